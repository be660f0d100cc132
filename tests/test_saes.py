import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import config as config_lib
from gsae_jax.saes import (
    contract,
    gated,
    jumprelu,
    linalg,
    parameters,
    products,
    relu,
    relu_april,
    signed_gated,
    trained,
)
from tests import references
from tests.refusals import refused
from tests.small_saes import B, D, F, assert_close, away_from_init, inputs

ABLATIONS = {
    "gated": {},
    "unfrozen decoder": {"freeze_aux_decoder": False},
    "no r_mag": {"use_r_mag": False},
    "untied": {"tie_encoder": False},
    "tanh": {"penalty": "tanh", "penalty_scale": 2.0},
    "log": {"penalty": "log", "penalty_scale": 0.5},
}


def loss(module, params, x, l1_coefficient, config):
    batch = contract.Batch(x, x, jnp.zeros(config.width, bool), jnp.int32(0))
    return module.loss(params, {}, batch, {"l1_coefficient": l1_coefficient}, config)


def loss_and_gradients(module, params, x, l1_coefficient, config):
    return jax.value_and_grad(partial(loss, module), has_aux=True)(params, x, l1_coefficient, config)


@pytest.mark.parametrize("name", ABLATIONS)
def test_gated_loss_and_gradients_match_float64(name):
    switches = ABLATIONS[name]
    config = gated.Config(D, F, **switches)
    params, x = away_from_init(gated, config), inputs()
    (value, statistics), grads = loss_and_gradients(gated, params, x, 0.07, config)
    expected, expected_grads, f = references.gated_sae(
        params,
        x,
        0.07,
        tie=config.tie_encoder,
        r_mag=config.use_r_mag,
        freeze=config.freeze_aux_decoder,
        penalty=config.penalty,
        scale=config.penalty_scale,
    )
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert_close(grads[key], expected_grads[key])
    assert_close(gated.encode(params, x, config), f)
    np.testing.assert_allclose(statistics.means["l0"], (f > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))


def test_baseline_loss_and_gradients_match_float64():
    config = relu.Config(D, F)
    params, x = away_from_init(relu, config), inputs()
    (value, statistics), grads = loss_and_gradients(relu, params, x, 0.07, config)
    expected, expected_grads, f = references.relu_sae(params, x, 0.07)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for key in expected_grads:
        assert_close(grads[key], expected_grads[key])
    x_hat = f @ np.asarray(params["W_dec"], np.float64) + np.asarray(params["b_dec"])
    gamma = statistics.means["x_hat_sq"] / statistics.means["x_hat_dot_x"]
    np.testing.assert_allclose(gamma, (x_hat**2).sum() / (x_hat * x).sum(), rtol=1e-5)


@pytest.mark.parametrize("module", [gated, relu])
def test_aligned_loss_and_gradients_match_float64(module):
    config, options = module.Config(D, F, aligned=True), {"r_mag": False} if module is gated else {}
    params, x = away_from_init(module, config), inputs()
    encoder = "W_gate" if module is gated else "W_enc"
    reference = references.gated_sae if module is gated else references.relu_sae
    (value, _), grads = loss_and_gradients(module, params, x, 0.07, config)
    expected, expected_grads, f = references.of_aligned(reference, encoder, params, x, 0.07, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert_close(grads[key], expected_grads[key])
    assert_close(module.encode(params, x, config), f)
    assert 0.05 < (f > 0).mean() < 0.95


@pytest.mark.parametrize("module", [gated, relu])
def test_the_normal_form_of_an_aligned_sae_is_one_that_is_not(module):
    """Its columns and rows have inner products of one; the untrained encoder has them already."""
    config, plain, x = module.Config(D, F, aligned=True), module.Config(D, F), inputs()
    params, encoder = away_from_init(module, config), "W_gate" if module is gated else "W_enc"
    normal = module.normal_form(params, config)
    np.testing.assert_allclose(jnp.einsum("df,fd->f", normal[encoder], normal["W_dec"]), 1, rtol=1e-5)
    assert_close(module.encode(normal, x, plain), module.encode(params, x, config))
    for key, value in module.normal_form(normal, config).items():
        np.testing.assert_array_equal(value, normal[key], err_msg=key)
    first = module.init(jax.random.key(0), config)
    np.testing.assert_array_equal(module.normal_form(first, config)[encoder], first["W_dec"].T)
    assert not np.any(normal.get("r_mag", 0))


def test_a_column_without_a_part_along_its_row_is_aligned():
    W, W_dec = jnp.array([[0.0, -2.0], [3.0, 0.0]]), jnp.eye(2)
    np.testing.assert_allclose(linalg.aligned(W, W_dec), [[1, -2], [3, 1]])


def test_options_that_alignment_excludes():
    for name, value in (("tie_encoder", False), ("only_magnitude", True)):
        with refused("options.aligned", name):
            contract.build_config(gated, "gated", (D,), None, F, "float32", {"aligned": True, name: value})


def test_signed_loss_and_gradients_match_float64():
    config = signed_gated.Config(D, F)
    params, x = away_from_init(signed_gated, config), inputs()
    params["b_gate"] -= 1.0
    (value, statistics), grads = loss_and_gradients(signed_gated, params, x, 0.07, config)
    expected, expected_grads, f = references.signed_gated_sae(params, x, 0.07)
    assert 0.05 < (f > 0).mean() < 0.5
    assert 0.05 < (f < 0).mean() < 0.5
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert_close(grads[key], expected_grads[key])
    assert_close(signed_gated.encode(params, x, config), f)
    np.testing.assert_allclose(statistics.means["l0"], (f != 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(statistics.fired, (f != 0).any(0))
    theta = signed_gated.feature_facts(params, config)["threshold"]
    assert (np.abs(f) >= np.where(f, theta, 0) * (1 - 1e-5)).all()


def test_a_negative_feature_alone_fires():
    """So that it is not dead, and counts."""
    params = signed_gated.init(jax.random.key(0), config := signed_gated.Config(D, F))
    x = -10 * params["W_dec"][3][None]
    params["b_gate"] = jnp.full(F, -1e3).at[3].set(-1.0)
    _, statistics = loss(signed_gated, params, x, 0.07, config)
    np.testing.assert_array_equal(np.flatnonzero(statistics.fired), [3])
    assert statistics.means["l0"] == 1
    np.testing.assert_allclose(signed_gated.encode(params, x, config)[0, 3], -10, rtol=1e-5)


def test_a_signed_feature_is_two_of_a_gated_sae():
    """Which share their weights, where no threshold is below 0."""
    params, x = away_from_init(signed_gated, signed_gated.Config(D, F)), inputs()
    params["b_gate"] = -jnp.abs(params["b_gate"]) - 0.5
    signs = {name: -1 if name in ("W_gate", "W_dec") else 1 for name in params}
    axes = {name: 1 if name == "W_gate" else 0 for name in params}
    twice = {
        name: value if name == "b_dec" else jnp.concatenate([value, signs[name] * value], axes[name])
        for name, value in params.items()
    }
    f = signed_gated.encode(params, x, signed_gated.Config(D, F))
    pairs = gated.encode(twice, x, gated.Config(D, 2 * F))
    assert (f < 0).any()
    np.testing.assert_allclose(f, pairs[:, :F] - pairs[:, F:], rtol=1e-5, atol=1e-6)
    values = [
        loss(module, p, x, 0.07, module.Config(D, width))[1].means
        for module, p, width in ((signed_gated, params, F), (gated, twice, 2 * F))
    ]
    for name, value in values[0].items():
        np.testing.assert_allclose(value, values[1][name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("bandwidth", [0.05, 0.3])
def test_jumprelu_loss_and_straight_through_gradients_match_float64(bandwidth):
    """Thresholds of either sign, also below half a bandwidth; eps is in units of E||x||^2 = 1."""
    config = jumprelu.Config(D, F, bandwidth=bandwidth)
    params, x = away_from_init(jumprelu, config), inputs()
    (value, statistics), grads = loss_and_gradients(jumprelu, params, x, 0.07, config)
    expected, expected_grads, f = references.jumprelu_sae(params, x, 0.07, bandwidth * np.sqrt(D))
    assert (params["threshold"] < 0).any()
    assert (expected_grads["threshold"] != 0).mean() > 0.5
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert_close(grads[key], expected_grads[key])
    assert_close(jumprelu.encode(params, x, config), f)
    np.testing.assert_allclose(statistics.means["l0"], (f > 0).sum(1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))


def test_jumprelu_constants_are_the_papers_at_its_scale():
    """eps and theta_0 are 0.001 of inputs with E||x||^2 = 1, and ours have D."""
    config = jumprelu.Config(D, F)
    params = jumprelu.init(jax.random.key(0), config)
    np.testing.assert_allclose(params["threshold"], 0.001 * np.sqrt(D), rtol=1e-6)
    for field in ("bandwidth", "initial_threshold"):
        with refused(f"options.{field}", "-1"):
            contract.build_config(jumprelu, "jumprelu", (D,), None, F, "float32", {field: -1.0})


def test_the_relu_sae_of_april_matches_float64_and_has_unit_rows_in_other_forms():
    config = relu_april.Config(D, F)
    params, x = away_from_init(relu_april, config), inputs()
    (value, statistics), grads = loss_and_gradients(relu_april, params, x, 0.07, config)
    expected, expected_grads, f = references.relu_april_sae(params, x, 0.07)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for key in grads:
        assert_close(grads[key], expected_grads[key])
    assert_close(relu_april.encode(params, x, config), f)
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))
    for name, module in (("relu", relu), ("jumprelu", jumprelu)):
        other = contract.converter("relu_april", name)(params, config)
        np.testing.assert_allclose(jnp.linalg.norm(other["W_dec"], axis=-1), 1, rtol=1e-6)
        others = module.Config(D, F)
        reconstruction = module.decode(other, module.encode(other, x, others))
        assert_close(reconstruction, relu_april.decode(params, jnp.asarray(f, jnp.float32)))
    back = contract.converter("relu", "relu_april")(
        contract.converter("relu_april", "relu")(params, config), relu.Config(D, F)
    )
    assert_close(relu_april.encode(back, x, config), f * np.linalg.norm(params["W_dec"], axis=-1))


def test_the_auxiliary_term_does_not_train_the_decoder():
    """With no feature's magnitude above zero, W_dec can get a gradient from the auxiliary term only."""
    config = gated.Config(D, F)
    params = away_from_init(gated, config) | {"b_mag": jnp.full(F, -1e3)}

    def grad(config):
        return loss_and_gradients(gated, params, inputs(), 0.0, config)[1]

    assert not np.any(grad(config)["W_dec"])
    assert np.any(grad(dataclasses.replace(config, freeze_aux_decoder=False))["W_dec"])

    # With W_gate zero the centring reaches nothing, and b_dec could get a gradient as the decoder's bias only.
    still = params | {"W_gate": jnp.zeros((D, F))}

    def bias_gradient(config):
        def auxiliary(b_dec):
            return loss(gated, still | {"b_dec": b_dec}, inputs(), 0.0, config)[1].means["auxiliary"]

        return jax.grad(auxiliary)(params["b_dec"])

    assert not np.any(bias_gradient(config))
    assert np.any(bias_gradient(dataclasses.replace(config, freeze_aux_decoder=False)))


@pytest.mark.parametrize(
    ("module", "switches", "products"),
    [(gated, {}, 7), (gated, {"tie_encoder": False}, 9), (signed_gated, {}, 7), (relu, {}, 5)],
)
def test_a_step_makes_no_more_products_than_it_must(module, switches, products):
    """Tied: one encoder, two decodes, and the gradients of each; the centring's share is a vector's product."""
    config = module.Config(D, F, **switches)
    params = module.init(jax.random.key(0), config)
    gradients = jax.grad(partial(loss, module), has_aux=True)
    jaxpr = jax.make_jaxpr(gradients, static_argnums=3)(params, inputs(), 0.1, config)
    products_made = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    sizes = [  # multiplications: the output's elements times the contracted axis
        math.prod(
            [*eqn.outvars[0].aval.shape, *(eqn.invars[0].aval.shape[i] for i in eqn.params["dimension_numbers"][0][0])]
        )
        for eqn in products_made
    ]
    assert sum(size == B * D * F for size in sizes) == products
    assert all(size <= D * F for size in sizes if size != B * D * F)


@pytest.mark.parametrize("module", [gated, relu])
def test_init_is_a_tied_random_dictionary(module):
    params = module.init(jax.random.key(3), module.Config(D, F))
    encoder = params["W_gate" if module is gated else "W_enc"]
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(encoder, params["W_dec"].T)
    assert not any(np.any(value) for name, value in params.items() if not name.startswith("W"))  # 64 exceeds F / 2


@pytest.mark.parametrize("module", [gated, relu])
@pytest.mark.parametrize(("initial_l0", "expected"), [(16, 16), (64, 64), (0, 512), (600, 512)])
def test_about_so_many_features_are_active_before_training(module, initial_l0, expected):
    config = module.Config(96, 1024, initial_l0=initial_l0)
    x = jax.random.normal(jax.random.key(1), (256, 96))  # E||x||^2 = D
    f = module.encode(module.init(jax.random.key(0), config), x, config)
    assert (f > 0).sum(-1).mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("initial_l0", "expected"), [(64, 64), (0, 1024), (2000, 1024)])
def test_either_sign_counts_before_training(initial_l0, expected):
    config = signed_gated.Config(96, 1024, initial_l0=initial_l0)
    x = jax.random.normal(jax.random.key(1), (256, 96))
    f = signed_gated.encode(signed_gated.init(jax.random.key(0), config), x, config)
    assert (f != 0).sum(-1).mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("module", [gated, relu])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_folding_mean_and_scale_is_the_same_sae_in_other_units(module, mean):
    config = module.Config(D, F)
    params, x, scale = away_from_init(module, config), np.asarray(inputs()), 7.3
    mean_D = mean * np.arange(1, D + 1, dtype=np.float32)
    units = [parameters.Units(scale, mean_D)]
    folded = parameters.fold(module, params, units, units)
    sae = trained.SAE(
        name="a",
        architecture=module.__name__.rpartition(".")[2],
        config=config,
        site="blocks.0.hook_mlp_out",
        params=folded,
        scale=scale,
    )
    f = module.encode(params, scale * (x - mean_D), config)
    assert 0.05 < (f > 0).mean() < 0.95
    x_hat = np.asarray(module.decode(params, f)) / scale + mean_D
    shaped, tolerance = x.reshape(4, -1, D), 1e-5 + 1e-5 * mean
    np.testing.assert_allclose(sae.encode(shaped).reshape(B, F), f / scale, rtol=1e-4, atol=tolerance)
    np.testing.assert_allclose(sae(shaped).reshape(B, D), x_hat, rtol=1e-4, atol=tolerance)
    for name, value in parameters.unfold(module, folded, units, units).items():
        np.testing.assert_allclose(value, params[name], rtol=1e-5, atol=tolerance, err_msg=name)
    with refused("x", "[64, 13]", "12"):
        sae.encode(jnp.zeros((B, D + 1)))


@pytest.mark.parametrize(("module", "products"), [(gated, 7), (relu, 5)])
def test_every_product_of_a_bfloat16_step_has_bfloat16_operands(module, products):
    """And float32 sums; the encoder's bias from the centre takes products of one row."""
    B, D, F = 32, 8, 64
    config = module.Config(D, F, dtype="bfloat16")
    x = jax.random.normal(jax.random.key(1), (B, D))
    batch = contract.Batch(x, x, lambda: jnp.zeros(F, bool), jnp.int32(0))

    def loss(params):
        return module.loss(params, {}, batch, {"l1_coefficient": 0.1}, config)[0]

    params = module.init(jax.random.key(0), config)
    lowered = jax.jit(jax.grad(loss)).lower(params).as_text()
    dots = re.findall(r"dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>", lowered)
    assert set(dots) == {("bf16", "bf16", "f32")}
    assert len(dots) >= products
    exact = jax.grad(lambda p: module.loss(p, {}, batch, {"l1_coefficient": 0.1}, module.Config(D, F))[0])(params)
    for key, value in jax.grad(loss)(params).items():
        assert value.dtype == jnp.float32
        assert np.linalg.norm(value - exact[key]) <= 0.02 * np.linalg.norm(exact[key]) + 1e-6, key


@pytest.mark.parametrize("module", [gated, relu])
def test_bfloat16_products_keep_their_digits_beside_a_large_mean(module):
    config, mean_D = module.Config(D, F, dtype="bfloat16"), np.full(D, 100, np.float32)
    params, x = away_from_init(module, config), np.asarray(inputs())
    f = module.encode(params, x, config)
    units = [parameters.Units(1.0, mean_D)]
    shifted = module.encode(parameters.fold(module, params, units, units), x + mean_D, config)
    np.testing.assert_allclose(shifted, f, rtol=0.05, atol=0.05)


def test_penalties_have_the_slope_of_l1_at_0_and_scales_of_their_own():
    params, x = away_from_init(gated, gated.Config(D, F)), inputs()
    small = {
        name: float(loss(gated, params, x, 0.07, gated.Config(D, F, penalty=name, penalty_scale=1e-3))[0])
        for name in ("tanh", "log")
    }
    expected = float(loss(gated, params, x, 0.07, gated.Config(D, F))[0])
    np.testing.assert_allclose(list(small.values()), expected, rtol=1e-3)
    for options, fact in (
        ({"penalty": "tanh", "penalty_scale": 0.0}, "above 0"),
        ({"penalty": "log", "penalty_scale": -1.0}, "above 0"),
        ({"penalty_scale": 2.0}, '"l1" has no scale'),
    ):
        with refused("options.penalty_scale", fact):
            contract.build_config(gated, "gated", (D,), None, F, "float32", options)
    with refused("options.penalty", "'l2'", "tanh"):
        contract.build_config(gated, "gated", (D,), None, F, "float32", {"penalty": "l2"})


def test_a_stack_gets_what_it_lacks_from_its_architectures_recipe():
    def recipe(architecture, **settings):
        stack = contract.with_recipe(config_lib.Stack(architecture, "site", 2**16, **settings))
        return stack.learning_rates, stack.b1, stack.b2, stack.clip_norm, stack.coefficient_warmup_fraction

    assert recipe("gated") == recipe("relu") == ((3e-4,), 0, 0.999, 0, 0)
    assert recipe("relu_april") == ((5e-5,), 0.9, 0.999, 1, 0.05)
    assert recipe("jumprelu") == ((7e-5,), 0, 0.999, 0, 0.01)
    assert recipe("matryoshka") == recipe("batch_topk") == recipe("topk") == ((pytest.approx(1e-4),), 0.9, 0.999, 0, 0)
    own = {"learning_rates": (1e-2, 2e-2), "b1": 0.5, "b2": 0.9, "clip_norm": 3.0, "coefficient_warmup_fraction": 0.0}
    assert recipe("relu_april", **own) == tuple(own.values())
    with refused("architecture", "'gate'"):
        recipe("gate")


def test_steps_are_counted_in_products_of_the_encoders_size():
    counts = {name: products.count(name) for name in ("gated", "relu", "jumprelu", "topk", "matryoshka")}
    assert counts == {"gated": 7, "relu": 5, "jumprelu": 5, "topk": 5, "matryoshka": 5}
    assert products.count("gated", tie_encoder=False) == 9
    assert products.count("gated", freeze_aux_decoder=False) == 8
    assert products.equal_width("relu", 1024) == 1432  # 7 / 5 of it, as a multiple of 8
    with refused("architecture", "'gate'"):
        products.count("gate")


def test_unknown_architectures_and_options_are_named():
    with refused("", "'gate'", "did you mean 'gated'?", "known: batch_topk, batch_topk_crosscoder, batch_topk_tr"):
        contract.trainable("gate")
    with refused("options.tie_encodr", "'gated'", "did you mean 'tie_encoder'?"):
        contract.build_config(gated, "gated", (D,), None, F, "float32", {"tie_encodr": True})


@pytest.mark.parametrize("use_r_mag", [True, False])
def test_the_jumprelu_form_is_the_same_function(use_r_mag):
    config = gated.Config(D, F, use_r_mag=use_r_mag)
    params, x = away_from_init(gated, config), inputs()
    f = gated.encode(params, x, config)
    same = jumprelu.encode(jumprelu.from_gated(params, config), x, jumprelu.Config(D, F))
    np.testing.assert_array_equal(same > 0, f > 0)
    np.testing.assert_allclose(same, f, rtol=1e-5, atol=1e-6)
    assert 0 < (jumprelu.from_gated(params, config)["threshold"] > 0).sum() < F


def test_a_baseline_is_a_jumprelu_sae_and_that_is_a_gated_one():
    x = inputs()
    params = away_from_init(relu, relu.Config(D, F))
    form = jumprelu.from_relu(params, relu.Config(D, F))
    f = relu.encode(params, x, relu.Config(D, F))
    np.testing.assert_allclose(jumprelu.encode(form, x, jumprelu.Config(D, F)), f, rtol=1e-5, atol=1e-6)
    form["threshold"] = jax.random.normal(jax.random.key(1), (F,))  # below 0 it is as at 0
    f = jumprelu.encode(form, x, jumprelu.Config(D, F))
    assert f.min() == 0
    assert 0.05 < (f > 0).mean() < 0.95
    np.testing.assert_allclose(
        gated.encode(gated.from_jumprelu(form, jumprelu.Config(D, F)), x, gated.Config(D, F)), f, rtol=1e-5, atol=1e-6
    )


def test_an_untied_encoder_has_no_jumprelu_form():
    config = gated.Config(D, F, tie_encoder=False)
    with refused("tie_encoder", "False", "JumpReLU"):
        jumprelu.from_gated(gated.init(jax.random.key(0), config), config)


@pytest.mark.parametrize("module", [gated, signed_gated, relu, jumprelu])
def test_nan_is_never_hidden(module):
    """Neither of an input nor of a parameter; the other inputs keep their features."""
    params = gated.init(jax.random.key(0), gated.Config(D, F))
    if module in (relu, jumprelu):
        params = jumprelu.from_gated(params, gated.Config(D, F))
    if module is relu:
        del params["threshold"]
    sae = trained.SAE("a_0", module.__name__.rpartition(".")[2], module.Config(D, F), "", params)
    x = inputs()
    spoilt = x.at[3, 5].set(jnp.nan)
    features = sae.encode(spoilt)
    assert np.isnan(features[3]).all()
    assert np.isnan(sae(spoilt)[3]).all()
    np.testing.assert_array_equal(np.delete(features, 3, 0), np.delete(sae.encode(x), 3, 0))
    for name in params:
        if name not in ("W_dec", "b_dec"):
            broken = params | {name: params[name].at[..., 7].set(jnp.nan)}
            features = np.asarray(dataclasses.replace(sae, params=broken).encode(x))
            assert np.isnan(features[:, 7]).any(), name
            assert np.isfinite(np.delete(features, 7, 1)).all(), name
