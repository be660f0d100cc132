"""The blinded study: which features are chosen, what raters see, and that no answer is lost."""

import concurrent.futures
import contextlib
import csv
import http.client
import itertools
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.parse

import numpy as np
import pytest

import gsae_jax
from gsae_jax import scoring, studying
from gsae_jax.rating import association, pages, pairs, server
from gsae_jax.rating import study as study_lib
from gsae_jax.rating.statistics import Paired
from gsae_jax.rating.study import AUTOMATIC, FIRST, PERSON, SCORES, SECOND, Changed, Study
from gsae_jax.web import server as web
from tests.refusals import refused
from tests.viewed import HERE, HOSTILE, OURS, change_about, get, with_texts

FORM = "application/x-www-form-urlencoded"


@pytest.fixture(scope="module")
def collected(collected_run):
    return gsae_jax.features.load(collected_run)


@pytest.fixture
def folder(collected_run, tmp_path):
    """A copy of the collected files, which a test may change."""
    shutil.copytree(collected_run / "features", tmp_path / "features")
    return tmp_path / "features"


def wanted(run, first="gated", second="baseline", pairs=3, raters=2, **more):
    return studying.Wanted([str(run)], first, second, pairs, raters, **more)


@pytest.fixture
def made(collected_run, tmp_path):
    """A study of two people with three pairs each."""
    study = Study(studying.new(wanted(collected_run), str(tmp_path / "study")))
    yield study
    study.close()


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


def test_pairs_are_of_the_nearest_l0_alive_and_drawn_by_the_seed(collected, collected_run):
    (group,) = pairs.choose({"run": collected}, "gated", "baseline", 10, seed=3)
    l0 = {name: float(each.columns()["density"].sum()) for name, each in collected.items()}
    nearest = min(("gated_0", "gated_1"), key=lambda name: abs(np.log(l0[name] / l0["baseline_0"])))
    assert [source.about["sae"] for source in group.sources] == [nearest, "baseline_0"]
    assert group.l0 == pytest.approx([l0[nearest], l0["baseline_0"]])
    assert (group.layer, group.site, group.target) == (0, "hook_mlp_out", "blocks.0.hook_mlp_out")
    for source, numbers, alive in zip(group.sources, group.pairs.T, group.alive, strict=True):
        assert len({*numbers}) == 10
        features = source.features
        good = {
            feature.number
            for feature in features
            if sum(context.quantile is None for context in feature.contexts) >= pairs.FEWEST
        }
        assert {*numbers} <= good
        assert alive == len(good) > 10
    (again,) = pairs.choose({"elsewhere": collected}, "gated", "baseline", 10, seed=3)
    (more,) = pairs.choose({"run": collected}, "gated", "baseline", 12, seed=3)
    (every,) = pairs.choose({"run": collected}, "gated", "baseline", None, seed=3)
    (other,) = pairs.choose({"run": collected}, "gated", "baseline", 10, seed=4)
    (swapped,) = pairs.choose({"run": collected}, "baseline", nearest, 10, seed=3)
    np.testing.assert_array_equal(group.pairs, again.pairs)
    np.testing.assert_array_equal(group.pairs, more.pairs[:10])
    np.testing.assert_array_equal(group.pairs, swapped.pairs[:, ::-1])
    assert len(every.pairs) == min(every.alive)
    assert [len({*numbers}) for numbers in every.pairs.T] == [len(every.pairs)] * 2
    assert (group.pairs != other.pairs).any()


def dead(path, numbers):
    """Make features inactive in a file, or active in few rows."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for number in numbers:
            db.execute("DELETE FROM contexts WHERE feature = ? AND (quantile < 10 OR rank >= 4)", (number,))


def test_features_with_few_contexts_are_not_drawn(folder):
    dead(folder / "gated_0.sqlite", range(0, 64, 2))
    (group,) = pairs.choose({"run": gsae_jax.features.load(folder)}, "gated_0", "baseline")
    assert {*(group.pairs[:, 0] % 2)} == {1}


def test_each_site_and_language_model_is_a_group(folder, tmp_path):
    def moved(name, **facts):
        (tmp_path / name).mkdir()
        for file in folder.glob("*.sqlite"):
            shutil.copy(file, tmp_path / name)
            change_about(tmp_path / name / file.name, **facts)
        return gsae_jax.features.load(tmp_path / name)

    deeper = moved("deeper", targets=["blocks.3.attn.hook_z"], parameters="3")
    other = moved("other", model="other", language_model={"weights": "1"}, parameters="4")
    for each in (*deeper.values(), *other.values()):
        each.about["collection"]["parameters"] += each.sae
    runs = {"run": gsae_jax.features.load(folder), "deeper": deeper, "other": other}
    groups = pairs.choose(runs, "gated", "baseline", 5)
    assert [(group.model, group.layer, group.site) for group in groups] == [
        ("other", 0, "hook_mlp_out"),
        ("small", 0, "hook_mlp_out"),
        ("small", 3, "attn.hook_z"),
    ]
    (group,) = pairs.choose(runs, "gated", "deeper:baseline", 5)
    assert group.layer == 3
    same = {"run": runs["run"], "again": gsae_jax.features.load(folder)}
    with refused("--first", "run:gated", "again:gated"):
        pairs.choose(same, "gated", "run:baseline", 5)
    (group,) = pairs.choose(same, "run:gated", "again:baseline", 5)
    assert [source.run for source in group.sources] == ["run", "again"]
    clash = moved("clash", language_model={"weights": "2"})
    with refused("--runs", "small"):
        pairs.choose({"run": runs["run"], "clash": clash}, "gated", "baseline", 5)
    with refused("--second", "attn.hook_z", "hook_mlp_out"):
        pairs.choose({"run": runs["run"], "deeper": deeper}, "run:gated", "deeper:baseline", 5)
    reread = moved("reread", text_fingerprint="another")
    with refused("--runs", "text_fingerprint"):
        pairs.choose({"run": runs["run"], "reread": reread}, "run:gated", "reread:baseline", 5)


def test_what_cannot_be_studied_is_refused_and_nothing_is_written(collected_run, tmp_path):
    out = str(tmp_path / "study")
    run = str(collected_run)
    cases = [
        (wanted(run, first="gatd"), "--first", "'gated'"),
        (wanted(run, second="topk"), "--second", "baseline_0"),
        (wanted(run, first="nowhere:gated"), "--first", "gated"),
        (wanted(run, first="gated_0", second="gated_0"), "--second", "same SAE"),
        (wanted(run, pairs=1000), "--pairs", "2,000"),
        (wanted(run, pairs=0), "--pairs", "all"),
        (wanted(run, pairs=None, raters=100), "--raters", "100"),
        (wanted(run, raters=-1), "--raters", "-1"),
        (wanted(run, seed=-1), "--seed", "-1"),
        (wanted(run, raters=0, is_shared=True), "--shared", "0"),
        (wanted(tmp_path / "nothing"), "--runs", "nothing"),
        (wanted(tmp_path), "--runs", "gsae_jax.collect"),
        (studying.Wanted([run, run], "gated", "baseline", 3), "--runs", run),
    ]
    for case, field, fact in cases:
        with refused(field, fact):
            studying.new(case, out)
        assert not (tmp_path / "study").exists()
    (tmp_path / "study").mkdir()
    with refused("--out", "exists"):
        studying.new(wanted(run), out)
    with refused("STUDY", "no study"):
        Study(tmp_path)
    (tmp_path / "study.sqlite").write_text("something else")
    with refused("STUDY", "cannot be read"):
        Study(tmp_path)


def test_people_have_pairs_of_their_own_or_the_same_in_orders_of_their_own(made, collected_run, tmp_path):
    items = {item.item: item for item in made.items()}
    assert len(items) == 12
    mine = [made.order(person.rater) for person in made.raters(PERSON)]
    assert {*mine[0]}.isdisjoint(mine[1])
    for order in mine:
        chosen = [items[item] for item in order]
        assert len(chosen) == 6
        for pair in {item.pair for item in chosen}:
            both = {item.side: item for item in chosen if item.pair == pair}
            assert both.keys() == {FIRST, SECOND}
            assert both[FIRST].sae.startswith("gated")
            assert both[SECOND].sae == "baseline_0"
        assert order != sorted(order)
    with contextlib.closing(Study(studying.new(wanted(collected_run), str(tmp_path / "again")))) as again:
        assert files(again)["items"] == files(made)["items"]
        for order, other in zip(mine, (again.order(person.rater) for person in again.raters(PERSON)), strict=True):
            assert sorted(order) == sorted(other)
            assert order != other  # which nobody can work out from the seed
        assert [each.token for each in again.raters(PERSON)] != [each.token for each in made.raters(PERSON)]
    shared = studying.new(wanted(collected_run, is_shared=True, pairs=5), str(tmp_path / "shared"))
    with contextlib.closing(Study(shared)) as study:
        one, other = (study.order(person.rater) for person in study.raters(PERSON))
        assert sorted(one) == sorted(other) == [*range(10)]
        assert one != other
        assert (study.path.stat().st_mode & 0o077) == 0
    programs = studying.new(wanted(collected_run, pairs=None, raters=0), str(tmp_path / "programs"))
    with contextlib.closing(Study(programs)) as study:
        assert study.raters(PERSON) == []
        assert len(study.items()) == 2 * study.about["groups"][0]["pairs"] > 40
        assert {item.page for item in study.items()} == {None}  # which only people need
    with refused("STUDY", "--raters"):
        studying.serve(str(programs), "127.0.0.1", 0)


def everything(study, number=0):
    """All answers of a server to a person who looks at everything and answers: status, headers, body."""
    rater, seen = Rater(study, number), []
    paths = ["", "overview", "end", "0", "7", *map(str, range(1, 7))]
    answers = [rater.client.get(f"{rater.base}{path}", headers=HERE) for path in paths]
    answers += [rater.save(1), rater.save(1, "a word", "yes"), rater.save(1, "other", "no")]
    answers += [rater.client.get(f"{rater.base}{path}", headers=HERE) for path in ("1", "overview")]
    answers += [rater.client.get(path, headers=HERE) for path in ("/", "/r/wrong/", "/nothing")]
    for answer in answers:
        headers = [(name, value) for name, value in answer.headers if name != "Date"]
        assert rater.person.token not in answer.text + str(headers)
        seen.append((answer.status_code, headers, answer.text))
    return seen


def test_pages_do_not_tell_the_side(collected_run, tmp_path, monkeypatch):
    """The same study with its sides swapped, and with the same links, answers with the same bytes."""
    links = itertools.cycle(["qzxv1", "qzxv2"])
    monkeypatch.setattr(studying.web, "new_token", lambda: next(links))
    made = Study(studying.new(wanted(collected_run), str(tmp_path / "study")))
    first = next(item.sae for item in made.items() if item.side == FIRST)
    swapped = studying.new(wanted(collected_run, first="baseline", second=first), str(tmp_path / "swapped"))
    with contextlib.closing(Study(swapped)) as other:
        assert {item.side for item in other.items() if item.sae == first} == {SECOND}
        for number in (0, 1):
            assert everything(made, number) == everything(other, number)


def rescaled(path, by, shift):
    """Multiply the activations of a file by a power of two, and change how often its features are active."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE features SET strongest = strongest * ?, density = density / 2, fired = fired * 2", (by,))
        for feature, histogram in db.execute("SELECT feature, histogram FROM features").fetchall():
            bars = [[bin + shift, 2 * count] for bin, count in json.loads(histogram)]
            db.execute("UPDATE features SET histogram = ? WHERE feature = ?", (json.dumps(bars), feature))
        rows = db.execute("SELECT feature, quantile, rank, active FROM contexts").fetchall()
        for *key, active in rows:
            scaled = json.dumps([[at, value * by] for at, value in json.loads(active)])
            query = "UPDATE contexts SET active = ? WHERE feature = ? AND quantile = ? AND rank = ?"
            db.execute(query, (scaled, *key))
        db.execute("UPDATE contexts SET activation = activation * ?, row = row", (by,))
        db.execute("UPDATE effects SET effect = effect * 3")


def test_pages_do_not_tell_the_scale_the_density_or_the_number(collected, folder):
    rescaled(folder / "gated_0.sqlite", by=4, shift=8)
    other = gsae_jax.features.load(folder)["gated_0"]
    for before, after in zip(collected["gated_0"], other, strict=True):
        assert (after.numbers["strongest"] or 0) == 4 * (before.numbers["strongest"] or 0)
        assert pages.page(before) == pages.page(after)
    feature = collected["gated_0"][3]
    shown = json.loads(pages.page(feature))
    assert shown.keys() == {"strongest", "sample", "histogram", "promotes", "suppresses"}
    position, tokens, active = shown["strongest"][0]
    assert dict(active)[position] == 1
    assert tokens[position] == feature.contexts[0].tokens[feature.contexts[0].position]
    assert shown["promotes"] == [each.text for each in feature.effects["direct"] if each.effect > 0]


def test_no_word_of_a_page_gives_an_sae_away(made, collected_run):
    secret = ["gated", "baseline", "relu", "hook_", "blocks.", "mlp", "layer", "threshold", "density", "r_mag", "sae"]
    secret += ["neighbour", "cosine", "small", "sqlite", str(collected_run), study_lib.FIRST + " side", "architecture"]
    assert made.about["groups"][0]["model"] == "small"
    for number in (0, 1):
        for _, headers, text in everything(made, number):
            said = (text + str(headers)).lower()
            for word in secret:
                assert not re.search(rf"\b{re.escape(word.lower())}", said), word


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


def test_ratings_are_of_pairs_that_one_rater_rated_both(made):
    order = made.order(1)
    items = {item.item: item for item in made.items()}
    one = items[order[0]]
    two = next(item for item in items.values() if item.pair == one.pair and item.side != one.side)
    alone = next(item for item in items.values() if item.pair != one.pair)
    made.answer(1, one.item, 2, "x")
    made.answer(1, alone.item, 1, "x")
    assert made.ratings() == {PERSON: [], AUTOMATIC: []}
    made.answer(2, two.item, 1, "x")  # by somebody else
    assert made.ratings()[PERSON] == []
    made.answer(1, two.item, 0, "y")
    scores = (2.0, 0.0) if one.side == FIRST else (0.0, 2.0)
    assert made.ratings() == {PERSON: [Paired(one.pair, "small", 0, "hook_mlp_out", 1, *scores)], AUTOMATIC: []}
    # Programs rate as well, under their names.
    rater = made.add_rater("a program")
    assert made.add_rater("a program") == rater != made.add_rater("another")
    made.answer(rater, one.item, 0.75, "é", {"n": 3})
    made.answer(rater, two.item, 0.5, "", {})
    assert made.answered(rater) == {one.item, two.item}
    assert {each.item: (each.score, each.details) for each in made.answers(rater)} == {
        one.item: (0.75, {"n": 3}),
        two.item: (0.5, {}),
    }
    (pair,) = made.ratings()[AUTOMATIC]
    assert (pair.rater, {pair.first, pair.second}) == (rater, {0.75, 0.5})
    with pytest.raises(Changed):
        made.answer(1, one.item, 1, "x", seen=0)
    with pytest.raises(sqlite3.IntegrityError):
        made.answer(1, 999, 1, "x")
    with pytest.raises(sqlite3.IntegrityError):
        made.answer(1, one.item, float("nan"), "x")
    assert made.said(1, one.item).score == 2.0


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


def analysed(folder, out=""):
    analyses = studying.analyse(str(folder), out)
    return {each.rater: each for each in analyses}


def test_people_and_programs_are_analysed(made, tmp_path):
    folder = made.path.parent
    with refused("STUDY"):
        studying.analyse(str(folder))
    items = {item.item: item for item in made.items()}
    for rater in made.raters(PERSON):
        for item in made.order(rater.rater):
            better = items[item].side == FIRST
            made.answer(rater.rater, item, 2.0 if better else float(items[item].pair % 2), "words")
    rater = association.Association()
    assert scoring.rate_study(str(folder), rater) == len(items)
    analyses = analysed(folder)
    assert analyses.keys() == {"people", association.Association.name}
    people, rules = analyses["people"], analyses[association.Association.name]
    assert people.sides == ("gated", "baseline")
    assert people.difference.pairs == len(items) / 2 == 6
    assert people.difference.mean == np.mean([2 - pair % 2 for pair in range(6)])
    assert people.answers["gated"] == {"yes": 6, "maybe": 0, "no": 0}
    each = gsae_jax.features.load(made.about["groups"][0]["saes"][FIRST]["path"]).popitem()[1]
    first = [item for item in items.values() if item.side == FIRST]
    scores = {item.pair: rater.rate(each, item.feature).score for item in first}
    assert {p.pair: p.first for p in rules.paired} == scores
    analyses = json.loads((folder / "analysis" / "analysis.json").read_text())["analyses"]
    assert [each["rater"] for each in analyses] == ["people", association.Association.name]
    page = (folder / "analysis" / "report.html").read_text()
    written = page + (folder / "analysis" / "analysis.json").read_text()
    assert all(person.token not in written for person in made.raters(PERSON))
    lines = list(csv.DictReader((folder / "analysis" / "answers.csv").read_text().splitlines()))
    assert len(lines) == 2 * len(items)
    by_person = [line for line in lines if line["rater"] == "people"]
    assert [line["explanation"] for line in by_person] == ["words"] * len(items)
    assert {(line["sae"], int(line["feature"])) for line in lines} == {(i.sae, i.feature) for i in items.values()}
    analysed(folder, str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "answers.csv").read_bytes() == (folder / "analysis" / "answers.csv").read_bytes()


def test_ratings_of_a_study_are_continued_and_known_ones_are_taken(folder, tmp_path, monkeypatch):
    study = Study(studying.new(wanted(folder, raters=0), str(tmp_path / "study")))
    scoring.rate(scoring.Wanted(features=str(folder), saes=[study.items()[0].sae]), association.Association())
    rater, seen = association.Association(), []
    rate = rater.rate

    def stop(features, number):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append((features.sae, number))
        return rate(features, number)

    monkeypatch.setattr(rater, "rate", stop)
    with pytest.raises(KeyboardInterrupt):
        scoring.rate_study(str(study.path.parent), rater)
    (program,) = study.raters(AUTOMATIC)
    known = sum(item.sae == study.items()[0].sae for item in study.items())
    assert len(study.answers(program.rater)) == known + len(seen)
    assert scoring.rate_study(str(study.path.parent), association.Association()) == len(study.items())
    assert study.earlier_answers() == []
    assert study.raters(AUTOMATIC) == [program]


def test_a_study_whose_features_are_others_is_not_rated(folder, tmp_path):
    study = Study(studying.new(wanted(folder, raters=0), str(tmp_path / "study")))
    path = study.items()[0].path
    change_about(path, parameters="others")
    with refused("--study", path):
        scoring.rate_study(str(study.path.parent), association.Association())
    (tmp_path / "moved").mkdir()
    shutil.move(path, tmp_path / "moved")
    with refused("--study", path):
        scoring.rate_study(str(study.path.parent), association.Association())


def test_the_commands_of_an_automatic_study(folder, tmp_path):
    def run(*command):
        command = [sys.executable, "-m", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    sides = ("--first=gated", "--second=baseline", "--pairs=all", "--raters=0", "--out=study")
    assert run("gsae_jax.study", "new", f"--runs={folder}", *sides)[0] == 0
    code, said = run("gsae_jax.rate", "--study=study")
    assert code == 0, said
    code, said = run("gsae_jax.study", "analyse", "study", "--out=report")
    assert code == 0, said
    contents = json.loads((tmp_path / "report" / "analysis.json").read_text())["analyses"][0]
    assert f"{contents['difference']['mean']:+.3f}" in said
    for command, field in (
        (("gsae_jax.rate", "--study=study", "--sae=gated_0"), "--sae"),
        (("gsae_jax.study", "analyse", "study", "--out=study/study.sqlite"), "--out"),
        (("gsae_jax.rate", "--study=study", "--yes"), "--yes"),
        (("gsae_jax.study", "analyse", "nowhere"), "STUDY"),
        (("gsae_jax.study", "analyse"), "STUDY"),
    ):
        code, said = run(*command)
        assert code == 2
        assert f"error: {field}" in said, said


def test_a_damaged_study_is_refused(made, tmp_path):
    shutil.copytree(made.path.parent, tmp_path / "damaged")
    with contextlib.closing(sqlite3.connect(tmp_path / "damaged" / "study.sqlite")) as db, db:
        db.execute("DROP TABLE answers")
    with refused("STUDY"):
        Study(tmp_path / "damaged")


def test_who_stopped_early_counts_as_far_as_they_came(made):
    order = made.order(made.raters(PERSON)[0].rater)
    items = {item.item: item for item in made.items()}
    pair = items[order[0]].pair
    for item in order:
        if items[item].pair == pair or item == order[-1]:
            made.answer(made.raters(PERSON)[0].rater, item, 2.0, "words")
    (people,) = studying.analyse(str(made.path.parent))
    assert (people.difference.pairs, people.of_pairs) == (1, 6)
    assert "1 of 6 pairs" in people.summary
