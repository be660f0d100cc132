"""The server of the pages: which requests it refuses, many clients at once, and the command."""

import concurrent.futures
import functools
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from gsae_jax.viewer import server
from gsae_jax.web import server as web
from tests.refusals import refused
from tests.viewed import HERE, OURS, get, serving


def test_what_does_not_come_from_the_pages_is_refused(viewed):
    app = server.application(*viewed)
    client = app.test_client()
    body = {"sae": "gated_0", "text": "def"}
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
        "10.0.0.1",
    ):
        assert client.get("/", headers={"Host": host}).status_code in (400, 403), host
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    cases = [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "empty"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe", "Sec-Fetch-Mode": "navigate"},
    ]
    for headers in cases:
        for path in ("/", "/gated_0/list.js", "/static/viewer.js"):
            assert client.get(path, headers={**HERE, **headers}).status_code == 403, headers
        assert client.post("/api/text", json=body, headers={**HERE, **headers}).status_code == 403, headers
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
    get(client, "/gated_0/3", headers={**HERE, **link})  # of a message, for one
    assert client.post("/api/text", json=body, headers={**HERE, **link}).status_code == 403  # a form elsewhere
    assert client.post("/api/text", json=body, headers=HERE).status_code == 403  # from nowhere
    # A form cannot send JSON's type without asking first, which is answered without any permission.
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.post("/api/text", data=json.dumps(body), headers=OURS, content_type=kind)
        assert answer.status_code == 415
    answer = client.options("/api/text", headers={**HERE, "Origin": "http://evil.example"})
    assert not any(name.startswith("Access-Control") for name in answer.headers.keys())  # noqa: SIM118 (pairs)
    for path in ("/", "/static/viewer.js"):
        headers = client.get(path, headers=HERE, buffered=True).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Frame-Options"] == "DENY"


def test_paths_outside_and_large_or_wrong_bodies_are_refused(client):
    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2fserver.py",
        "/static//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/gated_0/..%2f..%2fetc%2fpasswd",
        "/gated_0/0x1",
        "/gated_0/-1",
        "/gated_0/99999999999999999999",
        "/gated_0.sqlite",
        "/config.json",
    ):
        assert client.get(path, headers=HERE).status_code in (308, 400, 404), path
    large = json.dumps({"sae": "gated_0", "text": "x" * web.LARGEST_BODY})
    assert client.post("/api/text", data=large, headers=OURS, content_type="application/json").status_code == 413
    edit = {"sae": "gated_0", "feature": 3, "strength": 1.0}
    steer = {"text": "def", "edits": [edit], "tokens": 16, "temperature": 0, "seed": 0}
    wrong = [
        ("/api/text", "{", "JSON|parse|decode|browser"),
        ("/api/text", "[]", "object"),
        ("/api/text", json.dumps({"sae": "gated_0"}), "text"),
        ("/api/text", json.dumps({"sae": "gated_9", "text": "x"}), "gated_1"),
        ("/api/text", json.dumps({"sae": "gated_0", "text": ""}), "text"),
        ("/api/text", json.dumps({"sae": "gated_0", "text": "def " * 100}), "32"),
        ("/api/text", json.dumps({"sae": ["gated_0"], "text": "x"}), "sae"),
        ("/api/text", json.dumps({"sae": "gated_0", "text": "x", "more": 1}), "more"),
        *(
            ("/api/steer", json.dumps(steer | change), fact)
            for change, fact in (
                ({"edits": []}, "features"),
                ({"edits": [edit] * 99}, "features"),
                ({"edits": ["x"]}, "edits"),
                ({"edits": [edit | {"feature": 64}]}, "63"),
                ({"edits": [edit | {"feature": True}]}, "63"),
                ({"edits": [edit | {"strength": "1"}]}, "strength"),
                ({"edits": [edit | {"strength": 1e30}]}, "strength"),
                ({"edits": [edit | {"sae": "x"}]}, "gated_0"),
                ({"tokens": 17}, "16"),
                ({"tokens": True}, "tokens"),
                ({"temperature": -1}, "temperature"),
                ({"seed": -1}, "seed"),
                ({"text": "def " * 20}, "positions"),
            )
        ),
    ]
    for path, body, fact in wrong:
        answer = client.post(path, data=body, headers=OURS, content_type="application/json")
        assert answer.status_code == 400, (body, answer.text)
        assert re.search(fact, answer.json["error"]), (body, answer.text)


def test_an_address_that_others_reach_asks_for_a_token(viewed):
    token = web.new_token()
    assert len(token) >= 32
    assert token != web.new_token()
    app = server.application(*viewed, host="0.0.0.0", token=token)
    app.test_client = functools.partial(app.test_client, use_cookies=False)  # the test sends its own
    host = {"Host": "10.1.2.3:8000"}
    for path in ("/", "/gated_0/", "/gated_0/list.js", "/gated_0/3", "/?token=", "/?token=wrong", f"/?token={token}x"):
        answer = app.test_client().get(path, headers=host)
        assert answer.status_code == 403
        assert token not in answer.text
        assert "gated" not in answer.text
    body = {"sae": "gated_0", "text": "def"}
    origin = {**host, "Origin": "http://10.1.2.3:8000"}
    assert app.test_client().post("/api/text", json=body, headers=origin).status_code == 403
    client = app.test_client()
    answer = client.get(f"/gated_0/3?token={token}&x=1", headers=host, base_url="http://10.1.2.3:8000")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/gated_0/3?x=1")
    cookie = answer.headers["Set-Cookie"]
    assert cookie.startswith(f"gsae_jax_8000={token};")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    sent = {**host, "Cookie": f"gsae_jax_8000={token}"}
    assert "gated_0" in get(app.test_client(), "/gated_0/3", headers=sent)
    for wrong in (f"gsae_jax_8000={token[:-1]}", "gsae_jax_8000=", f"gsae_jax_8001={token}"):
        get(app.test_client(), "/gated_0/3", 403, {**host, "Cookie": wrong})
    get(app.test_client(), "/", 403, {**sent, "Host": "evil.example"})
    assert (
        app.test_client().get(f"//evil.example/?token={token}", headers=host).headers.get("Location", "/")[:2] != "//"
    )
    assert [web.is_loopback(each) for each in ("127.0.0.1", "::1", "localhost", "127.0.0.5")] == [True] * 4
    assert [web.is_loopback(each) for each in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4


def clients(port, seconds, count=20):
    """What `count` clients at once get for so long: pages read, texts tried; asserts that nothing is lost."""
    kinds = ("/", "/gated_0/", "/gated_0/list.js", "/gated_0/%d", "/gated_1/%d", "/gated_0/search?kind=token&q=def")
    known, end = {}, time.monotonic() + seconds

    def one(number):
        done, connection = 0, http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.monotonic() < end:
            turn = number + done
            if turn % 9 == 8:
                body = json.dumps({"sae": "gated_0", "text": "def value " * (1 + turn % 3)})
                headers = {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{port}"}
                path = body
                connection.request("POST", "/api/text", body, headers)
            else:
                path = kinds[turn % len(kinds)]
                path = path % (turn % 64) if "%d" in path else path
                connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == 200, (path, answer.status, text[:200])
            assert known.setdefault(path, text) == text, path
            done += 1
        connection.close()
        return done

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return sum(pool.map(one, range(count)))


def test_twenty_clients_at_once_lose_nothing(viewed):
    with serving(server.application(*viewed)) as port:
        assert clients(port, 5) > 40


@pytest.mark.variants
def test_twenty_clients_for_ten_minutes_lose_nothing(viewed):
    with serving(server.application(*viewed)) as port:
        done = clients(port, 600)
    print(f"{done:,} requests")


def test_a_real_server_refuses_what_the_application_would_not_see(viewed):
    with serving(server.application(*viewed)) as port:
        for head, statuses in (
            (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", (b"403",)),
            (b"GET / HTTP/1.0\r\n\r\n", (b"400", b"403")),
            (b"GET /static/../server.py HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (b"404",)),
            (b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (b"404", b"400")),
            (b"POST /api/text HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n", (b"413", b"403")),
            (b"NONSENSE\r\n\r\n", (b"400",)),
        ):
            with socket.create_connection(("127.0.0.1", port), 30) as raw:
                raw.sendall(head)
                answer = raw.recv(65536)
            assert answer.split(b" ", 2)[1] in statuses, (head, answer[:200])
        with refused("--port", str(port)):
            web.listening(server.application(*viewed), "127.0.0.1", port)
        with refused("--port", "nowhere.invalid"):
            web.listening(server.application(*viewed), "nowhere.invalid", 0)
    for host in ("localhost", "::1"):
        listening = web.listening(server.application(*viewed), host, 0)
        assert int(listening.effective_port) > 0
        listening.task_dispatcher.shutdown()
        listening.close()


def test_the_command_serves_until_it_is_interrupted(collected_run):
    # A shell may start what runs in the background without this signal.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run_it = f"{heeding}; runpy.run_module('gsae_jax.view', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", run_it, f"--workdir={collected_run}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ ", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/gated_0/3")
        assert b"gated_0" in connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
    for arguments, field in (
        (["--features=x", "--model=y"], "--model"),
        (["--export=x", "--open"], "--open"),
        (["--export=x", "--port=8000"], "--port"),
        (["--features=nowhere"], "--features"),
        ([], "--workdir"),
    ):
        done = subprocess.run([sys.executable, "-m", "gsae_jax.view", *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {field}: "), done.stderr
