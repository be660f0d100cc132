"""The blinded study: which features are chosen, and what raters see."""

import contextlib
import itertools
import json
import re
import shutil
import sqlite3

import numpy as np
import pytest

import gsae_jax
from gsae_jax import studying
from gsae_jax.rating import pages, pairs
from gsae_jax.rating import study as study_lib
from gsae_jax.rating.study import FIRST, PERSON, SECOND, Study
from tests.refusals import refused
from tests.study.common import Rater, files, wanted
from tests.viewed import HERE, change_about


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
