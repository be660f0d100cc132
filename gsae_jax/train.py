"""Train an experiment, or continue its training, and write its report.

python -m gsae_jax.train --config quickstart --workdir runs/quickstart
"""

import logging
import signal
from typing import Any, NoReturn

import jax
from absl import flags
from etils import epath

from gsae_jax import cli, config_trees, experiments, plugins, processes, reporting, sae_loading
from gsae_jax.config import Experiment
from gsae_jax.storage import run_directory
from gsae_jax.training import loop, preparation

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command

INTERRUPTED = 75  # exit code: saved, run again to continue (EX_TEMPFAIL)


def run(config: Any, path: epath.PathLike) -> int:
    """Train to the end and write the report. Returns 0 or `INTERRUPTED`. `gsae_jax.experiment` accepts `config`.

    A finished run is trained further if `train.steps` has grown, and measured again if `evaluation` has changed.
    Otherwise it is not changed. An earlier report is kept in `earlier_reports/`.
    """
    plugins.reread()
    config = experiments.experiment(config)
    workdir = run_directory.Workdir(path)
    workdir.check_writable()
    config = sae_loading.pinned(config, path)
    workdir.check(config_trees.to_dict(config))
    if workdir.latest_step() == config.train.steps == run_directory.reported_step(workdir):
        if workdir.experiment().evaluation == config.evaluation:
            logger.info(f"{path} is finished; its report is {workdir.report / 'report.md'}. Nothing was changed.")
            return 0
        reporting.measure_again(workdir, config)
        return 0
    starts = {}
    if workdir.latest_step() is None:
        for warning in preparation.warnings(config):  # a run that has begun cannot change these settings
            logger.warning(warning)
        starts = sae_loading.starts(config)
    if not loop.train(config, path, starts):
        return INTERRUPTED
    reporting.report(workdir)
    return 0


def main() -> int:
    """The command."""
    processes.on_interruption(_interrupt)
    try:
        return run(config_trees.from_dict(Experiment, cli.given(CONFIG)), WORKDIR.value)
    except KeyboardInterrupt as interruption:  # outside of the loop, which has a handler of its own
        if jax.distributed.is_initialized():  # the other processes have to hear of it
            raise
        logger.info(f"{interruption}: the same command continues from the last checkpoint, or begins if there is none")
        return INTERRUPTED


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    CONFIG = cli.define_config()
    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Directory of the run, local or gs://bucket/folder; made if it does not exist.", required=True
    )
    cli.run(main, several=True)
