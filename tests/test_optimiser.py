import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gsae_jax import config as config_lib
from gsae_jax.training import optimiser


def test_it_is_adam_without_a_first_moment():
    """Ten steps of random gradients of many sizes, before any projection."""
    params = {"a": jax.random.normal(jax.random.key(0), (5, 7)), "b": jax.random.normal(jax.random.key(1), (3,))}
    ours, adam = optimiser.scale_by(0.0, 0.999), optax.adam(1.0, b1=0.0, b2=0.999)
    our_state, adam_state = ours.init(params), adam.init(params)
    for step in range(10):
        key = jax.random.key(step + 2)
        grads = jax.tree.map(
            lambda p, key=key, step=step: 10.0 ** (step % 4 - 2) * jax.random.normal(key, p.shape), params
        )
        our_updates, our_state = ours.update(grads, our_state)
        adam_updates, adam_state = adam.update(grads, adam_state, params)
        for name in params:
            np.testing.assert_allclose(our_updates[name], -adam_updates[name], rtol=1e-6)
    assert len(jax.tree.leaves(our_state)) == 1 + len(params)  # the count, and one array per parameter


@pytest.mark.parametrize(("b1", "b2"), [(0.5, 0.999), (0.9, 0.95)])
def test_with_a_first_moment_clipping_and_warmups_it_is_optax(b1, b2):
    """Two SAEs of a stack, each clipped by its own norm; the second's gradients are below the limit."""
    params = {"a": jax.random.normal(jax.random.key(0), (2, 5, 7)), "b": jnp.ones((2, 3))}
    schedule = optax.linear_schedule(0.1, 1.0, 5)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1, b2, 1e-8))
    state, each = optimiser.scale_by(b1, b2).init(params), [jax.tree.map(lambda x, n=n: x[n], params) for n in range(2)]
    their_states = [theirs.init(one) for one in each]
    for step in range(8):
        sizes = jnp.array([3.0, 1e-2])
        grads = {
            name: jax.random.normal(jax.random.key(step), value.shape) * sizes.reshape(-1, *[1] * (value.ndim - 1))
            for name, value in params.items()
        }
        for n in range(2):
            updates, their_states[n] = theirs.update(jax.tree.map(lambda x, n=n: x[n], grads), their_states[n])
            each[n] = optax.apply_updates(each[n], updates)
        norm_N = jnp.sqrt(optimiser.squared_norms(grads))
        assert norm_N[0] > 1 > norm_N[1]
        clipped = optimiser.clip(grads, norm_N, 1.0)
        rates = jnp.full(2, schedule(step))
        params, state = optimiser.update(params, clipped, state, rates, (), optimiser.finite(grads), b1, b2)
    for n, theirs in enumerate(each):
        for name, value in theirs.items():
            np.testing.assert_allclose(params[name][n], value, rtol=1e-5, atol=1e-6)
    broken = {name: value.at[0].set(jnp.nan) for name, value in grads.items()}
    _, after = optimiser.update(params, broken, state, rates, (), optimiser.finite(broken), b1, b2)
    for kind, values in optimiser.moments(state).items():
        for name, value in values.items():
            np.testing.assert_array_equal(optimiser.moments(after)[kind][name][0], value[0])
            assert np.any(optimiser.moments(after)[kind][name][1] != value[1])


def test_the_coefficient_is_warmed_up_from_zero_before_a_target_moves_it():
    assert optimiser.coefficient_warmup(100, 0.0) is None
    factor = optimiser.coefficient_warmup(100, 0.2)
    assert [float(factor(step)) for step in (0, 10, 20, 99)] == pytest.approx([0, 0.5, 1, 1])
    stack = config_lib.Stack("gated", "a", 8, (1e-2,), (1e-3,), coefficient_warmup_fraction=0.25)
    assert optimiser.constant_from(100, stack) == 25
    assert optimiser.constant_from(100, dataclasses.replace(stack, target_l0=(4.0,))) == 66
    gain = optimiser.gain(config_lib.Train(steps=100, warmup_steps=10), 0.2)
    assert [float(gain(step)) > 0 for step in (10, 19, 20, 65, 66)] == [False, False, True, True, False]


def test_decoder_rows_stay_unit_and_learning_rates_belong_to_their_sae():
    start = jax.random.normal(jax.random.key(0), (2, 9, 5))
    start /= jnp.linalg.norm(start, axis=-1, keepdims=True)
    params = {"W_dec": start, "b_dec": jnp.zeros((2, 5))}
    state = optimiser.scale_by(0.0, 0.999).init(params)
    for step in range(10):
        grads = {"W_dec": jax.random.normal(jax.random.key(step), start.shape), "b_dec": jnp.ones((2, 5))}
        params, state = optimiser.update(
            params, grads, state, jnp.array([0.1, 0.0]), {"W_dec"}, jnp.array([True, True])
        )
        np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=-1), 1, atol=1e-6)
    assert np.abs(params["W_dec"][0] - start[0]).min() > 0
    np.testing.assert_allclose(params["W_dec"][1], start[1], atol=1e-6)
    np.testing.assert_allclose(params["b_dec"], [[-1.0] * 5, [0.0] * 5], rtol=1e-5)


def test_the_first_update_ignores_the_length_of_the_gradient_along_a_row():
    """One step, by hand: project, divide by the absolute value (the corrected second moment's root), renormalise."""
    row, gradient, rate = np.array([0.6, 0.8]), np.array([5.0, 1.0]), 0.01
    across = gradient - (gradient @ row) * row
    moved = row - rate * across / (np.abs(across) + 1e-8)
    params = {"W_dec": jnp.array(row).reshape(1, 1, 2)}
    state = optimiser.scale_by(0.0, 0.999).init(params)
    grads = {"W_dec": jnp.array(gradient).reshape(1, 1, 2)}
    params, _ = optimiser.update(params, grads, state, jnp.array([rate]), {"W_dec"}, jnp.array([True]))
    np.testing.assert_allclose(params["W_dec"][0, 0], moved / np.linalg.norm(moved), rtol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30])
def test_an_sae_whose_gradients_are_not_finite_stays_as_it_is(broken):
    """To the last bit, while the other one moves as it would alone; 1e30 has no finite square."""
    params = {"W_dec": jax.random.normal(jax.random.key(0), (2, 9, 5)), "b_dec": jnp.ones((2, 5))}
    grads = {name: jax.random.normal(jax.random.key(1), value.shape) for name, value in params.items()}
    rates = jnp.array([0.1, 0.2])
    state = optimiser.scale_by(0.0, 0.999).init(params)
    params, state = optimiser.update(params, grads, state, rates, {"W_dec"}, optimiser.finite(grads))
    moved, after = optimiser.update(params, grads, state, rates, {"W_dec"}, optimiser.finite(grads))
    for name, place in (("W_dec", (1, 8, 4)), ("b_dec", (1, 0))):
        wrong = grads | {name: grads[name].at[place].set(broken)}
        np.testing.assert_array_equal(optimiser.finite(wrong), [True, False])
        ours, ours_after = optimiser.update(params, wrong, state, rates, {"W_dec"}, optimiser.finite(wrong))
        for key in params:
            np.testing.assert_array_equal(ours[key][1], params[key][1])
            np.testing.assert_array_equal(ours_after.nu[key][1], state.nu[key][1])
            np.testing.assert_array_equal(ours[key][0], moved[key][0])
            np.testing.assert_array_equal(ours_after.nu[key][0], after.nu[key][0])


@pytest.mark.parametrize(
    ("decay_fraction", "expected"),
    [(0.0, {0: 0.1, 9: 1, 50: 1, 99: 1}), (0.4, {0: 0.1, 9: 1, 59: 1, 80: 0.5, 99: 0.00154}), (1.0, {9: 1, 55: 0.5})],
)
def test_schedule(decay_fraction, expected):
    config = config_lib.Train(
        steps=100,
        batch_size=1,
        warmup_steps=10,
        decay_fraction=decay_fraction,
        compute_dtype="float32",
        log_every=1,
    )
    factor = optimiser.schedule(config)
    for step, value in expected.items():
        np.testing.assert_allclose(factor(jnp.int32(step)), value, atol=1e-4)
