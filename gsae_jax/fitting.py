"""From settings to trained SAEs, for notebooks and scripts."""

from typing import Any

from etils import epath

from gsae_jax import errors, sae_loading
from gsae_jax.saes.trained import SAE


def fit(experiment: Any, path: epath.PathLike) -> dict[str, SAE]:
    """Train an experiment in a directory, write its report there, and return its SAEs by name: `{stack}_{index}`.

    A run that was interrupted continues from its last checkpoint. A finished run is loaded. It is trained further if
    `train.steps` has grown, and measured again if `evaluation` has changed.

    Args:
        experiment: the result of `gsae_jax.experiment`, or its first argument: the name of an experiment, the path of a
            config file, nested dicts or a `ConfigDict`.
        path: the run's directory. It is created if it does not exist.

    Raises:
        UserError: invalid settings, or a directory that has another run.
        TrainingError: updates were not finite `train.max_skipped` times in a row, or the disk is full.
        KeyboardInterrupt: training was interrupted. The run is saved, and the same call continues it.
    """
    from gsae_jax import train  # not above, as `python -m gsae_jax.train` imports this package first

    with errors.about("path", **{"--workdir": "path", "base": "experiment"}):
        code = train.run(experiment, path)
    if code == train.INTERRUPTED:
        raise KeyboardInterrupt(f"the run in {path} is saved; the same call continues it")
    return sae_loading.load(path)
