import copy
import dataclasses
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import batching
from gsae_jax.saes import gated, gated_batch_topk, jumprelu, relu, signed_gated, trained
from tests.refusals import refused
from tests.small_saes import B, D, F, assert_close, away_from_init, inputs


def an_sae():
    config = relu.Config(D, F)
    return trained.SAE("a_0", "relu", config, "", away_from_init(relu, config))


def test_activations_of_any_number_type():
    """Integers are numbers, and reconstructions of them are not rounded to integers."""
    sae, whole = an_sae(), np.arange(3 * D).reshape(3, D)
    expected, back = sae.encode(whole.astype(np.float32)), sae(whole.astype(np.float32))
    for x in (whole, whole.tolist(), whole.astype(np.uint8), jnp.asarray(whole)):
        np.testing.assert_array_equal(sae.encode(x), expected)
        np.testing.assert_array_equal(sae(x), back)
        assert sae(x).dtype == jnp.float32
    np.testing.assert_array_equal(sae.decode(np.ones(F, bool)), sae.decode(np.ones(F, np.float32)))
    assert sae(whole.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert jax.jit(sae.encode)(jnp.asarray(whole)).shape == (3, F)


@pytest.mark.parametrize(
    "x",
    [[[1.0] * D, [1.0]], "text", None, {}, np.array([None] * D), np.ones(D, complex), [10**400] * D, np.ones(D + 1), 3],
    ids=["ragged", "text", "None", "dict", "objects", "complex", "huge", "longer", "scalar"],
)
def test_what_is_no_array_of_activations_is_refused(x):
    with refused("x"):
        an_sae().encode(x)


def test_a_forgotten_site_or_model_is_told():
    """Also by an SAE of several sites, and where the reconstruction is asked for."""
    one, sites = an_sae(), ("a", "b")
    two = dataclasses.replace(one, site=sites, config=config_of_two_sites())
    for wrong, alone, both in (
        (dict.fromkeys(sites, inputs()), "activations[sae.site]", "[activations[site] for site in sae.site]"),
        ("import numpy", "lm.activations(text, [sae.site])[sae.site]", "lm.activations(text, sae.site)"),
        (["import numpy", "x"], "lm.activations(text, [sae.site])[sae.site]", "lm.activations(text, sae.site)"),
    ):
        what = "is a dict of sites" if isinstance(wrong, dict) else "is text"
        for sae, how in ((one, alone), (two, both)):
            for function in (sae.encode, sae):
                with refused("x", what, how):
                    function(wrong)


def config_of_two_sites():
    """A Config of an SAE that reads two sites."""
    return types.SimpleNamespace(d_in=(D, D), width=F)


@pytest.mark.torch
def test_tensors_of_torch_are_activations():
    import torch

    sae, x = an_sae(), inputs()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.tensor(np.asarray(x)).to(dtype).requires_grad_()
        same = jnp.asarray(tensor.detach().float().numpy(), str(dtype).removeprefix("torch."))
        np.testing.assert_array_equal(sae.encode(tensor), sae.encode(same))
        assert sae(tensor).dtype == same.dtype


def a_gated_sae(seed=0, **changes):
    config = gated.Config(D, F)
    metadata = {"model_name": "small", "sizes": [1, {"a": None}]}
    sae = trained.SAE("gated_0", "gated", config, "blocks.0.hook_mlp_out", away_from_init(gated, config, seed))
    return dataclasses.replace(sae, metadata=metadata, **changes)


def test_parameters_and_sizes_are_attributes():
    sae = a_gated_sae()
    assert (sae.d_in, sae.width) == (D, F)
    for name, value in sae.params.items():
        assert getattr(sae, name) is value
    r_mag, b_mag, b_gate = (np.asarray(sae.params[name], np.float64) for name in ("r_mag", "b_mag", "b_gate"))
    np.testing.assert_allclose(sae.threshold, np.maximum(b_mag - np.exp(r_mag) * b_gate, 0), rtol=1e-5, atol=1e-6)
    assert {"W_gate", "W_dec", "encode", "site"} <= set(dir(sae))
    assert not [name for name in dir(sae) if name.startswith("_")]
    with pytest.raises(AttributeError, match=r"\(gated\) has no 'W_enc'; its arrays are W_dec, W_gate, b_dec"):
        sae.W_enc  # noqa: B018
    with pytest.raises(AttributeError, match=r"\(relu\) has no 'threshold'"):
        an_sae().threshold  # noqa: B018
    for same in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        np.testing.assert_array_equal(same.W_dec, sae.W_dec)


@pytest.mark.parametrize("architecture", [gated_batch_topk, jumprelu, signed_gated])
def test_a_threshold_is_that_above_which_features_are_active(architecture):
    options = {"k": 4} if architecture is gated_batch_topk else {}
    config = architecture.Config(D, F, **options)
    params = dict(architecture.init(jax.random.key(1), config))
    random = np.random.default_rng(2)
    for name in ("b_gate", "b_mag", "r_mag", "b_enc"):
        if name in params:
            params[name] = jnp.asarray(random.normal(size=F) * 0.3, jnp.float32)
    params["threshold"] = jnp.float32(0.7) if params.get("threshold", jnp.zeros(0)).ndim == 0 else jnp.full(F, -0.3)
    if "threshold" not in architecture.PARAMETERS:
        del params["threshold"]
    name = architecture.__name__.rpartition(".")[2]
    sae = trained.SAE("a_0", name, config, "blocks.0.hook_mlp_out", params)
    f = np.abs(np.asarray(sae.encode(random.normal(size=(4000, D)).astype(np.float32))))
    smallest = np.where(f > 0, f, np.inf).min(0)
    assert sae.threshold.shape == (F,)
    assert (smallest >= np.asarray(sae.threshold) - 1e-4).all()
    assert np.isclose(smallest, sae.threshold, atol=0.1).mean() > 0.5


def test_an_sae_is_shown_in_a_line():
    sae = a_gated_sae(l1_coefficient=0.01, learning_rate=3e-4)
    numbers = "l1_coefficient 0.01, learning_rate 0.0003"
    assert repr(sae) == f"<SAE gated_0: gated, {F} features of blocks.0.hook_mlp_out, d_in {D}, {numbers}>"


def test_an_sae_is_a_pytree():
    """Its parameters alone are leaves; the rest is part of the tree's definition, and is not lost."""
    sae, x = a_gated_sae(), inputs()
    leaves, structure = jax.tree.flatten(sae)
    assert len(leaves) == len(sae.params)
    assert hash(structure) == hash(jax.tree.structure(copy.deepcopy(sae)))  # NaN and a dict are in it
    assert structure == jax.tree.structure(copy.deepcopy(sae))
    assert structure != jax.tree.structure(dataclasses.replace(sae, scale=2.0))
    traces = []

    @jax.jit
    def reconstruct(sae, x):
        traces.append(sae.name)
        return sae, sae(x)

    for _ in range(2):
        back, x_hat = reconstruct(sae, x)
        np.testing.assert_allclose(x_hat, sae(x), rtol=1e-5, atol=1e-6)
        assert (back.name, back.site, back.metadata) == (sae.name, sae.site, sae.metadata)
    assert reconstruct(dataclasses.replace(sae, name="other"), x)[0].name == "other"
    assert traces == ["gated_0", "other"]


def test_gradients_and_maps_over_saes():
    sae, x = a_gated_sae(), inputs()
    grads = jax.jit(jax.grad(lambda sae, x: jnp.square(sae(x) - x).sum()))(sae, x)
    f = np.asarray(sae.encode(x), np.float64)
    error = f @ np.asarray(sae.W_dec, np.float64) + np.asarray(sae.b_dec) - np.asarray(x)
    assert_close(grads.W_dec, 2 * f.T @ error)

    other = dataclasses.replace(sae, params=away_from_init(gated, sae.config, 1))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), sae, other)
    many = jax.vmap(lambda sae, x: sae.encode(x), in_axes=(0, None))(stacked, x)
    for ours, each in zip(many, (sae, other), strict=True):
        assert_close(ours, np.asarray(each.encode(x)))


def test_many_activations_are_encoded_in_batches(monkeypatch):
    sae, x = an_sae(), inputs()
    expected = sae.encode(x)
    monkeypatch.setattr(trained, "ROWS_AT_ONCE", 10)
    ours = sae.encode(x.reshape(2, -1, D))
    np.testing.assert_allclose(ours.reshape(B, F), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(sae.encode)(x), expected, rtol=1e-5, atol=1e-6)


def test_numbers_of_tokens_are_compiled_in_few_shapes():
    """As in a loop over texts, and with the same features as without padding."""
    config = gated.Config(D, F)
    sae = trained.SAE("a_0", "gated", config, "site", gated.init(jax.random.key(0), config))
    x = jax.random.normal(jax.random.key(1), (40, D))
    expected, before = gated.encode(sae.params, x, config), trained._apply._cache_size()
    x = np.asarray(x)
    for count in range(1, 41):
        np.testing.assert_allclose(sae.encode(x[:count]), expected[:count], atol=1e-5)
    assert trained._apply._cache_size() - before == len({batching.padded_size(count) for count in range(1, 41)})
