"""The analysis of a study: what its ratings say, as numbers, tables, figures and sentences."""

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
from gsae_jax.rating import statistics
from gsae_jax.rating.statistics import Difference, Paired, Test
from gsae_jax.storage import writing

ANSWERS = {2.0: "yes", 1.0: "maybe", 0.0: "no"}
COLOURS = ("#d9730d", "#0b6e99")  # of the first and the second side
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

    @property
    def sentences(self) -> list[str]:
        """What the numbers mean."""
        first, second = self.sides
        each = self.difference
        unit = "points of 2" if self.people else "in the score"
        said = [
            f"The mean rating is {self.means[0]:.3f} for {first} and {self.means[1]:.3f} for {second}, over "
            f"{_pairs(each.pairs)}. The mean difference is {each.mean:+.3f} {unit}."
        ]
        if each.low is None or each.high is None:
            said.append("All differences are equal, so there is no interval.")
        else:
            said[0] = said[0][:-1] + f", with a {each.confidence:.0%} interval of {each.low:+.3f} to {each.high:+.3f}."
        wilcoxon = self.tests[0]
        if wilcoxon.p is None:
            said.append(f"The Wilcoxon test cannot be made: {wilcoxon.why}.")
        elif wilcoxon.p < LEVEL:
            said.append(
                f"The one-sided Wilcoxon test has p = {wilcoxon.p:.2g}: features of {first} are rated above those of "
                f"{second}."
            )
        else:
            said.append(
                f"The one-sided Wilcoxon test has p = {wilcoxon.p:.2g}: the ratings do not show that features of "
                f"{first} are more interpretable than those of {second}."
            )
            if each.low is not None and each.low > 0:
                said.append("The interval lies above 0 nevertheless: the test compares ranks, and not means.")
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
        }


def analyse(rater: str, sides: tuple[str, str], paired: Sequence[Paired], people: bool) -> Analysis:
    """The analysis of all ratings of people, or of an automatic rater.

    Args:
        rater: `people`, or the rater's name.
        sides: names of the two sides.
        paired: the ratings; at least one.
        people: whether ratings are 2, 1 or 0 for yes, maybe or no.
    """
    groups = []
    for key in sorted({(each.model, each.layer, each.site) for each in paired}):
        mine = [each for each in paired if (each.model, each.layer, each.site) == key]
        groups.append(Group(*key, *_means(mine), statistics.mean_difference(statistics.differences(mine))))
    answers: dict[str, dict[str, int]] = {}
    if people:
        for side, values in zip(sides, ([p.first for p in paired], [p.second for p in paired]), strict=True):
            answers[side] = {name: values.count(score) for score, name in ANSWERS.items()}
    difference = statistics.mean_difference(statistics.differences(paired))
    tests = statistics.tests(paired)
    return Analysis(rater, sides, people, list(paired), _means(paired), difference, tests, groups, answers)


def _means(paired: Sequence[Paired]) -> tuple[float, float]:
    return float(np.mean([each.first for each in paired])), float(np.mean([each.second for each in paired]))


def write(analyses: Sequence[Analysis], facts: Mapping[str, Any], folder: Path) -> None:
    """Write `analysis.json`, `answers.csv` and `report.html`, in place of earlier ones.

    Args:
        analyses: of people and of automatic raters; at least one.
        facts: of the study, for the report.
        folder: is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = rendering.render(
        "study.html", analyses=analyses, facts=facts, figures=[figures(each) for each in analyses]
    )
    contents = {"study": dict(facts), "analyses": [each.record() for each in analyses]}
    writing.write_text(folder / "analysis.json", json.dumps(contents, indent=1, sort_keys=True) + "\n")
    writing.write_text(folder / "answers.csv", table(analyses))
    writing.write_text(folder / "report.html", report)


def table(analyses: Sequence[Analysis]) -> str:
    """CSV of all ratings, a line for each pair and rater. People have numbers in it, and no names."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first, second = analyses[0].sides
    writer.writerow(["rater", "person", "pair", "model", "layer", "site", first, second])
    for each in analyses:
        for paired in each.paired:
            person = paired.rater if each.people else ""
            place = (paired.pair, paired.model, paired.layer, paired.site)
            writer.writerow([each.rater, person, *place, f"{paired.first:g}", f"{paired.second:g}"])
    return text.getvalue()


def figures(analysis: Analysis) -> list[str]:
    """SVG of the ratings of both sides, and of their difference at each site."""
    # Names are no formulas; with a fixed salt and no date, the same analysis has the same bytes.
    settings = {"text.parse_math": False, "svg.hashsalt": "gsae_jax", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
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
            axis.hist(values, bins, histtype="step", color=colour, linewidth=1.5, label=_short(side))
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
    axis.set_xlabel(f"mean difference, {_short(analysis.sides[0])} minus {_short(analysis.sides[1])}")
    return figure


def _svg(figure: Figure) -> str:
    with io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    return text[text.index("<svg") :]


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:11] + "…" + name[-12:]


def _pairs(number: int) -> str:
    return "1 pair" if number == 1 else f"{number:,} pairs"
