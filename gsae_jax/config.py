"""An experiment as frozen dataclasses, built from an `ml_collections` file or plain dicts, and checked at the door.

`configs/base.py` lists every field once, with its default and a comment; the dataclasses below hold none
but those of fields that earlier runs lack.
Whatever can be checked without reading a model or a data set is checked here. Nothing below this file sees a
`ConfigDict`.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

INT32 = 2**31 - 1  # devices count steps, tokens and features in 32 bits
FLOAT32 = 3.4e38  # and no number in a config may be infinite there


class ConfigError(ValueError):
    """Something the user wrote cannot be used. `field` names it, the message says what to write instead.

    Both may quote files that others made; what a terminal would act on, line breaks too, is written as in Python.
    """

    def __init__(self, field: str, message: str):
        line = re.sub(r"\s*\n\s*", " ", f"{field}: {message}".strip())
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in line))
        self.field, self.problem = field, message

    def within(self, group: str) -> "ConfigError":
        """The same error of a field that belongs to a group."""
        return ConfigError(f"{group}.{self.field}", self.problem)


class _WrongTypeError(ConfigError):
    def __init__(self, field: str, value: Any, wanted: str):
        super().__init__(field, f"is {value!r} ({type(value).__name__}); write a value of type {wanted}")


class TrainingError(RuntimeError):
    """What a user did not cause by what was written: numbers that stay not finite, a disk that is full."""


def known_names(name: str, names: Iterable[str]) -> str:
    """`did you mean 'x'? known: x, y, z` for an unknown name."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
    return f"{hint}known: {', '.join(names)}"


@dataclasses.dataclass(frozen=True)
class LM:
    """The language model whose activations are studied."""

    path: str
    dtype: Literal["float32", "bfloat16"]
    revision: str = ""  # runs of the first versions have none


@dataclasses.dataclass(frozen=True)
class Data:
    """Text, and how it becomes rows of tokens."""

    corpus: str
    path: str
    field: str
    separator: str
    name: str
    train_split: str
    test_split: str
    data_dir: str
    context_length: int
    prepend_bos: bool
    # Runs of earlier versions have none of these, and held out every twentieth piece of their text.
    held_out: Literal["hash", "position"] = "position"
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        _at_least("data.context_length", self.context_length, 2)


@dataclasses.dataclass(frozen=True)
class Activations:
    """How tokens become SAE inputs."""

    rows_per_forward: int
    buffer_size: int
    scale_tokens: int
    drop_special_tokens: bool
    max_norm_multiple: float
    center: bool = False  # as runs of earlier versions, which have none

    def __post_init__(self) -> None:
        _at_least("activations.rows_per_forward", self.rows_per_forward, 1)
        _at_least("activations.scale_tokens", self.scale_tokens, 1)
        if self.max_norm_multiple != 0 and self.max_norm_multiple <= 1:
            raise ConfigError(
                "activations.max_norm_multiple",
                f"is {self.max_norm_multiple:g}; write 0 to keep every token, or a multiple of the median norm above 1",
            )


@dataclasses.dataclass(frozen=True)
class Stack:
    """SAEs of one architecture, width and site that differ in numbers only, trained together.

    `l1_coefficients`, `learning_rates`, `seeds` and, where there are any, `target_l0` are matched up; one of length 1
    serves every SAE.
    """

    architecture: str
    site: str | tuple[str, ...]
    width: int
    l1_coefficients: tuple[float, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    options: dict[str, Any]
    # Runs of earlier versions have none of these.
    target_l0: tuple[float, ...] = ()
    start_from: str = ""
    target: str | tuple[str, ...] = ""

    def __len__(self) -> int:
        return max(len(self.l1_coefficients), len(self.learning_rates), len(self.seeds), len(self.target_l0))

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it reads."""
        return (self.site,) if isinstance(self.site, str) else self.site

    @property
    def targets(self) -> tuple[str, ...]:
        """The sites that it writes; by default those that it reads."""
        return ((self.target,) if isinstance(self.target, str) else self.target) if self.target else self.sites

    def numbers(self) -> list[tuple[float, float, int]]:
        """(l1_coefficient, learning_rate, seed) of each SAE."""
        columns = (self.l1_coefficients, self.learning_rates, self.seeds)
        return list(zip(*(column * len(self) if len(column) == 1 else column for column in columns), strict=True))

    def check(self, path: str) -> None:
        """Raises `ConfigError` with the stack's path in the config."""
        _at_least(f"{path}.width", self.width, 1)
        for field in ("l1_coefficients", "learning_rates", "seeds", "target_l0"):
            values = getattr(self, field)
            if field == "target_l0" and not values:
                continue
            if not values:
                raise ConfigError(
                    f"{path}.{field}", "has no values; write one for all SAEs of the stack, or one for each"
                )
            if len(values) not in (1, len(self)):
                raise ConfigError(
                    f"{path}.{field}",
                    f"has {len(values)} values; write 1 or {len(self)}, as many as the stack has SAEs",
                )
        _seed(f"{path}.seeds", *self.seeds)
        for field in ("l1_coefficients", "learning_rates"):
            if min(getattr(self, field)) < 0:
                raise ConfigError(
                    f"{path}.{field}", f"has a negative value: {getattr(self, field)}; write numbers >= 0"
                )
        if self.target_l0 and (min(self.target_l0) <= 0 or max(self.target_l0) >= self.width):
            raise ConfigError(
                f"{path}.target_l0",
                f"is {self.target_l0}; write active features per token, above 0 and below the width",
            )
        for field, names in (("site", self.sites), ("target", self.targets)):
            if not names or len(set(names)) < len(names):
                raise ConfigError(f"{path}.{field}", f"is {names}; write one site, or several that differ")
        if self.target_l0 and min(self.l1_coefficients) == 0:
            raise ConfigError(
                f"{path}.l1_coefficients",
                "has a 0, from which target_l0 cannot start; write a first guess such as 0.01",
            )


@dataclasses.dataclass(frozen=True)
class Train:
    """The optimisation, common to every stack."""

    steps: int
    batch_size: int
    warmup_steps: int
    decay_fraction: float
    compute_dtype: Literal["float32", "bfloat16"]
    log_every: int
    # Runs of earlier versions have none of these.
    resample_steps: tuple[int, ...] = ()
    resample_warmup_steps: int = 1000
    dead_after: int = 1000
    max_skipped: int = 100

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "log_every", "resample_warmup_steps", "dead_after", "max_skipped"):
            _at_least(f"train.{field}", getattr(self, field), 1)
        _at_least("train.warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                "train.warmup_steps", f"is {self.warmup_steps}; write less than train.steps ({self.steps})"
            )
        if not 0 <= self.decay_fraction <= 1:
            raise ConfigError(
                "train.decay_fraction",
                f"is {self.decay_fraction:g}; write a fraction of training from 0 (constant rate) to 1",
            )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along the batch (`data`, 0 = all that `latent` leaves) and along the dictionary (`latent`)."""

    data: int
    latent: int

    def __post_init__(self) -> None:
        _at_least("mesh.data", self.data, 0)
        _at_least("mesh.latent", self.latent, 1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, what, and which to keep."""

    every: int
    keep: int
    # Runs of earlier versions have none of these.
    keep_every: int = 0
    keep_best: str = ""
    buffer: bool = True

    def __post_init__(self) -> None:
        _at_least("checkpoint.every", self.every, 1)
        _at_least("checkpoint.keep", self.keep, 1)
        _at_least("checkpoint.keep_every", self.keep_every, 0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The held-out measurement at the end of training."""

    tokens: int
    rows_per_forward: int

    def __post_init__(self) -> None:
        _at_least("evaluation.tokens", self.tokens, 1, most=2**62)  # as far as the text goes
        _at_least("evaluation.rows_per_forward", self.rows_per_forward, 1)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What SAEs are measured with: the language model, the text, and how much of it."""

    lm: LM
    data: Data
    evaluation: Evaluation
    drop_special_tokens: bool


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run: a language model, text, stacks of SAEs, and how they are trained and measured."""

    seed: int
    lm: LM
    data: Data
    activations: Activations
    stacks: dict[str, Stack]
    train: Train
    mesh: Mesh
    checkpoint: Checkpoint
    evaluation: Evaluation
    loggers: tuple[str, ...] = ("tensorboard",)  # as runs of the first versions had

    def __post_init__(self) -> None:
        _seed("seed", self.seed)
        if not self.stacks:
            raise ConfigError(
                "stacks", "is empty; add one, for example `config.stacks.gated = base.stack(architecture='gated', ...)`"
            )
        for name, stack in self.stacks.items():
            # It becomes part of SAEs' names, of keys in files and of the report's text.
            if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII):
                raise ConfigError("stacks", f"has the name {name!r}; write up to 100 letters, digits, _ and -")
            stack.check(f"stacks.{name}")
        fresh = self.activations.rows_per_forward * self.data.context_length
        batch = self.train.batch_size
        if fresh % batch and batch % fresh:
            raise ConfigError(
                "train.batch_size",
                f"is {batch}, but one forward pass gives {fresh} activations "
                "(activations.rows_per_forward x data.context_length); write a divisor or a multiple of that",
            )
        if self.activations.buffer_size < batch or self.activations.buffer_size % batch:
            raise ConfigError(
                "activations.buffer_size",
                f"is {self.activations.buffer_size}; write a multiple of train.batch_size ({batch}), at least 1x",
            )

        if self.train.steps % self.updates_per_call:
            raise ConfigError(
                "train.steps",
                f"is {self.train.steps}; write a multiple of {self.updates_per_call}, the updates of one forward pass",
            )

        # Features are dead after so many steps at the earliest, and those that begin again need a call to train in.
        earliest, last = self.train.dead_after, self.train.steps - self.updates_per_call
        if self.train.resample_steps and last < earliest:
            raise ConfigError(
                "train.resample_steps",
                f"is {self.train.resample_steps}, but this run has no step for it: features count as dead after "
                f"{earliest} steps at the earliest (train.dead_after), and resampling is possible until step {last}; "
                "lower train.dead_after, raise train.steps, or write ()",
            )
        if any(not earliest <= step <= last for step in self.train.resample_steps):
            raise ConfigError(
                "train.resample_steps",
                f"is {self.train.resample_steps}; write steps from {earliest} (train.dead_after) to {last}",
            )
        best, _, statistic = self.checkpoint.keep_best.partition("/")
        if self.checkpoint.keep_best and (best not in self.stacks or statistic not in ("loss", "mse")):
            raise ConfigError(
                "checkpoint.keep_best",
                f"is {self.checkpoint.keep_best!r}; write STACK/loss or STACK/mse, where STACK is one of "
                f"{', '.join(self.stacks)}",
            )
        for name, stack in self.stacks.items():
            if stack.target_l0 and self.train.steps < 2:
                raise ConfigError("train.steps", f"is 1, in which stacks.{name}.target_l0 cannot be met; write more")
            if stack.target_l0 and self.train.warmup_steps >= 2 * self.train.steps // 3:
                raise ConfigError(
                    "train.warmup_steps",
                    f"is {self.train.warmup_steps}; stacks.{name}.target_l0 is met between warm-up and two thirds of "
                    f"training; write less than {2 * self.train.steps // 3}",
                )

    @property
    def sites(self) -> list[str]:
        """The sites that any stack reads or writes, each once."""
        return sorted({site for stack in self.stacks.values() for site in (*stack.sites, *stack.targets)})

    @property
    def updates_per_call(self) -> int:
        """SAE updates in one call of the train program."""
        return max(1, self.activations.rows_per_forward * self.data.context_length // self.train.batch_size)

    @property
    def resampled_at(self) -> tuple[int, ...]:
        """`train.resample_steps`, as ends of calls of the train program."""
        per_call = self.updates_per_call
        return tuple(sorted({-(-step // per_call) * per_call for step in self.train.resample_steps}))

    @property
    def forwards_per_call(self) -> int:
        """Forward passes of the language model in one call of the train program."""
        return max(1, self.train.batch_size // (self.activations.rows_per_forward * self.data.context_length))

    @property
    def rows_per_call(self) -> int:
        """Rows of tokens that one call of the train program consumes."""
        return self.forwards_per_call * self.activations.rows_per_forward


@dataclasses.dataclass(frozen=True)
class PretrainModel:
    """The shape of a GELU model, in TransformerLens' names."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _at_least(f"model.{field.name}", getattr(self, field.name), 1)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Training a small language model and its tokenizer from text."""

    seed: int
    data: Data
    vocab_size: int
    model: PretrainModel
    epochs: float
    batch_size: int
    learning_rate: float
    b2: float
    weight_decay: float
    warmup_steps: int
    test_tokens: int

    def __post_init__(self) -> None:
        _seed("seed", self.seed)
        _at_least("vocab_size", self.vocab_size, 257)  # every byte, and <|endoftext|>
        for field in ("batch_size", "test_tokens"):
            _at_least(field, getattr(self, field), 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        for field in ("epochs", "learning_rate"):
            if getattr(self, field) <= 0:
                raise ConfigError(field, f"is {getattr(self, field):g}; write a positive number")


T = typing.TypeVar("T")


def from_dict(cls: type[T], tree: Any) -> T:
    """A config dataclass from a `ConfigDict` or nested dicts.

    Raises:
        ConfigError: an unknown, missing or wrongly typed field, or an impossible value or combination.
    """
    if hasattr(tree, "to_dict"):
        tree = tree.to_dict()
    return convert("", cls, tree)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config, which `from_dict` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def parse_json(text: str) -> Any:
    """JSON that anyone may have written.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a name twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str = "") -> list[str]:
    """`field: a != b` for each leaf that differs between two JSON configs."""
    lines = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b:
            lines.append(f"{path}{key}: {a!r} != {b!r}")
    return lines


def fingerprint(*parts: Any) -> str:
    """A short name for JSON-able values: equal values, equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_text(field: str, text: str) -> None:
    """Raises `ConfigError` for text that cannot be written in UTF-8, or that has a NUL, which no path can have."""
    if "\0" in text or text.encode("utf-8", "replace").decode() != text:
        raise ConfigError(field, f"is {text!r}, which has a character that no path or text can have; write it anew")


def _at_least(field: str, value: int, least: int, most: int = INT32) -> None:
    if value < least:
        raise ConfigError(field, f"is {value}; write {least} or more")
    if value > most:
        raise ConfigError(field, f"is {value}; write {most} or less")


def _seed(field: str, *seeds: int) -> None:
    if min(seeds) < 0 or max(seeds) > INT32:
        raise ConfigError(field, f"is {', '.join(map(str, seeds))}; write integers from 0 to {INT32}")


def convert(path: str, kind: Any, value: Any) -> Any:
    """`value` as `kind`: a dataclass, int, float, bool, str, None, Literal, X | Y, tuple[X, ...], dict[str, X] or Any.

    Any is what JSON has.

    Raises:
        ConfigError: it is of another type, or no number or text that a config can have.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _json_value(path, value)
    if origin is types.UnionType:
        return _one_of(path, args, value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
        if not isinstance(value, Mapping):
            raise ConfigError(path or "config", f"is {value!r}; write a group with the fields {', '.join(fields)}")
        prefix = f"{path}." if path else ""
        for name in value:
            if name not in fields:
                raise ConfigError(f"{prefix}{name}", f"is not a field; {known_names(str(name), fields)}")
        for field in dataclasses.fields(kind):
            if field.name not in value and field.default is dataclasses.MISSING:
                raise ConfigError(
                    f"{prefix}{field.name}", "is missing; build the config on configs/base.py, which has every field"
                )
        return kind(**{name: convert(f"{prefix}{name}", fields[name], item) for name, item in value.items()})
    if origin is dict and isinstance(value, Mapping):
        return {str(name): convert(f"{path}.{name}", args[1], item) for name, item in value.items()}
    if origin is tuple:
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(convert(path, args[0], item) for item in values)
    if origin is Literal:
        if value in args:
            return value
        raise ConfigError(path, f"is {value!r}; {known_names(str(value), args)}")
    known = (int, float) if kind is float else kind
    if isinstance(kind, type) and isinstance(value, known) and (kind is bool or not isinstance(value, bool)):
        if kind is float and not -FLOAT32 <= value <= FLOAT32:
            shown = value if isinstance(value, float) else "too large"
            raise ConfigError(path, f"is {shown}; write a finite number, up to {FLOAT32:g} in size")
        if kind is int and not -(2**63) <= value < 2**63:
            raise ConfigError(path, "is too large; write an integer of up to 64 bits")
        if isinstance(value, str):
            check_text(path, value)
        return float(value) if kind is float else value
    raise _WrongTypeError(path, value, _name(kind))


def _name(kind: Any) -> str:
    return "None" if kind is types.NoneType else str(kind) if typing.get_origin(kind) else kind.__name__


def _one_of(path: str, kinds: tuple[Any, ...], value: Any) -> Any:
    """`value` as the first of these types that it is of: a list is a tuple, and not text."""
    for kind in kinds:
        try:
            # A tuple takes a single value as well, which is of another type here.
            if typing.get_origin(kind) is not tuple or isinstance(value, tuple | list):
                return convert(path, kind, value)
        except _WrongTypeError:
            continue
    raise _WrongTypeError(path, value, " or ".join(map(_name, kinds)))


def _json_value(path: str, value: Any) -> Any:
    """What JSON has; a list as a tuple."""
    if isinstance(value, Mapping):
        return {str(name): _json_value(f"{path}.{name}", item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_json_value(path, item) for item in value)
    return None if value is None else convert(path, type(value) if type(value) in (bool, int, float) else str, value)
