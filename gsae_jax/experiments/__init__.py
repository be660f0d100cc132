"""The `ConfigDict` that a config file changes, and experiments that the package carries, each a file, by name.

The fields, their defaults and what they mean stand in `gsae_jax/config.py`.
"""

import dataclasses
import itertools
import os
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from gsae_jax import config as config_lib
from gsae_jax import plugins
from gsae_jax.errors import UserError, known_names


def experiment_config() -> ConfigDict:
    """Every setting of an experiment with its default, and no stacks: what a config file changes and returns."""
    return ConfigDict(_defaults(config_lib.Experiment))


def stack_config(
    architecture: str, site: str, width: int, l1_coefficients: Any, *, grid: bool = False, **settings: Any
) -> ConfigDict:
    """A stack of an experiment: SAEs that differ in l1 coefficient, learning rate, seed and target L0 only.

    Args:
        architecture: a file of `gsae_jax/saes/`, such as "gated" or "relu".
        site: a TransformerLens hook name.
        width: features.
        l1_coefficients: one for each SAE, or one for all.
        grid: one SAE for each combination of `l1_coefficients`, `learning_rates` and `seeds`, in the order of nested
            loops. The config then lists the numbers of every SAE. `target_l0` goes with `l1_coefficients`.
        settings: other fields of `gsae_jax.config.Stack`, such as `learning_rates=(1e-3,)`; every other name is an
            option of the architecture, such as `tie_encoder=False` for a gated SAE.
    """
    config = _defaults(config_lib.Stack)
    given = {"architecture": architecture, "site": site, "width": width, "l1_coefficients": l1_coefficients}
    for name, value in (given | settings).items():
        if name not in config:
            config["options"][name] = value
        elif isinstance(config[name], tuple):  # the command line changes tuples only
            config[name] = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        else:
            config[name] = value
    return ConfigDict(config | _combinations(config) if grid else config)


def _combinations(stack: dict[str, Any]) -> dict[str, Any]:
    """The columns of a stack in which every combination of its numbers stands once; those that are empty stay so."""
    l1_coefficients, targets = stack["l1_coefficients"], stack["target_l0"]
    sparsities = list(l1_coefficients)
    if targets:
        most = max(len(l1_coefficients), len(targets))
        matched = [column * most if len(column) == 1 else column for column in (l1_coefficients, targets)]
        if len(matched[0]) != len(matched[1]):  # which the check of a config refuses
            return {}
        sparsities = list(zip(*matched, strict=True))
    members = list(itertools.product(sparsities, stack["learning_rates"], stack["seeds"]))
    if not members:
        return {}
    sparsity, learning_rates, seeds = zip(*members, strict=True)
    columns = {"learning_rates": learning_rates, "seeds": seeds}
    if not targets:
        return columns | {"l1_coefficients": sparsity}
    l1_coefficients, targets = zip(*sparsity, strict=True)
    return columns | {"l1_coefficients": l1_coefficients, "target_l0": targets}


def pretrain_config() -> ConfigDict:
    """Every setting of `python -m gsae_jax.pretrain` with its default, those of the embedded language model."""
    return ConfigDict(_defaults(config_lib.Pretrain))


def located(given: str) -> str:
    """The path of a config file that was given as a path or by name, both with `:ARGUMENT` or without.

    Raises:
        UserError: neither a file nor the name of an experiment.
    """
    name, colon, argument = given.partition(":")
    experiments = plugins.known("experiments", having="get_config")
    if name in experiments:
        return f"{experiments[name].__file__}{colon}{argument}"
    if name and os.sep not in name and not name.endswith(".py") and not os.path.exists(name):
        what = f"{name!r} is not the name of an experiment; {known_names(name, experiments)}"
        raise UserError(f"{what}; or write the path of a file, such as my_experiment.py", "--config")
    return os.path.expanduser(given)  # shells leave the ~ of --config=~/x.py to programs


def _defaults(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass with their defaults; those that have none are empty."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            tree[field.name] = _defaults(field.type)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
        else:
            tree[field.name] = () if typing.get_origin(field.type) is tuple else None
    return tree
