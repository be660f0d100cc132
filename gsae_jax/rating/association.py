"""A rater that needs no language model but the one that was studied: rules about the text near a token.

From half of the rows in which a feature has a context, and half of the random sample of rows, it learns where the
feature is active: on which tokens, words, n-grams and kinds of tokens, after which ones, and at which positions. The
rules are the explanation. It is judged by how well they predict where the feature is active in the other half.

The score is low for a feature that depends on more than a few tokens. So it is a lower bound of how interpretable a
feature is to a person.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gsae_jax.features import Features
from gsae_jax.rating.ratings import Rating

VERSION = 1  # of the rater; its ratings depend on it and on nothing else
RULES = 8  # of an explanation, at most
LEAST_GAIN = 0.01  # of a rule, in sensitivity plus specificity
LEAST_ROWS = 4  # in which a feature has a context, for it to be rated
DRAWS = 200  # of the bootstrap
OFFSETS = (0, -1, -2, -3, -4, 1)  # of tokens that rules look at
PLACES = ("on", "after", "2 tokens after", "3 tokens after", "4 tokens after", "before")


class Kind(NamedTuple):
    """A kind of rules.

    Attributes:
        codes: [rows, T]; what the rules of this kind tell apart at each token, as numbers from 0.
        words: writes the rule of a code.
    """

    codes: np.ndarray
    words: Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where a rule holds, a feature is expected to be active.

    Attributes:
        kind: number of its kind.
        code: what holds, over all kinds.
        words: the same for readers.
        active: tokens that it holds for, that no earlier rule does, and on which the feature is active, when learned.
        tokens: all tokens that it holds for and no earlier rule does, when learned.
        activation: mean of the feature on these.
    """

    kind: int
    code: int
    words: str
    active: int
    tokens: int
    activation: float


class Association:
    """The rater. It is deterministic, and rates a feature in some milliseconds."""

    name = f"rules {VERSION}"

    def __init__(self) -> None:
        """There is nothing to set."""
        self._text: _Text | None = None

    def rate(self, features: Features, number: int) -> Rating | None:
        """The rating of a feature; None if it has contexts in fewer than 4 rows, or is active on all tokens."""
        if self._text is None or self._text.features is not features:
            self._text = _Text(features)
        return self._text.rate(number)


class _Text:
    """The rows of a file, as its features' rules see them."""

    def __init__(self, features: Features):
        self.features = features
        numbers, self._tokens = features.rows()
        self._place = {int(number): place for place, number in enumerate(numbers)}
        self._sampled = [self._place[number] for number in features.about["sample_rows"]]
        _, self._sample = features.sample()
        self._kinds = _kinds(self._tokens, features.texts)
        starts = np.cumsum([0] + [int(kind.codes.max()) + 1 for kind in self._kinds])
        self._starts = starts[:-1]
        # Every code of every kind is a number of its own.
        self._codes = np.stack(
            [kind.codes + start for kind, start in zip(self._kinds, self._starts, strict=True)], -1
        ).astype(np.int32)
        self._local = np.full(starts[-1], -1, np.int32)  # scratch: numbers of the codes that matter for one feature

    def rate(self, number: int) -> Rating | None:
        contexts = self.features.active_in(number)
        if len(contexts) < LEAST_ROWS:
            return None
        T = self._tokens.shape[1]
        activations = {self._place[row]: pair for row, pair in contexts.items()}
        rows = list(activations)
        others = [row for row in self._sampled if row not in activations]
        places, values = self._sample.get(number, (np.empty(0, int), np.empty(0, np.float32)))
        for order, row in enumerate(self._sampled):
            if row not in activations:
                mine = places // T == order
                activations[row] = (places[mine] % T, values[mine])
        learn, judge = rows[::2] + others[::2], rows[1::2] + others[1::2]
        rules = self._learn(learn, _dense(activations, learn, T))
        return self._judge(rules, judge, _dense(activations, judge, T), len(rows[1::2]))

    def _learn(self, rows: Sequence[int], a: np.ndarray) -> list[Rule]:
        """Rules, each the one that adds most to sensitivity plus specificity on what the earlier ones leave."""
        codes = self._codes[rows].reshape(-1, len(self._kinds))
        a = np.abs(a.reshape(-1))
        active = a > 0
        P, N = int(active.sum()), int((~active).sum())
        if not P or not N:
            return []
        candidates = np.unique(codes[active])
        self._local[candidates] = np.arange(len(candidates))
        local = self._local[codes] + 1  # 0: a code that no active token has
        self._local[candidates] = -1
        left = np.ones(len(a), bool)
        rules: list[Rule] = []
        while len(rules) < RULES:
            hits = np.bincount(local[left & active].ravel(), minlength=len(candidates) + 1)[1:]
            misses = np.bincount(local[left & ~active].ravel(), minlength=len(candidates) + 1)[1:]
            # Less what chance alone may add, so that rules of few tokens need to be right more often.
            gains = (hits - np.sqrt(hits)) / P - (misses + np.sqrt(misses)) / N
            best = int(np.argmax(gains))
            if gains[best] < LEAST_GAIN:
                break
            code = int(candidates[best])
            kind = int(np.searchsorted(self._starts, code, "right")) - 1
            holds = left & (codes[:, kind] == code)
            words = self._kinds[kind].words(code - int(self._starts[kind]))
            mean = float(a[holds].mean())
            rules.append(Rule(kind, code, words, int(hits[best]), int(holds.sum()), mean))
            left &= ~holds
        return rules

    def _judge(self, rules: Sequence[Rule], rows: Sequence[int], a: np.ndarray, contexts: int) -> Rating | None:
        """How well rules predict activations on other rows, of which the first `contexts` are of contexts."""
        a = np.abs(a)
        if not a.any() or a.all():
            return None  # there is nothing to tell apart
        predicted = np.zeros(a.shape)
        for rule in reversed(rules):
            predicted[self._codes[rows, :, rule.kind] == rule.code] = rule.activation
        active, expected = a > 0, predicted > 0
        counts = [active, active & expected, ~active, ~active & ~expected]
        moments = [np.ones(a.shape), predicted, a, predicted**2, a**2, predicted * a]
        sums = np.stack([each.sum(1, dtype=np.float64) for each in counts + moments], 1)  # [rows, 10]
        accuracy = float(_balanced_accuracy(sums.sum(0)))
        drawn = _draws(len(rows)) @ sums
        low, high = np.nanpercentile(_balanced_accuracy(drawn), (2.5, 97.5))
        correlations = _correlation(drawn)
        known = correlations[np.isfinite(correlations)]
        details: dict[str, Any] = {
            "correlation": _number(_correlation(sums.sum(0))),
            "correlation_low": float(np.percentile(known, 2.5)) if known.size else None,
            "correlation_high": float(np.percentile(known, 97.5)) if known.size else None,
            "contexts": _number(_balanced_accuracy(sums[:contexts].sum(0))),
            "random_text": _number(_balanced_accuracy(sums[contexts:].sum(0))),
            "rules": [{"words": r.words, "active": r.active, "tokens": r.tokens, "mean": r.activation} for r in rules],
        }
        explanation = "; ".join(rule.words for rule in rules) or "no rule was found"
        return Rating(accuracy, float(low), float(high), explanation, details)


def _dense(activations: Mapping[int, tuple[np.ndarray, np.ndarray]], rows: Sequence[int], T: int) -> np.ndarray:
    """[rows, T] of activations."""
    dense = np.zeros((len(rows), T), np.float32)
    for place, row in enumerate(rows):
        positions, values = activations[row]
        dense[place, positions] = values
    return dense


def _balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """From [..., (active, of these expected, not active, of these not expected, ...)]; NaN if one of them is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[..., 1] / sums[..., 0] + sums[..., 3] / sums[..., 2]) / 2


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's, from [..., 4:] sums of 1, x, y, x x, y y, x y; NaN where one does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums[..., 4:], -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)), -1, 1)


def _number(value: np.ndarray) -> float | None:
    return float(value) if math.isfinite(value) else None


@functools.lru_cache(maxsize=8)
def _draws(rows: int) -> np.ndarray:
    """[DRAWS, rows]: how often each row is in each resample."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), DRAWS).astype(float)


def _kinds(tokens: np.ndarray, texts: Mapping[int, str]) -> list[Kind]:
    """All kinds of rules, for tokens [rows, T]."""
    ids, known = np.unique(tokens, return_inverse=True)
    known = known.reshape(tokens.shape).astype(np.int32)
    start = len(ids)  # stands for what lies before the row, or after it
    names = [_quoted(texts[int(token)]) for token in ids] + ["the row's edge"]
    kinds = []
    shifted = {offset: _shifted(known, offset, start) for offset in OFFSETS}
    for offset, place in zip(OFFSETS, PLACES, strict=True):
        kinds.append(Kind(shifted[offset], _namer(place, names)))
        if not offset:
            positions = np.minimum(np.arange(tokens.shape[1]), 8)
            kinds.append(
                Kind(
                    np.broadcast_to(positions, tokens.shape),
                    lambda code: f"at position {code}" if code < 8 else "at position 8 or later",
                )
            )
    for length in (2, 3):
        parts = [shifted[-back] for back in reversed(range(length))]
        flat = functools.reduce(lambda all_, part: all_.astype(np.int64) * (start + 1) + part, parts)
        grams, codes = np.unique(flat, return_inverse=True)

        def gram(code: int, grams: np.ndarray = grams, length: int = length) -> str:
            pieces = [int(grams[code]) // (start + 1) ** back % (start + 1) for back in reversed(range(length))]
            return "on " + " ".join(names[piece] for piece in pieces)

        kinds.append(Kind(codes.reshape(tokens.shape).astype(np.int32), gram))
    for describe, place in ((_word, "on the word"), (_shape, "on")):
        described = [describe(texts[int(token)]) for token in ids]
        values, of_token = np.unique(described, return_inverse=True)
        for offset, where in ((0, place), (-1, f"after{place[2:]}")):
            codes = np.append(of_token, len(values)).astype(np.int32)[shifted[offset]]
            labels = [*values, "the row's edge"]
            kinds.append(Kind(codes, _namer(where, labels)))
    seen = np.zeros(tokens.shape, np.int32)
    for row, line in enumerate(known):
        _, first = np.unique(line, return_index=True)
        seen[row] = 1
        seen[row, first] = 0
    kinds.append(Kind(seen, lambda code: "on a token that the row has before" if code else "on a token that is new"))
    return kinds


def _namer(place: str, names: Sequence[str]) -> Callable[[int], str]:
    """What writes a rule: where the thing is that a code stands for, and its name."""
    return lambda code: f"{place} {names[code]}"


def _shifted(codes: np.ndarray, offset: int, filler: int) -> np.ndarray:
    """The codes at `offset` from each token; `filler` beyond the row."""
    if not offset:
        return codes
    moved = np.full_like(codes, filler)
    if offset < 0:
        moved[:, -offset:] = codes[:, :offset]
    else:
        moved[:, :-offset] = codes[:, offset:]
    return moved


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _word(text: str) -> str:
    """A token without spaces around it, in lower case."""
    return _quoted(text.strip().lower())


def _shape(text: str) -> str:
    """What a token looks like."""
    word = text.strip()
    if not word:
        return "a line end" if "\n" in text else "spaces"
    space = " after a space" if text[:1].isspace() else ""
    if word.isdecimal():
        return "digits" + space
    if word.isalpha():
        kind = "an upper case" if word.isupper() else "a capitalised" if word[:1].isupper() else "a lower case"
        return f"{kind} word{space}"
    if not any(char.isalnum() for char in word):
        return "punctuation" + space
    return "letters with other characters" + space
