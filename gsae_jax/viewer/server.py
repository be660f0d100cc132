"""The server of the pages: which requests it answers, and with what."""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode, urlsplit

import flask
import waitress.server
from werkzeug import exceptions

from gsae_jax.errors import UserError
from gsae_jax.viewer import library as library_lib
from gsae_jax.viewer.live import Live
from gsae_jax.viewer.pages import Links, Pages

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 2**18  # bytes; a text that fills a long context is smaller
THREADS = 32  # most of them wait: one request computes at a time
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def application(pages: Pages, live: Callable[[], Live] | None, host: str = "127.0.0.1", token: str = "") -> flask.Flask:
    """The pages as a WSGI application.

    Args:
        pages: what is shown.
        live: loads the language model and the SAEs when they are first needed; None if there are none.
        host: that the server listens on. A request for another one is refused, so that a page of the web whose name
            leads to this machine reads nothing.
        token: that a browser must show once; "" asks for none.
    """
    app = flask.Flask("gsae_jax.viewer")
    app.config |= {"MAX_CONTENT_LENGTH": LARGEST_BODY}
    _guard(app, pages, host, token)
    _show(app, pages, live is not None)
    if live is not None:
        _compute(app, pages, live)
    return app


def _guard(app: flask.Flask, pages: Pages, host: str, token: str) -> None:
    """Refuse what does not come from the pages themselves, and answer errors with a sentence."""
    names = {*LOOPBACK} if is_loopback(host) else {*LOOPBACK, host, socket.gethostname(), socket.getfqdn()}

    def known_host(name: str | None) -> bool:
        if name in names:
            return True
        try:  # an address is not a name that could lead elsewhere
            return not is_loopback(host) and bool(ipaddress.ip_address(name or ""))
        except ValueError:
            return False

    @app.before_request
    def check() -> Any:
        request = flask.request
        try:
            if not known_host(urlsplit(f"//{request.headers.get('Host', '')}").hostname):
                raise exceptions.Forbidden(
                    "The request is for another host. Open the address that the command printed."
                )
        except ValueError as error:  # no host at all
            raise exceptions.BadRequest("The request names no host.") from error
        origin, site = request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site")
        # A link elsewhere may lead here. Anything else that another page asks for is refused.
        is_link = request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
        if (origin is not None and urlsplit(origin).netloc != request.host) or (
            site not in ("same-origin", "none", None) and not is_link
        ):
            raise exceptions.Forbidden("The request comes from another page.")
        if request.method == "POST" and origin is None and site != "same-origin":
            raise exceptions.Forbidden("The request does not say which page it comes from.")
        if token and request.endpoint != "static":
            return _let_in(request, token, pages)
        return None

    @app.after_request
    def add_headers(response: flask.Response) -> flask.Response:
        response.headers.update(HEADERS)
        if flask.request.endpoint != "static":
            response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(UserError)
    def refused(error: UserError) -> Any:
        status = 400 if flask.request.method == "POST" or flask.request.endpoint == "search" else 404
        return _problem(pages, str(error), status)

    @app.errorhandler(exceptions.HTTPException)
    def failed(error: exceptions.HTTPException) -> Any:
        return _problem(pages, error.description or error.name, error.code or 500)


def _problem(pages: Pages, sentence: str, status: int) -> Any:
    if flask.request.path.startswith("/api/") or flask.request.endpoint == "search":
        return flask.jsonify(error=sentence), status
    return pages.error(Links(), sentence), status


def _let_in(request: flask.Request, token: str, pages: Pages) -> Any:
    """None for a browser that has shown the token; else what it is answered."""
    name = f"gsae_jax_{urlsplit(f'//{request.host}').port or 80}"  # cookies do not tell ports apart
    given = request.args.get("token")
    if given is not None and hmac.compare_digest(given.encode(), token.encode()):
        rest = [(key, value) for key, value in request.args.items(multi=True) if key != "token"]
        target = request.path.replace("//", "/") + (f"?{urlencode(rest)}" if rest else "")
        response = flask.redirect(target)
        response.set_cookie(name, token, httponly=True, samesite="Lax")
        return response
    if given is None and hmac.compare_digest(request.cookies.get(name, "").encode(), token.encode()):
        return None
    if request.path.startswith("/api/"):
        raise exceptions.Forbidden("The token is missing or wrong. Open the address that the command printed.")
    return pages.token(Links()), 403


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


def listening(app: flask.Flask, host: str, port: int) -> Any:
    """A server that listens, and answers when its `run` is called; `effective_port` is its port.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        # A name may stand for several addresses, each with a port of its own.
        family, kind, protocol, _, address = socket.getaddrinfo(
            "127.0.0.1" if host == "localhost" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be used ({error}); write another --port or --host", "--port") from error
    return waitress.server.create_server(
        app,
        sockets=[bound],
        threads=THREADS,
        max_request_body_size=LARGEST_BODY,
        connection_limit=500,
        ident=None,
        clear_untrusted_proxy_headers=True,
    )
