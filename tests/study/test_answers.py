"""The blinded study: people answer, and no answer is lost."""

import concurrent.futures
import contextlib
import http.client
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.parse

import pytest

from gsae_jax import studying
from gsae_jax.rating import server
from gsae_jax.rating.study import SCORES, Study
from gsae_jax.web import server as web
from tests.study.common import FORM, Rater, typed, wanted
from tests.viewed import HERE, HOSTILE, OURS, get, with_texts


def test_a_person_answers_goes_back_and_changes(made):
    rater = Rater(made)
    order = made.order(rater.person.rater)
    assert 'href="1">Begin' in rater.get()
    assert typed(rater.get("1")) == ("", None, 0)
    # What is missing is said, and what was typed stays.
    for explanation, choice, fact in (
        ("a word", "", "Choose"),
        (" ", "maybe", "explanation"),
        ("x" * 10_001, "no", "1 c"),
    ):
        answer = rater.save(1, explanation, choice)
        assert answer.status_code == 400
        assert fact in re.search(r'role="alert"[^>]*>(.*?)<', answer.text)[1]
        assert typed(answer.text)[:2] == (explanation, choice or None)
        assert made.answers() == []
    answer = rater.save(1, "words", "maybe")
    assert (answer.status_code, answer.headers["Location"]) == (303, "2#main")
    assert typed(rater.get("1"))[:2] == ("words", "maybe")
    assert "1 of 6 answered" in rater.get("2")
    assert 'href="2">Continue' in rater.get()
    # Back and overview keep what is not complete.
    assert rater.save(2, "half a", "", go="back").headers["Location"] == "1#main"
    assert typed(rater.get("2")) == ("half a", None, 1)
    assert "begun" in rater.get("overview")
    assert rater.save(3, "", "", go="overview").headers["Location"] == "overview#main"
    assert made.said(rater.person.rater, order[2]) is None
    assert [answer.item for answer in made.answers()] == [order[0]]
    assert rater.save(2, "half a line", "yes", version=1).status_code == 303
    # A change keeps the earlier version, and no change is none.
    assert rater.save(1, "words", "maybe", version=1).status_code == 303
    assert rater.save(1, "", "no", version=1).status_code == 303
    (before,) = made.earlier_answers()
    assert (before.item, before.version, before.score, before.explanation) == (order[0], 1, 1.0, "words")
    now = made.said(rater.person.rater, order[0])
    assert (now.version, now.score, now.explanation) == (2, 0.0, "")
    # An answer that was saved does not become a draft.
    assert rater.save(1, "", "yes", go="back", version=2).status_code == 400
    assert made.said(rater.person.rater, order[0]) == now
    for place in range(3, 7):
        assert "missing" in rater.get("end")
        answer = rater.save(place, "x", "yes")
    assert answer.headers["Location"] == "end#main"
    assert "Thank you" in rater.get("end")
    assert [answer.score for answer in made.answers(rater.person.rater)].count(SCORES["yes"]) == 5
    assert made.answered(2) == set()
    with contextlib.closing(Study(made.path.parent)) as reopened:
        assert reopened.answers() == made.answers()


def test_two_windows_lose_nothing(made):
    rater = Rater(made)
    item = made.order(1)[0]
    rater.get("1")  # both windows show it without an answer
    assert rater.save(1, "from one", "yes").status_code == 303
    answer = rater.save(1, "from the other", "no")
    assert answer.status_code == 409
    assert "Yes: from one" in answer.text
    assert typed(answer.text) == ("from the other", "no", 1)
    assert made.said(1, item).explanation == "from one"
    assert rater.save(1, "from one", "yes").status_code == 303  # the same, sent twice
    assert made.earlier_answers() == []
    assert rater.save(1, "from the other", "no", version=1).status_code == 303
    assert [each.explanation for each in made.earlier_answers()] == ["from one"]
    # Drafts as well.
    assert rater.save(2, "draft of one", go="overview").status_code == 303
    assert rater.save(2, "draft of the other", go="overview").status_code == 409
    assert rater.save(2, "draft of the other", "maybe").status_code == 409
    assert typed(rater.get("2")) == ("draft of one", None, 1)


@pytest.mark.parametrize(
    "text",
    [
        HOSTILE,
        "</textarea><script>alert(1)</script>",
        "\n\nbegins with line ends\n\ttab\n",
        "naïve 猫 🐈‍⬛ עברית \u202e \u0301 &amp; \"'",
        "猫" * 10_000,
        " spaces around ",
    ],
)
def test_an_explanation_of_any_characters_is_kept(made, text):
    rater = Rater(made)
    answer = rater.save(1, text.replace("\n", "\r\n"), "yes")  # as browsers send it
    assert answer.status_code == 303
    assert made.answers()[0].explanation == text
    page = rater.get("1")
    assert "<script" not in page
    assert "<img" not in page
    shown = typed(page)[0]
    for sign, entity in (("&lt;", "<"), ("&gt;", ">"), ("&#34;", '"'), ("&#39;", "'"), ("&amp;", "&")):
        shown = shown.replace(sign, entity)
    assert shown == text


def test_hostile_texts_of_features_are_escaped(folder, tmp_path):
    for file in folder.glob("*.sqlite"):
        with_texts(file, HOSTILE)
    with contextlib.closing(Study(studying.new(wanted(folder), str(tmp_path / "study")))) as study:
        page = Rater(study).get("1")
    assert "<img" not in page
    assert "<script" not in page
    assert "&lt;img" in page


def test_what_does_not_come_from_a_persons_pages_is_refused(made):
    rater = Rater(made)
    body = {"explanation": "x", "choice": "yes"}
    path = f"{rater.base}1"
    post = rater.client.post
    for headers in (
        HERE,  # from nowhere
        {**HERE, "Origin": "http://evil.example"},
        {**HERE, "Origin": "null"},
        {**HERE, "Origin": "http://127.0.0.1:9999"},
        {"Host": "evil.example", "Origin": "http://evil.example"},
        {**HERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"},
    ):
        assert post(path, data=body, headers=headers).status_code == 403, headers
    get(rater.client, path, 403, {"Host": "evil.example"})
    large = {**body, "explanation": "x" * web.LARGEST_BODY}
    assert post(path, data=large, headers=OURS).status_code == 413
    token = rater.person.token
    wrong = ["", "x", token[:-1], token + "x", token.swapcase(), "%00", "é", "..", token + "%0a"]
    for each in wrong:
        assert rater.client.get(f"/r/{each}/1", headers=HERE).status_code in (404, 308), each
        assert post(f"/r/{each}/1", data=body, headers=OURS).status_code in (404, 405), each
    for place in ("0", "7", "-1", "x", "1.5", "99999999999999999999"):
        assert post(f"{rater.base}{place}", data=body, headers=OURS).status_code in (404, 405), place
    for method in ("put", "delete", "patch"):
        assert getattr(rater.client, method)(path, headers=OURS).status_code == 405
    assert made.answers() == []
    for name in ("study.sqlite", "../study.sqlite", "static/../study.sqlite"):
        assert rater.client.get(f"/{name}", headers=HERE).status_code == 404
    assert "link" in get(rater.client, "/")
    answer = rater.client.get(path, headers=HERE)
    assert "form-action 'self'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Referrer-Policy"] == "same-origin"  # the address is secret
    assert "Set-Cookie" not in answer.headers
    # What a browser does not send is no answer.
    for odd in (
        {},
        {"choice": "perhaps", "explanation": "x"},
        {"choice": "yes", "explanation": "x", "version": "9" * 30},
    ):
        assert post(path, data=odd, headers=OURS).status_code in (400, 409)
    assert made.answers() == []
    # From elsewhere, the same links are enough.
    elsewhere = server.application(made, "0.0.0.0").test_client()
    get(elsewhere, path, headers={"Host": "10.1.2.3:8000"})
    get(elsewhere, path, 403, {"Host": "evil.example"})


def test_an_answer_that_cannot_be_written_stays_on_the_page(made):
    rater = Rater(made)
    with contextlib.closing(sqlite3.connect(made.path)) as other:
        made._db.execute("PRAGMA busy_timeout = 50")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError):
            made.answer(1, made.order(1)[0], 1.0, "x")
        other.rollback()
    made._db.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
    answer = rater.save(1, "typed", "yes")
    assert answer.status_code == 503
    assert "disk is full" in answer.text
    assert typed(answer.text) == ("typed", "yes", 0)
    made._db.execute("DROP TRIGGER full")
    assert rater.save(1, "typed", "yes").status_code == 303
    assert [each.version for each in made.answers()] == [1]


def test_threads_and_processes_share_a_study(made):
    other = Study(made.path.parent)
    items = [item.item for item in made.items()]

    def rate(number):
        study = (made, other)[number % 2]
        rater = study.add_rater(f"program {number % 4}")
        for item in items:
            study.answer(rater, item, number / 8, f"{number}")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(rate, range(8)))
    assert len(made.answers()) == 4 * len(items)
    assert {each.version for each in made.answers()} == {2}
    assert len(made.earlier_answers()) == 4 * len(items)
    other.close()


@contextlib.contextmanager
def process(folder):
    """The command as a process of its own: (process, port, paths of the links)."""
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run_it = f"{heeding}; runpy.run_module('gsae_jax.study', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", run_it, "serve", str(folder), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            links = []
            for line in started.stdout:
                if "Ctrl-C" in line:
                    break
                links.append(urllib.parse.urlsplit(line.split()[-1]))
            yield started, links[0].port, [link.path for link in links]
        finally:
            started.kill()


def test_no_confirmed_answer_is_lost_when_the_server_is_killed(collected_run, tmp_path):
    """Twenty people answer at once; the process is killed in the middle, started again, and killed once more."""
    out = studying.new(wanted(collected_run, pairs=15, raters=20, is_shared=True), str(tmp_path / "study"))
    confirmed, lock, enough = {}, threading.Lock(), threading.Event()

    def answer(port, number, path, turn, most):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            for place in range(1, 31):
                version = confirmed.get((number, place), (None, 0))[1]
                text = f"rater {number} place {place} turn {turn} é"
                body = {"explanation": text, "choice": ("yes", "maybe", "no")[place % 3], "version": version}
                headers = {"Origin": f"http://127.0.0.1:{port}", "Content-Type": FORM}
                connection.request("POST", f"{path}{place}", urllib.parse.urlencode(body), headers)
                reply = connection.getresponse()
                reply.read()
                assert reply.status == 303
                with lock:
                    confirmed[number, place] = (text, version + 1)
                    if len(confirmed) >= most:
                        enough.set()
        except (OSError, http.client.HTTPException):
            return  # it was killed before it answered
        finally:
            connection.close()

    links = None
    for turn, most in enumerate((200, 450)):
        enough.clear()
        with process(out) as (started, port, paths), concurrent.futures.ThreadPoolExecutor(20) as pool:
            assert links in (None, paths)
            links = paths
            tasks = [pool.submit(answer, port, n, path, turn, most) for n, path in enumerate(paths, 1)]
            assert enough.wait(120)
            started.send_signal(signal.SIGKILL)
            assert started.wait(30) == -signal.SIGKILL
            for task in tasks:
                task.result(120)
        assert len(confirmed) < 600, "all were answered before the process was killed"
        with contextlib.closing(Study(out)) as study:
            places = {(r, place): item for r in range(1, 21) for place, item in enumerate(study.order(r), 1)}
            known = {(each.rater, each.item): each for each in [*study.earlier_answers(), *study.answers()]}
            versions = {(each.rater, each.item, each.version): each.explanation for each in study.earlier_answers()}
            versions |= {(each.rater, each.item, each.version): each.explanation for each in study.answers()}
            for (rater, place), (text, version) in confirmed.items():
                assert versions[rater, places[rater, place], version] == text
            for rater, place in places:  # what was written and not confirmed any more
                each = known.get((rater, places[rater, place]))
                confirmed[rater, place] = (each.explanation, each.version) if each else (None, 0)
            confirmed = {key: value for key, value in confirmed.items() if value[1]}
            assert study._rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.variants
def test_the_command(collected_run, tmp_path):
    out = tmp_path / "study"

    def command(*arguments):
        call = [sys.executable, "-m", "gsae_jax.study", *arguments]
        return subprocess.run(call, capture_output=True, text=True)

    sides = ("--first=gated", "--second=baseline")
    done = command("new", f"--runs={collected_run}", *sides, "--pairs=2", "--raters=3", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert re.search(r"small blocks\.0\.hook_mlp_out: 6 pairs of gated_\d \(L0 [\d.]+.*baseline_0 \(L0", done.stdout)
    with process(out) as (started, port, paths):
        assert len({*paths}) == 3
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", f"{paths[0]}1")
        reply = connection.getresponse()
        assert b"Feature 1 of 4" in reply.read()
        assert reply.headers["Server"] is None
        connection.close()
        started.send_signal(signal.SIGINT)
        assert started.wait(60) in (0, 130)
    for arguments, field in (
        (("serv", str(out)), "ACTION: "),
        (("serve",), "STUDY: "),
        (("serve", str(out), "more"), "unexpected argument"),
        (("serve", str(out), "--pairs=3"), "--pairs: "),
        (("new", f"--runs={collected_run}", *sides, "--pairs=many", "--out=x"), "--pairs: "),
    ):
        done = command(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith(f"error: {field}"), (arguments, done.stderr)
