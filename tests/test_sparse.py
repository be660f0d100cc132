"""The step by active features only: its sums, its gradients, and training with it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.kernels import active
from gsae_jax.saes import contract, features, parameters
from gsae_jax.saes.features import Sparsity
from gsae_jax.training import loop
from gsae_jax.training.stacks import Stack
from tests.refusals import refused
from tests.training import Interrupting, assert_same, begin, begin_calls, metrics_without_time, params_of, with_
from tests.variants import variants

B, D, D_OUT = 32, 12, 9


@pytest.mark.parametrize("F", [1, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
def test_active_features_are_found(F, density):
    on = np.random.default_rng(F).random((7, F)) < density
    mask = active.pack(jnp.asarray(on))
    assert mask.most == on.sum(1).max()
    slots = active.Slots.of(mask, int(mask.most) + 2, F)
    index = np.asarray(slots.features)
    for features_of_token, on_F in zip(index, on, strict=True):
        np.testing.assert_array_equal(np.sort(features_of_token[features_of_token < F]), np.flatnonzero(on_F))
    values = np.asarray(slots.take(jnp.asarray(np.where(on, 2.0, 5.0))))
    np.testing.assert_array_equal(values, np.where(index < F, 2.0, 0.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "block", [pytest.param(1, marks=pytest.mark.variants), 5, pytest.param(64, marks=pytest.mark.variants)]
)
@pytest.mark.parametrize("which", [(True,), (True, False), (True, True)])
def test_sums_over_active_features(dtype, tolerance, block, which):
    """Values and gradients against float64."""
    random, F, K = np.random.default_rng(0), 40, D
    rank = np.argsort(np.argsort(random.random((B, F)), 1), 1)
    slots = active.Slots.of(active.pack(jnp.asarray(rank < np.arange(B)[:, None] % (K + 1))), K, F)
    index = np.asarray(slots.features)
    assert (np.diff(slots.ends) > 0).all()  # tokens of every kind
    values, W, x = random.normal(size=(len(which), B, K)), random.normal(size=(F, D)), random.normal(size=(B, D))
    values[:, index == F] = 0
    d_out = random.normal(size=(len(which), B, D))
    rows = np.concatenate([W, np.zeros((1, D))])[index]

    def decode(values, W):
        return active.decode(values, slots, W, which, dtype, block)

    out, pull = jax.vjp(decode, jnp.asarray(values, jnp.float32), jnp.asarray(W, jnp.float32))
    np.testing.assert_allclose(out, np.einsum("vbk,bkd->vbd", values, rows), rtol=tolerance, atol=10 * tolerance)
    d_values, d_W = pull(jnp.asarray(d_out, jnp.float32))
    filled = np.where(index < F, np.einsum("vbd,bkd->vbk", d_out, rows), 0)
    np.testing.assert_allclose(
        jnp.where(jnp.asarray(index)[None] < F, d_values, 0), filled, rtol=tolerance, atol=10 * tolerance
    )
    expected = np.zeros((F + 1, D))
    for v in np.flatnonzero(which):
        np.add.at(expected, index, values[v][..., None] * d_out[v][:, None])
    np.testing.assert_allclose(d_W, expected[:F], rtol=tolerance, atol=20 * tolerance)
    sums = active.add_rows(
        slots, jnp.asarray(values[:1], jnp.float32), jnp.asarray(x[None], jnp.float32), F, dtype, block
    )
    expected = np.zeros((F + 1, D))
    np.add.at(expected, index, values[0][..., None] * x[:, None])
    np.testing.assert_allclose(sums, expected[:F], rtol=tolerance, atol=20 * tolerance)


GATED, RELU, JUMPRELU = ("gated", {}), ("relu", {}), ("jumprelu", {"bandwidth": 0.1})
TANH, ALIGNED = ("gated", {"penalty": "tanh"}), ("gated", {"aligned": True})
OTHERS = [("gated", {"use_r_mag": False}), ("gated", {"freeze_aux_decoder": False}), ("gated", {"penalty": "log"})]
OTHERS += [
    ("relu", {"aligned": True}),
    ("relu_april", {"initial_norm": 1.0}),
    ("relu_transcoder", {"skip": True}),
    ("jumprelu_transcoder", {"bandwidth": 0.1}),
]
SKIP = ("gated_transcoder", {"skip": True})
GATED_BATCH_TOPK, BATCH_TOPK, TOPK = (
    (name, {"k": 4, "auxk_coefficient": 0.5}) for name in ("gated_batch_topk", "batch_topk", "topk")
)
OTHERS += [BATCH_TOPK, ("batch_topk_transcoder", {"k": 4, "skip": True})]
CASES = [
    *(GATED, RELU, JUMPRELU, SKIP, GATED_BATCH_TOPK),
    *(pytest.param(*other, marks=pytest.mark.variants) for other in (TANH, ALIGNED, *OTHERS)),
]
every = pytest.mark.parametrize(("name", "options"), [*CASES, pytest.param(*TOPK, marks=pytest.mark.variants)])


def case(name, options, F, bias=-1.0, dtype="float32"):
    """(architecture, its Config, parameters, inputs); a lower `bias` opens fewer features."""
    architecture = contract.module_of(name)
    d_out = (D_OUT,) if "transcoder" in name else None
    options = options | ({"k": min(options["k"], F)} if "k" in options else {})
    config = contract.build_config(architecture, name, (D,), d_out, F, dtype, options)
    params = architecture.init(jax.random.key(0), config)
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {n: p + 0.3 * jax.random.normal(key, p.shape) for key, (n, p) in zip(keys, params.items(), strict=True)}
    params, _ = parameters.split(architecture, params)
    params |= {key: params[key] + bias for key in ("b_gate", "b_enc") if key in params}
    return architecture, config, params, jax.random.normal(jax.random.key(2), (B, D)) + 0.3


COEFFICIENTS = {"l1_coefficient": 0.07}


def loss_of(architecture, config, dead=0):
    """The first features are dead ones."""

    def loss(params, x, features=None):
        targets = x[:, : getattr(config, "d_out", D)]
        batch = contract.Batch(x, targets, lambda: jnp.arange(config.width) < dead, jnp.int32(0))
        more = {} if features is None else {"features": features}
        state = {name: jnp.zeros(config.width) for name, each in architecture.PARAMETERS.items() if not each.trained}
        return architecture.loss(params, state, batch, COEFFICIENTS, config, **more)

    return loss


def active_of(architecture, config, dead=0):
    """Which features a loss needs to see, from pre-activations."""
    own = contract.active(architecture)
    return own and (lambda pre: own(pre, lambda: jnp.arange(config.width) < dead, COEFFICIENTS, config))


def most_active(architecture, config, params, x, dead=0):
    """How many features the loss needs to see of each token, ascending."""
    encoder, own = contract.encoder(architecture, params, config), active_of(architecture, config, dead)
    pre = (x - encoder.b[None]) @ encoder.W + encoder.bias[None]
    return np.sort(np.asarray(own(pre) if own else pre > 0).sum(1))


def by_active(architecture, config, params, x, capacities, block=1, dead=0):
    return features.gradients(
        loss_of(architecture, config, dead),
        features.Choice(
            lambda params: contract.encoder(architecture, params, config), active_of(architecture, config, dead)
        ),
        params,
        x,
        x,
        config.dtype,
        Sparsity(capacities, block),
    )


def assert_equal(ours, theirs, tolerance):
    """Gradients by norm, statistics by value."""
    (grads, statistics), (expected, expected_statistics) = ours, theirs
    for key, value in expected.items():
        error = np.linalg.norm(np.asarray(grads[key], np.float64) - value)
        assert error <= tolerance * max(np.linalg.norm(value), 1e-3), key
    for key, value in expected_statistics.means.items():
        np.testing.assert_allclose(statistics.means[key], value, rtol=10 * tolerance, atol=1e-6, err_msg=key)
    np.testing.assert_array_equal(statistics.fired, expected_statistics.fired)
    for key, value in expected_statistics.state.items():
        np.testing.assert_allclose(statistics.state[key], value, rtol=10 * tolerance, err_msg=key)


@every
@pytest.mark.parametrize(
    ("F", "bias", "capacities"),
    [
        pytest.param(96, -2.0, (64,), id="some"),
        pytest.param(33, -1.0, (1, 32), id="width that words do not divide", marks=pytest.mark.variants),
        pytest.param(64, -1e3, (8,), id="no feature active", marks=pytest.mark.variants),
        pytest.param(64, 1e3, (64,), id="all features active", marks=pytest.mark.variants),
        pytest.param(1, 0.0, (1,), id="one feature", marks=pytest.mark.variants),
    ],
)
@pytest.mark.parametrize("block", [1, pytest.param(8, marks=pytest.mark.variants)])
def test_gradients_are_the_dense_ones(name, options, F, bias, capacities, block):
    """Within 1e-6 of each other, and within 1e-5 of float64."""
    architecture, config, params, x = case(name, options, F, bias)
    assert most_active(architecture, config, params, x)[-1] <= capacities[-1]
    ours = by_active(architecture, config, params, x, capacities, block)
    dense = jax.grad(loss_of(architecture, config), has_aux=True)(params, x)
    assert_equal(ours, dense, 1e-6)
    with jax.enable_x64(True):
        wide = dataclasses.replace(config, dtype="float64")
        x_64 = jnp.asarray(np.asarray(x, np.float64))
        params_64 = {key: jnp.asarray(np.asarray(value, np.float64)) for key, value in params.items()}
        assert_equal(ours, jax.grad(loss_of(architecture, wide), has_aux=True)(params_64, x_64), 1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [GATED_BATCH_TOPK, *(pytest.param(*other, marks=pytest.mark.variants) for other in (BATCH_TOPK, TOPK))],
)
def test_dead_features_are_seen_for_auxk(name, options):
    architecture, config, params, x = case(name, options, 96)
    dead = 40
    assert most_active(architecture, config, params, x, dead)[-1] > most_active(architecture, config, params, x)[-1]
    expected = jax.grad(loss_of(architecture, config, dead), has_aux=True)(params, x)
    assert expected[1].means["auxk"] > 0
    assert_equal(by_active(architecture, config, params, x, (64,), dead=dead), expected, 1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)  # TopK selects as many features of every token
@pytest.mark.parametrize("parts", [4, 1])
def test_a_token_over_capacity_takes_the_dense_step(name, options, parts, monkeypatch):
    """Also where one token alone is over it."""
    monkeypatch.setattr(features, "DENSE_PARTS", parts)
    architecture, config, params, x = case(name, options, 96, -2.0)
    x = x.at[0].multiply(4)
    counts = most_active(architecture, config, params, x)
    assert counts[-1] > counts[-2]
    dense = jax.grad(loss_of(architecture, config), has_aux=True)(params, x)
    assert_equal(by_active(architecture, config, params, x, (int(counts[-1]) - 1,)), dense, 1e-6)


@every
def test_numbers_that_are_not_finite_show(name, options):
    architecture, config, params, x = case(name, options, 64)
    for key in ("W_gate", "W_enc", "W_dec"):
        if key in params:
            broken = params | {key: params[key].at[0, 0].set(jnp.nan)}
            _, statistics = by_active(architecture, config, broken, x, (64,))
            assert not jnp.isfinite(statistics.means["loss"])


def trained_stack(how, steps, *, shape=(1, 1), name="gated", F=64, dtype="float32"):
    """(state, statistics) of a stack of two SAEs after some steps on a mesh."""
    by_k = "topk" in name
    options, l1_coefficients = ({"k": 4}, ()) if by_k else ({}, (0.05,))
    config = config_lib.Stack(name, "site", F, l1_coefficients, (3e-3,), (0, 1), options)
    stack = dataclasses.replace(Stack.build("a", config, {"site": D}, dtype), sparsity=how)
    data, latent = shape
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data, latent), jax.devices()[: data * latent])
    specs = stack.specs()
    state = jax.jit(stack.init, out_shardings=jax.tree.map(partial(NamedSharding, mesh), specs))()
    for key, bias in (("b_gate", -1.5), ("b_mag", -1.2), ("b_enc", -1.5)):
        if key in state.params:
            state.params[key] += bias

    def update(state, x, step):
        dead_after = 1 if by_k else 1000  # so that AuxK has dead features
        state, statistics = stack.update(
            stack.transpose(state), {"site": x}, step, jnp.float32(1), dead_after=dead_after
        )
        return stack.transpose(state), statistics

    everywhere = PartitionSpec()
    step = jax.jit(
        jax.shard_map(
            update, mesh=mesh, in_specs=(specs, PartitionSpec("data"), everywhere), out_specs=(specs, everywhere)
        )
    )
    for number in range(steps):
        x = jax.random.normal(jax.random.key(number), (64, D)) + 0.3
        state, statistics = step(state, x, jnp.int32(number))
    return jax.device_get((state, statistics))


@pytest.mark.parametrize("name", ["gated", *variants("gated_batch_topk", "relu", "jumprelu", "topk")])
@pytest.mark.parametrize(
    "shape",
    [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants), pytest.param((1, 2), marks=pytest.mark.variants)],
)
def test_a_mesh_trains_as_the_dense_step(name, shape):
    dense, expected = trained_stack(None, 3, shape=shape, name=name)
    for capacities in ((4, 16), (1,)):
        state, statistics = trained_stack(Sparsity(capacities, 1), 3, shape=shape, name=name)
        for key, value in dense.params.items():
            np.testing.assert_allclose(state.params[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
        np.testing.assert_array_equal(state.steps_since_fired, dense.steps_since_fired)
        for key, value in expected.items():
            np.testing.assert_allclose(statistics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.variants
def test_300_steps_end_within_the_noise_of_summation_order():
    """Which is measured as what another order of the same dense sums, on two devices, comes to."""
    (dense, _), (other_order, _) = trained_stack(None, 300), trained_stack(None, 300, shape=(2, 1))
    sparse, _ = trained_stack(Sparsity((16, 64), 1), 300)
    for key, value in dense.params.items():
        noise = np.abs(other_order.params[key] - value).max()
        assert np.abs(sparse.params[key] - value).max() <= 5 * noise + 1e-6, key


@pytest.mark.variants
def test_bfloat16_operands():
    dense, expected = trained_stack(None, 3, dtype="bfloat16")
    sparse, statistics = trained_stack(Sparsity((64,), 1), 3, dtype="bfloat16")
    for key, value in expected.items():
        np.testing.assert_allclose(statistics[key], value, rtol=2e-2, atol=1e-3, err_msg=key)
    assert np.linalg.norm(sparse.params["W_dec"] - dense.params["W_dec"]) < 0.02 * np.linalg.norm(dense.params["W_dec"])


def settings_of(step, options=None, width=2**15, latent=1, platform="cpu", name="gated"):
    l1_coefficients = () if "topk" in name else (0.01,)
    config = config_lib.Stack(name, "site", width, l1_coefficients, (3e-4,), (0,), options or {})
    return Stack.build("a", config, {"site": 8}, "float32", step, latent, platform).sparsity


def test_which_step_a_stack_gets():
    assert settings_of("auto").capacities == features.CAPACITIES
    assert settings_of("auto", name="relu").capacities == features.CAPACITIES
    assert settings_of("auto", {"k": 8}, name="gated_batch_topk").capacities == features.CAPACITIES
    assert settings_of("dense") is None
    assert settings_of("auto", width=1024) is None
    assert settings_of("auto", width=1024 * 16, latent=16) is None
    assert settings_of("auto", platform="gpu") is None
    assert settings_of("auto", {"tie_encoder": False}) is None
    assert settings_of("sparse", width=1024).capacities[0] < 1024
    assert settings_of("sparse", platform="gpu").block > 1
    with refused("train.step", "sparse", "tie_encoder=False", "dense"):
        settings_of("sparse", {"tie_encoder": False})


@pytest.mark.variants
def test_a_killed_run_continues_bit_for_bit(experiment, tmp_path, monkeypatch):
    sparse = with_(experiment, train={"step": "sparse"})
    assert all(stack.sparsity for stack in begin(sparse)[0].stacks)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.train(sparse, whole)
    with monkeypatch.context() as patch:
        real, after = rows_lib.batches, begin_calls(sparse) + 3
        patch.setattr(rows_lib, "batches", lambda *args: Interrupting(real(*args), after))
        assert not loop.train(sparse, parts)
    assert loop.train(sparse, parts)
    assert_same(params_of(parts), params_of(whole))
    assert metrics_without_time(parts) == metrics_without_time(whole)
    assert loop.train(with_(experiment, train={"step": "dense"}), tmp_path / "dense")
    for name, params in params_of(tmp_path / "dense").items():
        for key, value in params.items():
            np.testing.assert_allclose(
                params_of(whole)[name][key], value, rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}"
            )
