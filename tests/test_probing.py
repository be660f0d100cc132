"""Sparse probes against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.data import labels
from gsae_jax.evaluation import probing
from gsae_jax.saes import relu
from tests.measuring import as_sae

DOCUMENTS, PER, T = 24, 4, 32  # rows of a document


@pytest.fixture(scope="module")
def rows():
    """Rows with a label of 5 values at random, and one that only a few tokens have."""
    random = np.random.default_rng(0)
    shape = (DOCUMENTS * PER, T)
    mask = np.ones(shape, bool)
    mask[:, 0] = False
    codes = np.where(mask, random.integers(0, 5, shape), -1)
    rare = np.full(shape, -1)
    rare[0, 1] = 0
    document = np.repeat(np.arange(DOCUMENTS), PER)
    values = {"kind": list("abcde"), "rare": ["r"]}
    return labels.Rows(np.zeros(shape, np.int32), mask, document, values, {"kind": codes, "rare": rare})


def test_no_document_is_in_training_and_testing(rows):
    tasks = probing.tasks(rows)
    assert sorted((task.kind, task.value) for task in tasks.each) == [("kind", value) for value in "abcde"]
    sides = []
    for side in ("train", "test"):
        places = np.concatenate([tasks.places[getattr(task, side).places] for task in tasks.each])
        sides.append({*rows.document_R[places // T].tolist()})
        for task in tasks.each:
            sample = getattr(task, side)
            assert sample.has_value.mean() == 0.5
            at = tasks.places[sample.places]
            assert len({*at.tolist()}) == len(at)
            assert rows.mask_RxT.ravel()[at].all()
            is_value = rows.labels["kind"].ravel()[at] == "abcde".index(task.value)
            np.testing.assert_array_equal(is_value, sample.has_value)
    assert not sides[0] & sides[1]
    assert len(sides[1]) == round(DOCUMENTS * probing.TEST)


def test_tasks_are_of_the_most_frequent_values(rows, monkeypatch):
    counts = np.bincount(rows.labels["kind"][rows.mask_RxT], minlength=5)
    monkeypatch.setattr(probing, "VALUES", 2)
    found = [task.value for task in probing.tasks(rows).each]
    assert found == ["abcde"[code] for code in np.argsort(-counts)[:2]]


def reference(x, y, steps=200):
    """Newton's method for the same loss, in float64."""
    mean, spread = x.mean(0), x.std(0)
    z = np.column_stack([(x - mean) / spread, np.ones(len(x))])
    ridge = np.diag([*np.ones(x.shape[1]), 0])
    w = np.zeros(z.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-z @ w))
        w -= 0.5 * np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + ridge, z.T @ (p - y) + ridge @ w)
    return w[:-1] / spread, w[-1] - mean @ (w[:-1] / spread)


@pytest.mark.parametrize("gap", [0.5, 20.0])
def test_the_probe_is_logistic_regression(gap):
    """Also of classes that a plane divides, where the loss without a penalty has no minimum."""
    random = np.random.default_rng(1)
    y = np.arange(200) % 2 == 0
    x = random.normal(size=(200, 3)) * [1, 10, 0.1] + gap * y[:, None] * [1, 0, 0.1] + 5
    weights, intercept = probing.fit(x, y)
    expected, at = reference(x, y)
    np.testing.assert_allclose(weights, expected, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(intercept, at, rtol=2e-3, atol=1e-3)
    if gap > 1:
        np.testing.assert_array_equal(x @ weights + intercept > 0, y)


def test_a_feature_that_never_fires_is_no_fault():
    x = np.column_stack([np.zeros(10), np.arange(10)])
    weights, _ = probing.fit(x, np.arange(10) > 4)
    assert weights[0] == 0
    assert weights[1] > 0


@pytest.fixture(scope="module")
def planted(rows):
    """An SAE of 40 features, with inputs of which some features tell the values, and others a part of them."""
    random = np.random.default_rng(2)
    tasks = probing.tasks(rows)
    D, F = 16, 40
    codes = rows.labels["kind"].ravel()[tasks.places]
    x = random.normal(size=(len(codes), D)).astype(np.float32)
    x[:, :5] = 3 * (codes[:, None] == np.arange(5)) + 0.1 * x[:, :5]
    W_enc = random.normal(size=(D, F)) / 8
    W_enc[:, 7:12] = np.eye(D)[:, :5]
    scale = np.ones(F)
    scale[20:] = 1e-3  # large activations of short rows
    W_enc[:, 20:] *= 100
    rows_of = random.normal(size=(F, D))
    rows_of /= np.linalg.norm(rows_of, axis=1, keepdims=True)
    params = {"W_enc": W_enc, "b_enc": np.full(F, -0.5), "W_dec": rows_of * scale[:, None], "b_dec": np.zeros(D)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    return as_sae("relu_0", relu, params, relu.Config(D, F)), x, tasks.each


def test_scores_equal_numpy(planted):
    sae, x, each = planted
    found = probing.probe(sae, x, each)
    params = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    f = np.maximum((x - params["b_dec"]) @ params["W_enc"] + params["b_enc"], 0)
    for number, task in enumerate(each):
        places, y = task.train.places, task.train.has_value
        difference = np.abs(f[places[y]].mean(0) - f[places[~y]].mean(0)) * np.linalg.norm(params["W_dec"], axis=1)
        best = np.argsort(-difference)[: max(probing.KS)]
        np.testing.assert_array_equal(found.features[number], best)
        for column, k in enumerate(probing.KS):
            weights, intercept = reference(f[places][:, best[:k]], y)
            said = f[task.test.places][:, best[:k]] @ weights + intercept > 0
            right = said == task.test.has_value
            balanced = (right[task.test.has_value].mean() + right[~task.test.has_value].mean()) / 2
            assert found.scores[number, column] == pytest.approx(balanced, abs=0.02)


def test_a_feature_of_a_value_is_found(planted):
    sae, x, each = planted
    found = probing.probe(sae, x, each)
    assert [*found.features[:, 0]] == [7 + "abcde".index(task.value) for task in each]
    assert (found.scores > 0.99).all()
    assert (probing.dense(x, each) > 0.99).all()


def test_batches_do_not_change_the_scores(planted, monkeypatch):
    sae, x, each = planted
    whole = probing.probe(sae, x, each)
    monkeypatch.setattr(probing.inference, "tokens_at_once", lambda width: 100)
    parts = probing.probe(sae, x, each)
    np.testing.assert_array_equal(whole.features, parts.features)
    np.testing.assert_allclose(whole.scores, parts.scores, atol=5e-3)


def test_labels_at_random_are_at_chance(rows):
    tasks = probing.tasks(rows)
    x = np.random.default_rng(3).normal(size=(len(tasks.places), 8)).astype(np.float32)
    assert abs(probing.dense(x, tasks.each).mean() - 0.5) < 0.05
