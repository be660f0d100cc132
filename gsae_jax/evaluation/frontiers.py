"""Frontiers of loss recovered against L0, and how many features one needs where the other recovers as much."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from gsae_jax.evaluation import metrics
from gsae_jax.saes import contract

LEVELS = (0.8, 0.85, 0.9, 0.95)  # loss recovered at which frontiers are compared
NOT_REACHED, ABOVE, UNCERTAIN = "not reached", "recovers more", "uncertain"  # why an L0 at a level is unknown


def stacks(records: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of SAEs by (site, stack), by ascending L0.

    A stack's SAEs have one run, site, variant and width. Where others at the site have its name, its variant follows,
    and its width where that is not enough: SAEs that came together need not be of one kind, as dictionary_learning's
    trainer_0 and trainer_1. Where an option says how many features are active, the stacks of a run that differ in it
    alone are one, which has the name of their variant without that option. If several runs have it, each has its own,
    whose name begins with the run's.
    """
    groups: dict[tuple[str, str, str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (math.isnan(record["l0"]), record["l0"])):
        run, stem, _ = identity(record)
        if record.get("frontier"):
            stem = "/".join(filter(None, (stem.rpartition("/")[0], record["frontier"])))
        groups[stem, record["site"], run, family(record), record["width"]].append(record)
    frontiers = {}
    for (stem, site, run, variant, width), members in sorted(groups.items()):
        others = [(other, kind, size) for same, where, other, kind, size in groups if (same, where) == (stem, site)]
        variants = [kind for other, kind, _ in others if other == run]
        by_run = f"{run}/" if run and len({other for other, *_ in others}) > 1 else ""
        by_variant = f"/{variant}" if len({*variants}) > 1 else ""
        by_width = f"/{width}" if variants.count(variant) > 1 else ""
        frontiers[site, f"{by_run}{stem}{by_variant}{by_width}"] = members
    return frontiers


def family(record: dict[str, Any]) -> str:
    """The variant of a record's frontier, without the option that says how many features are active."""
    return str(record.get("frontier") or record["variant"])


def identity(record: dict[str, Any]) -> tuple[str, str, int | str]:
    """(run, stack, place in the stack) of a record's SAE. Records of earlier versions say it in the name only."""
    if "stack" in record:
        return record.get("run", ""), record["stack"], record.get("index", 0)
    stem, _, index = record["name"].partition("_ito_")[0].rpartition("_")
    return "", stem, index


def log_l0_at(level: float, recovered: np.ndarray, l0: np.ndarray) -> float:
    """Log L0 of a frontier where it recovers so much, interpolated; NaN where it does not pass the level.

    SAEs without active features are left out.
    """
    order = np.argsort(recovered)
    order = order[l0[order] > 0]
    recovered, l0 = recovered[order], l0[order]
    if not len(l0) or not recovered[0] <= level <= recovered[-1]:
        return math.nan
    return float(np.interp(level, recovered, np.log(l0)))


class OverSeeds(NamedTuple):
    """A mean over seeds and its 95% t interval.

    Attributes:
        middle: the mean; NaN if one of the values is not a number.
        low, high: the ends of the interval; also NaN if there is one seed.
    """

    middle: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """`1.23 [1.15, 1.31]`; without the interval if it is not known; a dash if nothing is."""
        if not math.isfinite(self.middle):
            return "–"
        return f"{self.middle:{form}}" + f" [{self.low:{form}}, {self.high:{form}}]" * math.isfinite(self.low)


NOT_KNOWN = OverSeeds(math.nan, math.nan, math.nan)


def over_seeds(values: Sequence[float] | np.ndarray) -> OverSeeds:
    """The mean of a number of each seed, at least one, and its interval."""
    numbers = np.asarray(values, float)
    if not np.isfinite(numbers).all():
        return NOT_KNOWN
    mean = float(numbers.mean())
    n = len(numbers)
    half = float(special.stdtrit(n - 1, 0.975) * np.std(numbers, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return OverSeeds(mean, mean - half, mean + half)


def ratio_over_seeds(ratios: Sequence[float]) -> OverSeeds:
    """The geometric mean of a ratio of each seed, and its interval."""
    return OverSeeds(*map(math.exp, over_seeds(np.log(ratios))))


def l0_at(records: Sequence[Mapping[str, Any]], level: float) -> float:
    """L0 of one frontier where it recovers so much, interpolated as of `log_l0_at`."""
    recovered, l0 = (np.array([record[field] for record in records]) for field in ("loss_recovered", "l0"))
    return math.exp(log_l0_at(level, recovered, l0))


def at_l0(records: Sequence[Mapping[str, Any]], field: str, l0: float, beyond: float = 1.0) -> float:
    """A metric of one frontier at an L0, interpolated along log L0; NaN where it is out of range.

    Args:
        records: of the frontier.
        field: the metric.
        l0: the L0.
        beyond: an end of the frontier counts as of this L0 if its L0 differs by no more than this factor.
    """
    known = sorted((r["l0"], r[field]) for r in records if r["l0"] > 0 and math.isfinite(r[field]))
    if not known or not known[0][0] / beyond <= l0 <= known[-1][0] * beyond:
        return math.nan
    l0s, values = zip(*known, strict=True)
    return float(np.interp(math.log(l0), np.log(l0s), values))


def ratios(records: list[dict[str, Any]], sums: dict[str, metrics.Sums]) -> list[dict[str, Any]]:
    """Per site and level: the L0 of one stack divided by another's, for the pairs that `contract.is_compared` accepts.

    A frontier is a stack's SAEs of one learning rate and one seed, at least two. Each side has its best learning rate
    at the level, that of least L0 as the geometric mean over seeds. SAEs without an L0 or a loss recovered are left
    out: they have diverged, or loss recovered has no meaning at their site. So is a level that neither side reaches, or
    that both are above.

    Returns:
        For each: `site`, `level`, `stack`, `variant`, `width`, `baseline`, the two learning rates and L0s, `ratio` of
        the geometric means over seeds, `low` and `high` (`interval_of_ratio`), how many `seeds` each has, and the
        `runs` of both. `unknown` says of each side why its L0 is NaN: `NOT_REACHED`; `ABOVE`, as even its sparsest SAEs
        recover more; or `UNCERTAIN`, as the SAEs of another learning rate end before the level and are better where
        they do. It is "" where the L0 is known.
    """
    frontiers: dict[tuple[str, str], dict[float, dict[int, list[str]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    points, about, run_of = {}, {}, {}
    measured = [r for r in records if math.isfinite(r["loss_recovered"]) and math.isfinite(r["l0"]) and not r["ito"]]
    for (site, stack), members in stacks(measured).items():
        about[site, stack] = {"stack": stack, "variant": family(members[0]), "width": members[0]["width"]}
        for record in members:
            frontiers[site, stack][record["learning_rate"]][record["seed"]].append(record["name"])
            run_of[record["name"]] = identity(record)[0]
            again = metrics.resampled(sums[record["name"]])
            points[record["name"]] = {
                name: np.concatenate([[record[name]], again[name]]) for name in ("loss_recovered", "l0")
            }

    def log_l0(level: float, names: list[str], draw: int) -> float:
        recovered, l0 = (np.array([points[name][field][draw] for name in names]) for field in ("loss_recovered", "l0"))
        return log_l0_at(level, recovered, l0)

    def active(names: list[str]) -> list[tuple[float, float]]:
        """(loss recovered, L0) of the SAEs that have active features, in ascending order."""
        ends = sorted((points[name]["loss_recovered"][0], points[name]["l0"][0]) for name in names)
        return [(recovered, l0) for recovered, l0 in ends if l0 > 0]

    def best(level: float, by_rate: dict[float, dict[int, list[str]]]) -> tuple[float, float, str]:
        """(log L0, learning rate, why they are NaN)."""

        def mean(level: float, rate: float) -> float:
            return float(np.mean([log_l0(level, names, 0) for names in by_rate[rate].values()]))

        lowest, rate = min(
            ((mean(level, rate), rate) for rate in by_rate if math.isfinite(mean(level, rate))), default=(math.nan,) * 2
        )
        frontiers_here = [names for by_seed in by_rate.values() for names in by_seed.values()]
        if not math.isfinite(lowest):
            highest = [ends[-1][0] for names in frontiers_here if (ends := active(names))]
            return math.nan, math.nan, ABOVE if highest and min(highest) >= level else NOT_REACHED
        for names in frontiers_here:
            if not math.isfinite(log_l0(level, names, 0)):
                if not (ends := active(names)):
                    continue
                (low, l0_there), (high, l0_at_most) = ends[0], ends[-1]
                # Compared at the end that is nearer to the level. Where the best does not go that far its mean is NaN,
                # nothing can be compared, and the level is kept.
                at, l0 = (level, l0_there) if low > level else (high, l0_at_most)
                if math.log(l0) < mean(at, rate):
                    return math.nan, math.nan, UNCERTAIN
        return lowest, rate, ""

    def is_frontier(by_rate: dict[float, dict[int, list[str]]]) -> bool:
        return any(len(names) > 1 for by_seed in by_rate.values() for names in by_seed.values())

    compared = []
    for (site, stack), by_rate in sorted(frontiers.items()):
        here = [
            other
            for other_site, other in sorted(frontiers)
            if other_site == site
            and contract.is_compared(about[site, stack]["variant"], about[site, other]["variant"])
            and all(is_frontier(side) for side in (by_rate, frontiers[site, other]))
        ]
        for other, level in [(other, level) for other in here for level in LEVELS]:
            sides = [best(level, by_rate), best(level, frontiers[site, other])]
            (ours, rate, _), (theirs, their_rate, _) = sides
            unknown = [why for _, _, why in sides]
            if unknown in ([NOT_REACHED] * 2, [ABOVE] * 2):
                continue
            record = {
                "site": site,
                "level": level,
                **about[site, stack],
                "baseline": other,
                "learning_rate": rate,
                "baseline_learning_rate": their_rate,
                "l0": math.exp(ours),
                "baseline_l0": math.exp(theirs),
                "ratio": math.exp(ours - theirs),
                "low": math.nan,
                "high": math.nan,
                "seeds": [],
                "runs": [],
                "unknown": unknown,
            }
            if not any(unknown):
                by_seed = [by_rate[rate], frontiers[site, other][their_rate]]
                means = [
                    [float(np.mean([log_l0(level, names, draw) for names in side.values()])) for side in by_seed]
                    for draw in range(1, metrics.DRAWS + 1)
                ]
                pairs = [
                    log_l0(level, by_seed[0][seed], 0) - log_l0(level, by_seed[1][seed], 0)
                    for seed in by_seed[0]
                    if seed in by_seed[1]
                ]
                low, high = interval_of_ratio(ours - theirs, [a - b for a, b in means], pairs)
                record |= {
                    "low": low,
                    "high": high,
                    "seeds": [len(side) for side in by_seed],
                    "runs": sorted({run_of[name] for side in by_seed for names in side.values() for name in names}),
                }
            compared.append(record)
    return compared


def interval_of_ratio(log_ratio: float, drawn: Sequence[float], of_seeds: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a ratio of L0s, over the text and over seeds.

    SAEs of a seed are measured on the same text as those of another, so the two kinds of variation are independent, and
    the squares of their half intervals of the log ratio are added.

    Args:
        log_ratio: what was measured.
        drawn: log ratios of the bootstrap over the text.
        of_seeds: log ratios of the seeds that both sides have. Fewer than two say nothing about seeds.

    Returns:
        (low, high); NaN where a frontier passes the level in some of the draws only.
    """
    low, high = metrics.interval(np.asarray(drawn))
    seeds = over_seeds(of_seeds) if len(of_seeds) > 1 else NOT_KNOWN
    half = (seeds.high - seeds.low) / 2 if math.isfinite(seeds.low) else 0.0
    return (
        math.exp(log_ratio - math.hypot(log_ratio - low, half)),
        math.exp(log_ratio + math.hypot(high - log_ratio, half)),
    )
