"""What is collected of features, against NumPy; on any mesh, in any chunks, and after a stop."""

import collections
import contextlib
import dataclasses
import json
import math
import re
import sqlite3

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import features as features_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.features import collection as collection_lib
from gsae_jax.features import effects, neighbours, streaming, tables
from gsae_jax.lms import loading
from gsae_jax.saes import (
    batch_topk,
    gated,
    gated_crosscoder,
    inference,
    relu,
    relu_transcoder,
    signed_gated,
    topk,
    trained,
)
from tests import feature_files
from tests.measuring import SITE, on_mesh

D, F, T, ROWS = 32, 48, 16, 80
OTHER = "blocks.1.hook_mlp_out"
SETTINGS = {
    "gated": (gated, {}, SITE, ""),
    "signed_gated": (signed_gated, {}, SITE, ""),
    "topk": (topk, {"k": 3}, SITE, ""),
    "batch_topk": (batch_topk, {"k": 3}, SITE, ""),
    "relu_transcoder": (relu_transcoder, {"d_out": D}, SITE, OTHER),
    "gated_crosscoder": (gated_crosscoder, {}, (SITE, OTHER), (SITE, OTHER)),
}


@pytest.fixture(scope="module")
def tokens(lm_dir):
    """[ROWS, T], with BOS in front and a special token inside."""
    tokens = np.random.default_rng(3).integers(2, 500, (ROWS, T)).astype(np.int32)
    tokens[:, 0] = tokens[::5, 7] = loading.load_lm(lm_dir).tokenizer.bos_token_id
    return tokens


def make(kind, lm, tokens):
    """An SAE of random weights, of which some features are active on few tokens and some on none."""
    module, options, site, target = SETTINGS[kind]
    several = isinstance(site, tuple)
    config = module.Config(d_in=(D, D) if several else D, width=F, **options)
    params = dict(module.init(jax.random.key(5), config))
    sites = [*site] if several else [site]
    x = [np.asarray(lm.activations(tokens, [each])[each]).reshape(-1, D) for each in sites]
    params |= {name: jnp.asarray(x[0].mean(0)) for name in ("b_dec", "b_in") if name in params and not target}
    spread = jnp.linspace(-0.5, -6.0, F)
    name = "b_gate" if "b_gate" in params else "b_enc"
    scale = float(np.std(x[0])) * math.sqrt(D)
    params[name] = spread * scale / 8
    if "r_mag" in params:
        params["r_mag"] = jnp.linspace(-0.3, 0.3, F)
    if "threshold" in params:
        params["threshold"] = jnp.full(F, 0.1 * scale)
    norms = np.linalg.norm(x[0], axis=-1)
    limit = float(np.quantile(norms, 0.97))
    limits = (limit, math.inf) if several else limit if not target else math.inf
    return trained.SAE(f"{kind}_0", kind, config, site, params, 0.1, 1e-3, 0, 1.0, limits, target=target, stack=kind)


def collection_of(lm_dir, kinds, tokens, mesh):
    lm = loading.load_lm(lm_dir, mesh=mesh)
    plain = loading.load_lm(lm_dir)
    saes = {f"{kind}_0": make(kind, plain, tokens) for kind in kinds}
    about = {name: {"sae": name, "architecture": sae.architecture} for name, sae in saes.items()}
    hidden = np.random.default_rng(4).random(tokens.shape) < 0.1  # as `data.roles` hides them
    rows = np.where(hidden, ~tokens, tokens)
    return collection_lib.Collection(lm, mesh, saes, saes, rows, lm.special_tokens, about, {"jax": jax.__version__})


def dump(folder):
    """The contents of every file of a folder."""
    return {path.name: list(sqlite3.connect(path).iterdump()) for path in sorted(folder.glob("[!.]*.sqlite"))}


@pytest.fixture(scope="module")
def collected(lm_dir, tokens, tmp_path_factory):
    """A collection of every kind on one device, and its folder."""
    folder = tmp_path_factory.mktemp("features")
    collection = collection_of(
        lm_dir, SETTINGS, tokens, mesh_lib.make_mesh(mesh_lib.config_lib.Mesh(1, 1), jax.devices()[:1])
    )
    collection_lib.collect(collection, folder)
    return collection, folder


def features_of(collection, name, tokens):
    """Feature activations [ROWS, T, F], and which tokens [ROWS, T] are looked at."""
    sae, lm = collection.saes[name], collection.lm
    x = lm.activations(tokens, sorted({*sae.sites, *sae.targets}))
    inputs = tuple(x[site] for site in sae.sites)
    f = np.array(sae.encode(inputs if len(inputs) > 1 else inputs[0]))
    limits = sae.norm_limit if isinstance(sae.norm_limit, tuple) else (sae.norm_limit,) * len(sae.targets)
    valid = ~np.isin(tokens, collection.special_tokens) & (collection.rows >= 0)
    for site, limit in zip(sae.targets, limits, strict=True):
        valid &= np.linalg.norm(np.asarray(x[site], np.float64), axis=-1) <= limit
    return np.where(valid[..., None], f, 0), valid


def test_an_sae_that_is_never_active_has_a_file_like_others(lm_dir, tokens, tmp_path):
    mesh = mesh_lib.make_mesh(mesh_lib.config_lib.Mesh(1, 1), jax.devices()[:1])
    collection = collection_of(lm_dir, ["gated"], tokens, mesh)
    params = collection.saes["gated_0"].params
    params["b_gate"] = jnp.full_like(params["b_gate"], -1e6)
    collection.about["gated_0"]["width"] = F
    collection_lib.collect(collection, tmp_path)
    (features,) = features_lib.load(tmp_path).values()
    assert not features.columns()["fired"].any()
    assert not features[0].contexts
    assert features.sample()[1] == {}


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_kept_of_each_feature_equals_numpy(collected, tokens, kind):
    collection, folder = collected
    f, valid = features_of(collection, f"{kind}_0", tokens)
    db = tables.opened(folder / f"{kind}_0.sqlite")
    about = tables.known(folder / f"{kind}_0.sqlite")
    assert about == collection.about[f"{kind}_0"]
    assert valid.sum() < ROWS * (T - 1)
    active = (f != 0).sum((0, 1))
    assert active.min() == 0 or kind in ("topk", "batch_topk", "gated_crosscoder")
    assert active.max() > effects.CONTEXTS
    feature_files.assert_kept(db, tokens, f, valid)


@pytest.mark.parametrize("kind", ["gated", "signed_gated"])
def test_contexts_of_quantiles_are_a_random_sample_of_all_active_tokens(collected, tokens, kind, monkeypatch):
    collection, folder = collected
    f, _ = features_of(collection, f"{kind}_0", tokens)
    row, position = np.indices((ROWS, T))
    priority = streaming.priorities(row, position, T)
    assert len(np.unique(priority)) == ROWS * T
    assert abs(np.corrcoef(priority.ravel(), np.arange(ROWS * T))[0, 1]) < 0.1
    db = tables.opened(folder / f"{kind}_0.sqlite")
    seen = 0
    for feature in range(F):
        contexts = list(
            db.execute(
                "SELECT quantile, rank, row, position FROM contexts WHERE feature = ? ORDER BY quantile, rank",
                (feature,),
            )
        )
        on = f[..., feature] != 0
        first = np.where(on, priority, streaming.EMPTY).argmin(1)
        rows = np.flatnonzero(on.any(1))
        rows = rows[np.argsort(priority[rows, first[rows]])][: streaming.SAMPLE]
        by_value = rows[np.argsort(np.abs(f[rows, first[rows], feature]), kind="stable")]
        strongest = {row for quantile, _, row, _ in contexts if quantile == tables.STRONGEST}
        expected = []
        for quantile, part in enumerate(np.array_split(by_value, 10)):
            part = sorted(set(part) - strongest, key=lambda row: priority[row, first[row]])
            expected += [(quantile, rank, row, first[row]) for rank, row in enumerate(part[:2])]
        assert [context for context in contexts if context[0] != tables.STRONGEST] == expected
        places = [row for _, _, row, _ in contexts]
        assert len(set(places)) == len(places)  # never two from the same place
        seen += len(expected)
    assert seen > F


@pytest.mark.variants
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_the_files_do_not_depend_on_the_mesh(collected, tokens, lm_dir, tmp_path, shape):
    """To the last bit where devices split the text; up to rounding where they split the dictionary."""
    _, folder = collected
    collection_lib.collect(collection_of(lm_dir, SETTINGS, tokens, on_mesh(*shape)), tmp_path)
    ours, theirs = dump(tmp_path), dump(folder)
    assert len(SETTINGS) == len(ours) == len(ours.keys() & theirs.keys())
    number = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")
    for name in ours:
        if shape[1] == 1:
            assert ours[name] == theirs[name], name
            continue
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert number.sub("", mine) == number.sub("", other)
            values = [[float(each) for each in number.findall(line)] for line in (mine, other)]
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


class StoppedError(Exception):
    pass


def collect_until(collection, folder, stop):
    """Collect until `stop(stage, done)` is true, or to the end; returns the stages and their steps that were done."""
    steps = []

    def progress(stage, done, total):
        steps.append((stage, done))
        if stop(stage, done):
            raise StoppedError

    with contextlib.suppress(StoppedError):
        collection_lib.collect(collection, folder, progress)
    return steps


def test_a_collection_that_is_stopped_anywhere_goes_on(collected, tokens, tmp_path, monkeypatch):
    """And does nothing twice."""
    collection, folder = collected
    monkeypatch.setattr(collection_lib, "SAVE_EVERY", 0.0)
    steps, seen, ablations = [], set(), collections.Counter()
    ablated = effects.ablated

    def counted(lm, mesh, sae, T, group):
        ablations.update((sae.name, feature) for feature, *_ in group)
        return ablated(lm, mesh, sae, T, group)

    monkeypatch.setattr(effects, "ablated", counted)
    for _ in range(40):

        def stop(stage, done):
            is_new = (stage, done) not in seen
            seen.add((stage, done))
            return is_new and len(seen) % 3 == 0

        steps += collect_until(collection, tmp_path, stop)
        if len(dump(tmp_path)) == len(SETTINGS):
            break
    done = {stage: [number for each, number in steps if each == stage] for stage, _ in steps}
    assert done["activations"] == done["contexts"] == [32, 64, 80]
    assert {feature for feature, times in ablations.items() if times != 1} == set()
    assert dump(tmp_path) == dump(folder)
    assert {path.name for path in tmp_path.iterdir()} == {f"{kind}_0.sqlite" for kind in SETTINGS}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert collect_until(collection, tmp_path, lambda *_: False) == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.parametrize("stage", ["activations", "contexts", "effects"])
def test_a_collection_may_go_on_for_some_of_its_saes(collected, tmp_path, monkeypatch, stage):
    """Their files are those of a collection of all; and the first pass is not made again."""
    collection, folder = collected
    monkeypatch.setattr(collection_lib, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(collection_lib, "ROWS", 8)
    collect_until(collection, tmp_path, lambda each, done: each == stage and done >= 40)
    for name in ("gated_0", "topk_0"):
        some = dataclasses.replace(collection, saes={name: collection.saes[name]})
        steps = collect_until(some, tmp_path, lambda *_: False)
        assert stage == "activations" or "activations" not in dict(steps) or name == "topk_0"
    ours, theirs = dump(tmp_path), dump(folder)
    number = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")  # other batches, other last bits
    assert {"gated_0.sqlite", "topk_0.sqlite"} <= ours.keys()
    for name in ("gated_0.sqlite", "topk_0.sqlite"):
        assert [number.sub("", line) for line in ours[name]] == [number.sub("", line) for line in theirs[name]]


def test_a_file_that_was_just_begun_or_nearly_finished_is_finished(collected, tmp_path, monkeypatch):
    collection, folder = collected
    only = dataclasses.replace(collection, saes={"gated_0": collection.saes["gated_0"]})
    (tmp_path / ".gated_0.sqlite").touch()  # by a process that was killed before it wrote anything
    with monkeypatch.context() as patched:
        patched.setattr(tables.os, "fsync", lambda _: 1 / 0)  # after the indices
        with pytest.raises(ZeroDivisionError):
            collection_lib.collect(only, tmp_path)
    assert not dump(tmp_path)
    collection_lib.collect(only, tmp_path)
    assert dump(tmp_path)["gated_0.sqlite"] == dump(folder)["gated_0.sqlite"]
    (tmp_path / "gated_0.sqlite").unlink()
    (tmp_path / ".gated_0.sqlite").write_bytes(b"damaged" * 999)
    (tmp_path / collection_lib.STREAM).write_bytes(b"damaged")
    collection_lib.collect(only, tmp_path)
    assert dump(tmp_path)["gated_0.sqlite"] == dump(folder)["gated_0.sqlite"]


def test_what_an_unfinished_collection_of_other_facts_left_is_not_used(collected, tokens, tmp_path, monkeypatch):
    collection, folder = collected
    facts = {name: dict(about) | {"text": "other"} for name, about in collection.about.items()}
    other = dataclasses.replace(collection, rows=tokens[::-1], about=facts)
    monkeypatch.setattr(collection_lib, "SAVE_EVERY", 0.0)

    def stop(stage, done, total):
        if stage == "effects":
            raise StoppedError

    with pytest.raises(StoppedError):
        collection_lib.collect(other, tmp_path, stop)
    collection_lib.collect(collection, tmp_path)
    assert dump(tmp_path) == dump(folder)


@pytest.mark.parametrize("floats", [2**22, 3 * 8])  # whole rows, and chunks of one token of each
def test_of_equal_activations_the_first_is_kept(monkeypatch, floats):
    """Of a row and of all rows: activations are small integers."""
    monkeypatch.setattr(inference, "floats_at_once", lambda platform: floats)
    jax.clear_caches()
    random, R, T, D = np.random.default_rng(0), 30, 7, 8
    x = random.integers(0, 3, (R, T, D)).astype(np.float32)
    params = {"W_enc": jnp.eye(D), "b_enc": jnp.zeros(D), "W_dec": jnp.eye(D), "b_dec": jnp.zeros(D)}
    sae = trained.SAE("a_0", "relu", relu.Config(D, D), SITE, params)
    mesh = mesh_lib.make_mesh(mesh_lib.config_lib.Mesh(1, 1), jax.devices()[:1])
    dictionary, placed = streaming.Dictionary.of(mesh, sae), streaming.params_on(mesh, sae)
    state = streaming.state_on(mesh, sae, streaming.empty(D))
    for start in range(0, R, 3):
        valid = jnp.ones((3, T), bool)
        state = streaming.update(dictionary, state, placed, jnp.asarray(x[start : start + 3]), valid, start)
    best, at = x.max(1), x.argmax(1)
    order = np.lexsort((np.broadcast_to(np.arange(R)[:, None], best.shape), -best), 0)[: streaming.TOP].T
    features = np.arange(D)[:, None]
    np.testing.assert_array_equal(state.top_row, order)
    np.testing.assert_array_equal(state.top_position, at[order, features])
    np.testing.assert_array_equal(state.top_value, best[order, features])
    jax.clear_caches()


@pytest.mark.variants
def test_chunks_of_a_row_give_the_same(collected, tokens, lm_dir, tmp_path, monkeypatch):
    collection, folder = collected
    monkeypatch.setattr(inference, "floats_at_once", lambda platform: 32 * 5 * F)
    jax.clear_caches()
    collection_lib.collect(dataclasses.replace(collection), tmp_path)
    ours, theirs = dump(tmp_path), dump(folder)
    for name in ours:
        for mine, other in zip(ours[name], theirs[name], strict=True):
            assert re.sub(r"[\d.e+-]{9,}", "", mine) == re.sub(r"[\d.e+-]{9,}", "", other)
    jax.clear_caches()


def contexts_of(db, feature):
    query = (
        f"SELECT tokens, position, active FROM contexts JOIN rows USING (row) WHERE feature = ? AND "
        f"quantile = {tables.STRONGEST} AND rank < {effects.CONTEXTS} ORDER BY rank"
    )
    return [(np.array(json.loads(t)), at, json.loads(active)) for t, at, active in db.execute(query, (feature,))]


@pytest.mark.parametrize("kind", SETTINGS)
def test_effects_equal_numpy(collected, kind):
    collection, folder = collected
    lm, sae = collection.lm, collection.saes[f"{kind}_0"]
    db = tables.opened(folder / f"{kind}_0.sqlite")
    site, W = sae.targets[-1], np.asarray(sae.params["W_dec_1" if kind == "gated_crosscoder" else "W_dec"], np.float64)
    gain, W_U = (np.asarray(x, np.float64) for x in (lm.params["ln_final"]["w"], lm.params["unembed.W_U"]))
    direct = (W - W.mean(-1, keepdims=True)) * gain @ W_U
    checked = 0
    for feature in range(0, F, 5):
        rows = {
            which: list(
                db.execute(
                    "SELECT token, effect FROM effects WHERE feature = ? AND kind = ? ORDER BY rank", (feature, which)
                )
            )
            for which in ("direct", "ablation")
        }
        order = np.argsort(-direct[feature])
        assert [token for token, _ in rows["direct"]] == [*order[:10], *order[::-1][:10]]
        np.testing.assert_allclose(
            [e for _, e in rows["direct"]], direct[feature][[t for t, _ in rows["direct"]]], rtol=1e-5, atol=1e-5
        )
        contexts = contexts_of(db, feature)
        ((divergence,),) = db.execute("SELECT divergence FROM features WHERE feature = ?", (feature,))
        if not contexts:
            assert (rows["ablation"], divergence) == ([], None)
            continue
        differences, divergences = [], []
        for tokens, position, active in contexts:
            amounts = np.zeros(len(tokens))
            for at, value in active:
                amounts[at] = value

            def tap(name, x, amounts=amounts, row=W[feature]):
                return x - (amounts[:, None] * row)[None].astype(np.float32) if name == site else None

            logits = [
                np.asarray(lm.run(tokens[None], each)[0, position], np.float64) for each in (lambda *_: None, tap)
            ]
            clean, without = (z - np.log(np.exp(z - z.max()).sum()) - z.max() for z in logits)
            differences.append(clean - without)
            divergences.append((np.exp(clean) * (clean - without)).sum())
        mean = np.mean(differences, 0)
        assert len(rows["ablation"]) == 20
        np.testing.assert_allclose([e for _, e in rows["ablation"]], mean[[t for t, _ in rows["ablation"]]], atol=1e-4)
        np.testing.assert_allclose([e for _, e in rows["ablation"]][:10], np.sort(mean)[::-1][:10], atol=1e-4)
        np.testing.assert_allclose([e for _, e in rows["ablation"]][10:], np.sort(mean)[:10], atol=1e-4)
        np.testing.assert_allclose(divergence, np.mean(divergences), atol=1e-5)
        checked += 1
    assert checked > 2


def test_features_that_are_alike_equal_numpy(collected, tokens):
    collection, folder = collected
    f, _ = features_of(collection, "gated_0", tokens)
    db = tables.opened(folder / "gated_0.sqlite")
    unit = {
        name: W / np.linalg.norm(W, axis=-1, keepdims=True)
        for name, sae in collection.saes.items()
        if sae.targets == (SITE,)
        for W in [np.asarray(sae.params["W_dec"], np.float64)]
    }
    assert len(unit) == 4
    on = f.reshape(-1, F) != 0
    for feature in range(F):
        for name, W in unit.items():
            cosines = W @ unit["gated_0"][feature]
            if name == "gated_0":
                cosines[feature] = -2
            order = np.argsort(-cosines)[: 10 if name == "gated_0" else 3]
            query = "SELECT other, cosine FROM neighbours WHERE feature = ? AND sae = ? ORDER BY rank"
            rows = list(db.execute(query, (feature, name)))
            assert [other for other, _ in rows] == [*order]
            np.testing.assert_allclose([cosine for _, cosine in rows], cosines[order], atol=1e-6)
        both = (on & on[:, feature][:, None]).sum(0)
        either = (on | on[:, feature][:, None]).sum(0)
        jaccard = np.where(both > 0, both / np.maximum(either, 1), -1)
        jaccard[feature] = -1
        order = [other for other in np.argsort(-jaccard, kind="stable")[:10] if jaccard[other] > 0]
        rows = list(db.execute("SELECT other, both, jaccard FROM cofiring WHERE feature = ? ORDER BY rank", (feature,)))
        assert [other for other, _, _ in rows] == order
        assert [count for _, count, _ in rows] == [both[other] for other in order]
        np.testing.assert_allclose([value for _, _, value in rows], jaccard[order], rtol=1e-6)


def test_the_sample_of_rows_is_spread_over_the_text():
    rows = collection_lib.sample_rows(1000, 128)
    assert len(rows) == collection_lib.SAMPLE_TOKENS // 128 == 128
    assert set(np.diff(rows)) == {7, 8}
    assert collection_lib.sample_rows(3, 128).tolist() == [0, 1, 2]
    assert collection_lib.sample_rows(3, 2**20).tolist() == [0]


def test_alike_in_parts(monkeypatch):
    random = np.random.default_rng(0)
    rows = random.standard_normal((11, 4)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    on = random.random((50, 11)) < 0.3
    token, feature = np.nonzero(on)
    whole = [*neighbours.nearest(rows, rows, 3, True)], [*neighbours.cofiring(token, feature, 11, 3)]
    monkeypatch.setattr(neighbours, "FLOATS", 44)
    parts = [*neighbours.nearest(rows, rows, 3, True)], [*neighbours.cofiring(token, feature, 11, 3)]
    for ours, theirs in zip(whole, parts, strict=True):
        assert [each.feature for each in ours] == [each.feature for each in theirs] == [*range(11)]
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine.others, other.others)
            np.testing.assert_allclose(mine.scores, other.scores, rtol=1e-6)
