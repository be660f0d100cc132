"""The blinded study: its ratings, their analysis, and programs that rate."""

import contextlib
import csv
import json
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

import gsae_jax
from gsae_jax import scoring, studying
from gsae_jax.rating import association
from gsae_jax.rating.statistics import Paired
from gsae_jax.rating.study import AUTOMATIC, FIRST, PERSON, Changed, Study
from tests.refusals import refused
from tests.study.common import wanted
from tests.viewed import change_about


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
    analysed(folder, str(tmp_path / "elsewhere"))  # again
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.csv").write_text("of something else")
    with refused("--out", "answers.csv"):
        analysed(folder, str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "answers.csv").read_text() == "of something else"


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


@pytest.mark.variants
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
