"""A server on this machine that speaks the chat protocol, and judges that it answers for."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

from gsae_jax.rating import chat

ROOT = Path(__file__).parents[2]


SECRET = "sk-secret-0123456789"


TEXT = re.compile(r"^Text \d+: (.*)$", re.MULTILINE)


class Protocol(http.server.BaseHTTPRequestHandler):
    """`POST /v1/chat/completions`, answered by `server.answer`, after the faults in `server.faults`."""

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with server.lock:
            server.seen.append(body)
            server.keys.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else server.always
        assert self.path == "/v1/chat/completions"
        asked = json.loads(body)
        assert (asked["model"], asked["temperature"]) == ("judge-1", 0)
        prompt = asked["messages"][0]["content"]
        with contextlib.suppress(ConnectionError):  # the client is gone
            (fault or (lambda handler, prompt: handler.completion(server.answer(prompt))))(self, prompt)
            with server.lock:
                server.answered.append(body)

    def completion(self, content, reason="stop", **message):
        choice = {"index": 0, "message": {"role": "assistant", "content": content} | message, "finish_reason": reason}
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        self.reply(200, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}))

    def reply(self, status, text, **headers):
        content = text.encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Protocol) as server:
        server.lock, server.ended = threading.Lock(), threading.Event()
        server.seen, server.answered, server.keys, server.faults, server.always = [], [], set(), [], None
        server.answer = knowing
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()


def made(server, cache, **options):
    waits = []
    client = chat.Client(server.url, "judge-1", cache, **{"timeout": 20, "sleep": waits.append} | options)
    client.waits = waits
    return client


def texts_of(prompt):
    return [json.loads(line) for line in TEXT.findall(prompt)]


def prompt_of(body):
    return json.loads(body)["messages"][0]["content"]


def knowing(prompt):
    """A judge that knows the rule of the first feature, whatever it is asked about."""
    if "Active: " in prompt:
        return "It is active on the word\n  cat. "
    texts = texts_of(prompt)
    if "are marked" not in prompt:
        return f"Here: {json.dumps([int(' cat' in text) for text in texts])}"
    marks = [re.findall("<<(.*?)>>", text, re.DOTALL) for text in texts]
    return json.dumps([int(bool(on) and set(" ".join(on).split()) == {"cat"}) for on in marks])


def guessing(prompt):
    if "Active: " in prompt:
        return "anything"
    bits = hashlib.sha256(prompt.encode()).digest()
    return json.dumps([bits[place] % 2 for place in range(len(texts_of(prompt)))])
