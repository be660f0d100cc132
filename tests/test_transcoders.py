"""Transcoders, which predict another site than they read, and crosscoders, which read and write several."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import measure, report, tables
from gsae_jax.saes import (
    batch_topk_crosscoder,
    batch_topk_transcoder,
    contract,
    gated_crosscoder,
    gated_transcoder,
    jumprelu_transcoder,
    parameters,
    relu,
    relu_crosscoder,
    relu_transcoder,
    topk_transcoder,
    trained,
)
from gsae_jax.training import resampling
from gsae_jax.training.stacks import Stack
from tests import references
from tests.measuring import as_sae, batches
from tests.refusals import refused
from tests.small_saes import assert_close, away_from_init

D_IN, D_OUT, F, B, K = 12, 9, 40, 64, 6
TRANSCODERS = {
    gated_transcoder: {"l1": 0.07},
    relu_transcoder: {"l1": 0.07},
    jumprelu_transcoder: {"l1": 0.07, "bandwidth": 0.3 * D_IN**0.5},
    topk_transcoder: {"k": K},
    batch_topk_transcoder: {"k": K},
}
CROSSCODERS = {gated_crosscoder: {"l1": 0.07}, relu_crosscoder: {"l1": 0.07}, batch_topk_crosscoder: {"k": K}}
MLP = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


def kind(module):
    return module.__name__.rpartition(".")[2].rpartition("_")[0]


transcoders = pytest.mark.parametrize("module", TRANSCODERS, ids=kind)
crosscoders = pytest.mark.parametrize("module", CROSSCODERS, ids=kind)


def config_of(module, d_in, d_out=None, **options):
    """With the options that the references have."""
    if kind(module) == "jumprelu":
        options |= {"bandwidth": 0.3}
    if contract.sparsity(module):
        options = {"k": K, "auxk_coefficient": 0.0} | options
    return contract.build_config(module, kind(module), d_in, d_out, F, "float32", options)


def activations():
    """Of a site of width D_IN, and of one of width D_OUT that partly depends on it."""
    x = jax.random.normal(jax.random.key(5), (B, D_IN)) + 0.5
    t = x[:, :D_OUT] + 0.5 * jax.random.normal(jax.random.key(6), (B, D_OUT))
    return x, t


def loss_and_gradients(module, params, inputs, targets, config, dead=None):
    trained_params, state = parameters.split(module, params)

    def loss(trained_params):
        batch = contract.Batch(inputs, targets, lambda: dead, jnp.int32(0))
        return module.loss(trained_params, state, batch, {"l1_coefficient": 0.07}, config)

    return jax.value_and_grad(loss, has_aux=True)(trained_params)


def assert_same(ours, theirs):
    """(Loss, gradients, features) to 1e-5."""
    ((value, statistics), grads), (expected, expected_grads, f) = ours, theirs
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert np.any(expected_grads[key]), key
        assert_close(grads[key], expected_grads[key])
    np.testing.assert_allclose(statistics.means["l0"], (f > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))


@transcoders
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_loss_and_gradients_match_float64(module, skip):
    config, (x, t) = config_of(module, (D_IN,), (D_OUT,), skip=skip), activations()
    params = away_from_init(module, config)
    expected = references.transcoder(kind(module), params, x, t, **TRANSCODERS[module])
    assert ("W_skip" in expected[1]) == skip
    assert_same(loss_and_gradients(module, params, x, t, config), expected)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    sae = trained.SAE("a_0", kind(module) + "_transcoder", config, MLP[0], params, target=MLP[1])
    f = np.asarray(sae.encode(x), np.float64)
    if kind(module) != "batch_topk":  # which has a threshold instead
        assert_close(f, expected[2])
    x_hat = f @ p["W_dec"] + p["b_dec"] + (np.asarray(x) @ p["W_skip"] if skip else 0)
    assert_close(sae(x), x_hat)
    assert_close(sae.decode(f) + (x @ sae.W_skip if skip else 0), x_hat)


@pytest.mark.parametrize("mean", [20.0, 2000.0])
@transcoders
def test_a_skip_transcoder_in_other_units(module, mean):
    """The mean of the inputs goes through W_skip into the bias, and is taken back."""
    config, x = config_of(module, (D_IN,), (D_OUT,), skip=True), np.asarray(activations()[0])
    params = away_from_init(module, config)
    inputs, targets = (
        parameters.Units(scale, mean * np.linspace(low, 1, D).astype(np.float32))
        for scale, low, D in ((3.0, -1, D_IN), (0.2, -0.5, D_OUT))
    )
    folded = parameters.fold(module, params, [inputs], [targets])

    def reconstructed(params, x):
        x_hat = module.decode(params, module.encode(params, x, config))
        return np.asarray(contract.with_skip(module, params, x, x_hat))

    x = x + inputs.mean
    in_training = jnp.asarray((x - inputs.mean) * inputs.scale)
    expected = reconstructed(params, in_training) / targets.scale + targets.mean
    tolerance = 1e-6 * mean * 10
    np.testing.assert_allclose(reconstructed(folded, jnp.asarray(x)), expected, atol=tolerance, rtol=1e-5)
    back = parameters.unfold(module, folded, [inputs], [targets])
    for name, value in back.items():
        np.testing.assert_allclose(value, params[name], atol=tolerance, rtol=1e-5, err_msg=name)
    assert parameters.fingerprint(back) != parameters.fingerprint(folded)


@crosscoders
@pytest.mark.parametrize("sites", [2, 1])
def test_a_crosscoders_loss_and_gradients_match_float64(module, sites):
    xs, widths = activations()[:sites], (D_IN, D_OUT)[:sites]
    config = config_of(module, widths)
    params = away_from_init(module, config)
    expected = references.crosscoder(kind(module), params, xs, **CROSSCODERS[module])
    ours = loss_and_gradients(module, params, xs, xs, config)
    assert_same(ours, expected)
    f = module.encode(params, xs, config)
    if kind(module) != "batch_topk":
        assert_close(f, expected[2])
    for site, x_hat in enumerate(module.decode(params, jnp.asarray(expected[2], jnp.float32))):
        assert_close(x_hat, expected[2] @ np.asarray(params[f"W_dec_{site}"]) + np.asarray(params[f"b_dec_{site}"]))


def test_dead_features_of_a_crosscoder_explain_the_residual():
    module, xs = batch_topk_crosscoder, activations()
    config = config_of(module, (D_IN, D_OUT), auxk_coefficient=0.5, k_aux=4)
    params, dead = away_from_init(module, config), np.arange(F) % 3 == 1
    expected = references.crosscoder("batch_topk", params, xs, k=K, dead=dead, k_aux=4, weight=0.5)
    assert_same(loss_and_gradients(module, params, xs, xs, config, jnp.asarray(dead)), expected)


@pytest.mark.variants
@crosscoders
def test_a_feature_may_have_any_scale(module):
    """The loss does not change if features grow and their rows shrink; so do not the features that are chosen."""
    xs, config = activations(), config_of(module, (D_IN, D_OUT))
    params, factor_F = away_from_init(module, config), jnp.linspace(0.3, 3, F)
    scaled = {}
    for name, value in params.items():
        role, axis = module.PARAMETERS[name].role, module.PARAMETERS[name].axis
        grows = role in (contract.Role.ENCODER, contract.Role.FEATURE)
        factor = factor_F if grows else 1 / factor_F if role is contract.Role.DECODER else jnp.ones(F)
        scaled[name] = value if axis is None else value * jnp.expand_dims(factor, [1 - axis] if value.ndim == 2 else [])
    first, other = (loss_and_gradients(module, each, xs, xs, config)[0] for each in (params, scaled))
    np.testing.assert_allclose(other[0], first[0], rtol=1e-5)
    np.testing.assert_array_equal(other[1].fired, first[1].fired)
    for name, value in first[1].state.items():
        np.testing.assert_allclose(other[1].state[name], value * factor_F, rtol=1e-5)


@crosscoders
def test_rows_of_zeros_have_gradients(module):
    xs, config = activations(), config_of(module, (D_IN, D_OUT))
    params = away_from_init(module, config)
    params["W_dec_0"] = params["W_dec_0"].at[:5].set(0)
    params["W_dec_1"] = params["W_dec_1"].at[3:8].set(0)  # features 3 and 4 have none at all
    (value, _), grads = loss_and_gradients(module, params, xs, xs, config)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("module", [gated_crosscoder, relu_crosscoder, gated_transcoder, relu_transcoder], ids=kind)
def test_about_so_many_features_are_active_before_training(module):
    d_in, d_out = ((96, 48), None) if "crosscoder" in module.__name__ else ((96,), (48,))
    config = dataclasses.replace(config_of(module, d_in, d_out, initial_l0=64), width=1024)
    params = module.init(jax.random.key(0), config)
    xs = tuple(jax.random.normal(jax.random.key(n), (256, D)) for n, D in enumerate(d_in))  # E||x||^2 = D
    f = module.encode(params, xs if d_out is None else xs[0], config)
    assert (f > 0).sum(-1).mean() == pytest.approx(64, rel=0.15)
    x_hats = jax.tree.leaves(module.decode(params, f))
    assert all(0.05 < jnp.square(x_hat).mean() < 5 for x_hat in x_hats)


@pytest.mark.parametrize("module", [gated_transcoder, relu_transcoder], ids=kind)
def test_the_jumprelu_form_of_a_transcoder(module):
    config, (x, _) = config_of(module, (D_IN,), (D_OUT,), skip=True), activations()
    params = away_from_init(module, config)
    convert = contract.converter(f"{kind(module)}_transcoder", "jumprelu_transcoder")
    form = convert(params, config)
    like = config_of(jumprelu_transcoder, (D_IN,), (D_OUT,), skip=True)
    assert set(form) == set(jumprelu_transcoder.init(jax.random.key(0), like))
    np.testing.assert_allclose(
        jumprelu_transcoder.encode(form, x, like), module.encode(params, x, config), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(form["W_skip"], params["W_skip"])


def test_sites_that_are_too_many_or_missing():
    widths = {f"blocks.{layer}.hook_mlp_out": 8 for layer in range(65)}
    build = partial(Stack.build, "a", widths=widths, dtype="float32")
    several = {"architecture": "relu_crosscoder", "width": F, "l1_coefficients": (0.1,)}
    with refused("stacks.a.site", "65 sites", "64"):
        build(config_lib.Stack(site=tuple(widths), **several))
    assert build(config_lib.Stack(site=tuple(widths)[:64], **several)).sae.d_in == (8,) * 64
    with refused("stacks.a.target"):
        build(config_lib.Stack(site=tuple(widths)[:2], target="blocks.3.hook_mlp_out", **several))


def test_each_site_that_a_crosscoder_writes_is_measured(lm, tmp_path):
    """As an SAE of that site whose reconstructions are the same; the identity of one site, and zero at the other."""
    first, second = sites = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"
    D = lm.sites[first]
    both = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    params = {"W_enc_0": both.T, "W_enc_1": 0 * both.T, "b_enc": jnp.zeros(2 * D), "W_dec_0": both, "W_dec_1": 0 * both}
    params |= {"b_dec_0": jnp.zeros(D), "b_dec_1": jnp.zeros(D)}
    config = relu_crosscoder.Config((D, D), 2 * D)
    cross = trained.SAE("a_0", "relu_crosscoder", config, sites, params, 0.1, 1e-3, 0, stack="a")
    like = {name: params[f"{name}_0"] for name in ("W_enc", "W_dec", "b_dec")} | {"b_enc": params["b_enc"]}
    single = as_sae("b_0", relu, like, relu.Config(D, 2 * D), site=first)
    saes = {"a_0": cross, "b_0": single}
    sums = measure.measure(lm, list(saes.values()), batches(lm), lm.special_tokens, ito=[3])
    records = {record["name"]: record for record in report.rows("small", saes, sums, ito=[3])}
    assert set(records) == {f"a_0{k}@{site}" for k in ("", "_ito_3") for site in sites} | {"b_0", "b_0_ito_3"}
    same, zero = (records[f"a_0@{site}"] for site in sites)
    for k in ("", "_ito_3"):
        for name in ("loss_recovered", "fvu", "l0", "ce_sae", "kl"):
            assert records[f"a_0{k}@{first}"][name] == pytest.approx(records[f"b_0{k}"][name], rel=1e-4, abs=1e-6)
    assert (same["site"], zero["site"], zero["layer"]) == (first, second, 1)
    assert same["fvu"] == pytest.approx(0, abs=1e-6)
    assert zero["loss_recovered"] == pytest.approx(0, abs=1e-6)
    assert same["l0"] == zero["l0"] == D
    shown = {table.name: [row[0] for row in table.table.rows] for table in tables.measured(list(records.values()))}
    assert shown == {first: ["b_0", "a_0", "b_0_ito_3", "a_0_ito_3"], second: ["a_0", "a_0_ito_3"]}
    report.write(tmp_path / "report", None, list(records.values()), sums, [], report.gates(saes))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("relu_transcoder", {"site": "a", "target": "b", "options": {"skip": True}}),
        ("gated_crosscoder", {"site": ("a", "b")}),
    ],
)
def test_what_a_dead_feature_becomes(name, settings):
    """An input's direction at each site, less what W_skip explains of the target; rows have the live ones' norm."""
    values = dict(zip("ab", map(np.asarray, activations()), strict=True))
    config = config_lib.Stack(name, width=F, l1_coefficients=(0.1,), **settings)
    stack = Stack.build("s", config, {"a": D_IN, "b": D_OUT}, "float32")
    before, dead = away_from_init(stack.architecture, stack.sae), np.arange(F) % 3 == 0

    def resample(state, x):
        return resampling.resample(stack, state, x, lambda inputs: inputs, jax.random.key(0), 1000)

    results = []
    for data, latent in ((1, 1), (2, 4)):
        mesh = mesh_lib.make_mesh(config_lib.Mesh(data, latent), jax.devices()[: data * latent])
        specs = stack.specs()
        state = dataclasses.replace(
            stack.init(),
            params={key: value[None] for key, value in before.items()},
            steps_since_fired=jnp.where(dead, 10_000, 5).astype(jnp.int32)[None],
        )
        state = jax.device_put(state, jax.tree.map(partial(NamedSharding, mesh), specs))
        mapped = jax.shard_map(
            resample, mesh=mesh, in_specs=(specs, PartitionSpec(None, "data")), out_specs=(specs, PartitionSpec())
        )
        after, count = jax.jit(mapped)(state, {site: x[None] for site, x in values.items()})
        assert count == dead.sum()
        results.append({key: np.asarray(value[0]) for key, value in after.params.items()})
    p, spread = results
    for key, value in p.items():
        np.testing.assert_allclose(spread[key], value, atol=1e-4, err_msg=key)
    if "transcoder" in name:
        places = [("W_enc", values["a"] - p["b_in"]), ("W_dec", values["b"] - p["b_dec"] - values["a"] @ p["W_skip"])]
    else:
        centred = [values[site] - p[f"b_dec_{n}"] for n, site in enumerate("ab")]
        places = [(f"{kind}_{n}", x) for kind in ("W_dec", "W_gate") for n, x in enumerate(centred)]
    tokens = []
    for key, x in places:
        rows, old = (params[key] if "dec" in key else params[key].T for params in (p, before))
        norm = np.linalg.norm(old[~dead], axis=1).mean() * (1 if "dec" in key else resampling.ENCODER_NORM)
        norm = 1 if key == "W_dec" else norm
        directions = x / np.linalg.norm(x, axis=1, keepdims=True)
        tokens.append((rows[dead] @ directions.T).argmax(1))
        np.testing.assert_allclose(rows[dead], norm * directions[tokens[-1]], atol=1e-4)
        np.testing.assert_array_equal(rows[~dead], old[~dead])
    assert all((of_one == tokens[0]).all() for of_one in tokens)
    assert len(set(tokens[0])) == dead.sum()
