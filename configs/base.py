"""For config files of earlier versions. New ones use `experiment_config` and `stack_config` of gsae_jax."""

from gsae_jax import experiment_config as get_config
from gsae_jax import stack_config

__all__ = ["data", "get_config", "stack"]


def data():
    return get_config().data


def stack(architecture, site, width, l1_coefficients, *values, **settings):
    names = ("learning_rates", "seeds", "target_l0", "start_from")
    settings |= dict(zip(names, values, strict=False))
    return stack_config(architecture, site, width, l1_coefficients, **settings)
