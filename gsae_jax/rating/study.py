"""The file of a study: what raters see, in which order, and what they answered.

SQLite, with a rollback journal and `synchronous = EXTRA`: an answer is on the disk before it counts as saved, also when
the machine loses its power.
"""

import contextlib
import dataclasses
import datetime
import hmac
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gsae_jax.errors import UserError
from gsae_jax.rating.statistics import Paired

FORMAT = 1
FILE = "study.sqlite"
FIRST, SECOND = "first", "second"  # sides
PERSON, AUTOMATIC = "person", "automatic"  # kinds of raters
SCORES = {"yes": 2.0, "maybe": 1.0, "no": 0.0}  # of people
WAIT = 30  # seconds for another process that writes
VERSION = """
    rater INTEGER NOT NULL REFERENCES raters, item INTEGER NOT NULL REFERENCES items, version INTEGER NOT NULL,
    score REAL NOT NULL, explanation TEXT NOT NULL, details TEXT NOT NULL, time TEXT NOT NULL
"""
SCHEMA = f"""
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
    item INTEGER PRIMARY KEY, pair INTEGER NOT NULL, side TEXT NOT NULL, path TEXT NOT NULL, sae TEXT NOT NULL,
    feature INTEGER NOT NULL, model TEXT NOT NULL, site TEXT NOT NULL, layer INTEGER NOT NULL, page TEXT,
    UNIQUE (pair, side)
);
CREATE TABLE raters (rater INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT UNIQUE, token TEXT UNIQUE);
CREATE TABLE orders (
    rater INTEGER NOT NULL REFERENCES raters, place INTEGER NOT NULL, item INTEGER NOT NULL REFERENCES items,
    PRIMARY KEY (rater, place)
) WITHOUT ROWID;
CREATE TABLE answers ({VERSION}, PRIMARY KEY (rater, item)) WITHOUT ROWID;
CREATE TABLE history ({VERSION}, PRIMARY KEY (rater, item, version)) WITHOUT ROWID;
CREATE TABLE drafts (
    rater INTEGER NOT NULL REFERENCES raters, item INTEGER NOT NULL REFERENCES items, version INTEGER NOT NULL,
    choice TEXT NOT NULL, explanation TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (rater, item)
) WITHOUT ROWID;
"""


class Changed(Exception):
    """An answer was saved elsewhere since the rater saw it, so that it is not replaced."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One feature of the study.

    Attributes:
        item: its number in the study.
        pair: number of the pair.
        side: `first` or `second`.
        path: the file of collected features, as it was when the study was made.
        sae: name of the SAE.
        feature: its number in the SAE.
        model: name of the language model.
        site: the site's name without the layer.
        layer: of the site.
        page: JSON of what people see of it (`gsae_jax.rating.pages.page`); None if no person rates it.
    """

    item: int
    pair: int
    side: str
    path: str
    sae: str
    feature: int
    model: str
    site: str
    layer: int
    page: str | None


@dataclasses.dataclass(frozen=True)
class Rater:
    """A person, or a program, that rates.

    Attributes:
        rater: its number, from 1.
        kind: `person` or `automatic`.
        name: of a program; None for people, who have none.
        token: the secret part of a person's link; None for programs.
    """

    rater: int
    kind: str
    name: str | None
    token: str | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a rater said of an item.

    Attributes:
        rater: number of the rater.
        item: number of the item.
        version: 1 for the first, and one more whenever it was changed.
        score: of people 2, 1 or 0 for yes, maybe and no; of programs what they give.
        explanation: what activates the feature, in words.
        details: other numbers, as JSON holds them.
        time: when it was saved, ISO 8601, UTC.
    """

    rater: int
    item: int
    version: int
    score: float
    explanation: str
    details: Mapping[str, Any]
    time: str


@dataclasses.dataclass(frozen=True)
class Draft:
    """What a person wrote before all was answered.

    Attributes:
        version: as of `Answer`, and counted together with answers.
        choice: `yes`, `maybe` or `no`; "" if none was chosen.
        explanation: so far.
    """

    version: int
    choice: str
    explanation: str


def create(
    folder: Path,
    about: Mapping[str, Any],
    items: Sequence[Item],
    tokens: Sequence[str],
    orders: Sequence[Sequence[int]],
) -> None:
    """Write the file of a new study into a folder.

    Args:
        folder: where no study is.
        about: facts of the study, which JSON holds.
        items: all features.
        tokens: the secret parts of the links, one for each person.
        orders: the numbers of the items that each person rates, in order.
    """
    (folder / FILE).touch(0o600)  # links are secret, and so is what each feature is
    with contextlib.closing(sqlite3.connect(folder / FILE)) as db:
        db.execute("PRAGMA synchronous = EXTRA")
        db.executescript(SCHEMA)
        with db:
            facts = {**about, "format": FORMAT}
            db.executemany("INSERT INTO about VALUES (?, ?)", [(key, json.dumps(facts[key])) for key in sorted(facts)])
            db.executemany(f"INSERT INTO items VALUES ({', '.join('?' * 10)})", map(dataclasses.astuple, items))
            for rater, (token, order) in enumerate(zip(tokens, orders, strict=True), 1):
                db.execute("INSERT INTO raters VALUES (?, ?, NULL, ?)", (rater, PERSON, token))
                db.executemany("INSERT INTO orders VALUES (?, ?, ?)", [(rater, *pair) for pair in enumerate(order, 1)])


class Study:
    """A study that is read and answered. Threads may share it, and several processes may have it open at once."""

    def __init__(self, folder: Path | str):
        """`folder`: of the study; raises `UserError` if it holds none."""
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            raise UserError(f"{folder} holds no study; write the folder that `study new` made", "STUDY")
        self.path = path
        self._lock = threading.RLock()
        try:
            uri = f"{path.absolute().as_uri()}?mode=rw"
            self._db = sqlite3.connect(uri, WAIT, uri=True, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA synchronous = EXTRA")
            self._db.execute("PRAGMA foreign_keys = ON")
            facts = self._rows("SELECT name, value FROM about")
            for table in ("items", "raters", "orders", "answers", "history", "drafts"):
                self._rows(f"SELECT 1 FROM {table} LIMIT 1")
            self.about: dict[str, Any] = {name: json.loads(value) for name, value in facts}
        except (sqlite3.Error, ValueError) as error:
            raise UserError(f"{path} cannot be read as a study ({error})", "STUDY") from error
        if self.about.get("format") != FORMAT:
            how = "install the version that made it"
            raise UserError(
                f"{path} has format {self.about.get('format')!r}, and this version reads {FORMAT}; {how}", "STUDY"
            )

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which is on the disk when it ends; raises `sqlite3.Error` if it cannot be written."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def items(self) -> list[Item]:
        """All items, by number."""
        return [Item(*row) for row in self._rows("SELECT * FROM items ORDER BY item")]

    def page(self, item: int) -> dict[str, Any]:
        """What people see of an item, as of `gsae_jax.rating.pages.page`."""
        ((page,),) = self._rows("SELECT page FROM items WHERE item = ?", item)
        value: dict[str, Any] = json.loads(page)
        return value

    def raters(self, kind: str) -> list[Rater]:
        """The people, or the programs."""
        return [Rater(*row) for row in self._rows("SELECT * FROM raters WHERE kind = ? ORDER BY rater", kind)]

    def person(self, token: str) -> Rater | None:
        """Whose link has this token; None if it is nobody's."""
        given = token.encode()
        return next(
            (each for each in self.raters(PERSON) if hmac.compare_digest((each.token or "").encode(), given)), None
        )

    def order(self, rater: int) -> list[int]:
        """The numbers of the items that a person rates, in the order in which they are shown."""
        return [item for (item,) in self._rows("SELECT item FROM orders WHERE rater = ? ORDER BY place", rater)]

    def add_rater(self, name: str) -> int:
        """The number of the program that is called so. It is added if there is none."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO raters VALUES (NULL, ?, ?, NULL)", (AUTOMATIC, name))
            ((rater,),) = db.execute("SELECT rater FROM raters WHERE name = ?", (name,))
        return int(rater)

    def answers(self, rater: int | None = None) -> list[Answer]:
        """The last version of all answers, or of those of one rater, by rater and item."""
        return self._answers("answers", rater)

    def earlier_answers(self, rater: int | None = None) -> list[Answer]:
        """Versions of answers that were changed since, by rater, item and version."""
        return self._answers("history", rater)

    def _answers(self, table: str, rater: int | None) -> list[Answer]:
        of = () if rater is None else (rater,)
        rows = self._rows(f"SELECT * FROM {table} {'WHERE rater = ?' * len(of)} ORDER BY rater, item, version", *of)
        return list(map(_answer, rows))

    def answered(self, rater: int) -> set[int]:
        """The items that a rater has answered."""
        return {item for (item,) in self._rows("SELECT item FROM answers WHERE rater = ?", rater)}

    def said(self, rater: int, item: int) -> Answer | Draft | None:
        """What a rater said of an item: an answer, or what was written before; None if there is nothing."""
        with self._lock:
            rows = self._rows("SELECT * FROM answers WHERE rater = ? AND item = ?", rater, item)
            if rows:
                return _answer(rows[0])
            query = "SELECT version, choice, explanation FROM drafts WHERE rater = ? AND item = ?"
            return next((Draft(*row) for row in self._rows(query, rater, item)), None)

    def answer(
        self,
        rater: int,
        item: int,
        score: float,
        explanation: str,
        details: Mapping[str, Any] | None = None,
        seen: int | None = None,
    ) -> None:
        """Save an answer. What it replaces goes to the history.

        Args:
            rater: its number.
            item: number of the item.
            score: as of `Answer`.
            explanation: as of `Answer`.
            details: as of `Answer`.
            seen: the version that the rater has seen, 0 if there was none; None replaces whatever there is.

        Raises:
            Changed: there is another version than the one that was `seen`; nothing is saved.
            sqlite3.Error: it cannot be written.
        """
        texts = _texts(explanation, details or {})
        with self._writing() as db:
            version = self._next(rater, item, seen)
            db.execute("INSERT INTO history SELECT * FROM answers WHERE rater = ? AND item = ?", (rater, item))
            db.execute("DELETE FROM drafts WHERE rater = ? AND item = ?", (rater, item))
            values = (rater, item, version, float(score), *texts, _now())
            db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def answer_all(self, rater: int, answers: Sequence[tuple[int, float, str, Mapping[str, Any]]]) -> None:
        """Save several answers of a program that has not answered these items: (item, score, explanation, details).

        Raises:
            sqlite3.Error: they cannot be written; then none is.
        """
        rows = [
            (rater, item, 1, float(score), *_texts(text, details), _now()) for item, score, text, details in answers
        ]
        if rows:
            with self._writing() as db:
                db.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def draft(self, rater: int, item: int, choice: str, explanation: str, seen: int) -> None:
        """Keep what a person wrote of an item that is not answered yet; arguments and errors are those of `answer`."""
        with self._writing() as db:
            values = (rater, item, self._next(rater, item, seen), choice, explanation, _now())
            db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?, ?, ?, ?)", values)

    def _next(self, rater: int, item: int, seen: int | None) -> int:
        """The number of the next version."""
        said = self.said(rater, item)
        version = said.version if said else 0
        if seen is not None and seen != version:
            raise Changed
        return version + 1

    def ratings(self) -> dict[str, list[Paired]]:
        """Pairs of which a rater has rated both features, by the kind of the rater: `person` and `automatic`."""
        query = (
            "SELECT kind, a.rater, pair, a.score, b.score, one.model, one.layer, one.site FROM items one "
            "JOIN items other USING (pair) JOIN answers a ON a.item = one.item "
            "JOIN answers b ON b.item = other.item AND b.rater = a.rater JOIN raters ON raters.rater = a.rater "
            "WHERE one.side = ? AND other.side = ? ORDER BY a.rater, pair"
        )
        ratings: dict[str, list[Paired]] = {PERSON: [], AUTOMATIC: []}
        for kind, rater, pair, first, second, model, layer, site in self._rows(query, FIRST, SECOND):
            ratings[kind].append(Paired(pair, model, layer, site, rater, first, second))
        return ratings


def _answer(row: Sequence[Any]) -> Answer:
    rater, item, version, score, explanation, details, time = row
    return Answer(rater, item, version, score, explanation, json.loads(details), time)


def _texts(explanation: str, details: Mapping[str, Any]) -> tuple[str, str]:
    """An explanation and the JSON of details."""
    return explanation, json.dumps(dict(details), allow_nan=False, ensure_ascii=False)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
