"""Serving pages to browsers: which requests are answered, and on which address."""

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import flask
import waitress.server
from werkzeug import exceptions

from gsae_jax.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 2**18  # bytes; a text that fills a long context is smaller
STATIC = Path(__file__).parent / "static"  # what browsers load from all servers
THREADS = 32  # most of them wait: one request computes at a time
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with none at all, browsers do not say where a form comes from
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def application(name: str) -> flask.Flask:
    """An application of this name, without pages. It serves the files of `web/static`."""
    app = flask.Flask(name, static_folder=str(STATIC))
    app.config |= {"MAX_CONTENT_LENGTH": LARGEST_BODY}
    return app


def guard(
    app: flask.Flask,
    host: str,
    problem: Callable[[str, int], Any],
    token: str = "",
    ask: Callable[[], str] | None = None,
) -> None:
    """Refuse what does not come from the pages themselves, and answer errors with a sentence.

    Args:
        app: whose requests are checked.
        host: that the server listens on. A request for another one is refused, so that a page of the web whose name
            leads to this machine reads nothing.
        problem: the answer for a sentence and a status.
        token: that a browser must show once; "" asks for none.
        ask: the page that asks for the token.
    """
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
            return _let_in(request, token, ask)
        return None

    @app.after_request
    def add_headers(response: flask.Response) -> flask.Response:
        response.headers.update(HEADERS)
        if flask.request.endpoint != "static":
            response.headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(UserError)
    def refused(error: UserError) -> Any:
        return problem(str(error), 400 if flask.request.method == "POST" else 404)

    @app.errorhandler(exceptions.HTTPException)
    def failed(error: exceptions.HTTPException) -> Any:
        return problem(error.description or error.name, error.code or 500)


def _let_in(request: flask.Request, token: str, ask: Callable[[], str] | None) -> Any:
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
    if ask is None or request.path.startswith("/api/"):
        raise exceptions.Forbidden("The token is missing or wrong. Open the address that the command printed.")
    return ask(), 403


def check_port(port: int) -> None:
    """Raises `UserError` for a number that no port has."""
    if not 0 <= port < 2**16:
        raise UserError(f"is {port}; write a number from 1 to {2**16 - 1}, or 0 for any that is free", "--port")


def address(host: str, port: int | str) -> str:
    """What browsers open, http://NAME:PORT/."""
    # Those two mean all addresses of this machine; others find it by its name.
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


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
