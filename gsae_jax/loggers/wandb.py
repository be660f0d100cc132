"""Weights & Biases: a run of the project gsae_jax, or of WANDB_PROJECT; with WANDB_MODE=offline in `wandb/` only."""

import importlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

from gsae_jax.errors import UserError
from gsae_jax.loggers import Run

PACKAGE = "wandb"


def check() -> None:
    """Raises `UserError` where numbers would go to an account, and nobody is logged in."""
    wandb: Any = importlib.import_module("wandb")
    if not _offline(wandb) and not wandb.login(prompt=False, verify=False):
        raise UserError("'wandb' is not logged in; run `wandb login`, or set WANDB_MODE=offline", "loggers")


def _offline(wandb: Any) -> bool:
    """By WANDB_MODE, or by `wandb offline` before."""
    return wandb.setup().settings.mode in ("offline", "disabled", "dryrun")


class History:
    """One run there; one that continues has the same id, which `wandb_id` in its directory keeps."""

    def __init__(self, run: Run):
        """Begin, or continue.

        Raises:
            UserError: wandb cannot, as without a network.
        """
        path = run.path / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:16])
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "gsae_jax"),
                name=os.environ.get("WANDB_NAME", run.path.name),
                id=path.read_text(),
                resume=None if _offline(wandb) else "allow",
                dir=str(run.folder),
                config=run.config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            why = " ".join(str(error).split())
            message = f"wandb cannot begin ({why}); connect to its server, or set WANDB_MODE=offline"
            raise UserError(message, "loggers") from error

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One row; of a step that comes again wandb keeps the first, and says so."""
        self._run.log(dict(numbers), step=step)

    def flush(self) -> None:
        """Nothing: wandb's own process writes as it goes."""

    def close(self, complete: bool) -> None:
        """Wait for what is being written or sent; the run is finished there, or has failed."""
        self._run.finish(exit_code=0 if complete else 1)


def open_logger(run: Run) -> History:
    """The logger of a run."""
    return History(run)
