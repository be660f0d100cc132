"""The analysis of a study: what its ratings say, as numbers, tables, figures and sentences."""

import base64
import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gsae_jax import rendering
from gsae_jax.errors import UserError
from gsae_jax.rating import statistics
from gsae_jax.rating.statistics import Difference, Paired, Test
from gsae_jax.storage import reading, writing

ANSWERS = {2.0: "yes", 1.0: "maybe", 0.0: "no"}
COLOURS = ("#d9730d", "#0b6e99")
FILES = ("analysis.json", "answers.csv", "report.html")
LEVEL = 0.05  # of the sentences about p-values


@dataclasses.dataclass(frozen=True)
class Group:
    """The pairs of one model and site.

    Attributes:
        model: the language model.
        layer: of the site.
        site: the site's name without the layer.
        first: mean rating of the first side.
        second: mean rating of the second side.
        difference: first minus second.
    """

    model: str
    layer: int
    site: str
    first: float
    second: float
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the ratings of people, or of one automatic rater, say.

    Attributes:
        rater: `people`, or the rater's name.
        sides: names of the two sides; the first is expected to be better.
        people: whether ratings are yes, maybe or no.
        paired: the ratings.
        means: of both sides.
        difference: first minus second over all pairs.
        tests: of `statistics.tests`.
        groups: by model, layer and site.
        answers: of people: how often each was given, by side; empty for automatic raters.
        of_pairs: pairs of the study that could have been rated.
    """

    rater: str
    sides: tuple[str, str]
    people: bool
    paired: Sequence[Paired]
    means: tuple[float, float]
    difference: Difference
    tests: Sequence[Test]
    groups: Sequence[Group]
    answers: Mapping[str, Mapping[str, int]]
    of_pairs: int

    @property
    def sentences(self) -> list[str]:
        """What the numbers mean."""
        first, second = self.sides
        each, wilcoxon = self.difference, self.tests[0]
        number = f"{each.pairs:,} pairs" if each.pairs != 1 else "1 pair"
        rated = number if each.pairs == self.of_pairs else f"{each.pairs:,} of {self.of_pairs:,} pairs"
        said = [
            f"The mean rating is {self.means[0]:.3f} for {first} and {self.means[1]:.3f} for {second}, over {rated}.",
            f"The mean difference is {each.mean:+.3f}.",
        ]
        if each.low is None or each.high is None:
            said.append("There is one pair" if each.pairs == 1 else "All differences are equal")
            said[-1] += ", so there is no interval."
        else:
            said[-1] = (
                said[-1][:-1] + f", with a {each.confidence:.0%} interval of {each.low:+.3f} to {each.high:+.3f}."
            )
        if wilcoxon.p is None:
            return [*said, f"The Wilcoxon test cannot be made: {wilcoxon.why}."]
        test = f"The one-sided Wilcoxon test has p = {wilcoxon.p:.2g}"
        if wilcoxon.p < LEVEL:
            said.append(f"{test}: features of {first} are rated above those of {second}.")
        elif each.high is not None and each.high < 0:
            said.append(
                f"{test}, and the interval lies below 0: features of {second} are rated above those of {first}."
            )
        else:
            claim = f"features of {first} are more interpretable than those of {second}"
            said.append(f"{test}: the ratings do not show that {claim}.")
        if each.low is not None and (each.low > 0) != (wilcoxon.p < LEVEL):
            said.append("The interval says otherwise: it is about means, and the test compares ranks.")
        return said

    @property
    def summary(self) -> str:
        """All of it as text for a terminal."""
        lines = [f"  {sentence}" for sentence in self.sentences]
        for side, counts in self.answers.items():
            lines.append(f"  {side}: {', '.join(f'{count} {answer}' for answer, count in counts.items())}")
        for test in self.tests:
            result = f"not made: {test.why}" if test.p is None else f"{test.statistic:.6g}, p = {test.p:.3g}"
            lines.append(f"  {test.name}, {test.about} (n = {test.n}): {result}")
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """All numbers, as JSON holds them."""
        return {
            "rater": self.rater,
            "sides": list(self.sides),
            "means": list(self.means),
            "difference": dataclasses.asdict(self.difference),
            "tests": [dataclasses.asdict(test) for test in self.tests],
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "answers": {side: dict(counts) for side, counts in self.answers.items()},
            "of_pairs": self.of_pairs,
        }


def analyse(
    rater: str, sides: tuple[str, str], paired: Sequence[Paired], people: bool, of_pairs: int | None = None
) -> Analysis:
    """The analysis of all ratings of people, or of an automatic rater.

    Args:
        rater: `people`, or the rater's name.
        sides: names of the two sides.
        paired: the ratings; at least one.
        people: whether ratings are 2, 1 or 0 for yes, maybe or no.
        of_pairs: pairs of the study that could have been rated; by default, those that were.
    """
    difference = statistics.mean_difference(statistics.differences(paired))
    groups = []
    for key in sorted({(each.model, each.layer, each.site) for each in paired}):
        mine = [each for each in paired if (each.model, each.layer, each.site) == key]
        own = difference if len(mine) == len(paired) else statistics.mean_difference(statistics.differences(mine))
        groups.append(Group(*key, *_means(mine), own))
    answers: dict[str, dict[str, int]] = {}
    if people:
        for side, values in zip(sides, ([p.first for p in paired], [p.second for p in paired]), strict=True):
            answers[side] = {name: values.count(score) for score, name in ANSWERS.items()}
    tests, pairs = statistics.tests(paired), difference.pairs if of_pairs is None else of_pairs
    return Analysis(rater, sides, people, list(paired), _means(paired), difference, tests, groups, answers, pairs)


def _means(paired: Sequence[Paired]) -> tuple[float, float]:
    """Of both sides, over pairs; several raters of a pair count as their mean."""
    by_pair: dict[int, list[tuple[float, float]]] = {}
    for each in paired:
        by_pair.setdefault(each.pair, []).append((each.first, each.second))
    first, second = np.mean([np.mean(both, axis=0) for both in by_pair.values()], axis=0)
    return float(first), float(second)


def write(
    analyses: Sequence[Analysis], facts: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write `analysis.json`, `answers.csv` and `report.html`, in place of earlier ones.

    Args:
        analyses: of people and of automatic raters; at least one.
        facts: of the study, for the report.
        answers: lines of the table, all with the same columns. People have numbers in it, and no names.
        folder: is made if it is not there.

    Raises:
        OSError: they cannot be written.
        UserError: files of these names are there, and they are not of an analysis.
    """
    if any((folder / name).exists() for name in FILES) and not _holds_analysis(folder):
        why = f"{folder} has a file that is not of an analysis, and would be replaced"
        raise UserError(f"{why} ({', '.join(FILES)} are written); write another folder", "--out")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [figures(each) for each in analyses]
    report = rendering.render("study.html", analyses=analyses, facts=facts, figures=drawn)
    contents = {"study": dict(facts), "analyses": [each.record() for each in analyses]}
    text = io.StringIO()
    table = csv.DictWriter(text, list(answers[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(answers)
    writing.write_text(folder / "analysis.json", json.dumps(contents, indent=1, sort_keys=True) + "\n")
    writing.write_text(folder / "answers.csv", text.getvalue())
    writing.write_text(folder / "report.html", report)


def _holds_analysis(folder: Path) -> bool:
    try:
        return {"study", "analyses"} <= reading.load_json(folder / "analysis.json").keys()
    except (OSError, ValueError):
        return False


def figures(analysis: Analysis) -> list[str]:
    """Data URLs of SVG pictures: the ratings of both sides, and their difference at each site."""
    # Names are no formulas; with a fixed salt and no date, the same analysis has the same bytes.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "gsae_jax"}):
        return [_svg(_ratings(analysis)), _svg(_differences(analysis))]


def _ratings(analysis: Analysis) -> Figure:
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axis = figure.add_subplot()
    if analysis.people:
        lefts = np.zeros(2)
        for name, shade in zip(ANSWERS.values(), (1.0, 0.55, 0.2), strict=True):
            counts = np.array([analysis.answers[side][name] for side in analysis.sides], float)
            shares = 100 * counts / np.maximum(1, [sum(analysis.answers[side].values()) for side in analysis.sides])
            bars = axis.barh([1, 0], shares, left=lefts, color=COLOURS[1], alpha=shade, label=name)
            axis.bar_label(bars, [f"{share:.0f}%" if share > 6 else "" for share in shares], label_type="center")
            lefts += shares
        axis.set_yticks([1, 0], [_short(side) for side in analysis.sides])
        axis.set_xlabel("% of answers")
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    else:
        bins = np.linspace(min(0.5, *(p.first for p in analysis.paired), *(p.second for p in analysis.paired)), 1, 26)
        for side, colour, values in zip(
            analysis.sides,
            COLOURS,
            ([p.first for p in analysis.paired], [p.second for p in analysis.paired]),
            strict=True,
        ):
            axis.hist(values, bins.tolist(), histtype="step", color=colour, linewidth=1.5, label=_short(side))
        axis.set_xlabel("score")
        axis.set_ylabel("features")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure


def _differences(analysis: Analysis) -> Figure:
    rows = [("all", analysis.difference)]
    rows += [(f"{_short(g.model)} {g.layer} {g.site}", g.difference) for g in analysis.groups]
    figure = Figure(figsize=(5, 0.9 + 0.3 * len(rows)), layout="constrained")
    axis = figure.add_subplot()
    axis.axvline(0, color="0.5", linewidth=1)
    for place, (_, each) in enumerate(rows):
        if each.low is not None and each.high is not None:
            axis.plot([each.low, each.high], [-place, -place], color=COLOURS[0], linewidth=2)
        axis.plot([each.mean], [-place], "o", color=COLOURS[0])
    axis.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axis.set_ylim(0.5 - len(rows), 0.5)
    axis.set_xlabel("mean difference and 90% interval")
    return figure


def _svg(figure: Figure) -> str:
    with io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _short(name: str) -> str:
    """The end of a long name, which tells SAEs and sites apart."""
    return name if len(name) <= 30 else f"…{name[-29:]}"
