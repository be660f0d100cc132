"""What was collected of features, for Python: `gsae_jax.features.load(path)`."""

import dataclasses
import functools
import itertools
import json
import logging
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax import errors, rendering
from gsae_jax.errors import UserError
from gsae_jax.features import ratings as ratings_lib
from gsae_jax.features import tables
from gsae_jax.features.ratings import Rating
from gsae_jax.storage.run_directory import Workdir

logger = logging.getLogger(__name__)

FOLDER = "features"  # in a run's directory
PROMOTED = 3  # tokens of a feature's direct effect that stand beside it


@dataclasses.dataclass(frozen=True)
class Context:
    """A place of the text on which a feature is active.

    Attributes:
        row: number of the row in the held-out text.
        position: of the token in its row.
        activation: of the feature on the token.
        quantile: 0 to 9, the part of a random sample, sorted by activation, that it is from; None of the strongest.
        tokens: [T], the texts of the row's tokens.
        activations: [T], of the feature on each of them.
    """

    row: int
    position: int
    activation: float
    quantile: int | None
    tokens: tuple[str, ...]
    activations: np.ndarray

    def __repr__(self) -> str:
        on = self.tokens[self.position]
        return f"<context: {self.activation:.4g} on {on!r}, token {self.position} of row {self.row}>"


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a feature does to one token: to its logit (direct), or its log probability (ablation)."""

    token: int
    text: str
    effect: float


@dataclasses.dataclass(frozen=True)
class Alike:
    """A feature that is like another one.

    Attributes:
        sae: the name of its SAE.
        feature: its number.
        score: cosine of the decoder rows, or Jaccard index of the tokens on which both are active.
    """

    sae: str
    feature: int
    score: float


@dataclasses.dataclass(frozen=True)
class Feature:
    """What is known of one feature. Renders as a card in a notebook.

    Attributes:
        sae: the name of its SAE.
        number: its number.
        numbers: those of `Features.columns`: `fired`, `density`, `strongest`, `divergence`, and facts of the SAE's
            architecture such as `threshold`; None where there is none.
        histogram: [bins], on how many tokens |activation| is in each bin; `Features.bins` has the edges.
        contexts: the strongest, in descending order; and those of quantiles, from the highest quantile.
        effects: by "direct" and "ablation", the tokens that it promotes most, and then those that it suppresses most.
        neighbours: features with similar decoder rows, of its own SAE and of others, by name.
        cofiring: features of its SAE that are active on the same tokens.
        ratings: by raters that run by themselves, by their names.
    """

    sae: str
    number: int
    numbers: Mapping[str, float | None]
    histogram: np.ndarray
    contexts: tuple[Context, ...]
    effects: Mapping[str, tuple[Effect, ...]]
    neighbours: Mapping[str, tuple[Alike, ...]]
    cofiring: tuple[Alike, ...]
    ratings: Mapping[str, Rating]

    def __repr__(self) -> str:
        numbers = [
            f"{name} {value:.4g}" for name in ("density", "strongest") if (value := self.numbers.get(name)) is not None
        ]
        promoted = [repr(each.text) for each in self.effects.get("direct", ()) if each.effect > 0][:PROMOTED]
        promotes = [f"promotes {' '.join(promoted)}"] if promoted else []
        return f"<feature {self.number} of {self.sae}: {', '.join([*numbers, *promotes])}>"

    def _repr_html_(self) -> str:
        """A card for a notebook."""
        return rendering.render("feature_card.html", feature=self)


class Features:
    """The features of one SAE, read from its file as they are asked for."""

    def __init__(self, path: Path):
        """`path`: the file; raises `UserError` if it is none of this format."""
        self._db = tables.opened(path)
        self.path = path
        self.about: dict[str, Any] = tables.about(self._db)

    def __repr__(self) -> str:
        of = self.about["collection"]
        return (
            f"<features of {self.sae}: {len(self)} of {', '.join(of['targets'])}, on {self.about['tokens']:,} tokens>"
        )

    def __len__(self) -> int:
        return int(self.about["collection"]["width"])

    def __getitem__(self, number: int) -> Feature:
        """What is known of a feature; raises `UserError` if there is none of this number."""
        errors.check_kind(number, numbers.Integral, "feature", "the number of a feature")
        if not 0 <= number < len(self):
            raise UserError(f"is {number}; {self.sae} has features 0 to {len(self) - 1}", "feature")
        return self._feature(int(number))

    def __iter__(self) -> Iterator[Feature]:
        return map(self._feature, range(len(self)))

    @property
    def sae(self) -> str:
        """The SAE's name."""
        return str(self.about["collection"]["sae"])

    @property
    def bins(self) -> np.ndarray:
        """The lower edges of the bins of `Feature.histogram`."""
        return np.array(self.about["bins"])

    def ratings(self) -> dict[str, dict[int, Rating]]:
        """All ratings by raters that run by themselves, by rater and feature."""
        return ratings_lib.read(self.path, self.about["collection"])

    def scores(self) -> dict[str, dict[int, float]]:
        """The scores of all ratings, by rater and feature."""
        return ratings_lib.scores(self.path, self.about["collection"])

    def columns(self) -> dict[str, np.ndarray]:
        """Numbers [F] of all features, by name; NaN where there is none. `pandas.DataFrame` takes them.

        The scores of a rater are named `score of RATER`.
        """
        cursor = self._db.execute("SELECT * FROM features ORDER BY feature")
        names = [column[0] for column in cursor.description]
        columns = zip(names, zip(*cursor, strict=True), strict=True)
        numbers = {
            name: np.array(values, None if name in ("feature", "fired") else float)
            for name, values in columns
            if name != "histogram"
        }
        for rater, scores in self.scores().items():
            numbers[f"score of {rater}"] = column = np.full(len(self), np.nan)
            column[list(scores)] = list(scores.values())
        return numbers

    def rows_active(self) -> np.ndarray:
        """[F]: in how many rows each feature has one of its strongest contexts, of which there are a few at most."""
        counts = np.zeros(len(self), int)
        query = "SELECT feature, count(*) FROM contexts WHERE quantile = ? GROUP BY feature"
        for feature, count in self._db.execute(query, (tables.STRONGEST,)):
            counts[feature] = count
        return counts

    def active_on(self, text: str) -> list[int]:
        """Features that have a context whose token is this text, apart from spaces around it."""
        query = (
            "SELECT DISTINCT feature FROM contexts WHERE token IN "
            "(SELECT token FROM tokens WHERE trim(text, ' ' || char(10) || char(9)) = ?) ORDER BY feature"
        )
        return [feature for (feature,) in self._db.execute(query, (text.strip(" \n\t"),))]

    def with_context(self, text: str) -> list[int]:
        """Features that have a context in a row that contains this text, whatever its case."""
        query = (
            "SELECT DISTINCT feature FROM contexts WHERE row IN "
            "(SELECT row FROM rows WHERE instr(lower_case(text), ?)) ORDER BY feature"
        )
        return [feature for (feature,) in self._db.execute(query, (text.lower(),))]

    def promoting(self, text: str, kind: str = "direct") -> list[int]:
        """Features for which this token, apart from spaces around it, is one of those that they promote most.

        `kind`: "direct" or "ablation".
        """
        query = (
            "SELECT DISTINCT feature FROM effects JOIN tokens USING (token) WHERE kind = ? AND effect > 0 "
            "AND trim(text, ' ' || char(10) || char(9)) = ? ORDER BY feature"
        )
        return [feature for (feature,) in self._db.execute(query, (kind, text.strip(" \n\t")))]

    def sample(self) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
        """Rows of text that are evenly spread over the held-out text, with all activations on them.

        Returns:
            Their tokens [rows, T], int32; and for each feature that is active there (places [A] of the tokens in the
            flattened array, activations [A]).
        """
        numbers = self.about["sample_rows"]
        rows = dict(self._db.execute("SELECT row, tokens FROM rows"))
        tokens = np.array([json.loads(rows[number]) for number in numbers], np.int32)
        active = {}
        for feature, pairs in self._db.execute("SELECT feature, active FROM sample"):
            places, values = zip(*json.loads(pairs), strict=True)
            active[feature] = np.array(places), np.array(values, np.float32)
        return tokens, active

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows of text that have a context, or are of the sample: their numbers [rows], and tokens [rows, T]."""
        numbers, tokens = zip(*self._db.execute("SELECT row, tokens FROM rows ORDER BY row"), strict=True)
        return np.array(numbers), np.array([json.loads(row) for row in tokens], np.int32)

    def active_in(self, number: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """For each row in which a feature has a context: (positions [A] of all active tokens, activations [A]).

        Rows of the strongest contexts come first, in descending order.
        """
        query = "SELECT row, active FROM contexts WHERE feature = ? ORDER BY quantile DESC, rank"
        rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for row, active in self._db.execute(query, (number,)):
            if row not in rows:
                pairs = np.array(json.loads(active))
                rows[row] = pairs[:, 0].astype(int), pairs[:, 1].astype(np.float32)
        return rows

    def pieces(self, row: int) -> list[str]:
        """The text of a row in parts, one for each token; a character of several tokens is of the last of them.

        In files of earlier versions, each part of such a character is "�".
        """
        ((_, tokens, text, *ends),) = self._db.execute("SELECT * FROM rows WHERE row = ?", (row,))
        if not any(ends):
            return [self.texts[token] for token in json.loads(tokens)]
        return [text[start:end] for start, end in itertools.pairwise([0, *json.loads(ends[0])])]

    @functools.cached_property
    def texts(self) -> Mapping[int, str]:
        """The text of each token that occurs in rows or effects."""
        return dict(self._db.execute("SELECT token, text FROM tokens"))

    def words(self, promoted: int = PROMOTED) -> tuple[list[str | None], list[tuple[str, ...]]]:
        """For all features: the token on which each is strongest (None if there is none), and what it promotes most.

        `promoted`: how many tokens of the direct effect.
        """
        on = self._db.execute(
            "SELECT text FROM features LEFT JOIN contexts ON contexts.feature = features.feature AND quantile = ? "
            "AND rank = 0 LEFT JOIN tokens USING (token) ORDER BY features.feature",
            (tables.STRONGEST,),
        )
        promotes: list[tuple[str, ...]] = [()] * len(self)
        query = (
            "SELECT feature, text FROM effects JOIN tokens USING (token) WHERE kind = 'direct' AND rank < ? "
            "AND effect > 0 ORDER BY feature, rank"
        )
        for feature, text in self._db.execute(query, (promoted,)):
            promotes[feature] = (*promotes[feature], text)
        return [text for (text,) in on], promotes

    def nearest(self, sae: str) -> dict[int, Alike]:
        """For each feature, the one of another SAE with the most similar decoder row; empty if none was looked for."""
        query = "SELECT feature, sae, other, cosine FROM neighbours WHERE sae = ? AND rank = 0 ORDER BY feature"
        return {feature: Alike(*row) for feature, *row in self._db.execute(query, (sae,))}

    def index(self) -> dict[str, Any]:
        """What `active_on`, `promoting` and `with_context` look in: features by token text, and by text of a row."""
        stripped = "trim(text, ' ' || char(10) || char(9))"
        tokens: dict[str, dict[str, list[int]]] = {"active_on": {}, "promoting": {}}
        for name, query in (
            ("active_on", f"SELECT DISTINCT {stripped}, feature FROM contexts JOIN tokens USING (token)"),
            (
                "promoting",
                f"SELECT DISTINCT {stripped}, feature FROM effects JOIN tokens USING (token) WHERE kind = 'direct' "
                "AND effect > 0",
            ),
        ):
            for text, feature in self._db.execute(f"{query} ORDER BY 1, 2"):
                tokens[name].setdefault(text, []).append(feature)
        rows: dict[int, tuple[str, list[int]]] = {
            row: (text, []) for row, text in self._db.execute("SELECT row, text FROM rows ORDER BY row")
        }
        for row, feature in self._db.execute("SELECT DISTINCT row, feature FROM contexts ORDER BY row, feature"):
            rows[row][1].append(feature)
        return {**tokens, "with_context": [pair for pair in rows.values() if pair[1]]}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _feature(self, number: int) -> Feature:
        cursor = self._db.execute("SELECT * FROM features WHERE feature = ?", (number,))
        numbers = dict(zip((column[0] for column in cursor.description), cursor.fetchone(), strict=True))
        histogram = np.zeros(len(self.bins), int)
        for place, count in json.loads(numbers.pop("histogram")):
            histogram[place] = count
        del numbers["feature"]
        effects: dict[str, tuple[Effect, ...]] = {}
        query = "SELECT token, text, effect FROM effects JOIN tokens USING (token) WHERE feature = ? AND kind = ?"
        for kind in ("direct", "ablation"):
            rows = self._db.execute(f"{query} ORDER BY rank", (number, kind))
            effects[kind] = tuple(Effect(*row) for row in rows)
        neighbours: dict[str, tuple[Alike, ...]] = {}
        for sae, other, cosine in self._db.execute(
            "SELECT sae, other, cosine FROM neighbours WHERE feature = ? ORDER BY sae, rank", (number,)
        ):
            neighbours[sae] = (*neighbours.get(sae, ()), Alike(sae, other, cosine))
        rows = self._db.execute("SELECT other, jaccard FROM cofiring WHERE feature = ? ORDER BY rank", (number,))
        cofiring = tuple(Alike(self.sae, *row) for row in rows)
        by_rater = ratings_lib.read(self.path, self.about["collection"], number)
        ratings = {rater: each[number] for rater, each in by_rater.items()}
        contexts = tuple(self._contexts(number))
        return Feature(self.sae, number, numbers, histogram, contexts, effects, neighbours, cofiring, ratings)

    def _contexts(self, number: int) -> Iterator[Context]:
        rows = self._db.execute(
            "SELECT row, position, activation, quantile, active, tokens FROM contexts JOIN rows USING (row) "
            "WHERE feature = ? ORDER BY quantile DESC, rank",
            (number,),
        ).fetchall()
        for row, position, activation, quantile, active, tokens in rows:
            ids = json.loads(tokens)
            activations = np.zeros(len(ids), np.float32)
            for at, value in json.loads(active):
                activations[at] = value
            texts = tuple(self.texts[token] for token in ids)
            of_sample = None if quantile == tables.STRONGEST else quantile
            yield Context(row, position, activation, of_sample, texts, activations)


def load(path: str | os.PathLike[str]) -> dict[str, Features]:
    """The features that `python -m gsae_jax.collect` has collected, by the names of their SAEs.

    Warns if the run has been trained further since.

    Args:
        path: the directory of a run, the folder that `--out` named, or one file of it.

    Raises:
        UserError: there are none, or a file is not of this format.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        folder = place / FOLDER if (place / FOLDER).is_dir() else place
        files: Sequence[Path] = sorted(
            file for file in folder.glob(f"*{tables.SUFFIX}") if not file.name.startswith(".")
        )
    else:
        files = [place] if place.exists() else []
    if not files:
        how = f"run `python -m gsae_jax.collect --workdir {path}` first" if place.exists() else "write another path"
        raise UserError(f"{path} has no collected features; {how}", "path")
    features = [Features(file) for file in files]
    _warn_of_other_steps(features)
    return {each.sae: each for each in features}


def _warn_of_other_steps(features: Sequence[Features]) -> None:
    """Warns of features in a run's directory that are of another checkpoint than its newest."""
    folder = features[0].path.absolute().parent
    run = Workdir(folder.parent)
    if folder.name != FOLDER or not run.holds_run():
        return
    newest = run.latest_step()
    others = sorted({each.about["collection"].get("step", newest) for each in features} - {newest, None})
    if newest is not None and others:
        steps = " and ".join(map(str, others))
        logger.warning(
            f"features in {folder} are of the checkpoint at step {steps}, and the newest of the run is at {newest}; "
            f"`python -m gsae_jax.collect --workdir {folder.parent} --overwrite` collects those of the newest"
        )
