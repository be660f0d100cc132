"""The file with what is known of the features of one SAE: an SQLite database, which `docs/features.md` describes.

SQLite, because a page reads one feature of many, search needs indices, Python has it, and what is written counts as a
whole or not at all, so that a collection goes on where it was stopped.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax.errors import UserError

FORMAT = 1
SUFFIX = ".sqlite"
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS features (
    feature INTEGER PRIMARY KEY, fired INTEGER NOT NULL, density REAL NOT NULL, strongest REAL NOT NULL,
    histogram TEXT NOT NULL, divergence REAL
);
CREATE TABLE IF NOT EXISTS rows (row INTEGER PRIMARY KEY, tokens TEXT NOT NULL, text TEXT NOT NULL, ends TEXT);
CREATE TABLE IF NOT EXISTS tokens (token INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS contexts (
    feature INTEGER NOT NULL, quantile INTEGER NOT NULL, rank INTEGER NOT NULL, row INTEGER NOT NULL,
    position INTEGER NOT NULL, token INTEGER NOT NULL, activation REAL NOT NULL, active TEXT NOT NULL,
    PRIMARY KEY (feature, quantile, rank)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS effects (
    feature INTEGER NOT NULL, kind TEXT NOT NULL, rank INTEGER NOT NULL, token INTEGER NOT NULL, effect REAL NOT NULL,
    PRIMARY KEY (feature, kind, rank)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS neighbours (
    feature INTEGER NOT NULL, sae TEXT NOT NULL, rank INTEGER NOT NULL, other INTEGER NOT NULL, cosine REAL NOT NULL,
    PRIMARY KEY (feature, sae, rank)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sample (feature INTEGER PRIMARY KEY, active TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cofiring (
    feature INTEGER NOT NULL, rank INTEGER NOT NULL, other INTEGER NOT NULL, both INTEGER NOT NULL,
    jaccard REAL NOT NULL, PRIMARY KEY (feature, rank)
) WITHOUT ROWID;
"""
# Made last, as they slow down writing.
INDICES = """
CREATE INDEX IF NOT EXISTS contexts_of_rows ON contexts (row);
CREATE INDEX IF NOT EXISTS contexts_of_tokens ON contexts (token);
CREATE INDEX IF NOT EXISTS effects_of_tokens ON effects (token, kind);
"""
STRONGEST = 10  # the `quantile` of the strongest contexts, above those of the sample, 0 to 9


class Writer:
    """A database that is being written. What was written before the last `commit` stays if the process is killed."""

    def __init__(self, path: Path, facts: Sequence[str] = ()):
        """Opens a new file, or one that was begun with the same `facts`, the names of numbers of features."""
        self._db = sqlite3.connect(path)
        # The file appears under its name when it is whole, so a crash of the machine loses a collection at most.
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.executescript(_schema(facts))

    def about(self) -> dict[str, Any]:
        """The facts of the file."""
        return about(self._db)

    def state(self, **facts: Any) -> None:
        """Write facts of the file, in place of earlier ones of these names."""
        pairs = [(name, json.dumps(value, sort_keys=True)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", pairs)

    def insert(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        """Insert rows; those that are there already stay."""
        rows = list(rows)
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", rows)

    def execute(self, query: str, *values: Any) -> list[Any]:
        """The rows of a statement."""
        return self._db.execute(query, values).fetchall()

    def commit(self) -> None:
        """Keep what was written."""
        self._db.commit()

    def finish(self, place: Path) -> None:
        """Make the indices, and put the whole file in its place."""
        self._db.executescript(INDICES)
        self._db.execute("PRAGMA optimize")
        self._db.commit()
        (path,) = [Path(file) for _, name, file in self._db.execute("PRAGMA database_list") if name == "main"]
        self._db.close()
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        path.replace(place)

    def close(self) -> None:
        """Close the file, without what was not kept."""
        self._db.close()


def opened(path: Path) -> sqlite3.Connection:
    """A finished file, to be read.

    Raises:
        UserError: it is not one of this format.
    """
    try:
        # `immutable`: nobody writes to it, so that it can be read from where nothing can be written.
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        db.create_function("lower_case", 1, str.lower, deterministic=True)  # SQLite's own is for ASCII only
        version = about(db).get("format")
    except (sqlite3.Error, ValueError) as error:
        raise UserError(f"cannot be read as a file of features ({error}); collect it again", str(path)) from error
    if version != FORMAT:
        known = f"has format {version!r}, and this version reads {FORMAT}"
        raise UserError(f"{known}; collect it again, or install the version that wrote it", str(path))
    return db


def known(path: Path) -> Any:
    """The facts that a finished file was collected with; None if there is no file.

    Raises:
        UserError: as `opened`.
    """
    if not path.exists():
        return None
    db = opened(path)
    try:
        return about(db)["collection"]
    finally:
        db.close()


def begun(path: Path, facts: Sequence[str]) -> Any:
    """What a file that is being written was collected with.

    None if it cannot be read, has nothing yet, or has other columns than a new file with these `facts` of features.
    """
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
    with contextlib.closing(sqlite3.connect(path)) as db, contextlib.closing(sqlite3.connect(":memory:")) as new:
        new.executescript(_schema(facts))
        try:
            return about(db).get("collection") if [*db.execute(query)] == [*new.execute(query)] else None
        except (sqlite3.Error, ValueError):
            return None


def _schema(facts: Sequence[str]) -> str:
    """SQL of the tables; `facts`: names of numbers of features."""
    columns = "".join(f', "{name}" REAL' for name in facts)
    return SCHEMA.replace("divergence REAL", f"divergence REAL{columns}")


def about(db: sqlite3.Connection) -> dict[str, Any]:
    """The facts of a file, by name."""
    return {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM about")}


def pairs(first: Iterable[Any], second: np.ndarray) -> str:
    """JSON of pairs of an integer and a number; a float32 is written with as few digits as give it back."""
    both = zip(np.asarray(first).tolist(), second, strict=True)
    return "[" + ",".join(f"[{a},{b!s}]" for a, b in both) + "]"
