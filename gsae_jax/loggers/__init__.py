"""Where metrics go besides `metrics.jsonl`: a file for each logger, whose `open_logger` gives a `Logger`.

A file whose logger needs a package that may be missing names it as `PACKAGE`.
"""

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from gsae_jax import errors, plugins
from gsae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """What a logger knows of a run.

    Attributes:
        path: its directory, which may be in a bucket.
        folder: where the logger may write on this machine; goes into the directory as it is.
        step: the last one of which numbers were written before; later ones come again.
        config: the experiment's, as JSON has it.
    """

    path: epath.Path
    folder: Path
    step: int
    config: dict[str, Any]


class Logger(Protocol):
    """Takes the numbers of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Those of one step, by name: `{stack}/{statistic}/{index}`."""

    def flush(self) -> None:
        """Have files hold all that was written."""

    def close(self, complete: bool) -> None:
        """The last call; `complete`: the run is at its last step."""


def module(name: str) -> Any:
    """The file of a logger; raises `UserError` where there is none."""
    with errors.about("loggers"):
        return plugins.load("loggers", name, having="open_logger")


def hints(names: Iterable[str], path: epath.PathLike) -> list[str]:
    """A sentence of each logger that has a function `hint`: how to look at what it writes of the run in `path`."""
    return [module(name).hint(path) for name in names if hasattr(module(name), "hint")]


def check_names(names: Iterable[str]) -> None:
    """Raises `UserError` for loggers that do not exist or are named twice."""
    names = list(names)
    if len(set(names)) < len(names):
        raise UserError(f"are {names}; write each once", "loggers")
    for name in names:
        module(name)


def check(names: Iterable[str]) -> None:
    """Raises `UserError` for loggers that cannot be used: their package is not there, or their own `check` raises."""
    names = list(names)
    check_names(names)
    for name in names:
        package = getattr(module(name), "PACKAGE", "")
        if package and importlib.util.find_spec(package) is None:
            wanted = package if plugins.is_own(name) else f"'gsae_jax[{name}]'"
            message = f"{name!r} needs the package {package}; `pip install {wanted}` first, or leave it out"
            raise UserError(message, "loggers")
        if hasattr(module(name), "check"):
            module(name).check()
