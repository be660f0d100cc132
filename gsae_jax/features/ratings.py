"""Ratings of features by raters that run by themselves: a file beside that of the features, which never changes."""

import contextlib
import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gsae_jax.errors import UserError

SUFFIX = ".ratings"
WAIT = 60  # seconds for another process that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS ratings (
    collection TEXT NOT NULL, rater TEXT NOT NULL, feature INTEGER NOT NULL, score REAL NOT NULL, low REAL NOT NULL,
    high REAL NOT NULL, explanation TEXT NOT NULL, details TEXT NOT NULL, PRIMARY KEY (collection, rater, feature)
) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class Rating:
    """How interpretable a feature is, to a rater that runs by itself.

    Attributes:
        score: 0 to 1: balanced accuracy of what the explanation predicts. 0.5 is chance.
        low: lower end of the score's 95% interval.
        high: its upper end.
        explanation: in words.
        details: other numbers, as JSON holds them.
    """

    score: float
    low: float
    high: float
    explanation: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def place(features: Path) -> Path:
    """The file of ratings of the features in a file."""
    return features.with_suffix(SUFFIX)


def read(features: Path, collection: Mapping[str, Any], number: int | None = None) -> dict[str, dict[int, Rating]]:
    """Ratings, by rater and feature; none of features that were collected with other settings.

    Args:
        features: the file of the features.
        collection: its facts of that name.
        number: of the feature; None for all.

    Raises:
        UserError: the file is damaged.
    """
    query = "SELECT rater, feature, score, low, high, explanation, details FROM ratings WHERE collection = ?"
    ratings: dict[str, dict[int, Rating]] = {}
    for rater, feature, score, low, high, explanation, details in _rows(features, collection, query, number):
        rating = Rating(score, low, high, explanation, json.loads(details))
        ratings.setdefault(rater, {})[feature] = rating
    return ratings


def scores(features: Path, collection: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Scores alone, by rater and feature; arguments and errors are those of `read`."""
    numbers: dict[str, dict[int, float]] = {}
    query = "SELECT rater, feature, score FROM ratings WHERE collection = ?"
    for rater, feature, score in _rows(features, collection, query):
        numbers.setdefault(rater, {})[feature] = score
    return numbers


def _rows(features: Path, collection: Mapping[str, Any], query: str, number: int | None = None) -> list[Any]:
    path = place(features)
    if not path.exists():
        return []
    values: list[Any] = [_identity(collection)]
    if number is not None:
        query, values = f"{query} AND feature = ?", [*values, number]
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", WAIT, uri=True)) as db:
            return db.execute(f"{query} ORDER BY rater, feature", values).fetchall()
    except sqlite3.Error as error:
        how = "try again" if "locked" in str(error) else "move it elsewhere"
        raise UserError(f"cannot be read as a file of ratings ({error}); {how}", str(path)) from error


def write(features: Path, collection: Mapping[str, Any], rater: str, ratings: Iterable[tuple[int, Rating]]) -> None:
    """Add ratings of a rater, in place of earlier ones. All are kept, or none.

    Raises:
        sqlite3.Error: they cannot be written.
    """
    identity = _identity(collection)
    rows = [
        (identity, rater, feature, r.score, r.low, r.high, r.explanation, json.dumps(dict(r.details), sort_keys=True))
        for feature, r in ratings
    ]
    with contextlib.closing(sqlite3.connect(place(features), WAIT)) as db, db:
        db.executescript(SCHEMA)
        db.executemany(f"INSERT OR REPLACE INTO ratings VALUES ({', '.join('?' * 8)})", rows)


def _identity(collection: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(collection), sort_keys=True).encode()).hexdigest()
