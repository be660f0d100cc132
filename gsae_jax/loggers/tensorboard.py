"""TensorBoard: `tensorboard/` in the run's directory."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from gsae_jax.loggers import Run, patient

PACKAGE = "tensorboardX"


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it is installed. That takes over a second, and we give it no tensors."""
    modules: dict[str, Any] = sys.modules
    if "torch" in modules:
        yield
        return
    modules["torch"] = None  # an import then fails as if it were not installed
    try:
        yield
    finally:
        del modules["torch"]


with _without_torch():
    import tensorboardX

tensorboardX.record_writer.register_writer_factory(patient.File.SCHEME, patient.File)


class Board:
    """An event file; what an earlier one has of steps that come again is hidden."""

    def __init__(self, run: Run):
        """In the run's folder."""
        folder = f"{patient.File.SCHEME}:{run.folder / 'tensorboard'}"
        self._writer = tensorboardX.SummaryWriter(folder, purge_step=run.step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Scalars."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def flush(self) -> None:
        """To the file."""
        self._writer.flush()

    def close(self, complete: bool) -> None:
        """Flush and close."""
        self._writer.close()


def hint(path: epath.PathLike) -> str:
    """How to look at a run."""
    return f"TensorBoard: `pip install tensorboard`, then `tensorboard --logdir {path}`"


def open_logger(run: Run) -> Board:
    """The logger of a run."""
    return Board(run)
