"""Makes an experiment from the settings that differ from the defaults. The package's experiments are files here.

`gsae_jax/config.py` has all fields with their defaults and descriptions.
"""

import contextlib
import dataclasses
import itertools
import numbers
import os
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from etils import epy

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, plugins
from gsae_jax.errors import UserError, known_names

with epy.lazy_imports():  # who writes nested dicts does not need it
    import ml_collections


RECIPES = ("2026",)
INITIAL_K = 64  # of the recipe of 2026


def experiment(base: Any = None, /, **changes: Any) -> config_lib.Experiment:
    """Makes an experiment from the settings that differ from the defaults, and checks values and combinations.

    Training checks the rest before it begins: sites, architectures with their options, and paths.

    gsae_jax.experiment("quickstart", train={"steps": 700}, evaluation={"tokens": 2**15})
    gsae_jax.experiment(lm={"path": "openai-community/gpt2"}, stacks={"gated": stack_config("gated", site, 1024, 1e-2)})

    Args:
        base: the experiment that is changed: the name of one of the package's experiments, the path of a config file,
            nested dicts, a `ConfigDict` or an experiment. The default is an experiment without stacks.
        changes: fields of an experiment. A group or a stack is a dict of the fields that change. Its other fields are
            kept, except the options of a stack that gets another architecture. None removes a stack, or a
            language model of `lms`.

    Raises:
        UserError: a field is unknown, missing or of a wrong type, a value or combination is impossible, or a config
            file is missing or fails.
    """
    if isinstance(base, config_lib.Experiment) and not changes:
        return base
    if base is None:
        base = {}
    with errors.about("base"):
        if isinstance(base, os.PathLike | str):
            path, colon, argument = located(os.fspath(base)).partition(":")
            base = _returned(path, *[argument] * bool(colon))
        tree = config_trees.plain(base)
        if not isinstance(tree, dict):
            raise UserError(f"is {base!r}; write the name of an experiment, the path of a config file, or a dict")
    changes = config_trees.plain(changes)
    for group in ("stacks", "lms"):
        there, members = tree.get(group) or {}, changes.get(group)
        for name, member in members.items() if isinstance(members, dict) else ():
            if member is None and name not in there:
                raise UserError(f"is None, but there is none to remove; {known_names(name, there)}", f"{group}.{name}")
    return config_trees.from_dict(config_lib.Experiment, config_trees.merged(tree, changes))


def experiment_config() -> "ml_collections.ConfigDict":
    """Every setting of an experiment with its default, without stacks. A config file changes and returns it."""
    return ml_collections.ConfigDict(_defaults(config_lib.Experiment))


def stack_config(
    architecture: str,
    site: str | tuple[str, ...],
    width: int,
    l1_coefficients: Any = (),
    *,
    grid: bool = False,
    recipe: str = "",
    **settings: Any,
) -> "ml_collections.ConfigDict":
    """A stack of an experiment: SAEs that differ only in l1 coefficient, learning rate, seed and target L0.

    Args:
        architecture: a file of `gsae_jax/saes/`, such as "gated"; or your own, as "my_package.tanh" or "tanh.py".
        site: a TransformerLens hook name, or a tuple of several.
        width: the number of features.
        l1_coefficients: one for each SAE, or one for all. Architectures such as "topk" have none, but an option `k`.
        grid: make one SAE for each combination of `l1_coefficients`, `learning_rates` and `seeds`, in the order of
            nested loops. The config then lists the values of every SAE. Each `target_l0` belongs to one of the
            `l1_coefficients`.
        recipe: "2026" trains gated SAEs as docs/recipe.md says: with the option `k` in place of `l1_coefficients`,
            BatchTopK opens their gates, and the loss of the last tenth of training has the KL divergence of the
            language model's predictions. If `k` is below 64, training begins with 64 open gates per token.
            `kl_fraction=0` and `initial_k=0` leave these parts out. "" trains them as their paper does.
        settings: other fields of `gsae_jax.config.Stack`, such as `learning_rates=(1e-3,)`. Every other name is an
            option of the architecture, such as `tie_encoder=False` for a gated SAE.

    Raises:
        UserError: a name is neither a field nor an option, and is similar to a field; or there is no such recipe for
            the architecture.
    """
    config = _defaults(config_lib.Stack)
    if recipe:
        if not isinstance(site, str):
            raise UserError(f"is {site}, but the recipe of {recipe} is for one site", "site")
        architecture, settings = _by_recipe(recipe, architecture, width, settings)
    for name in settings:
        near = config_trees.nearest(name, config)
        if name not in config and near and name not in options_of(architecture, otherwise=settings):
            raise UserError(f"is not a setting of a stack; did you mean {near}? known: {', '.join(config)}", name)
    given = {"architecture": architecture, "site": site, "width": width, "l1_coefficients": l1_coefficients}
    for name, value in (given | settings).items():
        if name not in config:
            config["options"][name] = value
        elif isinstance(config[name], tuple):  # the command line changes tuples only
            config[name] = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        else:
            config[name] = value
    if recipe and config["l1_coefficients"]:
        given = config["l1_coefficients"]
        raise UserError(f"is {given}, but the recipe of {recipe} has none; write k=32 in its place", "l1_coefficients")
    return ml_collections.ConfigDict(config | _combinations(config) if grid else config)


def _by_recipe(recipe: str, architecture: str, width: int, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(The architecture that a recipe trains, the settings with those of the recipe that are not given)."""
    errors.check_kind(recipe, str, "recipe", "its name as text")
    if recipe not in RECIPES:
        raise UserError(f"is {recipe!r}; {known_names(recipe, RECIPES)}", "recipe")
    if architecture != "gated":
        raise UserError(f"is {recipe!r}, a recipe for 'gated' and not for {architecture!r}; write ''", "recipe")
    if "k" not in settings:
        raise UserError(f"is missing, which the recipe of {recipe} needs; write active features of a token: k=32", "k")
    values: dict[str, Any] = {"auxk_coefficient": 1 / 8, "kl_fraction": 0.1}
    k, most = (
        each.get() if isinstance(each, ml_collections.FieldReference) else each for each in (settings["k"], width)
    )
    start = ("initial_k", "coefficient_warmup_fraction")
    # What is no number, or too large, is refused later.
    known = all(isinstance(each, numbers.Integral) for each in (k, most)) and 0 < int(k) <= int(most)
    if known and all(settings.get(name, True) for name in start):
        values |= dict(zip(start, (max(int(k), min(INITIAL_K, int(most))), 0.2), strict=True))
    return "gated_batch_topk", values | settings


def options_of(architecture: str, otherwise: Collection[str] = ()) -> Collection[str]:
    """The options of an architecture of the package; of a user's own, whose file is not run here, `otherwise`."""
    if plugins.is_own(architecture):
        return otherwise
    module = plugins.known("saes", having="PARAMETERS").get(architecture)
    return [field.name for field in dataclasses.fields(module.Config)] if module else []


def _combinations(stack: dict[str, Any]) -> dict[str, Any]:
    """The columns of a stack in which every combination of its numbers stands once; those that are empty stay so."""
    given = {name: stack[name] for name in ("l1_coefficients", "target_l0") if stack[name]}
    most = max(map(len, given.values()), default=1)
    matched = [column * most if len(column) == 1 else column for column in given.values()]
    if any(len(column) != most for column in matched):  # which the check of a config refuses
        return {}
    sparsities = list(zip(*matched, strict=True)) or [()]
    members = list(itertools.product(sparsities, stack["learning_rates"] or (None,), stack["seeds"]))
    if not members:
        return {}
    sparsity, learning_rates, seeds = zip(*members, strict=True)
    columns = {"learning_rates": learning_rates if stack["learning_rates"] else (), "seeds": seeds}
    return columns | dict(zip(given, zip(*sparsity, strict=True), strict=True))


def pretrain_config() -> "ml_collections.ConfigDict":
    """Every setting of `python -m gsae_jax.pretrain` with its default, those of the embedded language model."""
    return ml_collections.ConfigDict(_defaults(config_lib.Pretrain))


def completed(config: Any, cls: Any, wanted: Collection[str] = ()) -> Any:
    """What a config file returned, with every field that it lacks, so that the command line can change each.

    Args:
        config: a `ConfigDict`, which is completed in place, as its fields may refer to each other; or nested dicts or
            a dataclass, from which a new one is made. Anything else is returned as it is.
        cls: the dataclass with the fields.
        wanted: the paths of the fields that the command line changes. Of the fields without a default, a stack gets
            only these.
    """
    if not isinstance(config, ml_collections.ConfigDict) or isinstance(config, ml_collections.FrozenConfigDict):
        tree = config_trees.plain(config)
        if not isinstance(tree, dict):
            return config
        config = ml_collections.ConfigDict(tree).lock()
    with config.unlocked():
        _complete(config, cls, wanted)
    return config


def located(given: str, flag: str = "") -> str:
    """The path of a config file that was given as a path or by name, both with `:ARGUMENT` or without.

    Args:
        given: what the user wrote.
        flag: what stands before a name that an error suggests.

    Raises:
        UserError: neither a file nor the name of an experiment.
    """
    name, colon, argument = given.partition(":")
    experiments = plugins.known("experiments", having="get_config")
    if name in experiments:
        return f"{experiments[name].__file__}{colon}{argument}"
    if name and os.sep not in name and not name.endswith(".py") and not os.path.exists(name):
        what = f"{name!r} is not the name of an experiment; {known_names(name, experiments)}"
        raise UserError(f"{what}; or write the path of a file, such as my_experiment.py")
    path = os.path.expanduser(given)  # shells leave the ~ of --config=~/x.py to programs
    if not os.path.exists(path.partition(":")[0]):
        known = " or ".join(experiments)
        near = config_trees.nearest(Path(name).stem, experiments)
        near = Path(name).stem if Path(name).stem in experiments else near
        hint = (
            f"did you mean `{flag}{near}`, an experiment of the package?"
            if near
            else f"write the path of a config file, or {known}"
        )
        raise UserError(f"the file {name} does not exist; {hint}")
    return path


def _defaults(cls: Any) -> dict[str, Any]:
    """The fields of a dataclass with their defaults; those that have none are empty."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            tree[field.name] = _defaults(field.type)
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = field.default_factory()
        elif field.default is None:  # the command line takes a value of the type
            tree[field.name] = ml_collections.config_dict.placeholder(typing.get_args(field.type)[0])
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
        else:
            tree[field.name] = () if typing.get_origin(field.type) is tuple else None
    return tree


def _returned(path: str, *arguments: str) -> Any:
    """What the `get_config` of a file returns."""
    module = plugins.read(path)
    path = plugins.source(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} does not define get_config()")
    try:
        config = module.get_config(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} fails: {plugins.failure(error, path)}") from error
    if config is None:
        raise UserError(f"get_config() of {path} returns nothing; end it with `return config`")
    return config


def _complete(config: "ml_collections.ConfigDict", cls: Any, wanted: Collection[str], path: str = "") -> None:
    for field in dataclasses.fields(cls):
        name, kind = field.name, field.type
        if name not in config:
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if has_default:
                config[name] = _defaults(cls)[name]
            elif f"{path}{name}" in wanted:
                config[name] = () if typing.get_origin(kind) is tuple else kind() if isinstance(kind, type) else ""
        if name not in config:
            continue
        try:
            value = config[name]
        except ml_collections.config_dict.RequiredValueError:  # the command line has to give it
            continue
        if not isinstance(value, ml_collections.ConfigDict):
            # The command line parses text as the type that the field has: a list as a list, 1 as an integer.
            with contextlib.suppress(UserError):  # another door refuses it, with all that is wrong
                converted = config_trees.convert(kind, value)
                if type(converted) is not type(value):
                    del config[name]  # with which its type goes
                    config[name] = converted
        elif dataclasses.is_dataclass(kind):
            _complete(value, kind, wanted, f"{path}{name}.")
        elif name == "options":
            for option in wanted:
                group, _, option = option.rpartition(".")
                if group == f"{path}{name}" and not isinstance(value.get(option), str):
                    if option in value:
                        del value[option]
                    # It takes any literal, as its type is not known here.
                    value[option] = ml_collections.config_dict.placeholder(object)
        else:
            for key, item in value.items():
                if isinstance(item, ml_collections.ConfigDict):
                    _complete(item, typing.get_args(kind)[1], wanted, f"{path}{name}.{key}.")
