"""What tests of the pages over collected features have in common."""

import contextlib
import json
import sqlite3
import threading

from gsae_jax.features import tables
from gsae_jax.web import server as web

HERE = {"Host": "127.0.0.1:8000"}
OURS = {**HERE, "Origin": "http://127.0.0.1:8000"}
HOSTILE = "</script><img src=x onerror=alert(1)>"


@contextlib.contextmanager
def serving(app):
    """A real server, and its port."""
    listening = web.listening(app, "127.0.0.1", 0)
    thread = threading.Thread(target=listening.run, daemon=True)
    thread.start()
    try:
        yield listening.effective_port
    finally:
        listening.trigger.pull_trigger(listening.close)  # in its own thread
        thread.join(30)
        listening.task_dispatcher.shutdown()
        assert not thread.is_alive()


def change_about(path, **facts):
    """Change facts of the collection in a file."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        ((about,),) = db.execute("SELECT value FROM about WHERE name = 'collection'")
        changed = json.dumps(json.loads(about) | facts)
        db.execute("UPDATE about SET value = ? WHERE name = 'collection'", (changed,))
    return json.loads(about)


def with_texts(path, text):
    """Give all tokens and rows of a file one text."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE tokens SET text = ?", (text,))
        db.execute("UPDATE rows SET text = ?", (text,))


def widened(path, place, width):
    """A copy of a file in which the features repeat until there are `width`."""
    place.write_bytes(path.read_bytes())
    with contextlib.closing(sqlite3.connect(place)) as db, db:
        ((count,),) = db.execute("SELECT count(*) FROM features")
        for table in ("features", "contexts", "effects", "neighbours", "cofiring"):
            names = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[1] != "feature"]
            others = ", ".join(names)
            for start in range(count, width, count):
                db.execute(
                    f"INSERT INTO {table} (feature, {others}) SELECT feature + ?, {others} FROM {table} "
                    "WHERE feature < ? AND feature + ? < ?",
                    (start, count, start, width),
                )
    change_about(place, width=width)
    assert tables.known(place)["width"] == width


def get(client, path, status=200, headers=HERE):
    response = client.get(path, headers=headers)
    assert response.status_code == status, (path, response.status_code, response.text[:300])
    return response.text
