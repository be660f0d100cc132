"""The server of the pages: what it answers."""

from collections.abc import Callable
from typing import Any

import flask

from gsae_jax.errors import UserError
from gsae_jax.viewer import library as library_lib
from gsae_jax.viewer.live import Live
from gsae_jax.viewer.pages import Links, Pages
from gsae_jax.web import server as web


def application(pages: Pages, live: Callable[[], Live] | None, host: str = "127.0.0.1", token: str = "") -> flask.Flask:
    """The pages as a WSGI application.

    Args:
        pages: what is shown.
        live: loads the language model and the SAEs when they are first needed; None if there are none.
        host: as of `web.server.guard`.
        token: as of `web.server.guard`.
    """
    app = web.application("gsae_jax.viewer")

    def problem(sentence: str, status: int) -> Any:
        return _problem(pages, sentence, status)

    web.guard(app, host, problem, token, lambda: pages.token(Links()))
    _show(app, pages, live is not None)
    if live is not None:
        _compute(app, pages, live)
    return app


def _problem(pages: Pages, sentence: str, status: int) -> Any:
    if flask.request.endpoint == "search":
        return flask.jsonify(error=sentence), 400 if status == 404 else status
    if flask.request.path.startswith("/api/"):
        return flask.jsonify(error=sentence), status
    return pages.error(Links(), sentence), status


def _show(app: flask.Flask, pages: Pages, can_compute: bool) -> None:
    """Pages that only read."""
    entries = pages.library.entries
    links = Links()

    def script(text: str) -> flask.Response:
        return flask.Response(text, mimetype="text/javascript")

    def entry_of(key: str) -> library_lib.Entry:
        return library_lib.place(key, pages.library)[0]

    @app.get("/")
    def home() -> str:
        return pages.home(links)

    @app.get("/<key>/")
    def sae(key: str) -> str:
        return pages.sae(links, entry_of(key), flask.request.args.get("kind", ""), flask.request.args.get("q", ""))

    @app.get("/<key>/list.js")
    def listing(key: str) -> flask.Response:
        return script(pages.listing(entry_of(key)))

    @app.get("/<key>/search")
    def search(key: str) -> Any:
        return flask.jsonify(entry_of(key).search(flask.request.args.get("kind", ""), flask.request.args.get("q", "")))

    @app.get("/<key>/<int:number>")
    def feature(key: str, number: int) -> str:
        return pages.feature(links, entry_of(key), number)

    @app.get("/compare")
    def compare() -> str:
        return pages.compare(links, flask.request.args.get("a", "").strip(), flask.request.args.get("b", "").strip())

    @app.get("/compare/list.js")
    def pairing() -> flask.Response:
        return script(pages.pairing(*(entry_of(flask.request.args.get(name, "")) for name in ("a", "b"))))

    if not can_compute:
        return

    @app.get("/text")
    def text() -> str:
        key = flask.request.args.get("sae", "")
        return pages.text(links, key if key in entries else next(iter(entries)))

    @app.get("/steer")
    def steer() -> str:
        places = [library_lib.place(each, pages.library) for each in flask.request.args.getlist("f")]
        return pages.steer(links, [(entry, number) for entry, number in places if number is not None])


def _compute(app: flask.Flask, pages: Pages, live: Callable[[], Live]) -> None:
    """What needs the language model."""

    def body() -> dict[str, Any]:
        value = flask.request.get_json()
        if not isinstance(value, dict):
            raise UserError("is not an object; write {...}", "body")
        return value

    @app.post("/api/text")
    def try_text() -> Any:
        arguments = _arguments(body(), sae=str, text=str)
        found = live().active(**arguments)
        entry = pages.library.entries[arguments["sae"]]
        numbers = {number for pairs in found["active"] for number, _ in pairs or ()}
        strongest = entry.columns["strongest"]
        known = {number: {"on": entry.words[0][number], "strongest": float(strongest[number])} for number in numbers}
        return flask.jsonify(**found, features=known)

    @app.post("/api/steer")
    def try_steering() -> Any:
        kinds = {"text": str, "edits": list, "tokens": int, "temperature": float, "seed": int}
        return flask.jsonify(live().steered(**_arguments(body(), **kinds)))


def _arguments(body: dict[str, Any], **kinds: type) -> dict[str, Any]:
    """Values of a body, of these types and no others."""
    for name in body:
        if name not in kinds:
            raise UserError(f"is unknown; known: {', '.join(kinds)}", name)
    for name, kind in kinds.items():
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"is {value!r}; write a value of type {kind.__name__}", name)
    return body
