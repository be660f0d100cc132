"""The statistics of the paper's study (section 4.3 and Appendix H), by SciPy where it has the test.

A rating is a number for one feature by one rater: 2, 1 or 0 of a person, or an automatic score. The two features of a
pair have the same model, layer and site, and the same rater.
"""

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.9
RESAMPLES = 9999  # of the bootstrap
LEAST = 3  # sites, layers or raters that a test over them needs


class Paired(NamedTuple):
    """What one rater says of the two features of a pair.

    Attributes:
        pair: number of the pair.
        model: the language model.
        layer: of the site.
        site: the site's name without the layer, such as `hook_mlp_out`.
        rater: number of the rater.
        first: rating of the feature of the first side, which is expected to be better.
        second: rating of that of the second side.
    """

    pair: int
    model: str
    layer: int
    site: str
    rater: int
    first: float
    second: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of first minus second over pairs.

    Attributes:
        pairs: how many there are. Several raters of one pair count as their mean.
        mean: of the differences.
        low: lower end of the BCa bootstrap interval; None where there is none.
        high: its upper end.
        confidence: of the interval.
    """

    pairs: int
    mean: float
    low: float | None
    high: float | None
    confidence: float = CONFIDENCE


@dataclasses.dataclass(frozen=True)
class Test:
    """The result of a test.

    Attributes:
        name: of the test.
        about: what it compares.
        n: how many values, pairs or blocks it has.
        statistic: of the test; None if it cannot be made.
        p: its p-value; None if it cannot be made.
        why: why it cannot be made, or "".
    """

    name: str
    about: str
    n: int
    statistic: float | None = None
    p: float | None = None
    why: str = ""


def differences(ratings: Iterable[Paired]) -> np.ndarray:
    """[pairs]: first minus second, the mean over the raters of each pair."""
    by_pair: dict[int, list[float]] = {}
    for rating in ratings:
        by_pair.setdefault(rating.pair, []).append(rating.first - rating.second)
    return np.array([np.mean(by_pair[pair]) for pair in sorted(by_pair)], float)


def mean_difference(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """The mean and its BCa bootstrap interval.

    Args:
        values: [pairs], of `differences`.
        seed: of the bootstrap's draws.
        resamples: how many draws.

    Raises:
        ValueError: there are no pairs.
    """
    if not len(values):
        raise ValueError("there are no pairs")
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Difference(len(values), mean, None, None)  # nothing varies, so an interval would have no width
    low, high = _bca(values, np.random.default_rng(seed), resamples)
    return Difference(len(values), mean, low, high)


def _bca(values: np.ndarray, random: np.random.Generator, resamples: int) -> tuple[float, float]:
    """Ends of the BCa interval of a mean (Efron 1987).

    As of `scipy.stats.bootstrap`, whose time grows with the square of the number of values: it does not know that the
    jackknife of a mean has a closed form.
    """
    n, mean = len(values), np.mean(values)
    batch = max(1, 2**22 // n)  # bounds the memory
    sizes = [min(batch, resamples - start) for start in range(0, resamples, batch)]
    means = np.concatenate([values[random.integers(0, n, (size, n))].mean(1) for size in sizes])
    bias = special.ndtri((np.sum(means < mean) + np.sum(means <= mean)) / (2 * resamples))
    jackknife = (values.sum() - values) / (n - 1)
    centred = jackknife.mean() - jackknife
    acceleration = np.sum(centred**3) / (6 * np.sum(centred**2) ** 1.5)
    z = bias + special.ndtri(np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    low, high = np.quantile(means, special.ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def wilcoxon(values: np.ndarray) -> Test:
    """One-sided paired Wilcoxon test with Pratt's treatment of zeros: whether first is above second."""
    name, about = "Wilcoxon-Pratt, one-sided", "first above second"
    if not np.any(values):
        return Test(name, about, len(values), why="no pair has a difference")
    result = stats.wilcoxon(values, zero_method="pratt", alternative="greater")
    return Test(name, about, len(values), float(result.statistic), float(result.pvalue))


def mann_whitney(ratings: Sequence[Paired]) -> list[Test]:
    """Mann-Whitney U test, two-sided, of all ratings of each two models."""
    groups = _by(ratings, "model")
    return [
        _safely(
            "Mann-Whitney U",
            f"ratings of {one} and of {other}",
            len(groups[one]) + len(groups[other]),
            lambda one=one, other=other: stats.mannwhitneyu(groups[one], groups[other]),
        )
        for one, other in itertools.combinations(sorted(groups), 2)
    ]


def kruskal_wallis(ratings: Sequence[Paired]) -> Test:
    """Kruskal-Wallis test of all ratings over the models."""
    groups = _by(ratings, "model")
    name, about, n = "Kruskal-Wallis", "ratings over models", sum(map(len, groups.values()))
    if len(groups) < 2:
        return Test(name, about, n, why="there is one model")
    return _safely(name, about, n, lambda: stats.kruskal(*groups.values()))


def friedman(ratings: Sequence[Paired], over: str) -> Test:
    """Friedman test over sites, layers or raters.

    A block has the mean rating of each site (layer, rater), with all else equal. Raters who have rated less than
    others are left out, and then blocks that lack a site (layer, rater).

    Args:
        ratings: of the study; over layers, of one model.
        over: `site`, `layer` or `rater`.
    """
    name, about = "Friedman", f"ratings over {over}s"
    if over == "rater":
        cells = collections.Counter(
            each.rater for each in {each._replace(pair=0, first=0.0, second=0.0) for each in ratings}
        )
        some = [each for each in ratings if cells[each.rater] == max(cells.values())]
        if left := len(cells) - len({each.rater for each in some}):
            about += f", without {left} who rated less"
        ratings = some
    blocks, why = _blocks(ratings, over)
    if why:
        return Test(name, about, len(blocks), why=why)
    return _safely(name, about, len(blocks), lambda: stats.friedmanchisquare(*blocks.T))


def page(ratings: Sequence[Paired]) -> Test:
    """Page's test for a trend of the ratings of one model over layers: whether they increase with depth.

    Blocks are those of `friedman`.
    """
    name, about = "Page's trend", "ratings increase over layers"
    blocks, why = _blocks(ratings, "layer")
    if why:
        return Test(name, about, len(blocks), why=why)
    return _safely(name, about, len(blocks), lambda: _paged(blocks))


def _paged(blocks: np.ndarray) -> Any:
    result = stats.page_trend_test(blocks)
    return result.statistic, result.pvalue


def tests(ratings: Sequence[Paired]) -> list[Test]:
    """All tests of the paper, in its order. Models differ in depth, so each has its own tests over layers."""
    models = sorted({rating.model for rating in ratings})
    made = [wilcoxon(differences(ratings)), *mann_whitney(ratings), friedman(ratings, "site")]
    for test in (lambda mine: friedman(mine, "layer"), page):
        for model in models:
            result = test([rating for rating in ratings if rating.model == model])
            made.append(dataclasses.replace(result, about=f"{result.about} of {model}"))
    return [*made, friedman(ratings, "rater"), kruskal_wallis(ratings)]


def _by(ratings: Iterable[Paired], field: str) -> dict[str, list[float]]:
    """The ratings of all features, by a field. Several raters of a feature count as their mean."""
    features: dict[tuple[str, int, int], list[float]] = {}
    for rating in ratings:
        for side, value in enumerate((rating.first, rating.second)):
            features.setdefault((getattr(rating, field), rating.pair, side), []).append(value)
    groups: dict[str, list[float]] = {}
    for (group, _, _), values in features.items():
        groups.setdefault(group, []).append(float(np.mean(values)))
    return groups


def _blocks(ratings: Sequence[Paired], over: str) -> tuple[np.ndarray, str]:
    """[blocks, treatments] of mean ratings; and why there can be no test, or ""."""
    treatments = {getattr(rating, over) for rating in ratings}
    cells: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    others = [field for field in ("model", "layer", "site", "rater") if field != over]
    for rating in ratings:
        block = cells.setdefault(tuple(getattr(rating, field) for field in others), {})
        block.setdefault(getattr(rating, over), []).extend((rating.first, rating.second))
    whole = [cells[block] for block in sorted(cells) if cells[block].keys() == treatments]
    blocks = np.array([[np.mean(block[each]) for each in sorted(block)] for block in whole], float)
    if len(treatments) < LEAST:
        return blocks, f"there are fewer than {LEAST} {over}s"
    if len(blocks) < 2:
        return blocks, f"fewer than 2 blocks have a rating for every {over}"
    return blocks, ""


def _safely(name: str, about: str, n: int, test: Any) -> Test:
    """The result of a test of SciPy's; where all values are equal, it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            statistic, p = test()
        except ValueError as error:
            return Test(name, about, n, why=str(error))
    if not math.isfinite(p):
        return Test(name, about, n, why="all ratings are equal")
    return Test(name, about, n, float(statistic), float(p))
