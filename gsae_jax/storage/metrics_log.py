"""The statistics of training by step: `metrics.jsonl` in the run directory, and what other loggers write."""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gsae_jax import loggers
from gsae_jax.loggers import patient
from gsae_jax.storage import paths, reading, writing
from gsae_jax.storage.run_directory import Workdir

logger = logging.getLogger(__name__)


class Metrics:
    """Writes `metrics.jsonl` and feeds the loggers of a run; a resumed run continues both at its step.

    If the run directory is in a bucket, the files grow on the local disk, and `sync` copies them to the bucket.
    """

    def __init__(self, workdir: Workdir, step: int, names: Sequence[str], config: dict[str, Any]):
        """`names`: of files of `gsae_jax/loggers/`; `config`: what they may say of the run."""
        path = workdir.path / "metrics.jsonl"
        kept = [line for line, logged in _logged(path) if line.endswith("\n") and logged["step"] <= step]
        self._growing = workdir.path.growing()
        grows = self._growing.folder / "metrics.jsonl"
        if kept != _lines(paths.of(grows)):
            writing.write_text(grows, "".join(kept))
        self._file = patient.File(grows)
        run = loggers.Run(workdir.path, self._growing.folder.absolute(), step, config)
        self._loggers = [loggers.module(name).open_logger(run) for name in names]

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one line: the step and its values, which are lists for stacks.

        A number that is not finite is null in the line, and the loggers do not get it.
        """
        line = {
            name: list(map(_or_null, value)) if isinstance(value, list) else _or_null(value)
            for name, value in values.items()
        }
        self._file.write((json.dumps({"step": step, **line}, allow_nan=False) + "\n").encode())
        numbers = {
            name if index is None else f"{name}/{index}": number
            for name, value in values.items()
            for index, number in (enumerate(value) if isinstance(value, list) else [(None, value)])
            if math.isfinite(number)
        }
        for logger in self._loggers:
            logger.write(step, numbers)

    def sync(self) -> None:
        """Have the run directory hold what was written, also if it is in a bucket."""
        for logger in self._loggers:
            logger.flush()
        self._growing.sync()

    def close(self, complete: bool) -> None:
        """Flush all; `complete`: the run is at its last step."""
        self._file.close()
        for logger in self._loggers:
            logger.close(complete)
        self._growing.close()


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a number that was not finite is None."""
    return [logged for _, logged in _logged(workdir.path / "metrics.jsonl")]


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _lines(path: paths.Path) -> list[str]:
    # What a crash of the machine leaves need not be UTF-8.
    return path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True) if path.is_file() else []


def _logged(path: paths.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of metrics, and their values; warns of each line that cannot be read."""
    for number, line in enumerate(_lines(path), 1):
        try:
            logged = reading.parse_json(line)
            numbers = [value for each in logged.values() for value in (each if isinstance(each, list) else [each])]
            if type(logged["step"]) is not int or not all(x is None or isinstance(x, int | float) for x in numbers):
                raise ValueError
        except (ValueError, KeyError):
            if line.endswith("\n"):  # else it was being written when its process ended
                logger.warning(f"{path} line {number} is not a line of metrics and is left out")
        else:
            yield line, logged
