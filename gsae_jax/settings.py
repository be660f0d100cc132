"""List every setting of an experiment with its default and a description.

python -m gsae_jax.settings [--pretrain] [| grep train]

A config file writes `config.train.steps = 5000`, and the command line --config.train.steps=5000.
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from absl import flags

from gsae_jax import cli
from gsae_jax.config import Experiment, Pretrain


def settings(cls: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """The fields of a dataclass of `gsae_jax.config`, and of those in it, each with what it is.

    Yields:
        Name, default as Python writes it ("" where a config must give the value), and one sentence. A group, which
        comes before its fields, has a name that ends in a dot and no default.
    """
    members = {field.name: _members(field.type) for field in dataclasses.fields(cls)}
    for field in sorted(dataclasses.fields(cls), key=lambda field: members[field.name] is not None):
        name, group = f"{prefix}{field.name}", members[field.name]
        if group is not None:
            name += ".NAME" * (group is not field.type)
            yield f"{name}.", "", field.metadata["about"] or str(group.__doc__).partition("\n")[0]
            yield from settings(group, f"{name}.")
            continue
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
        about = field.metadata["about"] + (f" Values: {', '.join(choices)}." if choices else "")
        yield name, "" if value is dataclasses.MISSING else repr(value), about


def _members(kind: Any) -> Any:
    """The dataclass that a field holds, once or by names; None for a field that holds a value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    inner = args[1] if origin is dict else kind
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def listing(cls: Any) -> str:
    """`settings` as text, a line each."""
    lines = []
    for name, default, about in settings(cls):
        if name.endswith("."):
            lines.append(f"\n{name[:-1]}: {about}")
        else:
            lines.append(f"{name + (default and f' = {default}'):<42} {about}")
    return "\n".join(lines)


def markdown(cls: Any) -> str:
    """`settings` as tables, one for each group."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, default, about in settings(cls):
        if name.endswith("."):
            lines += ["", f"## {name[:-1]}", "", about, "", *lines[:2]]
        else:
            lines.append(f"| `{name}` | {default and f'`{default}`'} | {about} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    print(listing(Pretrain if PRETRAIN.value else Experiment))


if __name__ == "__main__":
    PRETRAIN = flags.DEFINE_bool("pretrain", False, "List the settings of gsae_jax.pretrain instead.")
    cli.run(main)
