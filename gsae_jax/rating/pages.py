"""What people see: features without anything that tells their SAE, and the pages around them."""

import json
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from gsae_jax import rendering
from gsae_jax.features import Context, Feature
from gsae_jax.rating.study import SCORES
from gsae_jax.web import contexts, histograms

AROUND = 100  # tokens on each side of the active one that a page has; more do not help, and rows may be long
LONGEST = 10_000  # characters of an explanation
EFFECTS = 10  # tokens that a feature promotes, and that it suppresses
QUANTILES = 10
CHOICES = {"yes": "Yes", "maybe": "Maybe", "no": "No"}
assert CHOICES.keys() == SCORES.keys()


def page(feature: Feature) -> str:
    """JSON of what people see of a feature.

    Nothing in it depends on the scale of activations, which differs between SAEs, or on how often the feature is
    active: activations are fractions of the strongest one, and the histogram is relative to its highest bar. Effects on
    tokens have an order and no numbers.
    """
    most = feature.numbers["strongest"] or 1.0
    strongest = [_context(each, most) for each in feature.contexts if each.quantile is None]
    sample: list[list[Any]] = [[] for _ in range(QUANTILES)]
    for each in feature.contexts:
        if each.quantile is not None:
            sample[each.quantile].append(_context(each, most))
    direct = feature.effects["direct"]
    value = {
        "strongest": strongest,
        "sample": sample,
        "histogram": _bars(feature.histogram),
        "promotes": [each.text for each in direct if each.effect > 0][:EFFECTS],
        "suppresses": [each.text for each in direct if each.effect < 0][:EFFECTS],
    }
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _context(context: Context, most: float) -> list[Any]:
    """[position, tokens, [[position, fraction], ...]] of the part of the row that a page has."""
    start, end = max(0, context.position - AROUND), context.position + AROUND + 1
    values = context.activations[start:end]
    active = [[int(at), _fraction(float(values[at]) / most)] for at in np.flatnonzero(values)]
    return [context.position - start, list(context.tokens[start:end]), active]


def _fraction(value: float) -> float:
    """Rounded to what a page shows; a token that is active stays active."""
    return round(value, 2) or math.copysign(0.001, value)


def _bars(counts: np.ndarray) -> list[int]:
    """Heights of the bins up to that of the strongest activation, in thousandths of the highest; an even number."""
    (some,) = np.nonzero(counts)
    if not some.size:
        return []
    end = int(some[-1]) + 1
    kept = np.asarray(counts[int(some[0]) : end], float)
    heights = np.ceil(1000 * kept / kept.max()).astype(int).tolist()
    return [0] * (len(heights) % 2) + heights


def _percent(value: float) -> str:
    return "<1%" if 0 < abs(value) < 0.01 else f"{round(100 * value)}%"


ENVIRONMENT = rendering.environment("gsae_jax.rating", "gsae_jax.web")
# Activations are fractions, and the templates of `web` show them with this filter.
ENVIRONMENT.filters |= {"number": _percent, "visible": contexts.visible, "token": contexts.visible_token}
ENVIRONMENT.globals |= {"CHOICES": CHOICES, "LONGEST": LONGEST}


def said(sentence: str) -> str:
    """A page of one sentence, for who has no link of a rater or a wrong one."""
    return _render("said.html", sentence=sentence)


def start(count: int, done: int, following: int) -> str:
    """The instructions. `count`: features of the person; `done`: answered ones; `following`: place of the next."""
    return _render("start.html", count=count, done=done, following=following)


def item(
    shown: dict[str, Any], place: int, count: int, done: int, typed: dict[str, Any], problem: str = "", other: str = ""
) -> str:
    """The page of one feature with its form.

    Args:
        shown: of `page`.
        place: in the person's order, from 1.
        count: features of the person.
        done: answered ones.
        typed: what the form has: `explanation`, `choice`, `version` and `is_saved`.
        problem: why it was not saved, in a sentence.
        other: what was saved elsewhere meanwhile.
    """
    sample = [
        (_part(QUANTILES - part), [_shown(each) for each in shown["sample"][part]])
        for part in range(QUANTILES - 1, -1, -1)
    ]
    return _render(
        "item.html",
        place=place,
        count=count,
        done=done,
        typed=typed,
        problem=problem,
        other=other,
        strongest=[_shown(each) for each in shown["strongest"]],
        sample=[part for part in sample if part[1]],
        bars=_histogram(shown["histogram"]),
        promotes=shown["promotes"],
        suppresses=shown["suppresses"],
    )


def overview(places: Collection[tuple[bool, bool]]) -> str:
    """All features of a person: for each whether it is answered, and whether something was written."""
    return _render("overview.html", places=places)


def end(count: int, missing: list[int]) -> str:
    """The last page; `missing`: places that are not answered."""
    return _render("end.html", count=count, missing=missing)


def _part(number: int) -> str:
    return f"Part {number} of {QUANTILES}" + {1: ", the strongest", QUANTILES: ", the weakest"}.get(number, "")


def _render(template: str, **values: Any) -> str:
    return ENVIRONMENT.get_template(template).render(values)


def _shown(stored: list[Any]) -> contexts.Shown:
    position, tokens, active = stored
    activations = np.zeros(len(tokens))
    for at, value in active:
        activations[at] = value
    return contexts.shown(Context(0, position, float(activations[position]), None, tuple(tokens), activations), 1.0)


def _histogram(heights: list[int]) -> histograms.Histogram | None:
    """Bars of a histogram. There are four bins in each factor of 2, and the last one ends at 100%."""
    edges = 100 * 2.0 ** ((np.arange(len(heights)) - len(heights)) / 4)
    return histograms.histogram(edges, np.array(heights, int))
