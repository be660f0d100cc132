"""Which features a study compares: pairs of one language model and one site, from two SAEs of nearly the same L0."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gsae_jax.errors import UserError, known_names
from gsae_jax.features import Features

FEWEST = 5  # rows on which a feature is active; with fewer, a rater sees too little
TEXT = ("text", "text_fingerprint", "rows", "context_length", "special_tokens_excluded")  # facts of a collection


@dataclasses.dataclass(frozen=True)
class Source:
    """An SAE with collected features.

    Attributes:
        run: the path of its run, as the user wrote it.
        features: what was collected.
    """

    run: str
    features: Features

    @property
    def about(self) -> Mapping[str, Any]:
        """Facts of the SAE and of the collection."""
        facts: Mapping[str, Any] = self.features.about["collection"]
        return facts

    @property
    def names(self) -> tuple[str, str]:
        """That of its stack, and its own."""
        return self.about["stack"], self.about["sae"]

    @property
    def place(self) -> tuple[str, str, tuple[str, ...]]:
        """Its language model, by name and by fingerprint, and the sites that it predicts."""
        fingerprint = json.dumps(self.about["language_model"], sort_keys=True)
        return self.about["model"], fingerprint, tuple(self.about["targets"])

    def l0(self) -> float:
        """How many of its features are active on a token, on average."""
        return float(self.features.columns()["density"].sum())

    def alive(self) -> np.ndarray:
        """Numbers of the features that are active in at least `FEWEST` rows."""
        return np.flatnonzero((self.features.columns()["fired"] > 0) & (self.features.rows_active() >= FEWEST))

    def draw(self, seed: int) -> np.ndarray:
        """All of `alive` in random order, which depends on the seed and on this SAE alone."""
        digest = hashlib.sha256(self.about["parameters"].encode()).digest()
        return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")]).permutation(self.alive())


@dataclasses.dataclass(frozen=True)
class Group:
    """Pairs of features of one language model and one site.

    Attributes:
        model: the name of the language model.
        target: the site that both SAEs predict; of several, the last.
        sources: the SAEs of the first and of the second side.
        l0: of both.
        alive: how many features of both could be drawn.
        pairs: [pairs, 2], numbers of features.
    """

    model: str
    target: str
    sources: tuple[Source, Source]
    l0: tuple[float, float]
    alive: tuple[int, int]
    pairs: np.ndarray

    @property
    def layer(self) -> int:
        """Of the site; 0 if its name has none."""
        return _parts(self.target)[0]

    @property
    def site(self) -> str:
        """The site's name without its layer."""
        return _parts(self.target)[1]


def _parts(target: str) -> tuple[int, str]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", target)
    return (int(match[1]), match[2]) if match else (0, target)


def choose(
    runs: Mapping[str, Mapping[str, Features]], first: str, second: str, count: int | None = None, seed: int = 0
) -> list[Group]:
    """Pairs of features at every site where both sides have an SAE.

    At each site, the SAEs of the two sides are those with the nearest L0. Features are drawn among those that are
    alive, at random and none twice.

    Args:
        runs: collected features by run and by SAE.
        first: the side that is expected to be better: the name of a stack or of an SAE, or RUN:NAME.
        second: the other side.
        count: pairs of each group; None for as many as there are.
        seed: of the draw. A larger count with the same seed adds pairs to those of a smaller one.

    Raises:
        UserError: there is no such side, no site has both, it is not clear which SAE is meant, the two were collected
            on different text, or there are too few features.
    """
    every = [Source(run, each) for run, saes in runs.items() for each in saes.values()]
    sides = (_named(every, first, "--first"), _named(every, second, "--second"))
    _check_models(every)
    places = sorted({source.place for source in sides[0]} & {source.place for source in sides[1]})
    if not places:
        theirs = [", ".join(sorted({f"{s.place[0]} {' '.join(s.place[2])}" for s in side})) for side in sides]
        why = f"has SAEs of {theirs[1]}, and {first} of {theirs[0]}: no language model and site has both sides"
        raise UserError(f"{why}; write one that has the same site", "--second")
    return [_group(place, sides, (first, second), count, seed) for place in places]


def _named(every: Sequence[Source], name: str, field: str) -> list[Source]:
    """The SAEs that a side's name means."""
    found = [source for source in every if name in source.names]
    run, colon, rest = name.rpartition(":")
    if not found and colon:
        found = [source for source in every if rest in source.names and run.rstrip("/") == source.run.rstrip("/")]
    if not found:
        known = dict.fromkeys(each for source in every for each in source.names if each)
        why = f"{name!r} is no stack and no SAE with collected features; {known_names(name, known)}"
        raise UserError(f"{why}; `python -m gsae_jax.collect` collects others", field)
    return found


def _check_models(every: Sequence[Source]) -> None:
    """Raises `UserError` for different language models of one name, which statistics could not tell apart."""
    fingerprints: dict[str, str] = {}
    for source in every:
        name, fingerprint, _ = source.place
        if fingerprints.setdefault(name, fingerprint) != fingerprint:
            raise UserError(
                f"have two language models that are both called {name}; write runs of one of them", "--runs"
            )


def _group(
    place: tuple[str, str, tuple[str, ...]],
    sides: tuple[list[Source], list[Source]],
    names: tuple[str, str],
    count: int | None,
    seed: int,
) -> Group:
    """The pairs of one language model and site."""
    model, _, targets = place
    here = [[source for source in side if source.place == place] for side in sides]
    for side, name, field in zip(here, names, ("--first", "--second"), strict=True):
        if len(among := {source.run for source in side}) > 1:
            both = " or ".join(f"{run}:{name}" for run in sorted(among))
            raise UserError(
                f"{name!r} is in several runs with SAEs of {model} {' '.join(targets)}; write {both}", field
            )
    l0 = {id(source): source.l0() for side in here for source in side}
    possible = [
        both
        for both in itertools.product(here[0], here[1])
        if both[0].about["parameters"] != both[1].about["parameters"] and all(l0[id(source)] > 0 for source in both)
    ]
    if not possible:
        why = f"has at {targets[-1]} the same SAE as --first, or none of the two has an active feature"
        raise UserError(f"{why}; write the name of another one", "--second")
    sources = min(
        possible, key=lambda both: (abs(math.log(l0[id(both[0])]) - math.log(l0[id(both[1])])), *_order(both))
    )
    differing = [fact for fact in TEXT if sources[0].about.get(fact) != sources[1].about.get(fact)]
    if differing:
        saes = " and ".join(source.about["sae"] for source in sources)
        why = f"have {saes}, which were collected on different text ({', '.join(differing)})"
        raise UserError(f"{why}, by which raters could tell them apart; collect both on the same text", "--runs")
    drawn = [source.draw(seed) for source in sources]
    most = min(map(len, drawn))
    if count is None:
        count = most
    if not most or count > most:
        fewest = min(zip(map(len, drawn), (source.about["sae"] for source in sources), strict=True))
        why = f"{fewest[1]} has {fewest[0]:,} at {targets[-1]} that are active in at least {FEWEST} rows"
        how = "write fewer pairs, or fewer people" if most else "collect more tokens"
        raise UserError(f"need {count:,} features of each SAE for all raters together, and {why}; {how}", "--pairs")
    pairs = np.stack([numbers[:count] for numbers in drawn], axis=1)
    both_l0 = (l0[id(sources[0])], l0[id(sources[1])])
    return Group(model, targets[-1], sources, both_l0, (len(drawn[0]), len(drawn[1])), pairs)


def _order(both: Sequence[Source]) -> list[str]:
    """Decides between pairs of SAEs with equally near L0, whichever side is the first."""
    return sorted(source.about["sae"] for source in both)
