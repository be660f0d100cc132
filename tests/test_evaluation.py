"""Metrics against float64, and the measuring of SAEs in a language model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import measure, metrics, plots, report
from gsae_jax.lms import loading
from gsae_jax.saes import gated, relu, relu_crosscoder, relu_transcoder, signed_gated
from tests import references
from tests.measuring import SITE, UNUSED, as_sae, batches, identity, on_mesh, reported, zero
from tests.refusals import refused
from tests.test_lms import checkpoint


def test_an_sae_may_have_any_name(lm):
    D = lm.sites[SITE]
    config = relu.Config(D, 2 * D)
    names = ("x", "zero", "mean")
    saes = [as_sae(name, relu, identity(D), config) for name in names]
    sums = measure.measure(lm, saes, batches(lm), lm.special_tokens)
    assert [metrics.combine(sums[name])["loss_recovered"] for name in names] == [1, 1, 1]


@pytest.mark.parametrize("mesh", [None, pytest.param((8, 1), marks=pytest.mark.variants), (2, 4)])
def test_identity_recovers_all_loss_and_zero_none(lm, mesh, monkeypatch):
    """Exactly: equal activations have equal losses, whatever they come from and whichever are measured with them."""
    monkeypatch.setattr(measure, "AT_ONCE", 4)
    D = lm.sites[SITE]
    config = relu.Config(D, 2 * D)
    saes = [as_sae("identity", relu, identity(D), config), as_sae("zero", relu, zero(D), config)]
    sums = measure.measure(lm.on(on_mesh(*mesh)) if mesh else lm, saes, batches(lm), lm.special_tokens)
    kept, none = metrics.combine(sums["identity"]), metrics.combine(sums["zero"])
    assert kept["loss_recovered"] == 1
    assert (none["l0"], none["alive"]) == (0, 0)
    assert none["loss_recovered"] == 0
    assert kept["l0"] == D
    assert kept["gamma"] == pytest.approx(1, rel=1e-6)
    assert kept["fvu"] == pytest.approx(0, abs=1e-10)
    assert none["fvu"] > 0.99
    special = sum(int(np.isin(tokens, lm.special_tokens).sum()) for tokens in batches(lm))
    assert kept["tokens"] == batches(lm).size - special


def test_an_sae_that_no_activation_is_for_is_refused(lm):
    D = lm.sites[SITE]
    sae = dataclasses.replace(as_sae("identity", relu, identity(D), relu.Config(D, 2 * D)), norm_limit=1e-9)
    with refused("identity", "every activation", "norm_limit (1e-09)"):
        measure.measure(lm, [sae], batches(lm), lm.special_tokens)


def test_a_token_above_the_limit_at_one_site_is_measured_at_none(lm):
    """As training sees whole tokens; of a crosscoder at both sites, and of a transcoder at the one that it reads."""
    D, sites = lm.sites[SITE], (SITE, "blocks.0.hook_resid_post")
    tokens = batches(lm)
    x = [np.concatenate([np.asarray(lm.activations(rows, [s])[s], np.float32) for rows in tokens]) for s in sites]
    norms = [np.linalg.norm(each, axis=-1) for each in x]
    allowed = ~np.isin(np.concatenate(list(tokens)), lm.special_tokens)
    limits = [float(np.median(of_site)) for of_site in norms]
    both = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    params = {"W_enc": both.T, "b_enc": jnp.zeros(2 * D), "W_dec": both, "b_dec": jnp.zeros(D)}
    cross = {f"{name}_{site}": params[name] for name in ("W_enc", "W_dec", "b_dec") for site in (0, 1)}
    cross["b_enc"] = params["b_enc"]
    transcodes = relu_transcoder.Config(width=2 * D, d_in=D, d_out=D)
    saes = [
        as_sae("cross", relu_crosscoder, cross, relu_crosscoder.Config((D, D), 2 * D), sites),
        as_sae("trans", relu_transcoder, params | {"b_in": jnp.zeros(D)}, transcodes),
    ]
    saes[0] = dataclasses.replace(saes[0], norm_limit=tuple(limits))
    saes[1] = dataclasses.replace(saes[1], target=sites[1], norm_limit=math.inf, input_norm_limit=limits[0])
    sums = measure.measure(lm, saes, tokens, lm.special_tokens)
    within = allowed & (norms[0] <= limits[0])
    assert metrics.combine(sums["trans"])["tokens"] == within.sum()
    within &= norms[1] <= limits[1]
    assert 0 < within.sum() < (allowed & (norms[0] <= limits[0])).sum()
    for site in sites:
        assert metrics.combine(sums[f"cross@{site}"])["tokens"] == within.sum()


def test_every_metric_matches_float64(lm, lm_dir):
    """The paper's formulas on the reference's activations and losses; special tokens keep their activation."""
    D, F = lm.sites[SITE], 50
    config = gated.Config(D, F)
    keys = jax.random.split(jax.random.key(0), 8)
    params = gated.init(keys[0], config)
    params = {
        name: p + 0.2 * jax.random.normal(key, p.shape) for key, (name, p) in zip(keys, params.items(), strict=False)
    }
    params["b_gate"] = params["b_gate"].at[:5].set(-1e6)  # five dead features
    tokens = batches(lm)
    hidden = np.random.default_rng(4).random(tokens.shape) < 0.2  # as `data.roles` hides them
    rows = np.where(hidden, ~tokens, tokens)
    ours = metrics.combine(
        measure.measure(lm.on(on_mesh(4, 2)), [as_sae("a", gated, params, config)], rows, lm.special_tokens)["a"]
    )

    tensors, settings = checkpoint(lm_dir)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    _, found = references.gelu_lm(tensors, settings, tokens)
    x = found[SITE]
    valid = ~np.isin(tokens, lm.special_tokens) & ~hidden.reshape(tokens.shape)
    _, _, f = references.gated_sae(params, x.reshape(-1, D), 0.0)
    x_hat = (f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])).reshape(x.shape)

    def log_probabilities(replacement):
        """Of the reference forward with the MLP's output replaced where tokens are valid."""
        out = np.where(valid[..., None], replacement, found[SITE])
        logits = references.gelu_lm(tensors, settings, tokens, replace={SITE: out})[0][:, :-1]
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def loss(replacement):
        return -np.take_along_axis(log_probabilities(replacement), tokens[:, 1:, None], -1).mean()

    x, x_hat, f = x[valid], x_hat[valid], f[valid.reshape(-1)]
    full = np.zeros(found[SITE].shape)
    full[valid] = x_hat
    ce = {"ce_clean": loss(found[SITE]), "ce_sae": loss(full), "ce_zero": loss(0.0), "ce_mean": loss(x.mean(0))}
    log_p, log_q = log_probabilities(found[SITE]), log_probabilities(full)
    gate = (x - np.asarray(params["b_dec"])) @ np.asarray(params["W_gate"]) + np.asarray(params["b_gate"]) > 0
    assert (gate & (f == 0)).any()
    expected = ce | {
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "loss_recovered_from_mean": 1 - (ce["ce_sae"] - ce["ce_clean"]) / (ce["ce_mean"] - ce["ce_clean"]),
        "cosine": ((x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)).mean(),
        "l1": f.sum(1).mean(),
        "gate_only": (gate & (f == 0)).sum(1).mean(),
        "dense": ((f > 0).mean(0) > 0.1).mean(),
        "l0": (f > 0).sum(1).mean(),
        "loss_recovered": 1 - (ce["ce_sae"] - ce["ce_clean"]) / (ce["ce_zero"] - ce["ce_clean"]),
        "gamma": (x_hat**2).sum() / (x_hat * x).sum(),
        "fvu": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "alive": (f > 0).any(0).mean(),
        "tokens": valid.sum(),
        "extreme": 0,
    }
    expected |= {f"{name}_all": expected[name] for name in ("fvu", "gamma")}
    c, c_hat = x - x.mean(0), x_hat - x.mean(0)
    expected["gamma_centered"] = (c_hat**2).sum() / (c_hat * c).sum()
    expected["mean_share"] = (x.mean(0) ** 2).sum() / (x**2).sum(1).mean()
    assert expected["alive"] <= 0.9
    intervals = ours.pop("intervals")
    assert ours == pytest.approx(expected, rel=1e-4)
    assert set(intervals) == set(metrics.RATIOS)
    for name, (low, high) in intervals.items():
        assert low < ours[name] < high, name


def test_intervals_are_those_of_resampled_rows():
    """A ratio's bootstrap against the spread that independent rows give it."""
    random = np.random.default_rng(0)
    rows = {"tokens": np.full(400, 100.0), "l0": random.normal(2000, 300, 400)}
    low, high = metrics.interval(metrics.resampled(dict.fromkeys(UNUSED, np.ones(400)) | rows)["l0"])
    assert (low + high) / 2 == pytest.approx(rows["l0"].mean() / 100, rel=2e-3)
    assert high - low == pytest.approx(2 * 1.96 * rows["l0"].std() / 20 / 100, rel=0.1)


def test_intervals_have_the_variation_between_documents():
    """Rows of one document are equal here, so the interval is that of so many documents, in rows of any order."""
    random = np.random.default_rng(0)
    document = random.permutation(np.repeat(np.arange(40), 10))
    of_document = random.normal(20, 3, 40)
    sums = dict.fromkeys(UNUSED, np.ones(400)) | {"l0": of_document[document]}
    low, high = metrics.interval(metrics.resampled(sums | {"document": document})["l0"])
    assert high - low == pytest.approx(2 * 1.96 * of_document.std() / 40**0.5, rel=0.1)
    few = document % (metrics.FEWEST_DOCUMENTS - 1)
    np.testing.assert_array_equal(metrics.resampled(sums | {"document": few})["l0"], metrics.resampled(sums)["l0"])
    records = [metrics.combine(each | {"fired": np.ones(3)}) for each in (sums | {"document": document}, sums)]
    assert records[0]["intervals"]["l0"] == [low, high]
    for record in records:
        del record["intervals"]
    assert str(records[0]) == str(records[1])  # with NaN


def test_features_chosen_by_gradient_pursuit(lm):
    """As many as allowed, also on a mesh, and closer than the encoder's of an untrained SAE."""
    D = lm.sites[SITE]
    config = gated.Config(D, 48)
    sae = as_sae("a_0", gated, gated.init(jax.random.key(0), config), config)
    sums = measure.measure(lm.on(on_mesh(4, 2)), [sae], batches(lm), lm.special_tokens, ito=(2, 8))
    assert list(sums) == ["a_0", "a_0_ito_2", "a_0_ito_8"]
    for of_sae in sums.values():  # neither counts special tokens
        assert of_sae["fired"].sum() == of_sae["l0"].sum() > 0
    encoder, two, eight = (metrics.combine(s) for s in sums.values())
    assert 1.9 < two["l0"] <= 2 < 6 < eight["l0"] <= 8 < encoder["l0"]
    assert eight["fvu"] < min(two["fvu"], encoder["fvu"])
    found = {record["name"]: record for record in report.rows("small", {"a_0": sae}, sums, ito=(2, 8))}
    assert [record["ito"] for record in found.values()] == [0, 2, 8]


@pytest.mark.variants
def test_features_of_either_sign_are_measured(lm, tmp_path):
    """By their absolute values; pursuit takes atoms along both directions too."""
    D, tokens = lm.sites[SITE], batches(lm)
    config = signed_gated.Config(D, 48)
    params = signed_gated.init(jax.random.key(0), config)
    params |= {"b_gate": jnp.full(48, -0.5).at[:5].set(-1e6), "b_mag": jnp.full(48, -0.7)}
    sae = as_sae("a_0", signed_gated, params, config)
    sums = measure.measure(lm.on(on_mesh(4, 2)), [sae], tokens, lm.special_tokens, ito=(4,))
    ours, pursued = (metrics.combine(sums[name]) for name in ("a_0", "a_0_ito_4"))
    valid = ~np.isin(tokens, lm.special_tokens)
    x = np.concatenate([np.asarray(loading.capture(lm.module, lm.params, part, {SITE})[SITE]) for part in tokens])
    x = x[valid.reshape(x.shape[:-1])].astype(np.float64)
    _, _, f = references.signed_gated_sae(params, x, 0.0)
    x_hat = f @ np.asarray(params["W_dec"], np.float64)
    assert (f < 0).any()
    expected = {
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "gate_only": ((np.abs(x @ np.asarray(params["W_gate"])) > 0.5) & (f == 0))[:, 5:].sum(1).mean(),
        "alive": (f != 0).any(0).mean(),
        "dense": ((f != 0).mean(0) > 0.1).mean(),
        "fvu": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert pursued["l0"] <= 4
    one_sign = dataclasses.replace(sae, architecture="gated", config=gated.Config(D, 48))
    clipped = metrics.combine(measure.measure(lm, [one_sign], tokens, lm.special_tokens, ito=(4,))["a_0_ito_4"])
    assert pursued["fvu"] < 0.9 * clipped["fvu"]
    found, _ = reported(tmp_path, lm, {"a_0": sae}, tokens)
    assert found["saes"][0]["variant"] == "signed_gated"


@pytest.mark.variants
def test_one_device_and_eight_agree(lm):
    D = lm.sites[SITE]
    config = gated.Config(D, 48)
    saes = [as_sae(f"a_{seed}", gated, gated.init(jax.random.key(seed), config), config) for seed in range(2)]
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    one = jax.make_mesh((1, 1), ("data", "latent"), devices=jax.devices()[:1], axis_types=axis_types)
    alone = measure.measure(lm.on(one), saes, batches(lm), lm.special_tokens)
    for mesh in (on_mesh(8, 1), on_mesh(2, 4)):
        spread = measure.measure(lm.on(mesh), saes, batches(lm), lm.special_tokens)
        for name, sums in alone.items():
            for key, value in sums.items():
                assert np.sum(value) == pytest.approx(np.sum(spread[name][key]), rel=1e-6), key


def test_loss_recovered_is_blank_where_zeroing_helps(lm, tmp_path):
    """An unembedding of the other sign predicts what does not come, the more so the more it knows."""
    D = lm.sites[SITE]
    wrong = dataclasses.replace(lm, params=lm.params | {"unembed.W_U": -lm.params["unembed.W_U"]})
    gate = gated.Config(D, 48)
    saes = {
        "gated_0": as_sae("gated_0", gated, gated.init(jax.random.key(0), gate), gate),
        "relu_0": as_sae("relu_0", relu, identity(D), relu.Config(D, 2 * D)),
    }
    found, text = reported(tmp_path, wrong, saes, batches(lm))
    assert all(record["ce_zero"] < record["ce_clean"] for record in found["saes"])
    assert [record["loss_recovered"] for record in found["saes"]] == [None, None]
    assert all("loss_recovered" not in record["intervals"] for record in found["saes"])
    assert found["l0_ratios"] == []
    assert sum(SITE in note and "loss recovered" in note for note in found["notes"]) == 1
    assert all(note in text for note in found["notes"])
    assert "nan" not in text
    (axis,) = plots.frontier([record | {"loss_recovered": math.nan} for record in found["saes"]]).axes
    assert axis.texts[0].get_text().startswith("there is nothing to draw")


def test_rows_of_two_tokens_recover_no_loss(lm, tmp_path):
    """The only token that is measured comes last, and predicts nothing."""
    D = lm.sites[SITE]
    saes = {"relu_0": as_sae("relu_0", relu, identity(D), relu.Config(D, 2 * D))}
    found, _ = reported(tmp_path, lm, saes, batches(lm)[:, :, :2])
    assert found["saes"][0]["loss_recovered"] is None
    assert any("longer than 2 tokens" in note for note in found["notes"])


@pytest.mark.variants
def test_tokens_of_extreme_norm_are_no_denominator(lm):
    """FVU and gamma of the others, against float64, whatever is done with those; and of all of them beside these."""
    site = "blocks.0.hook_resid_pre"
    D, tokens = lm.sites[site], batches(lm)
    spiky = int(tokens[0, 1, 3])
    W_E = lm.params["embed.W_E"]
    lm = dataclasses.replace(lm, params=lm.params | {"embed.W_E": W_E.at[spiky].multiply(1000)})
    config = gated.Config(D, 48)
    sae = as_sae("a_0", gated, gated.init(jax.random.key(0), config), config, site)
    ours = metrics.combine(measure.measure(lm, [sae], tokens, lm.special_tokens)["a_0"])
    valid = ~np.isin(tokens, lm.special_tokens)
    x = np.concatenate([np.asarray(loading.capture(lm.module, lm.params, part, {site})[site]) for part in tokens])
    x = x[valid.reshape(x.shape[:-1])].astype(np.float64)
    x_hat = np.asarray(sae(x.astype(np.float32)), np.float64)
    norms = np.linalg.norm(x, axis=1)
    typical = norms <= 10 * np.median(norms)
    assert 0 < ours["extreme"] == (~typical).sum() < 0.2 * len(x)
    for end, rows in (("", typical), ("_all", np.full(len(x), True))):
        error, of = x[rows] - x_hat[rows], x[rows] - x[rows].mean(0)
        assert ours[f"fvu{end}"] == pytest.approx((error**2).sum() / (of**2).sum(), rel=1e-4)
        assert ours[f"gamma{end}"] == pytest.approx((x_hat[rows] ** 2).sum() / (x_hat[rows] * x[rows]).sum(), rel=1e-4)
    record = report.rows("small", {"a_0": sae}, {"a_0": measure.measure(lm, [sae], tokens, lm.special_tokens)["a_0"]})
    assert any(f"{ours['extreme']} of" in note for note in report.notes(record))


def test_a_mean_that_hides_shrinkage_is_told(lm):
    D = lm.sites[SITE]
    lm = dataclasses.replace(lm, params=jax.tree.map(lambda value: value, lm.params))
    layer = SITE.rpartition(".")[0]
    lm.params[layer]["mlp"]["b_out"] = lm.params[layer]["mlp"]["b_out"] + 30
    config = gated.Config(D, 48)
    sae = as_sae("a_0", gated, gated.init(jax.random.key(0), config) | {"b_dec": jnp.full(D, 30.0)}, config)
    sums = measure.measure(lm, [sae], batches(lm), lm.special_tokens)
    ours = metrics.combine(sums["a_0"])
    assert ours["gamma"] == pytest.approx(1, abs=0.01)
    assert abs(ours["gamma_centered"] - 1) > 0.05
    assert ours["mean_share"] > 0.9
    notes = report.notes(report.rows("small", {"a_0": sae}, sums))
    assert any(f"{ours['gamma_centered']:.3f}" in note for note in notes)


@pytest.mark.variants
@pytest.mark.parametrize("devices", [3, 8])
def test_any_number_of_devices_measures_any_number_of_rows(lm, devices):
    D = lm.sites[SITE]
    config = gated.Config(D, 48)
    sae = as_sae("a_0", gated, gated.init(jax.random.key(0), config), config)
    rows = batches(lm)[:2, :5]
    mesh = mesh_lib.make_mesh(config_lib.Mesh(devices, 1), jax.devices()[:devices])
    alone, spread = (
        metrics.combine(measure.measure(on, [sae], rows, lm.special_tokens)["a_0"]) for on in (lm, lm.on(mesh))
    )
    assert spread.pop("intervals").keys() == alone.pop("intervals").keys()
    assert spread == pytest.approx(alone, rel=1e-4, nan_ok=True)
