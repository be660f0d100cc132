"""What a user can get wrong, and what goes wrong without a user's fault: errors that commands print as one sentence.

Code that finds a fault often does not know how the user named the faulty value: a path, for instance, is `lm.path` in
a config, `--model` on a command line and `path` in Python. Such code raises a `UserError` without a field. The caller
that knows the name adds it:

    with errors.about("lm.path"):
        checkpoint = Checkpoint.open(config.lm.path)
"""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """The user's input cannot be used.

    Attributes:
        problem: what is wrong and what to write instead.
        field: the setting, flag, argument or file with the problem; "" if it is not known yet.
    """

    def __init__(self, problem: str, field: str = ""):
        super().__init__(problem, field)
        self.problem, self.field = problem, field

    def __str__(self) -> str:
        """`field: problem` in one line.

        Both may quote files that others made, so that what a terminal would act on is written as in Python.
        """
        line = re.sub(r"\s*\n\s*", " ", f"{self.field}: {self.problem}" if self.field else self.problem).strip()
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


class TrainingError(RuntimeError):
    """Training failed, but not because of the user's input: numbers that stay not finite, or a full disk."""


def check_kind(value: Any, kinds: Any, field: str, wanted: str) -> None:
    """Raises `UserError` for an argument of another type than `kinds`, as of `isinstance`; True is no number."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"is of type {type(value).__name__}; give {wanted}", field)


@contextlib.contextmanager
def about(field: str, **names: str) -> Iterator[None]:
    """A `UserError` that is raised inside gets the name that the user knows.

    Args:
        field: of an error that has none.
        **names: of errors that have the name of a Python argument: `revision="--revision"`.
    """
    try:
        yield
    except UserError as error:
        error.field = names.get(error.field, error.field or field)
        raise


@contextlib.contextmanager
def caused_by(field: str) -> Iterator[None]:
    """A `UserError` that is raised inside is about this field; what the error named becomes part of its problem."""
    try:
        yield
    except UserError as error:
        error.problem, error.field = str(error), field
        raise


@contextlib.contextmanager
def within(group: str) -> Iterator[None]:
    """A `UserError` that is raised inside is about a field of this group, or about the group itself."""
    try:
        yield
    except UserError as error:
        error.field = ".".join(filter(None, (group, error.field)))
        raise


def known_names(name: str, names: Iterable[str]) -> str:
    """`did you mean 'x'? known: x, y, z` for an unknown name."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near and near[0] != name else ""
    return f"{hint}known: {', '.join(names)}"
