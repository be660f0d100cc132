"""Geometry of the pages' drawings, which templates write as SVG."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gsae_jax.evaluation import frontiers as frontiers_lib

COLOURS = 6  # of the style sheet, s0 to s5
WIDTH, HEIGHT = 600, 300  # of a frontier
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 28, 46  # its margins
HISTOGRAM = (600, 120)
GROUPED = 2  # bins of a file in a bar


class Tick(NamedTuple):
    """A label of an axis, and where it stands."""

    at: float
    text: str


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


class Bar(NamedTuple):
    """A bar of a histogram: its place, and what it counts."""

    x: float
    y: float
    width: float
    height: float
    low: float
    high: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Tokens by |activation|, in bins of equal width on a logarithmic axis."""

    bars: list[Bar]
    ticks: list[Tick]

    width, height = HISTOGRAM


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


def histogram(edges: np.ndarray, counts: np.ndarray) -> Histogram | None:
    """A histogram of a file, from its lower edges and counts [bins]; None if nothing was counted.

    Several bins of the file are one bar. The first bin begins at 0, and the last one does not end.
    """
    (some,) = np.nonzero(counts)
    if not some.size:
        return None
    first, last = int(some[0]) // GROUPED, int(some[-1]) // GROUPED
    grouped = np.add.reduceat(counts, np.arange(0, len(counts), GROUPED))
    lows = np.append(edges[::GROUPED], math.inf)
    bars, number = [], last - first + 1
    width, height = HISTOGRAM[0] / max(number, 8), HISTOGRAM[1] - 20
    for place, bin in enumerate(range(first, last + 1)):
        count = int(grouped[bin])
        tall = height * count / int(grouped.max())
        size = round(max(tall, 1.0) if count else 0.0, 1)
        bars.append(
            Bar(round(place * width, 1), height - size, round(width - 1, 1), size, lows[bin], lows[bin + 1], count)
        )
    every = max(1, math.ceil(number / 8))
    ticks = [Tick(bar.x, f"{bar.low:.2g}") for bar in bars[::every]]
    return Histogram(bars, ticks)
