"""What the tests of the blinded study share."""

import contextlib
import re
import sqlite3

from gsae_jax import studying
from gsae_jax.rating import server
from gsae_jax.rating.study import PERSON
from tests.viewed import OURS, get

FORM = "application/x-www-form-urlencoded"


def wanted(run, first="gated", second="baseline", pairs=3, raters=2, **more):
    return studying.Wanted([str(run)], first, second, pairs, raters, **more)


class Rater:
    """Asks a study's server as one person, without a network."""

    def __init__(self, study, number=0):
        self.client = server.application(study).test_client()
        self.person = study.raters(PERSON)[number]
        self.base = f"/r/{self.person.token}/"

    def get(self, path="", status=200):
        return get(self.client, f"{self.base}{path}", status)

    def save(self, place, explanation="", choice="", go="next", version=0):
        body = {"explanation": explanation, "choice": choice, "go": go, "version": version}
        return self.client.post(f"{self.base}{place}", data=body, headers=OURS)


def typed(page):
    """What the form of a page has: explanation, choice, version."""
    text = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page, re.DOTALL)[1]
    checked = re.search(r'value="(\w+)" checked', page)
    return text, checked and checked[1], int(re.search(r'name="version" value="(\d+)"', page)[1])


def files(study):
    """All that the file has, without the links."""
    with contextlib.closing(sqlite3.connect(study.path)) as db:
        return {
            table: db.execute(f"SELECT {columns} FROM {table} ORDER BY 1, 2").fetchall()
            for table, columns in (("items", "*"), ("orders", "*"), ("raters", "rater, kind, name"))
        }
