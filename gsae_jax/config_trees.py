"""Configs as nested dicts: from what a user wrote or a run recorded to the dataclasses of `config.py`, and back."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from gsae_jax import errors
from gsae_jax.config import FLOAT32, Experiment, HeldOut
from gsae_jax.errors import UserError, known_names

T = typing.TypeVar("T")

SYNONYMS = {"model": "lm", "lr": "learning_rates", "lambda": "l1_coefficients", "sparsity": "l1_coefficients"}


class _WrongTypeError(UserError):
    def __init__(self, value: Any, wanted: str):
        super().__init__(f"is {value!r} ({type(value).__name__}); write a value of type {wanted}")


def from_dict(cls: type[T], tree: Any) -> T:
    """Makes a config dataclass from a `ConfigDict`, or from nested dicts of the fields that differ from the defaults.

    Raises:
        UserError: an unknown, missing or wrongly typed field, or an impossible value or combination.
    """
    with errors.about("config"):
        return convert(cls, plain(tree))


def from_record(cls: type[T], tree: Any) -> T:
    """A config dataclass from what a run recorded: fields that did not exist then get their `earlier` values.

    Raises:
        UserError: as `from_dict`, and for a field that is missing though every run has recorded it.
    """
    return convert(cls, tree, recorded=True)


def held_out(tree: Any) -> HeldOut:
    """What SAEs are measured with, from a user's config of an experiment, which may lack stacks.

    Raises:
        UserError: as `from_dict` of an `Experiment`, but not for a combination of groups that only training needs.
    """
    with errors.about("config"):
        groups = _fields(Experiment, plain(tree))
    lm, data, evaluation = groups["lm"], groups["data"], groups["evaluation"]
    return HeldOut(lm, data, evaluation, groups["activations"].drop_special_tokens, groups["lms"])


def plain(tree: Any) -> Any:
    """Nested dicts of what may be, or have in it, a `ConfigDict` or one of the dataclasses above."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
    elif hasattr(tree, "to_dict"):
        tree = tree.to_dict()
    return {name: plain(value) for name, value in tree.items()} if isinstance(tree, Mapping) else tree


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config, which `from_dict` takes back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def merged(tree: Any, changes: Any) -> Any:
    """The tree of an experiment with the changes of another tree.

    A stack that gets another architecture loses the options of the one before. A stack that is None is left out,
    and so is a language model of `lms`.
    """
    if not isinstance(tree, Mapping) or not isinstance(changes, Mapping):
        return changes
    if changes.get("architecture", tree.get("architecture")) != tree.get("architecture"):
        tree = {name: value for name, value in tree.items() if name != "options"}
    result = {**tree, **{name: merged(tree.get(name), value) for name, value in changes.items()}}
    for group in ("stacks", "lms"):
        if isinstance(members := result.get(group), Mapping):
            result[group] = {name: member for name, member in members.items() if member is not None}
    return result


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


def check_text(text: str) -> None:
    """Raises `UserError` for text that cannot be written in UTF-8, or that has a NUL, which no path can have."""
    if "\0" in text or text.encode("utf-8", "replace").decode() != text:
        raise UserError(
            f"is {text!r}, which has a character that UTF-8 or a path cannot have; write it without that character"
        )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant by another: a synonym, one that is spelled alike, or one that begins so."""
    names = [known for known in names if known != name]
    if SYNONYMS.get(name) in names:
        return SYNONYMS[name]
    swapped = [known for known in names if sorted(known) == sorted(name)]
    alike = (
        swapped or difflib.get_close_matches(name, names, n=1) or [known for known in names if known.startswith(name)]
    )
    return alike[0] if alike and len(name) > 1 else None


def known_fields(name: str, known: Iterable[str], cls: Any = None) -> str:
    """`did you mean 'x'? known: x, y, z` for the name of a field that does not exist.

    `cls`: the dataclass that was meant to have it; its groups are searched, too.
    """
    known = list(known)
    below = fields_below(cls) if cls else {}
    field = nearest(name, known)
    meant = below.get(name) or ([field] if field else below.get(nearest(name, below) or "", []))
    if not meant:
        return known_names(name, known)
    return f"did you mean {' or '.join(map(repr, meant))}? known: {', '.join(known)}"


def fields_below(cls: Any) -> dict[str, list[str]]:
    """By the name of a field, where a dataclass' groups have it: as `train.steps`, or as `stacks.NAME.width`."""
    paths: dict[str, list[str]] = {}
    for field in dataclasses.fields(cls):
        several = typing.get_origin(field.type) is dict
        group = typing.get_args(field.type)[1] if several else field.type
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            prefix = f"{field.name}.NAME" if several else field.name
            for below in dataclasses.fields(group):
                paths.setdefault(below.name, []).append(f"{prefix}.{below.name}")
    return paths


def _fields(cls: Any, tree: Any, recorded: bool = False) -> dict[str, Any]:
    """The values of all fields of a dataclass, from a tree that may lack some."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(tree, Mapping):
        raise UserError(f"is {tree!r}; write a group with the fields {', '.join(known)}")
    for name in tree:
        if name not in known:
            raise UserError(f"is not a field; {known_fields(str(name), known, cls)}", str(name))
    values = {}
    for name, field in known.items():
        if name in tree:
            with errors.within(name):
                values[name] = convert(field.type, tree[name], recorded)
            continue
        value = field.metadata.get("earlier", field.default) if recorded else field.default
        if value is dataclasses.MISSING and not recorded and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if value is dataclasses.MISSING:
            what = "" if recorded else f"; write a value for it: {field.metadata.get('about', name)}"
            raise UserError(f"is missing{what}", name)
        values[name] = value
    return values


def convert(kind: Any, value: Any, recorded: bool = False) -> Any:
    """`value` as `kind`: a dataclass, int, float, bool, str, None, Literal, X | Y, tuple[X, ...], dict[str, X] or Any.

    Any is what JSON has. `recorded` as in `from_record`.

    Raises:
        UserError: it is of another type, or no number or text that a config can have.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _json_value(value)
    if origin is types.UnionType:
        return _one_of(args, value)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**_fields(kind, value, recorded))
    if origin is dict and isinstance(value, Mapping):
        return _named(value, lambda item: convert(args[1], item, recorded))
    if origin is tuple:
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(convert(args[0], item) for item in values)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"is {value!r}; {known_names(str(value), args)}")
    known = (int, float) if kind is float else kind
    if isinstance(kind, type) and isinstance(value, known) and (kind is bool or not isinstance(value, bool)):
        if kind is float and not -FLOAT32 <= value <= FLOAT32:
            shown = value if isinstance(value, float) else "too large"
            raise UserError(f"is {shown}; write a finite number, up to {FLOAT32:g} in size")
        if kind is int and not -(2**63) <= value < 2**63:
            raise UserError("is too large; write an integer of up to 64 bits")
        if isinstance(value, str):
            check_text(value)
        return float(value) if kind is float else value
    raise _WrongTypeError(value, _name(kind))


def _name(kind: Any) -> str:
    return "None" if kind is types.NoneType else str(kind) if typing.get_origin(kind) else kind.__name__


def _named(values: Mapping[str, Any], converted: Callable[[Any], Any]) -> dict[str, Any]:
    """The converted values, by name."""
    result = {}
    for name, value in values.items():
        with errors.within(str(name)):
            result[str(name)] = converted(value)
    return result


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    """`value` as the first of these types that it is of: a list is a tuple, and not text."""
    for kind in kinds:
        try:
            # A tuple takes a single value as well, which is of another type here.
            if typing.get_origin(kind) is not tuple or isinstance(value, tuple | list):
                return convert(kind, value)
        except _WrongTypeError:
            continue
    raise _WrongTypeError(value, " or ".join(map(_name, kinds)))


def _json_value(value: Any) -> Any:
    """What JSON has; a list as a tuple."""
    if isinstance(value, Mapping):
        return _named(value, _json_value)
    if isinstance(value, tuple | list):
        return tuple(_json_value(item) for item in value)
    return None if value is None else convert(type(value) if type(value) in (bool, int, float) else str, value)
