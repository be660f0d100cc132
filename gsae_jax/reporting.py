"""The report of a run in its directory, of which no earlier one is lost."""

import logging

from gsae_jax import config as config_lib
from gsae_jax import processes
from gsae_jax.config import Experiment
from gsae_jax.errors import UserError
from gsae_jax.measuring import evaluate
from gsae_jax.storage import run_directory

logger = logging.getLogger(__name__)


def report(workdir: run_directory.Workdir) -> None:
    """Measure a run at its newest checkpoint and write its report; an earlier one moves to `earlier_reports/`."""
    processes.wait("the place of the report")  # until every process has looked for an earlier one
    if processes.first() and (earlier := workdir.set_report_aside()):
        logger.info(f"the earlier report is kept in {earlier}")
    logger.info(evaluate(workdir.path, overwrite=True))


def change_evaluation(workdir: run_directory.Workdir, config: Experiment) -> None:
    """Record another `evaluation` in the config of a finished run.

    Raises:
        UserError: the run is of an earlier version. It does not say how much text `Facts.held_out` is the fingerprint
            of, and its config would not say it any more.
    """
    step = workdir.sound_step(("facts",))
    facts = None if step is None else workdir.facts(step)
    if facts is not None and facts.held_out and not facts.held_out_tokens:
        raise UserError(
            f"differs from that of the run in {workdir.path}, which is finished and of an earlier version; undo it, "
            "and run `python -m gsae_jax.evaluate --workdir RUN --tokens TOKENS` to measure on other text",
            "evaluation",
        )
    logger.info(f"{workdir.path} is finished, but evaluation.* has changed: the SAEs are measured again")
    processes.wait("the config of a finished run")  # until every process has read it
    if processes.first():
        workdir.create(config_lib.to_dict(config))
        workdir.release()
    processes.wait("the changed config")
