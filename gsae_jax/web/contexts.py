"""Contexts of a feature as pages show them: a window of the row, with active tokens in colour."""

import math
from typing import NamedTuple

from gsae_jax.features import Context

BEFORE, AFTER = 14, 10  # tokens around the active one that a context shows at first
LEVELS = 9  # of colour
SIGNS = {"\n": "⏎", "\t": "→"}


class Segment(NamedTuple):
    """A part of a row's text: one active token, or all others up to the next one.

    Attributes:
        text: as the text has it.
        level: of colour, -LEVELS to LEVELS, of activation / strongest; 0 where the feature is not active.
        activation: of the feature.
        is_here: whether it is the token that the context is about.
    """

    text: str
    level: int
    activation: float
    is_here: bool


class Shown(NamedTuple):
    """A context as a page shows it: segments before a window around its token, in it, and after it."""

    context: Context
    before: list[Segment]
    window: list[Segment]
    after: list[Segment]


def shown(context: Context, strongest: float) -> Shown:
    """A context with its tokens as segments."""
    start, end = max(0, context.position - BEFORE), context.position + AFTER + 1
    parts = ((0, start), (start, end), (end, len(context.tokens)))
    return Shown(context, *(_segments(context, strongest, *part) for part in parts))


def _segments(context: Context, strongest: float, start: int, end: int) -> list[Segment]:
    segments: list[Segment] = []
    others: list[str] = []  # that follow each other

    def flush() -> None:
        if others:
            segments.append(Segment("".join(others), 0, 0.0, False))
            others.clear()

    values = context.activations[start:end].tolist()
    for number, (text, value) in enumerate(zip(context.tokens[start:end], values, strict=True), start):
        if value or number == context.position:
            flush()
            segments.append(Segment(text, level(value, strongest), value, number == context.position))
        else:
            others.append(text)
    flush()
    return segments


def level(value: float, strongest: float) -> int:
    """The level of colour of an activation; every active token has one."""
    if not value or not strongest:
        return 0
    return int(math.copysign(max(1, min(LEVELS, math.ceil(LEVELS * abs(value) / strongest))), value))


def visible(text: str) -> str:
    """A text in which line ends, tabs and other characters that cannot be seen are written as something visible."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else SIGNS.get(char) or ascii(char)[1:-1] for char in text)


def visible_token(text: str | None) -> str:
    """The text of a token that stands alone: also its spaces are visible."""
    return "" if text is None else visible(text).replace(" ", "·") or "∅"
