"""The rater that learns rules about tokens, and what is kept of ratings."""

import subprocess
import sys

import numpy as np
import pytest

from gsae_jax import features, scoring
from gsae_jax.features import ratings as ratings_lib
from gsae_jax.rating import association
from tests import feature_files
from tests.refusals import refused

R, T, V = 600, 32, 50
NAME = association.Association.name
TEXTS = [f" w{number}" for number in range(V)]
TEXTS[7], TEXTS[8], TEXTS[9] = "\n", '"', " 42"
ON_TOKEN, ON_PAIR, AFTER, AT_START, DIGITS, RANDOM, RARE, DEAD, ALWAYS, ON_TWO = range(10)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A file of features whose rules are known."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, V, (R, T)).astype(np.int32)
    before = np.pad(tokens, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    two_before = np.pad(tokens, ((0, 0), (2, 0)), constant_values=-1)[:, :-2]
    on = np.zeros((R, T, 10), bool)
    on[..., ON_TOKEN] = tokens == 3
    on[..., ON_PAIR] = (tokens == 4) & (before == 5)
    on[..., AFTER] = two_before == 8
    on[:, 0, AT_START] = True
    on[..., DIGITS] = tokens == 9
    on[..., RANDOM] = random.random((R, T)) < 0.02
    on[3, 5, RARE] = True
    on[..., ALWAYS] = True
    on[..., ON_TWO] = (tokens == 11) | (tokens == 12)
    f = np.where(on, random.uniform(1, 2, on.shape), 0).astype(np.float32)
    path = tmp_path_factory.mktemp("planted") / "a_0.sqlite"
    feature_files.write(path, tokens, f, TEXTS, list(range(0, R, 5)))
    return features.load(path)["a_0"]


@pytest.fixture(scope="module")
def rated(planted):
    rater = association.Association()
    return [rater.rate(planted, number) for number in range(len(planted))]


@pytest.mark.parametrize(
    ("feature", "rule"),
    [
        (ON_TOKEN, 'on " w3"'),
        (ON_PAIR, 'on " w5" " w4"'),
        (AFTER, '2 tokens after "\\""'),
        (AT_START, "at position 0"),
        (DIGITS, 'on " 42"'),
    ],
)
def test_a_planted_rule_is_found(rated, feature, rule):
    rating = rated[feature]
    assert rating.explanation.split("; ")[0] == rule
    assert rating.score > 0.99
    assert rating.low <= rating.score <= rating.high <= 1
    assert rating.details["correlation"] > 0.9
    assert (rating.details["random_text"] or 1) > 0.99  # None: it has no active token there


def test_a_feature_that_fires_at_random_is_near_chance(rated):
    rating = rated[RANDOM]
    assert abs(rating.score - 0.5) < 0.05
    assert rating.low < 0.5 + 0.02
    assert rating.high - rating.low < 0.15
    assert abs(rating.details["correlation"] or 0) < 0.1


def test_a_rule_is_about_what_earlier_ones_leave(rated):
    assert {*rated[ON_TWO].explanation.split("; ")} == {'on " w11"', 'on " w12"'}


def test_what_chance_alone_would_give_is_no_rule(rated):
    """Among thousands of possible rules, some fit a random feature a little."""
    assert len(rated[RANDOM].details["rules"]) < association.RULES


def test_scores_equal_numpy(planted, rated):
    """Those of the first rule of a token, on the rows that were not learned from."""
    rating = rated[RANDOM]
    rules = rating.details["rules"]
    text = association._Text(planted)
    contexts = planted.active_in(RANDOM)
    rows = list(contexts)
    others = [row for row in planted.about["sample_rows"] if row not in contexts]
    judged = rows[1::2] + others[1::2]
    numbers, _ = planted.rows()
    place = {number: n for n, number in enumerate(numbers)}
    _, sample = planted.sample()
    order = {row: n for n, row in enumerate(planted.about["sample_rows"])}
    active, expected = [], []
    for row in judged:
        if row in contexts:
            on = np.isin(np.arange(T), contexts[row][0])
        else:
            on = np.isin(order[row] * T + np.arange(T), sample[RANDOM][0])
        active.append(on)
        words = [[kind.words(code) for code in kind.codes[place[row]]] for kind in text._kinds]
        expected.append([any(rule["words"] in at for rule in rules) for at in zip(*words, strict=True)])
    active, expected = np.array(active), np.array(expected)
    reference = (expected[active].mean() + (~expected[~active]).mean()) / 2
    assert rating.score == pytest.approx(reference, abs=1e-12)


@pytest.mark.parametrize("feature", [RARE, DEAD, ALWAYS])
def test_what_cannot_be_told_apart_is_not_rated(rated, feature):
    assert rated[feature] is None


def test_ratings_are_the_same_each_time(planted, rated):
    again = association.Association()
    assert [again.rate(planted, number) for number in reversed(range(len(planted)))] == rated[::-1]


@pytest.fixture
def folder(planted, tmp_path):
    (tmp_path / "a_0.sqlite").write_bytes(planted.path.read_bytes())
    return tmp_path


def test_ratings_are_kept_and_continued(folder, rated, monkeypatch):
    rater, seen = association.Association(), []
    rate = rater.rate

    def stop(each, number):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(number)
        return rate(each, number)

    monkeypatch.setattr(rater, "rate", stop)
    with pytest.raises(KeyboardInterrupt):
        scoring.rate(scoring.Wanted(features=str(folder)), rater)
    kept = features.load(folder)["a_0"]
    assert kept.ratings()[NAME] == {number: rated[number] for number in seen}
    ratings = scoring.rate(scoring.Wanted(features=str(folder)), association.Association())
    assert ratings == {"a_0": {number: rating for number, rating in enumerate(rated) if rating}}
    now = features.load(folder)["a_0"]
    assert now[ON_TOKEN].ratings[NAME] == rated[ON_TOKEN]
    assert "w3" in now[ON_TOKEN]._repr_html_()
    scores = now.columns()[f"score of {NAME}"]
    np.testing.assert_array_equal(scores, [rating.score if rating else np.nan for rating in rated])
    assert not scoring.to_rate(scoring.Wanted(numbers=[ON_TOKEN]), now, NAME)
    assert scoring.to_rate(scoring.Wanted(numbers=[ON_TOKEN]), now, "another") == [ON_TOKEN]


def test_ratings_of_features_of_other_settings_do_not_count(folder, rated):
    each = features.load(folder)["a_0"]
    ratings_lib.write(each.path, each.about["collection"] | {"rows": 1}, "rules", [(0, rated[0])])
    assert features.load(folder)["a_0"].ratings() == {}
    ratings_lib.write(each.path, each.about["collection"], "rules", [(0, rated[0])])
    assert features.load(folder)["a_0"].ratings() == {"rules": {0: rated[0]}}


def test_what_cannot_be_rated_is_refused(folder):
    for wanted, field in (
        (scoring.Wanted(), "--features"),
        (scoring.Wanted(features=str(folder / "nothing")), "--features"),
        (scoring.Wanted("nowhere", features=str(folder)), "--workdir"),
        (scoring.Wanted(features=str(folder), saes=["a_1"]), "--sae"),
        (scoring.Wanted(features=str(folder), numbers=[10]), "--feature"),
    ):
        with refused(field):
            scoring.rate(wanted, association.Association())
    (folder / "a_0.ratings").write_text("nonsense, and more of it")
    with refused(str(folder / "a_0.ratings")):
        scoring.rate(scoring.Wanted(features=str(folder)), association.Association())


def test_the_command(folder):
    command = [sys.executable, "-m", "gsae_jax.rate", f"--features={folder}", "--feature=0,1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert features.load(folder)["a_0"].ratings()[NAME].keys() == {0, 1}
    done = subprocess.run([*command[:-1], "--feature=x"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--feature" in done.stderr
