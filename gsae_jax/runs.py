"""Trained SAEs from a run directory."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import Experiment
from gsae_jax.lms import checkpoints
from gsae_jax.saes import trained


def load(path: epath.PathLike) -> dict[str, trained.SAE]:
    """The SAEs of a run's newest checkpoint, by name: `{stack}_{index}`.

    Args:
        path: the run's directory, local or gs://bucket/folder.

    Raises:
        ConfigError: not a run directory, no checkpoint yet, or gs:// that cannot be read.
    """
    workdir = workdir_lib.Workdir(path)
    config = config_lib.from_dict(Experiment, workdir.config())
    step = workdir.latest_step()
    if step is None:
        raise config_lib.ConfigError("--workdir", f"{workdir.path} has no checkpoint yet; run training for longer")
    facts = workdir.facts(step)
    built = {
        name: trained.build_config(
            stack.architecture,
            facts["widths"][stack.site],
            stack.width,
            config.train.compute_dtype,
            stack.options,
            f"stacks.{name}",
        )
        for name, stack in config.stacks.items()
    }
    like = {
        name: jax.eval_shape(
            jax.vmap(lambda key, m=module, c=sae: m.init(key, c)),
            jax.random.split(jax.random.key(0), len(config.stacks[name])),
        )
        for name, (module, sae) in built.items()
    }
    params = workdir.params(step, workdir_lib.single_device(like))
    return {
        sae.name: sae for name in config.stacks for sae in _members(name, config, built[name][1], params[name], facts)
    }


def pinned(config: Experiment, path: epath.PathLike) -> Experiment:
    """The experiment with a hub model's commit for its revision: that of the run in `path`, or the newest.

    Raises:
        ConfigError: no such model, or a path that cannot be a run directory.
    """
    name, revision = config.lm.path, config.lm.revision
    if not name or Path(name).is_dir():
        return config
    workdir = workdir_lib.Workdir(path)
    if workdir.latest_step() is not None and not revision:
        recorded = config_lib.from_dict(Experiment, workdir.config()).lm
        revision = recorded.revision if recorded.path == name else ""
    commit = checkpoints.find(name, revision, "lm.path")[1]
    return dataclasses.replace(config, lm=dataclasses.replace(config.lm, revision=commit))


def _members(
    name: str, config: Experiment, sae: Any, params: dict[str, jax.Array], facts: dict[str, Any]
) -> list[trained.SAE]:
    stack, scale = config.stacks[name], facts["scales"][config.stacks[name].site]
    return [
        trained.SAE(
            name=f"{name}_{index}",
            architecture=stack.architecture,
            config=sae,
            site=stack.site,
            params=trained.fold_scale({key: value[index] for key, value in params.items()}, scale),
            l1_coefficient=l1_coefficient,
            learning_rate=learning_rate,
            seed=seed,
            scale=scale,
            norm_limit=math.inf if facts["norm_limits"][stack.site] is None else facts["norm_limits"][stack.site],
        )
        for index, (l1_coefficient, learning_rate, seed) in enumerate(stack.numbers())
    ]
