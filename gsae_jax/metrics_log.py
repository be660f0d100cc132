"""The statistics of training by step: `metrics.jsonl` in the run directory, and what other loggers write."""

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import loggers, processes
from gsae_jax.buckets import is_bucket
from gsae_jax.loggers import patient
from gsae_jax.workdir import Workdir, is_file, write_text


class Metrics:
    """Writes `metrics.jsonl` and feeds the loggers of a run; a resumed run continues both at its step.

    If the run directory is in a bucket, the files grow on the local disk, and `sync` copies them to the bucket.
    """

    def __init__(self, workdir: Workdir, step: int, names: Sequence[str], config: dict[str, Any]):
        """`names`: of files of `gsae_jax/loggers/`; `config`: what they may say of the run."""
        path = workdir.path / "metrics.jsonl"
        lines = _lines(path)
        kept = [line for line, logged in _logged(path) if line.endswith("\n") and logged["step"] <= step]
        self._bucket, self._scratch, folder = None, None, workdir.path
        if is_bucket(workdir.path):
            self._bucket, self._scratch = workdir.path, tempfile.TemporaryDirectory(prefix="gsae_jax-")
            folder = epath.Path(self._scratch.name)
        if kept != lines or self._bucket:
            write_text(folder / "metrics.jsonl", "".join(kept))
        self._folder, self._file = folder, patient.File(Path(folder / "metrics.jsonl"))
        run = loggers.Run(workdir.path, Path(folder).absolute(), step, config)
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
        """Put what was written into the bucket; a local directory has it already."""
        if self._bucket:
            for logger in self._loggers:
                logger.flush()
            for folder, _, names in os.walk(self._folder):
                for file in (epath.Path(folder) / name for name in names if not Path(folder, name).is_symlink()):
                    file.copy(self._bucket / file.relative_to(self._folder), overwrite=True)

    def close(self, complete: bool) -> None:
        """Flush all; `complete`: the run is at its last step."""
        self._file.close()
        for logger in self._loggers:
            logger.close(complete)
        self.sync()
        if self._scratch:
            self._scratch.cleanup()


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a number that was not finite is None."""
    return [logged for _, logged in _logged(workdir.path / "metrics.jsonl")]


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _lines(path: epath.Path) -> list[str]:
    # What a crash of the machine leaves need not be UTF-8.
    return path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True) if is_file(path) else []


def _logged(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file of metrics, and their values; warns of each line that cannot be read."""
    for number, line in enumerate(_lines(path), 1):
        try:
            logged = config_lib.parse_json(line)
            numbers = [value for each in logged.values() for value in (each if isinstance(each, list) else [each])]
            if type(logged["step"]) is not int or not all(x is None or isinstance(x, int | float) for x in numbers):
                raise ValueError
        except (ValueError, KeyError, AttributeError):
            if line.endswith("\n"):  # else it was being written when its process ended
                processes.warn(f"{path} line {number} is not a line of metrics and is left out")
        else:
            yield line, logged
