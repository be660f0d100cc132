"""The report of a run in its directory, of which no earlier one is lost."""

import dataclasses
import logging

from gsae_jax import config_trees, processes
from gsae_jax.config import Experiment
from gsae_jax.errors import UserError
from gsae_jax.measuring import evaluate
from gsae_jax.storage import run_directory

logger = logging.getLogger(__name__)


def report(workdir: run_directory.Workdir) -> None:
    """Measure a run at its newest checkpoint and write its report; an earlier one moves to `earlier_reports/`."""
    logger.info(evaluate(workdir.path, earlier="aside"))


def measure_again(workdir: run_directory.Workdir, config: Experiment) -> None:
    """Measure a finished run with another `evaluation`, and then record that in its config.

    Raises:
        UserError: the language model or the text is not the run's; or the run is of an earlier version. Such a run does
            not say how much text `Facts.held_out` is the fingerprint of, and its config would not say it any more.
    """
    step = workdir.sound_step(("facts",))
    facts = None if step is None else workdir.facts(step)
    if facts is not None and facts.held_out and not facts.held_out_tokens:
        raise UserError(
            f"differs from the one that the run in {workdir.path} recorded. That run is finished and of an earlier "
            "version, so that its config cannot change. Change the setting back, and measure other text with "
            "`python -m gsae_jax.evaluate --workdir RUN --tokens TOKENS`",
            "evaluation",
        )
    logger.info(f"{workdir.path} is finished, but evaluation.* has changed: the SAEs are measured again")
    logger.info(evaluate(workdir.path, config=config_trees.to_dict(config), earlier="aside"))
    processes.wait("the report")  # until every process has read the config
    if processes.first():
        changed = dataclasses.replace(workdir.experiment(), evaluation=config.evaluation)
        workdir.create(config_trees.to_dict(changed), workdir.latest_step())
        workdir.release()
    processes.wait("the changed config")
