"""The statistics of the paper's study (section 4.3 and Appendix H), by SciPy where it has the test.

A rating is a number for one feature by one rater: 2, 1 or 0 of a person, or an automatic score. The two features of a
pair have the same model, layer and site, and the same rater.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.9
RESAMPLES = 9999  # of the bootstrap


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate distribution, whose ends are NaN
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, 2**22 // len(values)),  # bounds the memory
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = (float(end) if math.isfinite(end) else None for end in interval)
    return Difference(len(values), mean, low, high)


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

    A block has the mean rating for every site (layer, rater), with all else equal. Blocks that lack one are left out.
    Layers count by their order in their model.

    Args:
        ratings: of the study.
        over: `site`, `layer` or `rater`.
    """
    name, about = "Friedman", f"ratings over {over}s"
    blocks, why = _blocks(ratings, over, 3)
    if why:
        return Test(name, about, len(blocks), why=why)
    return _safely(name, about, len(blocks), lambda: stats.friedmanchisquare(*blocks.T))


def page(ratings: Sequence[Paired]) -> Test:
    """Page's test for a trend of ratings over layers: whether they increase with depth.

    Blocks are those of `friedman`.
    """
    name, about = "Page's trend", "ratings increase over layers"
    blocks, why = _blocks(ratings, "layer", 3)
    if why:
        return Test(name, about, len(blocks), why=why)
    return _safely(name, about, len(blocks), lambda: _paged(blocks))


def _paged(blocks: np.ndarray) -> Any:
    result = stats.page_trend_test(blocks)
    return result.statistic, result.pvalue


def tests(ratings: Sequence[Paired]) -> list[Test]:
    """All tests of the paper, in its order."""
    return [
        wilcoxon(differences(ratings)),
        *mann_whitney(ratings),
        *(friedman(ratings, over) for over in ("site", "layer", "rater")),
        page(ratings),
        kruskal_wallis(ratings),
    ]


def _by(ratings: Iterable[Paired], field: str) -> dict[str, list[float]]:
    """All ratings of both sides, by a field."""
    groups: dict[str, list[float]] = {}
    for rating in ratings:
        groups.setdefault(getattr(rating, field), []).extend((rating.first, rating.second))
    return groups


def _blocks(ratings: Sequence[Paired], over: str, least: int) -> tuple[np.ndarray, str]:
    """[blocks, treatments] of mean ratings; and why there can be no test, or ""."""
    treatments = _treatments(ratings, over)
    number = len(set(treatments))
    cells: dict[tuple[Any, ...], dict[Any, list[float]]] = {}
    others = [field for field in ("model", "layer", "site", "rater") if field != over]
    for rating, treatment in zip(ratings, treatments, strict=True):
        block = tuple(getattr(rating, field) for field in others)
        cells.setdefault(block, {}).setdefault(treatment, []).extend((rating.first, rating.second))
    whole = [block for block in sorted(cells) if len(cells[block]) == number]
    blocks = np.array([[np.mean(cells[block][each]) for each in sorted(cells[block])] for block in whole], float)
    if number < least:
        return blocks, f"there are fewer than {least} {over}s"
    if len(blocks) < 2:
        return blocks, f"fewer than 2 blocks have a rating for every {over}"
    return blocks, ""


def _treatments(ratings: Sequence[Paired], over: str) -> list[Any]:
    """What each rating is of; layers by their order in their model, as models differ in depth."""
    if over != "layer":
        return [getattr(rating, over) for rating in ratings]
    layers: Mapping[str, list[int]] = {
        model: sorted({rating.layer for rating in ratings if rating.model == model})
        for model in {rating.model for rating in ratings}
    }
    return [layers[rating.model].index(rating.layer) for rating in ratings]


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
