"""A language model as judge: answers and servers that fail."""

import email.utils
import json
import time
from pathlib import Path

import pytest

from gsae_jax.errors import TrainingError
from gsae_jax.rating import chat, judge
from tests import planted
from tests.judge.common import SECRET, knowing, made, prompt_of, serving, texts_of
from tests.refusals import refused


def refuses(handler, prompt):
    handler.completion(None, refusal="I cannot help with that.")


def filtered(handler, prompt):
    handler.completion("I", "content_filter")


def says_nothing(handler, prompt):
    handler.completion("")


def cuts(handler, prompt):
    handler.completion("[1, 0", "length")


def is_no_json(handler, prompt):
    handler.reply(200, "<html>Sign in first</html>")


def has_no_choices(handler, prompt):
    handler.reply(200, json.dumps({"error": {"message": "overloaded"}}))


def chats(handler, prompt):
    handler.completion("It depends: [1, 0] or [0, 1].")


ODD = {
    refuses: "refused",
    filtered: "refused",
    says_nothing: "refused",
    cuts: "cut",
    is_no_json: "no JSON",
    has_no_choices: "no choices",
    chats: "unreadable",
}


@pytest.mark.parametrize("fault", ODD, ids=lambda fault: fault.__name__)
def test_an_answer_that_cannot_be_used_is_asked_for_once_more(server, client, features, fault):
    """The first question about the explanation; and then the same twice, which does not count."""
    client.parallel = 1
    server.faults = [None, fault]
    rating = judge.Judge(client).rate(features, planted.RULE)
    assert (rating.score, rating.details["unusable"]) == (1, 0)
    again = [prompt_of(body) for body in server.seen if "An earlier answer" in body]
    assert [prompt.partition("\nAn earlier answer")[0] for prompt in again] == [prompt_of(server.seen[1]).strip()]
    problem, texts = ODD[fault], rating.details["texts"]
    assert client.spent.problems == ({} if problem == "unreadable" else {problem: 1})
    server.seen.clear()
    server.faults = [None, fault, *[None] * (rating.details["answers"] - 1), fault]
    other = judge.Judge(client, seed=7)  # its questions are others
    server.faults.pop(0)  # the explanation is known
    rating = other.rate(features, planted.RULE)
    assert rating.details["unusable"] == 1
    assert rating.details["problems"] == {problem: 1}
    assert rating.score == 1
    assert rating.details["texts"] == texts - len(texts_of(prompt_of(server.seen[0])))
    # What the model said is kept. What a server did in place of it is asked for again.
    server.seen.clear()
    if problem in ("no JSON", "no choices"):
        assert other.cost(features, [planted.RULE]).requests == 1
        assert other.rate(features, planted.RULE).details["unusable"] == 0
    else:
        assert other.cost(features, [planted.RULE]).requests == 0
        assert other.rate(features, planted.RULE) == rating
        assert not server.seen


@pytest.mark.parametrize("fault", ODD, ids=lambda fault: fault.__name__)
def test_there_is_no_score_without_an_explanation_or_half_of_the_answers(server, client, features, fault, caplog):
    server.always = fault
    rater, problem = judge.Judge(client), ODD[fault]
    for number, is_explained in ((planted.RANDOM, False), (planted.RULE, True)):
        server.always = fault
        if is_explained:
            server.always = lambda handler, prompt: (
                handler.completion("cats") if "Active: " in prompt else fault(handler, prompt)
            )
        elif fault is chats:  # any text is an explanation
            continue
        caplog.clear()
        if problem in ("no JSON", "no choices"):
            with pytest.raises(TrainingError, match=problem):
                rater.rate(features, number)
            server.always = None
            assert rater.rate(features, number)
        else:
            assert rater.rate(features, number) is None
            (warning,) = caplog.messages
            assert f"feature {number} of planted gets no score" in warning
            assert problem in warning
            sent = len(server.seen)
            assert rater.rate(features, number) is None  # and that is known
            assert len(server.seen) == sent
            assert rater.cost(features, [number]).requests == 0


def status(code, text="", **headers):
    return lambda handler, prompt: handler.reply(code, text, **headers)


def drips(handler, prompt):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        if handler.server.ended.wait(0.05):
            break


def hangs(handler, prompt):
    handler.server.ended.wait(100)


def breaks_off(handler, prompt):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def hangs_up(handler, prompt):
    handler.close_connection = True


PASSING = {
    "hangs": (hangs, "did not answer within 0.5 s"),
    "drips": (drips, "did not answer within 0.5 s"),
    "breaks_off": (breaks_off, "IncompleteRead"),
    "hangs_up": (hangs_up, "RemoteDisconnected"),
    "500": (status(500, '{"error": {"message": "CUDA out of memory"}}'), "answers 500 (CUDA out of memory)"),
    "503": (status(503), "answers 503 (Service Unavailable)"),
    "429": (status(429, '{"error": "slow down"}', Retry_After=7), "answers 429 (slow down)"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again_and_then_told(server, tmp_path, name, caplog):
    fault, said = PASSING[name]
    timeout = 0.5 if "0.5 s" in said else 20
    client = made(server, tmp_path / "replies.sqlite", timeout=timeout)
    server.faults, server.answer = [fault, fault], lambda prompt: "fine"
    assert client.ask(["one"], 10) == [("fine", "")]
    assert client.waits[:2] == ([7, 7] if name == "429" else [1, 2])
    # On a busy machine, an answer too may take longer than the short timeout.
    assert len(client.waits) == 2 or timeout < 1
    assert len(server.seen) - 1 == len(caplog.messages) == len(client.waits)
    assert said in caplog.messages[0]
    server.always = fault
    client.waits.clear()
    with pytest.raises(TrainingError) as caught:
        client.ask(["two"], 10)
    for fact in (server.url, said, "6 attempts", "continues"):
        assert fact in str(caught.value)
    assert client.waits == ([7, 7, 7, 8, 16] if name == "429" else [1, 2, 4, 8, 16])
    server.always = None
    server.seen.clear()
    client.waits.clear()
    assert client.ask(["one", "two"], 10) == [("fine", "")] * 2
    assert {prompt_of(body) for body in server.seen} == {"two"}
    assert len(server.seen) - 1 == len(client.waits)
    client.close()


def test_a_server_says_how_long_to_wait_as_a_date_or_too_long(server, client):
    server.answer = lambda prompt: "fine"
    date = email.utils.formatdate(time.time() + 60, usegmt=True)
    server.faults = [status(429, Retry_After=date), status(503, Retry_After="soon")]
    client.ask(["one"], 10)
    assert 50 < client.waits[0] <= 60
    assert client.waits[1:] == [2]
    server.faults = [status(429, '{"error": {"message": "out of credit"}}', Retry_After=3600)]
    with pytest.raises(TrainingError, match=r"429 \(out of credit\).*one attempt.*continues"):
        client.ask(["two"], 10)
    assert len(client.waits) == 2


def test_a_server_that_is_not_there_is_told(tmp_path):
    with serving() as server:
        pass
    client = made(server, tmp_path / "replies.sqlite")
    with pytest.raises(TrainingError, match=r"cannot be reached.*refused"):
        client.ask(["one"], 10)
    assert len(client.waits) == 5
    client.close()


@pytest.mark.parametrize(
    ("code", "field", "facts"),
    [
        (400, "model", ("'judge-1'", "400", "no such thing")),
        (401, "OPENAI_API_KEY", ("401", "no such thing")),
        (403, "OPENAI_API_KEY", ("403", "no such thing")),
        (404, "url", ("404", "no such thing")),
    ],
)
def test_what_does_not_pass_is_told_at_once_and_stops_other_questions(server, client, code, field, facts):
    body = json.dumps({"error": {"message": f"no such thing:\n{SECRET} \x1b[2J", "code": None}})
    server.always = status(code, body)
    with refused(field, *facts, server.url) as caught:
        client.ask([str(number) for number in range(100)], 10)
    assert SECRET not in repr(caught.value)
    assert "\x1b" not in caught.value.problem
    assert len(server.seen) < 20
    assert not client.waits
    server.always, server.answer = None, lambda prompt: "fine"
    assert client.ask(["0"], 10) == [("fine", "")]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(server, client, code):
    with serving() as other:
        elsewhere = f"http://localhost:{other.server_port}/v1/chat/completions"
        server.always = status(code, Location=elsewhere)
        with refused("url", elsewhere, "nothing was sent there"):
            client.ask(["one"], 10)
        assert (other.seen, len(server.seen)) == ([], 1)


def test_the_key_goes_to_the_server_and_nowhere_else(server, features, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it would see the key
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    client = made(server, tmp_path / "replies.sqlite")
    server.answer = lambda prompt: f"{SECRET} {knowing(prompt)}"
    rating = judge.Judge(client).rate(features, planted.RULE)
    assert rating.explanation == "*** It is active on the word cat."
    assert server.keys == {f"Bearer {SECRET}"}
    server.always = status(500, json.dumps({"error": f"{SECRET} {SECRET}"}))
    with pytest.raises(TrainingError) as caught:
        client.ask(["another"], 10)
    said = [repr(caught.value), repr(caught.value.__cause__), *caplog.messages, repr(client), *capfd.readouterr()]
    assert not any(SECRET in text for text in said)
    assert SECRET not in repr(vars(caught.value.__cause__))
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    assert b"active on the word" in (tmp_path / "replies.sqlite").read_bytes()
    client.close()


def test_without_a_key_nothing_is_sent_but_to_this_machine(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    for url in (
        "https://api.example.com/v1",
        "http://192.168.0.7/v1",
        "http://localhost.example.com",
        "http://[2001:db8::1]/v1",
    ):
        with refused("OPENAI_API_KEY", "is not set", "is not this machine"):
            chat.Client(url, "judge-1", tmp_path / "never.sqlite")
    assert not (tmp_path / "never.sqlite").exists()
    for url in ("http://localhost:8000/v1", "http://127.0.0.2/v1", "http://[::1]:8000/"):
        chat.Client(url, "judge-1", tmp_path / "replies.sqlite").close()
    client = made(server, tmp_path / "replies.sqlite")
    server.answer = lambda prompt: "fine"
    client.ask(["one"], 10)
    assert server.keys == {None}
    server.always = status(401, "who are you")
    with refused("OPENAI_API_KEY", "is not set", "who are you"):
        client.ask(["two"], 10)
    client.close()


@pytest.mark.parametrize(
    ("change", "field", "facts"),
    [
        ({"url": "localhost:8000/v1"}, "url", ("'localhost:8000/v1'", "http://localhost:8000/v1")),
        ({"url": "ftp://localhost/v1"}, "url", ("not the URL of a server",)),
        ({"url": "http://localhost:99999/v1"}, "url", ("not the URL of a server",)),
        ({"url": "http://local host/v1"}, "url", ("not the URL of a server",)),
        ({"url": "http://me:word@localhost/v1"}, "url", ("a name or a password", "OPENAI_API_KEY")),
        ({"url": "http://localhost/v1?key=3"}, "url", ("? or #",)),
        ({"url": "http://localhost/v1/chat/completions/"}, "url", ("write http://localhost/v1",)),
        ({"model": " "}, "model", ("is empty",)),
        ({"parallel": 0}, "parallel", ("is 0", "at least 1")),
        ({"key": "sk-one\nsk-two"}, "OPENAI_API_KEY", ("no key has",)),
        ({"key": "sk-éé"}, "OPENAI_API_KEY", ("no key has",)),
        ({"cache": "nowhere/replies.sqlite"}, "cache", ("nowhere/replies.sqlite", "unable to open")),
        ({"cache": "text"}, "cache", ("text", "not a database")),
        ({"cache": "features"}, "cache", ("something else",)),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_sent(path, tmp_path, monkeypatch, change, field, facts):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("these are no replies, and they stay as they are\n" * 99)
    Path("features").write_bytes(path.read_bytes())
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setenv("OPENAI_API_KEY", change.get("key", SECRET))
    arguments = {"url": "http://localhost:8000/v1", "model": "judge-1", "cache": "new"} | change
    arguments.pop("key", None)
    with refused(field, *facts) as caught:
        chat.Client(**arguments)
    assert "word" not in caught.value.problem.replace("password", "")
    assert "sk-" not in repr(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
