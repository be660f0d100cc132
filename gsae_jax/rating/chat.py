"""A client of servers that speak the OpenAI chat protocol: `POST URL/chat/completions`.

It sends one kind of request, for which the standard library is enough. Nothing is sent to any other address: redirects
are not followed. Replies are kept in an SQLite file as soon as they arrive, so that no question is asked twice.
"""

import collections
import contextlib
import email.utils
import hashlib
import http.client
import json
import logging
import os
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from gsae_jax.errors import TrainingError, UserError
from gsae_jax.web.server import is_loopback

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
PARALLEL = 4
ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds; each further wait is twice as long
LONGEST_WAIT = 300.0  # seconds for which a server may ask
LARGEST = 2**22  # bytes of a reply
FORMAT = 1  # of the file with replies
# What a reply may have in place of an answer. The first two are replies of the model, and are kept.
REFUSED, CUT, NO_JSON, NO_CHOICES = "refused", "cut", "no JSON", "no choices"


class Reply(NamedTuple):
    """What a server replied to a prompt.

    Attributes:
        content: the text. With the problem "no choices", the server's message.
        problem: "refused": the model refuses, or says nothing. "cut": it reached the maximum number of tokens. "no
            JSON" and "no choices": the body is not what the protocol says. "" if there is none.
    """

    content: str
    problem: str = ""

    @property
    def is_kept(self) -> bool:
        """Whether the model made it, so that there is no reason to ask again."""
        return self.problem in ("", REFUSED, CUT)


class Spent(NamedTuple):
    """What a client has sent, without what was known already.

    Attributes:
        requests: that were answered.
        input_tokens: as the server counts them.
        output_tokens: as the server counts them.
        problems: number of replies by their problem.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    problems: dict[str, int]


class Client:
    """Asks one model on one server, several questions at once."""

    def __init__(
        self,
        url: str,
        model: str,
        cache: str | os.PathLike[str],
        parallel: int = PARALLEL,
        timeout: float = 120.0,
        sleep: Callable[[float], object] | None = None,
    ):
        """Checks everything that can be checked without a request. The environment variable OPENAI_API_KEY has the key.

        Args:
            url: of the server, to which `/chat/completions` is added, such as `http://localhost:8000/v1`.
            model: its name on the server.
            cache: the SQLite file of replies; made if it is not there.
            parallel: requests at once.
            timeout: seconds to wait for a reply.
            sleep: what waits between two attempts; for tests.

        Raises:
            UserError: the URL cannot be used; there is no key, and the server is not on this machine; or the file is
                not one of replies.
        """
        self.url = _checked(url)
        if not model.strip():
            raise UserError("is empty; write the name that the server has for the model", "model")
        if parallel < 1:
            raise UserError(f"is {parallel}; write at least 1", "parallel")
        self.model, self.parallel = model, parallel
        self._key = _key(self.url)
        self._timeout, self._sleep = timeout, sleep
        # A proxy of the environment sees nothing of https; it would see all of http.
        through = urllib.request.ProxyHandler() if url.startswith("https") else urllib.request.ProxyHandler({})
        self._opener = urllib.request.build_opener(through, _NoRedirects())
        self._replies = _Replies(Path(cache))
        self._lock = threading.Lock()
        self._requests, self._input, self._output = 0, 0, 0
        self._problems: collections.Counter[str] = collections.Counter()

    @property
    def spent(self) -> Spent:
        """What was sent until now."""
        with self._lock:
            return Spent(self._requests, self._input, self._output, dict(self._problems))

    def known(self, prompt: str, max_tokens: int) -> Reply | None:
        """The reply to a prompt if it is known already; sends nothing."""
        return self._replies.get(self._question(prompt, max_tokens)[0])

    def ask(self, prompts: Sequence[str], max_tokens: int) -> list[Reply]:
        """The replies to prompts, in their order.

        Args:
            prompts: each is asked by itself.
            max_tokens: of each reply.

        Raises:
            UserError: the server refuses the request.
            TrainingError: it cannot be reached, fails or has too many requests, also after several attempts.
        """
        stopped = threading.Event()
        with futures.ThreadPoolExecutor(self.parallel) as pool:
            asked = {prompt: pool.submit(self._ask, prompt, max_tokens, stopped) for prompt in dict.fromkeys(prompts)}
            try:
                done, _ = futures.wait(asked.values(), return_when=futures.FIRST_EXCEPTION)
            finally:  # requests that are being answered are waited for, and kept
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
        for each in done:
            each.result()  # raises the first error
        return [asked[prompt].result() for prompt in prompts]

    def close(self) -> None:
        """Close the file."""
        self._replies.close()

    def _question(self, prompt: str, max_tokens: int) -> tuple[str, bytes]:
        """What the file calls a question, and the body of its request."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        name = json.dumps([self.url, asked], sort_keys=True)
        return hashlib.sha256(name.encode()).hexdigest(), json.dumps(asked).encode()

    def _ask(self, prompt: str, max_tokens: int, stopped: threading.Event) -> Reply:
        name, body = self._question(prompt, max_tokens)
        known = self._replies.get(name)
        if known is not None:
            return known
        reply, usage = self._parsed(self._send(body, stopped))
        if reply.is_kept:
            self._replies.put(name, reply)
        with self._lock:
            self._requests += 1
            self._input += _count(usage, "prompt_tokens")
            self._output += _count(usage, "completion_tokens")
            self._problems.update([reply.problem] if reply.problem else [])
        return reply

    def _send(self, body: bytes, stopped: threading.Event) -> bytes:
        """The body of the reply, after as many attempts as it takes."""
        wait = FIRST_WAIT
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._post(body)
            except _TryAgain as error:
                if attempt == ATTEMPTS or error.after > LONGEST_WAIT or stopped.is_set():
                    tried = f"{attempt} attempts" if attempt > 1 else "one attempt"
                    raise TrainingError(
                        f"{self.url} {error} (after {tried}); all answers so far are kept, and the same command "
                        "continues from there"
                    ) from error
                seconds = max(wait, error.after)
                logger.warning(f"{self.url} {error}; the next attempt is in {seconds:.0f} s")
                (self._sleep or stopped.wait)(seconds)  # the second ends early where another question has failed
                if stopped.is_set():
                    raise TrainingError(f"{self.url} {error}; another question has failed meanwhile") from error
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes) -> bytes:
        """The body of the reply to one attempt.

        Raises:
            UserError: no further attempt would help.
            _TryAgain: it may.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "gsae_jax"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            if isinstance(why, TimeoutError):
                raise _TryAgain(f"did not answer within {self._timeout:g} s") from None
            raise _TryAgain(f"cannot be reached ({self._line(f'{type(why).__name__}: {why}')})") from None

    def _read(self, response: Any) -> bytes:
        """The body, which must come before the timeout and not be too large."""
        end, parts, size = time.monotonic() + self._timeout, [], 0
        while part := response.read1(2**16):
            parts.append(part)
            size += len(part)
            if time.monotonic() > end:
                raise TimeoutError
            if size > LARGEST:
                return b""  # that is no JSON
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """The error to raise for a status that is no success."""
        body = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read(LARGEST)
        said = self._line(_message(body) or error.reason)
        status = f"answers {error.code} ({said})"
        if error.code in (408, 425, 429) or error.code >= 500:
            return _TryAgain(status, _seconds(error.headers.get("Retry-After", "")))
        if error.code in (401, 403):
            how = "is not accepted" if self._key else "is not set"
            return UserError(f"{how}: {self.url} {status}; set it to a key of this server", KEY)
        if 300 <= error.code < 400:
            to = self._line(error.headers.get("Location", "nowhere"))
            return UserError(f"{self.url} redirects to {to}; nothing was sent there. Write the server's own URL", "url")
        if error.code == 404:
            return UserError(f"{self.url} {status}; write the URL as its documentation has it, or another model", "url")
        return UserError(f"is {self.model!r}, and {self.url} {status}; write another model", "model")

    def _parsed(self, body: bytes) -> tuple[Reply, Any]:
        """A reply, and how many tokens it took."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            return Reply("", NO_JSON), None
        try:
            choice = answer["choices"][0]
            content, refusal = choice["message"].get("content"), choice["message"].get("refusal")
            reason = choice.get("finish_reason")
        except (LookupError, TypeError, AttributeError):
            return Reply(self._line(_message(body)), NO_CHOICES), None
        if not isinstance(content, str | None):
            return Reply("", NO_CHOICES), None
        text = self._without_key(content or "").encode("utf-8", "replace").decode()
        if refusal or reason == "content_filter":
            problem = REFUSED
        elif reason == "length":
            problem = CUT
        else:
            problem = "" if text.strip() else REFUSED
        return Reply(text, problem), answer.get("usage")

    def _without_key(self, text: str) -> str:
        """A server's text, in which the key may stand. Keys of a few letters are words such as `none`."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text

    def _line(self, text: str) -> str:
        """The same in one line of printable characters, which an error may quote."""
        line = " ".join(self._without_key(text).split())
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
        return line if len(line) <= 300 else f"{line[:299]}…"


class _TryAgain(Exception):
    """A server fails in a way that may pass.

    Attributes:
        after: seconds for which it asks to wait.
    """

    def __init__(self, why: str, after: float = 0.0):
        super().__init__(why)
        self.after = after


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: they would send the key and the text to an address that nobody wrote."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No request."""


class _Replies:
    """The file of replies. Each one is on disk before the next question of its thread is sent."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        try:
            self._db = sqlite3.connect(path, timeout=60, check_same_thread=False)
            ((version,),) = self._db.execute("PRAGMA user_version")
            ((tables,),) = self._db.execute("SELECT count(*) FROM sqlite_master")
            if version != FORMAT and (version or tables):
                raise UserError(f"{path} is a database of something else; write another path", "cache")
            with self._db:
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS replies (question TEXT PRIMARY KEY, content TEXT NOT NULL, "
                    "problem TEXT NOT NULL) WITHOUT ROWID"
                )
                self._db.execute(f"PRAGMA user_version = {FORMAT}")
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot keep replies ({error}); write another path", "cache") from error

    def get(self, question: str) -> Reply | None:
        with self._lock:
            row = self._db.execute("SELECT content, problem FROM replies WHERE question = ?", (question,)).fetchone()
        return None if row is None else Reply(*row)

    def put(self, question: str, reply: Reply) -> None:
        try:
            with self._lock, self._db:
                self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (question, *reply))
        except sqlite3.Error as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error}); all earlier answers are kept, and the same command "
                "continues from there"
            ) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _checked(url: str) -> str:
    """A URL without a slash at its end."""
    example = "write it as http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(f"is {url!r}, which is not the URL of a server; {example}", "url")
    if parts.username is not None or parts.password is not None:
        raise UserError(f"has a name or a password; {example}, and put the key into {KEY}", "url")
    if parts.query or parts.fragment:
        raise UserError(f"is {url!r}, which has ? or #; {example}", "url")
    url = url.rstrip("/")
    if url.endswith("/chat/completions"):
        raise UserError(f"is {url!r}; write {url.removesuffix('/chat/completions')}", "url")
    return url


def _key(url: str) -> str:
    """The key of the environment."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError("has characters that no key has; copy it again", KEY)
    host = urllib.parse.urlsplit(url).hostname or ""
    if not key and not is_loopback(host):
        raise UserError(f"is not set, and {host} is not this machine; set it to the key of the server", KEY)
    return key


def _message(body: bytes) -> str:
    """What a server says in the body of an error."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(text)
        for names in (("error", "message"), ("error",), ("message",), ("detail",)):
            value = answer
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if isinstance(value, str):
                return value
    return text


def _seconds(retry_after: str) -> float:
    """The header Retry-After: seconds, or a date."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", retry_after):
        return float(retry_after)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0.0


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
