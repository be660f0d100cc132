"""The histogram of a feature's activations, as places of bars, which templates write as SVG."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

HISTOGRAM = (600, 120)
GROUPED = 2  # bins of a file in a bar


class Tick(NamedTuple):
    """A label of an axis, and where it stands."""

    at: float
    text: str


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
