"""Geometry of the pages' drawings, which templates write as SVG."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gsae_jax.evaluation import frontiers as frontiers_lib
from gsae_jax.web.histograms import Tick

COLOURS = 6  # of the style sheet, s0 to s5
WIDTH, HEIGHT = 600, 300  # of a frontier
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 28, 46  # its margins


class Point(NamedTuple):
    """An SAE in a frontier: its place, and the record of the report."""

    x: float
    y: float
    record: dict[str, Any]


class Line(NamedTuple):
    """The SAEs of a stack, with a number for the colour."""

    name: str
    colour: int
    points: list[Point]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Loss recovered against L0 at one site."""

    site: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    beyond: int  # SAEs that are not drawn: they diverged, or nothing of them is active

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


def frontiers(records: Sequence[dict[str, Any]]) -> list[Frontier]:
    """Of each site, from records of a report; `l0` and `loss_recovered` are NaN where there is none."""
    stacks = frontiers_lib.stacks(list(records))
    drawn = []
    for site in sorted({site for site, _ in stacks}):
        lines = [(name, members) for (where, name), members in stacks.items() if where == site]
        # As in the report's figure: SAEs that have diverged would make the others' points one line.
        sound = {
            name: [r for r in members if r["l0"] > 0 and math.isfinite(r["l0"]) and -0.5 <= r["loss_recovered"] <= 1.5]
            for name, members in lines
        }
        every = [record for members in sound.values() for record in members]
        if not every:
            continue
        x = _Axis([math.log10(record["l0"]) for record in every], LEFT, WIDTH - RIGHT)
        y = _Axis([record["loss_recovered"] for record in every], HEIGHT - BOTTOM, TOP)
        drawn.append(
            Frontier(
                site,
                [
                    Line(
                        name,
                        number % COLOURS,
                        [Point(x(math.log10(r["l0"])), y(r["loss_recovered"]), r) for r in sound[name]],
                    )
                    for number, (name, _) in enumerate(lines)
                ],
                [Tick(x(math.log10(value)), f"{value:g}") for value in _powers(10**x.low, 10**x.high)],
                [Tick(y(value), f"{value:g}") for value in _steps(y.low, y.high)],
                sum(len(members) for _, members in lines) - len(every),
            )
        )
    return drawn


class _Axis:
    """Values to places, with room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        margin = 0.08 * (max(values) - min(values) or 1)
        self.low, self.high = min(values) - margin, max(values) + margin
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)


def _powers(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis; few of them."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if 2 <= len(inside) <= 7:
            return inside
    return _steps(low, high)


def _steps(low: float, high: float) -> list[float]:
    """Round numbers of a linear axis."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= raw)
    return [round(step * number, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
