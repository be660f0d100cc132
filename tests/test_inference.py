"""Encoding and decoding with trained SAEs: in parts, and by active features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import batching
from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import measure
from gsae_jax.saes import contract, features, inference, trained
from tests.measuring import SITE, as_sae, batches, on_mesh
from tests.refusals import refused

D, WIDE = 8, 64 * 512  # with room for every capacity
every = pytest.mark.parametrize("name", ["gated", "signed_gated", "relu", "jumprelu"])


def sae_of(name, F, L0):
    """With random weights, and about so many active features of a token; one feature is active on no token."""
    architecture = contract.module_of(name)
    config = contract.build_config(architecture, name, (D,), None, F, "float32", {})
    keys = jax.random.split(jax.random.key(1), 3)
    # Of another SAE, as some architectures have no `init`.
    gated = contract.module_of("gated")
    W_dec = gated.init(keys[0], gated.Config(D, F))["W_dec"]
    x = activations()
    params = {"W_dec": W_dec, "b_dec": 0.3 * jax.random.normal(keys[1], (D,))}
    bias = -jnp.quantile((x.reshape(-1, D) - params["b_dec"][None]) @ W_dec.T, 1 - L0 / F)
    biases = (jnp.zeros(F) + bias).at[3].set(-1e6)
    if name in ("gated", "signed_gated"):
        params |= {"W_gate": W_dec.T, "r_mag": 0.1 * jax.random.normal(keys[2], (F,))}
        params |= {"b_gate": biases, "b_mag": biases + 0.2}
    else:
        params |= {"W_enc": W_dec.T, "b_enc": biases}
    if name == "jumprelu":
        params["threshold"] = jnp.full(F, 0.1)
    return trained.SAE("a_0", name, config, "blocks.0.hook_mlp_out", params)


def activations(R=3, T=7):
    return jax.random.normal(jax.random.key(0), (R, T, D))


@pytest.mark.parametrize("at_once", [1, 3, 8, 20, 100])
def test_parts_are_joined(at_once):
    """Whatever the number of tokens, which may be a prime."""
    x, most = activations(3, 7), []

    def function(x):
        most.append(x.shape[0] * x.shape[1])
        return {"double": 2 * x, "norm": jnp.square(x).sum(-1)}, (x != 0).sum((0, 1))

    per_token, count = jax.jit(lambda x: batching.in_chunks(function, x, at_once))(x)
    np.testing.assert_array_equal(per_token["double"], 2 * x)
    np.testing.assert_allclose(per_token["norm"], jnp.square(x).sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(count, [21] * D)
    assert max(most) <= max(at_once, 3)


@every
@pytest.mark.parametrize("L0", [5, 200])
def test_active_features_are_those_of_the_dense_array(name, L0):
    """More of them than there are slots at first, too."""
    sae, x = sae_of(name, 2048, L0), activations()
    dense = np.asarray(sae.encode(x))
    assert (dense < 0).any() == (name == "signed_gated")
    indices, values = sae.encode(x, sparse=True)
    assert values.shape == (*x.shape[:-1], (dense != 0).sum(-1).max())
    assert (np.diff(indices, axis=-1) >= 0).all()
    scattered = np.zeros((*x.shape[:-1], sae.width + 1), np.float32)
    np.put_along_axis(scattered, np.asarray(indices), np.asarray(values), -1)
    np.testing.assert_array_equal(scattered[..., :-1], dense)
    np.testing.assert_array_equal(scattered[..., -1], 0)
    np.testing.assert_allclose(sae.decode((indices, values)), sae.decode(dense), rtol=1e-5, atol=1e-5)
    on_one = jax.tree.map(lambda slots: slots[0, 0], (indices, values))
    np.testing.assert_allclose(sae.decode(on_one), sae.decode(dense[0, 0]), rtol=1e-5, atol=1e-5)


def test_no_feature_is_active_and_no_token_is_there():
    sae = sae_of("gated", 64, 5)
    sae = dataclasses.replace(sae, params=sae.params | {"b_gate": jnp.full(64, -1e6)})
    f = sae.encode(activations(), sparse=True)
    np.testing.assert_array_equal(f.indices, 64)
    np.testing.assert_array_equal(sae.decode(f), jnp.broadcast_to(sae.b_dec, (3, 7, D)))
    assert sae.encode(activations()[:0], sparse=True).values.shape == (0, 7, 1)


def test_a_feature_that_is_not_a_number_is_active():
    sae, x = sae_of("gated", 64, 5), activations()
    f = sae.encode(x.at[1, 2, 0].set(jnp.nan), sparse=True)
    assert np.isnan(np.asarray(f.values)[1, 2]).all()
    assert np.isfinite(np.asarray(sae.decode(f))).all(-1).sum() == 20


@pytest.mark.parametrize("slots", [*features.CAPACITIES, WIDE])
@pytest.mark.parametrize(
    ("name", "L0s"),
    [
        ("gated", (5, 20, 40, 200)),
        pytest.param("relu", (5, 20, 40, 200), marks=pytest.mark.variants),
        pytest.param("jumprelu", (20, 60, 100, 2000), marks=pytest.mark.variants),
    ],
)
def test_wide_reconstructions_are_the_dense_ones(name, L0s, slots):
    """By every number of slots, and by dense products."""
    capacities = features.capacities(WIDE, features.DECODED_PER_SLOT)
    assert capacities == features.CAPACITIES
    sae, x = sae_of(name, WIDE, L0s[[*capacities, WIDE].index(slots)]), activations()
    most = (sae.encode(x) != 0).sum(-1).max()
    assert slots == next(size for size in (*capacities, WIDE) if most <= size)

    dense = sae.functions.decode(sae.params, sae.functions.encode(sae.params, x.reshape(-1, D), sae.config))
    np.testing.assert_allclose(sae(x).reshape(-1, D), dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda sae, x: sae(x))(sae, x).reshape(-1, D), dense, rtol=1e-4, atol=1e-4)
    broken = dataclasses.replace(sae, params=sae.params | {"W_dec": sae.W_dec.at[3, 0].set(jnp.nan)})
    assert np.isnan(broken(x)).any(-1).all()  # though the feature is active on no token


@pytest.mark.parametrize("F", [64, WIDE])
def test_derivatives_of_both_modes(F):
    """Of compiled code, also under `vmap`."""
    sae, x = sae_of("gated", F, 5), activations()
    of_one = jax.jacrev(sae)(x[0, 0])
    np.testing.assert_allclose(jax.jacfwd(sae)(x[0, 0]), of_one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(jax.jacrev(sae))(x[0])[0], of_one, rtol=1e-4, atol=1e-5)
    indices, values = sae.encode(x, sparse=True)
    ours = jax.jit(jax.grad(lambda values: jnp.square(sae.decode((indices, values))).sum()))(values)
    dense = jax.grad(lambda f: jnp.square(sae.decode(f)).sum())(sae.encode(x))
    expected = np.take_along_axis(np.asarray(dense), np.minimum(np.asarray(indices), F - 1), -1)
    np.testing.assert_allclose(ours, np.where(np.asarray(indices) < F, expected, 0), rtol=1e-3, atol=1e-4)


def test_no_tokens_in_compiled_code():
    sae = sae_of("gated", 64, 5)
    for shape in ((0, 5, D), (3, 0, D), (0, D)):
        x = jnp.zeros(shape)
        assert jax.jit(sae)(x).shape == sae(x).shape == shape
        assert jax.jit(sae.encode)(x).shape == (*shape[:-1], 64)
    none = jnp.zeros((3, 7, 0), jnp.int32), jnp.zeros((3, 7, 0))
    np.testing.assert_array_equal(sae.decode(none), jnp.broadcast_to(sae.b_dec, (3, 7, D)))


@pytest.mark.parametrize("shape", [(8, 40), (320,)])
def test_tokens_stay_on_their_devices(shape, monkeypatch):
    """In compiled code and outside, if rows lie along an axis of a mesh; the parts are small ones here."""
    monkeypatch.setattr(inference, "floats_at_once", lambda platform: 2**14)
    sae, mesh = sae_of("gated", 1024, 5), on_mesh(8, 1)
    x = jax.random.normal(jax.random.key(3), (*shape, D))
    placed = jax.device_put(x, mesh_lib.sharding(mesh, "data"))
    for function in (sae, sae.encode):
        for each in (function, jax.jit(function)):
            result = each(placed)
            np.testing.assert_allclose(result, function(x), rtol=1e-4, atol=1e-4)
            assert result.addressable_shards[0].data.shape[0] == shape[0] // 8


def test_an_own_architecture_decodes_by_its_own_function(tmp_path):
    """Features may be negative, and the output bias may be missing."""
    file = tmp_path / "plain.py"
    file.write_text(
        """
import dataclasses
import jax
from gsae_jax.saes.contract import Parameter, Role

PARAMETERS = {
    "W_enc": Parameter(("d_in", "width"), Role.ENCODER),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER),
    "b_dec": Parameter(("d_in",), Role.OUTPUT_BIAS),
}

@dataclasses.dataclass(frozen=True)
class Config:
    d_in: int
    width: int
    dtype: str = "float32"

def init(key, config):
    W = jax.random.normal(key, (config.d_in, config.width))
    return {"W_enc": W, "W_dec": W.T}

def encode(params, x, config):
    f = x @ params["W_enc"]
    return f * (abs(f) > 9)

def decode(params, f):
    return 2 * f @ params["W_dec"]
"""
    )
    architecture = contract.module_of(str(file))
    config = architecture.Config(D, 64 * 128)
    sae = trained.SAE("a_0", str(file), config, "", architecture.init(jax.random.key(0), config))
    x = activations().astype(jnp.bfloat16)
    f = sae.encode(x)
    assert (f < 0).any()
    assert (f == 0).mean() > 0.9
    expected = architecture.decode(sae.params, f.reshape(-1, config.width)).reshape(x.shape)
    np.testing.assert_allclose(sae(x).astype("float32"), expected.astype("float32"), rtol=1e-2)
    np.testing.assert_allclose(sae.decode(sae.encode(x, sparse=True)), expected, rtol=1e-4, atol=1e-3)


def test_pairs_that_are_no_features_are_refused():
    sae = sae_of("gated", 64, 5)
    indices, values = sae.encode(activations(), sparse=True)
    ragged = [[1], [2, 3]]
    wrong_pairs = [(values, values), (indices[..., :1], values), (indices + 64, values), (ragged, ragged)]
    for wrong in ((indices, values, values), *wrong_pairs):
        with refused("f"):
            sae.decode(wrong)
    with refused("sparse", "jit"):
        jax.jit(lambda x: sae.encode(x, sparse=True))(activations())


@pytest.mark.parametrize("ks", [(), (4, 16)])
def test_memory_of_measuring_does_not_grow_with_tokens_times_features(ks):
    """Eight times the tokens take less than one more array [tokens, features] would."""
    F = 2**15
    sae = sae_of("gated", F, 20)

    def bytes_for(T):
        x = jax.ShapeDtypeStruct((4, T, D), jnp.float32)
        mask, mean = jax.ShapeDtypeStruct((4, T), bool), jax.ShapeDtypeStruct((D,), jnp.float32)
        place = {"valid": mask, "typical": mask, "mean": mean, "typical_mean": mean}
        settings = None, sae.architecture, sae.config, 0
        step, args = (measure._pursue, (*settings, ks)) if ks else (measure._reconstruct, settings)
        lowered = step.lower(*args, sae.params, (x, x), place)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = bytes_for(256), bytes_for(2048)
    assert many - few < 4 * 4 * 2048 * F / 8


def test_a_language_model_takes_a_wide_sae(lm):
    """In place of activations, inside compiled code."""
    width = lm.sites[SITE]
    gated = contract.module_of("gated")
    config = gated.Config(width, 64 * 128)
    params = gated.init(jax.random.key(0), config) | {"b_gate": jnp.full(64 * 128, -0.3)}
    sae, tokens = as_sae("a_0", gated, params, config, SITE), batches(lm)[0]
    expected = lm.run(tokens, lambda site, x: sae.decode(sae.encode(x)) if site == SITE else x)
    np.testing.assert_allclose(lm.run(tokens, sae), expected, rtol=1e-4, atol=1e-4)
