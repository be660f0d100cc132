"""TensorBoard: `tensorboard/` in the run's directory."""

from collections.abc import Mapping

import tensorboardX

from gsae_jax.loggers import Run, patient

PACKAGE = "tensorboardX"


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


def open_logger(run: Run) -> Board:
    """The logger of a run."""
    return Board(run)
