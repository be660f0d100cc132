"""What an architecture gives to the rest of the package, and what it gets.

An architecture is one file, of `saes/` or of a user's own: pure functions on a dict of arrays, as `Architecture` lists
them, and `Trainable` where it can be trained here. Its table `PARAMETERS` says of each array over which axis its
features lie and what it does. Sharding, the optimiser, resampling, the units of a site, loading and export read this
table, so that nothing outside of `saes/` knows an architecture by its name.

A file may also define these functions, for which the functions of the same names in this file are the defaults:

    gate(params, inputs, config)      which features [B, F] are switched on, whatever their magnitude
    frozen(config)                    names of parameters that training leaves as they are
    normal_form(params, config)       the same function by parameters that mean the same in another library
    shifted(params, shift_D)          parameters whose pre-activations are larger by shift @ encoder
    encoder(params, config)           the weights that decide which features can be active (`features.Encoder`), or
                                      None; with it `loss` takes `features`, may be shown the active ones only, and
                                      is a mean over tokens, as its statistics are
    active(pre_BxF, dead, coefficients, config, shards)   with `encoder`: which features [B, F] `loss` needs to see,
                                      from its pre-activations. The default: those that are positive. With this
                                      function, `loss` may compare the tokens of a batch
    feature_facts(params, config)     numbers [F] that describe features, by name, in the inputs' units
    skip(params, inputs)              what is added to `decode` in reconstructions of these inputs, such as x @ W_skip:
                                      [B, D] or [1, D] for each site that is written. The default: nothing
    from_X(params, config)            parameters of the same function as those of the architecture X
    encode_shard(params, inputs, config, shards)   `encode` on one shard of the dictionary, where features are compared
    learning_rate(width)              its own learning rate, for stacks that have none
    idle(config)                      options that do nothing beside the others, by name, and why: new runs refuse them

Only `init` may read an option whose name begins with `initial_`. A new run that starts from other SAEs refuses it. The
warm-up's `initial_k` of `SPARSITY = "k"` is an exception.

and these constants:

    SPARSITY = "k"                    the option that says how many features are active. Such an architecture has no
                                      sparsity coefficient: its stacks have no `l1_coefficients` and no `target_l0`.
                                      Stacks that differ in this option alone are one frontier of the report
    SIGNED = True                     features may be negative
    RECIPE = {"b1": 0.9}              its own values of the fields of a stack that `RECIPE` below lists
"""

import dataclasses
import enum
import operator
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, plugins
from gsae_jax.errors import UserError, known_names

BASELINES = ("relu", "relu_transcoder", "relu_crosscoder")  # what the report compares all others with
Params = dict[str, jax.Array]
# Activations [B, D] of one site; a tuple of them where the Config's d_in (for targets: d_out) is a tuple.
Activations = Any
NEEDED = ("Config", "PARAMETERS", "init", "encode", "decode")  # of every architecture
# What stacks are trained with where neither the user nor the architecture says otherwise: the Gated SAE paper's Adam.
RECIPE: Mapping[str, float] = {"b1": 0.0, "b2": 0.999, "clip_norm": 0.0, "coefficient_warmup_fraction": 0.0}
LEARNING_RATE = 3e-4  # its gated SAEs'
L1_COEFFICIENT = 1e-2  # where the search for a target L0 begins
OWN = ("d_in", "d_out", "width", "dtype")  # fields of a Config that are no options: the experiment sets them


class Role(enum.Enum):
    """What a parameter does, which decides how it changes with the units of inputs and targets."""

    ENCODER = "weights from inputs to features"
    DECODER = "weights from features to targets"
    FEATURE = "a bias or a threshold of features, in their units"
    INPUT_BIAS = "subtracted from the inputs"
    OUTPUT_BIAS = "added to the reconstructions"
    CENTER = "subtracted from the inputs of a site, and added to its reconstructions"
    SKIP = "weights from inputs to targets, beside the features"
    LOGARITHM = "the logarithm of a factor without a unit"
    NUMBER = "has no unit"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of an architecture.

    Attributes:
        shape: names of sizes in the Config: "width" for features, "d_in" and "d_out" for a site's.
        role: what it does.
        site: which of the sites that the stack reads; for the roles DECODER and OUTPUT_BIAS, that it writes. The role
            SKIP is for stacks that read and write one site.
        unit_rows: its rows stay unit: gradients lose their part along a row, and rows are divided by their norm.
        trained: False for state, which no gradient trains: `loss` returns its next value.
    """

    shape: tuple[str, ...]
    role: Role
    site: int = 0
    unit_rows: bool = False
    trained: bool = True

    @property
    def axis(self) -> int | None:
        """The axis over features; None where every device has all of the array."""
        return self.shape.index("width") if "width" in self.shape else None

    def sizes(self, config: Any) -> tuple[int, ...]:
        """The array's shape."""
        sizes = (getattr(config, name) for name in self.shape)
        return tuple(size[self.site] if isinstance(size, tuple) else size for size in sizes)


class Batch(NamedTuple):
    """What a loss is taken of, on one shard of the data.

    Attributes:
        inputs: of the sites that are read.
        targets: of the sites that are written; the same arrays for an SAE.
        dead: gives [F], which features have not fired for `train.dead_after` steps. It is a function, as devices
            exchange the mask only where a loss asks for it.
        step: updates so far.
    """

    inputs: Activations
    targets: Activations
    dead: Callable[[], jax.Array]
    step: jax.Array


class Statistics(NamedTuple):
    """What a loss says besides its value.

    Attributes:
        means: batch means by name. `loss`, `mse` (squared error over D), `l0`, `x_hat_sq` and `x_hat_dot_x` (the parts
            of gamma, equation 10 of the paper) are wanted of every architecture. `mse` keeps its gradient: where the
            loss has the KL divergence of the language model's predictions, this replaces a part of `mse`.
        fired: [F], which features were active on a token of the batch.
        state: the next value of every array that no gradient trains; empty where there is none. Shards of the data may
            disagree: their mean becomes the state.
    """

    means: dict[str, jax.Array]
    fired: jax.Array
    state: Params


@dataclasses.dataclass(frozen=True)
class Shards:
    """What crosses the shards of a dictionary, and of a batch.

    Attributes:
        axis: of the mesh, along which features lie; None where one device has all of them.
        data: along which tokens lie. Losses are means over tokens, so only what compares tokens needs it.
    """

    axis: str | None = None
    data: str | None = None

    @property
    def count(self) -> int:
        """How many shards the dictionary has."""
        return 1 if self.axis is None else jax.lax.axis_size(self.axis)

    def sum(self, tree: Any) -> Any:
        """The sum over shards of the dictionary of every array of a tree."""
        return tree if self.axis is None else jax.lax.psum(tree, self.axis)

    def batch_size(self, tokens: int) -> int:
        """Tokens of the whole batch, where each shard has so many."""
        return tokens if self.data is None else tokens * jax.lax.axis_size(self.data)

    def batch_mean(self, value: jax.Array) -> jax.Array:
        """The mean over shards of the batch; for values without a gradient."""
        return value if self.data is None else jax.lax.pmean(value, self.data)

    def sum_over_batch(self, value: jax.Array) -> jax.Array:
        """The sum over shards of dictionary and batch; for values without a gradient."""
        axes = tuple(axis for axis in (self.axis, self.data) if axis is not None)
        return jax.lax.psum(value, axes) if axes else value

    def feature(self, width: int) -> Any:
        """The number of this shard's first feature, where each shard has so many."""
        return 0 if self.axis is None else width * jax.lax.axis_index(self.axis)

    def token(self, tokens: int) -> Any:
        """The number of this shard's first token, where each shard has so many."""
        return 0 if self.data is None else tokens * jax.lax.axis_index(self.data)


WHOLE = Shards()


class Architecture(Protocol):
    """A file of `saes/`, or a user's own."""

    @property
    def Config(self) -> type[Any]:
        """A frozen dataclass of sizes and options.

        `d_in`, `width` and `dtype` are set from the experiment, and `d_out` if it has that field. `d_in: int` reads
        one site, `d_in: tuple[int, ...]` several. Without `d_out` the sites that are read are written as well. Every
        other field is an option, of any type that JSON has; `__post_init__` may raise `UserError` with its name.
        """

    @property
    def PARAMETERS(self) -> Mapping[str, Parameter]:
        """Every array that an SAE may have; which ones it has depends on its options."""

    def init(self, key: jax.Array, config: Any) -> Params:
        """The untrained parameters, state included."""

    def encode(self, params: Params, inputs: Activations, config: Any, /) -> jax.Array:
        """Feature activations [B, F]."""

    def decode(self, params: Params, f_BxF: jax.Array) -> Activations:
        """Reconstructions of the sites that are written: f @ decoder + bias; without what a file's `skip` adds."""


class Trainable(Architecture, Protocol):
    """An architecture that can be trained here."""

    def loss(
        self,
        params: Params,
        state: Params,
        batch: Batch,
        coefficients: Mapping[str, jax.typing.ArrayLike],
        config: Any,
        shards: Shards = WHOLE,
    ) -> tuple[jax.Array, Statistics]:
        """The loss of a batch and its statistics, on one device of the mesh.

        Args:
            params: those that gradients train; of the features, this shard's.
            state: the others.
            batch: of this shard of the data.
            coefficients: `l1_coefficient`, by which the warm-up is multiplied already; NaN for an architecture that has
                none. `warmup`, which rises from 0 to 1; without it, it is 1.
            config: the architecture's.
            shards: sums what each shard of the dictionary contributes.
        """


class SparselyTrainable(Architecture, Protocol):
    """An architecture whose step can compute the active features only."""

    def encoder(self, params: Params, config: Any) -> Any:
        """The weights that decide which features can be active (`features.Encoder`), or None with these options."""

    def loss(
        self,
        params: Params,
        state: Params,
        batch: Batch,
        coefficients: Mapping[str, jax.typing.ArrayLike],
        config: Any,
        shards: Shards = WHOLE,
        features: Any = None,
    ) -> tuple[jax.Array, Statistics]:
        """As `Trainable.loss`.

        Args:
            features: the batch's (`features.Features`), all or the active ones; without it dense products make them.
        """


def module_of(architecture: str, having: str = "PARAMETERS") -> Architecture:
    """The module with the pure functions of an architecture.

    Args:
        architecture: the name of a file of `saes/`, a dotted path, or the path of a .py file.
        having: what it must define besides.

    Raises:
        UserError: there is none, it cannot be imported, or it lacks what every architecture defines.
    """
    module = plugins.load("saes", architecture, having)
    file = plugins.source(module)
    if missing := [name for name in NEEDED if not hasattr(module, name)]:
        raise UserError(f"{file} does not define {' and '.join(missing)}")
    Config, table = module.Config, module.PARAMETERS
    if not getattr(getattr(Config, "__dataclass_params__", None), "frozen", False):
        raise UserError(f"Config in {file} is not a frozen dataclass; write @dataclasses.dataclass(frozen=True)")
    fields = {setting.name for setting in dataclasses.fields(Config)}
    if missing := [name for name in ("d_in", "width", "dtype") if name not in fields]:
        raise UserError(f"Config in {file} has no field {' and '.join(missing)}")
    if not isinstance(table, Mapping) or not all(isinstance(entry, Parameter) for entry in table.values()):
        raise UserError(f"PARAMETERS in {file} is not a dict of contract.Parameter by name")
    if not any(entry.role is Role.DECODER and entry.site == 0 for entry in table.values()):
        raise UserError(f"PARAMETERS in {file} has no parameter with Role.DECODER for the first site")
    return cast(Architecture, module)


def trainable(architecture: str) -> Trainable:
    """The same for one that can be trained.

    Raises:
        UserError: as `module_of`, and for one without `loss`, which can only be evaluated.
    """
    return cast(Trainable, module_of(architecture, having="loss"))


def with_recipe(stack: config_lib.Stack) -> config_lib.Stack:
    """The stack with its architecture's own values for the settings of the optimiser that it does not have.

    If it has target L0s and no coefficient to start from, it gets `L1_COEFFICIENT`.

    Raises:
        UserError: as `module_of`, or an architecture whose `RECIPE` has other names.
    """
    unset = {name for name in RECIPE if getattr(stack, name) is None}
    coefficients = stack.l1_coefficients
    if not unset and stack.learning_rates and (coefficients or not stack.target_l0):
        return stack
    with errors.about("architecture"):
        module = module_of(stack.architecture)
        own = getattr(module, "RECIPE", {})
        if others := sorted(set(own) - set(RECIPE)):
            raise UserError(
                f"RECIPE in {plugins.source(module)} has {', '.join(others)}; it may have {', '.join(RECIPE)}"
            )
    rates = stack.learning_rates
    if not rates:
        rate = getattr(module, "learning_rate", None)
        rates = (rate(stack.width) if rate else LEARNING_RATE,)
    if stack.target_l0 and not coefficients and sparsity(module) is None:
        coefficients = (L1_COEFFICIENT,)
    values = {name: own.get(name, RECIPE[name]) for name in unset}
    return dataclasses.replace(stack, learning_rates=rates, l1_coefficients=coefficients, **values)


def with_recipes(config: config_lib.Experiment) -> config_lib.Experiment:
    """The experiment with `with_recipe` of each stack."""
    stacks = {}
    for name, stack in config.stacks.items():
        with errors.within(f"stacks.{name}"):
            stacks[name] = with_recipe(stack)
    return dataclasses.replace(config, stacks=stacks)


def build(stack: config_lib.Stack, widths: Mapping[str, int], dtype: str) -> tuple[Trainable, Any]:
    """The architecture of a stack, and its Config.

    Args:
        stack: its settings.
        widths: of the sites.
        dtype: of the matrix products' operands.

    Raises:
        UserError: as `trainable` and `build_config`, and for a coefficient that is missing or that there is not.
    """
    with errors.about("architecture"):
        architecture = trainable(stack.architecture)
    option = sparsity(architecture)
    if option is None and not stack.l1_coefficients:
        raise UserError("has no values; write one for all SAEs of the stack, or one for each", "l1_coefficients")
    for field in ("l1_coefficients", "target_l0"):
        if option is not None and (value := getattr(stack, field)):
            what = f"is {value}, but {stack.architecture!r} has no sparsity coefficient"
            raise UserError(f"{what}; leave it out, and write the option {option} instead", field)
    if option is not None and f"initial_{option}" in {each.name for each in dataclasses.fields(architecture.Config)}:
        _check_warmup(stack, f"initial_{option}")
    d_in = tuple(widths[site] for site in stack.sites)
    d_out = tuple(widths[site] for site in stack.targets) if stack.target else None
    sae = build_config(architecture, stack.architecture, d_in, d_out, stack.width, dtype, stack.options)
    return architecture, sae


def _check_warmup(stack: config_lib.Stack, option: str) -> None:
    """Raises `UserError` for one of the two settings of a warm-up without the other; `option`: where it begins."""
    fraction, first = stack.coefficient_warmup_fraction or 0, stack.options.get(option, 0)
    if fraction and not first:
        why = f"is {fraction:g}, but {stack.architecture!r} has no coefficient that could rise"
        raise UserError(f"{why}; write 0, or write the option {option}", "coefficient_warmup_fraction")
    if first and not fraction:
        why = f"is {first}, but the warm-up has no length"
        raise UserError(f"{why}; write coefficient_warmup_fraction, such as 0.1", f"options.{option}")


def build_config(
    architecture: Architecture,
    name: str,
    d_in: tuple[int, ...],
    d_out: tuple[int, ...] | None,
    width: int,
    dtype: str,
    options: Mapping[str, Any],
) -> Any:
    """The Config of an architecture.

    Args:
        architecture: the file.
        name: what errors call it.
        d_in: widths of the sites that are read.
        d_out: of those that are written, or None where they are the same.
        width: features.
        dtype: of the matrix products' operands.
        options: the others of its fields.

    Raises:
        UserError: an option that does not exist or has a wrong value, or sites that the architecture does not take.
    """
    kinds = typing.get_type_hints(architecture.Config)
    sizes: dict[str, Any] = {"width": width, "dtype": dtype}
    for size, widths, site in (("d_in", d_in, "site"), ("d_out", d_out, "target")):
        if size not in kinds:
            if widths is not None:
                why = f"is given, but {name!r} writes the site that it reads; leave it out"
                raise UserError(why, site)
            continue
        several = kinds[size] is not int
        if widths is None:
            widths = d_in
        if not several and len(widths) != 1:
            raise UserError(f"has {len(widths)} sites, but {name!r} takes one; write one", site)
        most = 1 + max(parameter.site for parameter in architecture.PARAMETERS.values())
        if len(widths) > most:
            raise UserError(f"has {len(widths)} sites, but {name!r} takes {most} at most", site)
        sizes[size] = widths if several else widths[0]
    known = [setting.name for setting in dataclasses.fields(architecture.Config) if setting.name not in OWN]
    values = {}
    with errors.within("options"):
        for option, value in options.items():
            with errors.within(option):
                if option not in known:
                    raise UserError(f"is not an option of {name!r}{_instead(option, known)}")
                values[option] = config_trees.convert(kinds[option], value)
        for setting in dataclasses.fields(architecture.Config):
            required = setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING
            if required and setting.name not in sizes | values:
                raise UserError(f"is missing; {name!r} needs a value for it", setting.name)
        return architecture.Config(**sizes, **values)


def _instead(option: str, known: Sequence[str]) -> str:
    """What to write for an option that does not exist: another option, or a field of the stack."""
    near = config_trees.nearest(option, [field.name for field in dataclasses.fields(config_lib.Stack)])
    field = f"; did you mean the stack's {near!r}?" if near and not config_trees.nearest(option, known) else ""
    return f"{field}; {known_names(option, known)}" if known else f", which has no options{field or '; leave it out'}"


def options(config: Any) -> dict[str, Any]:
    """The options of a Config."""
    names = [setting.name for setting in dataclasses.fields(config) if setting.name not in OWN]
    return {name: getattr(config, name) for name in names}


def sparsity(architecture: Architecture) -> str | None:
    """The option that says how many features are active, of an architecture without a sparsity coefficient."""
    return getattr(architecture, "SPARSITY", None)


def frontier(architecture: str, config: Any) -> str:
    """The variant without how many features are active; "" if a coefficient decides that.

    Of a larger number at the start of training it says only that there is one, as that may depend on the final number.
    """
    option = sparsity(module_of(architecture))
    if not option:
        return ""
    first = f"initial_{option}"
    return variant(architecture, config, without=(option, first)) + f" {first}" * bool(getattr(config, first, 0))


def variant(architecture: str, config: Any, without: Collection[str] = ()) -> str:
    """The architecture and its options that are not the default: "gated", "gated tie_encoder=False", "topk.py"."""
    shown = [f"{name}={value}" for name, value in _changed(config).items() if name not in without]
    return " ".join([plugins.label(architecture), *shown])


def _changed(config: Any) -> dict[str, Any]:
    """The options that are not the default."""
    return {name: value for name, value in config_lib.changed(config).items() if name not in OWN}


def idle(architecture: Architecture, config: Any, starts: bool = False) -> dict[str, str]:
    """The options that do nothing beside the others, and why.

    `starts`: parameters are those of other SAEs, so that `init` does nothing.
    """
    own = getattr(architecture, "idle", None)
    why: dict[str, str] = dict(own(config)) if own else {}
    if starts:
        read_by_init = [name for name in options(config) if name.startswith("initial_")]
        why |= {name: "start_from gives the parameters" for name in read_by_init}
        why.pop(f"initial_{sparsity(architecture)}", None)
    return why


def check_new(architecture: Architecture, config: Any, starts: bool) -> None:
    """Raises `UserError` for an option of a new run that does nothing; `starts` as of `idle`."""
    why = idle(architecture, config, starts)
    for name, value in _changed(config).items():
        if name in why:
            raise UserError(f"is {value!r}, but {why[name]}; leave it out", f"options.{name}")


def is_gated(variant: str) -> bool:
    """Whether a variant has a gate and magnitudes, as the SAEs of the Gated SAE paper."""
    return "gated" in variant.partition(" ")[0]


def is_compared(ours: str, theirs: str) -> bool:
    """Whether a report divides the L0 of one variant by that of another.

    All are divided by ReLU SAEs, transcoders and crosscoders with the default options; how many features are active at
    the start may differ. Otherwise variants of different architectures are compared, gated ones divided by the others.
    """

    def place(variant: str) -> int:
        without_start = " ".join(part for part in variant.split(" ") if not part.startswith("initial_l0="))
        return 2 if without_start in BASELINES else 0 if is_gated(variant) else 1

    architecture, other = (variant.partition(" ")[0] for variant in (ours, theirs))
    if place(ours) != place(theirs):
        return place(ours) < place(theirs)
    return architecture < other


def converter(source: str, target: str) -> Callable[[Params, Any], Params] | None:
    """What turns parameters of one architecture into those of the same function in another, if anything does."""
    convert = getattr(module_of(target), f"from_{source}", None)
    if convert is None and source != target:
        return None

    def converted(params: Params, config: Any) -> Params:
        params = normal_form(module_of(source), params, config)
        return dict(params) if convert is None else convert(params, config)

    return converted


def gate(architecture: Architecture, params: Params, inputs: Activations, config: Any) -> jax.Array:
    """Which features [B, F] are switched on."""
    own = getattr(architecture, "gate", None)
    return own(params, inputs, config) if own else architecture.encode(params, inputs, config) != 0


def is_signed(architecture: Architecture) -> bool:
    """Whether features may be negative."""
    return bool(getattr(architecture, "SIGNED", False))


def encode_shard(
    architecture: Architecture, params: Params, inputs: Activations, config: Any, shards: Shards
) -> jax.Array:
    """Activations of the features of one shard of the dictionary."""
    own = getattr(architecture, "encode_shard", None)
    return own(params, inputs, config, shards) if own else architecture.encode(params, inputs, config)


def compares_features(architecture: Architecture) -> bool:
    """Whether `encode` compares features with each other, so that one's activation depends on the others'."""
    return hasattr(architecture, "encode_shard")


def skip(architecture: Architecture, params: Params, inputs: Activations) -> Activations | None:
    """What is added to the decoded features of inputs; None for nothing."""
    own = getattr(architecture, "skip", None)
    return own(params, inputs) if own else None


def with_skip(architecture: Architecture, params: Params, inputs: Activations, decoded: Activations) -> Activations:
    """The reconstructions of inputs whose features are decoded."""
    skipped = skip(architecture, params, inputs)
    return decoded if skipped is None else jax.tree.map(operator.add, decoded, skipped)


def frozen(architecture: Architecture, config: Any) -> frozenset[str]:
    """The names of parameters that training leaves as they are."""
    own = getattr(architecture, "frozen", None)
    return frozenset(own(config)) if own else frozenset()


def trains_features(architecture: Architecture, config: Any) -> bool:
    """Whether training moves the decoder; where it does not, the features are those that a stack starts from."""
    decoders = {name for name, parameter in architecture.PARAMETERS.items() if parameter.role is Role.DECODER}
    return not decoders <= frozen(architecture, config)


def normal_form(architecture: Architecture, params: Params, config: Any) -> Params:
    """The same function by parameters that mean the same in another library."""
    own = getattr(architecture, "normal_form", None)
    return own(params, config) if own else params


def reads_several(architecture: Architecture) -> bool:
    """Whether it reads a tuple of sites, as crosscoders do."""
    return typing.get_type_hints(architecture.Config)["d_in"] is not int


def writes_others(architecture: Architecture) -> bool:
    """Whether it writes other sites than it reads, as transcoders do."""
    return "d_out" in typing.get_type_hints(architecture.Config)


def can_shift(architecture: Architecture) -> bool:
    """Whether the architecture has `shifted`."""
    return hasattr(architecture, "shifted")


def shifted(architecture: Architecture, params: Params, shift_D: jax.typing.ArrayLike) -> Params:
    """Parameters whose pre-activations are larger by shift @ encoder; the architecture must have this function."""
    return cast(Any, architecture).shifted(params, shift_D)


def encoder(architecture: Architecture, params: Params, config: Any) -> Any:
    """The weights that decide which features can be active (`features.Encoder`), or None."""
    own = getattr(architecture, "encoder", None)
    return own(params, config) if own else None


def active(architecture: Architecture) -> Callable[..., jax.Array] | None:
    """The architecture's function of this name, if it has one."""
    return getattr(architecture, "active", None)


def has_encoder(architecture: Architecture, config: Any) -> bool:
    """Whether the architecture has `encoder`, with these options."""
    params = jax.eval_shape(lambda: architecture.init(jax.random.key(0), config))
    return jax.eval_shape(lambda params: encoder(architecture, params, config), params) is not None


def feature_facts(architecture: Architecture, params: Params, config: Any) -> dict[str, jax.Array]:
    """Numbers [F] that describe features, by name."""
    own = getattr(architecture, "feature_facts", None)
    return own(params, config) if own else {}
