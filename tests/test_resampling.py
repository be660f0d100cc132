"""Dead features begin again: which, from what, and what comes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.training import optimiser
from tests.training import advance, begin, single_device_mesh, with_


def with_bad_start(program, state):
    """Every feature's bias at -5, where almost nothing fires."""
    for stack in state.stacks.values():
        for name, value in stack.params.items():
            if name in ("b_gate", "b_enc"):
                stack.params[name] = jax.device_put(jnp.full_like(value, -5.0), value.sharding)
    return state


def some_dead(state):
    """Every third feature dead, in a pattern that differs between SAEs."""
    for stack in state.stacks.values():
        N, F = stack.steps_since_fired.shape
        since = jnp.where((jnp.arange(F)[None] + jnp.arange(N)[:, None]) % 3 == 0, 10_000, 5)
        stack.steps_since_fired = jax.device_put(since.astype(jnp.int32), stack.steps_since_fired.sharding)
        stack.second_moments = jax.tree.map(lambda x: x + 1, stack.second_moments)
    return state


def test_what_a_dead_feature_becomes(experiment):
    baseline = dataclasses.replace(experiment.stacks["baseline"], b1=0.9)
    experiment = dataclasses.replace(experiment, stacks=experiment.stacks | {"baseline": baseline})
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    state, _ = advance(program, state, lm_params, stream, calls=2)
    state = some_dead(state)
    before = jax.device_get(state)
    after, counts = jax.device_get(program.resample(state))
    for stack in program.stacks:
        old, new = before.stacks[stack.name], after.stacks[stack.name]
        site = stack.config.site
        axes = {name: parameter.axis for name, parameter in stack.architecture.PARAMETERS.items()}
        store = before.store[site].reshape(-1, before.store[site].shape[-1])
        store = (store - before.means[site]) * before.scales[site]
        for index in range(len(stack.config)):
            dead = old.steps_since_fired[index] >= 1000
            assert counts[stack.name][index] == dead.sum()
            assert (new.steps_since_fired[index] == np.where(dead, 0, 5)).all()
            params = {name: value[index] for name, value in new.params.items()}
            moments = {name: value[index] for name, value in new.second_moments.nu.items()}
            for name, value in params.items():
                by_feature = [np.moveaxis(x, axes[name] or 0, 0) for x in (value, old.params[name][index])]
                kept = slice(None) if axes[name] is None else ~dead
                np.testing.assert_array_equal(by_feature[0][kept], by_feature[1][kept], err_msg=name)
                if axes[name] is None:
                    continue
                squares = np.moveaxis(moments[name], axes[name], 0)
                np.testing.assert_allclose(squares[dead], squares[~dead].mean(), rtol=1e-5)
                if stack.name == "baseline":
                    first = np.moveaxis(new.second_moments.mu[name][index], axes[name], 0)
                    np.testing.assert_array_equal(first[dead], 0)
                    assert (first[~dead] != 0).any(), name
                if name.startswith("W_") and name != "W_dec":
                    live = np.linalg.norm(by_feature[1][~dead], axis=1).mean()
                    np.testing.assert_allclose(by_feature[0][dead], 0.2 * live * params["W_dec"][dead], rtol=1e-4)
                elif value.ndim == 1:
                    assert (by_feature[0][dead] == 0).all()
            centred = store - old.params["b_dec"][index]
            centred /= np.linalg.norm(centred, axis=1, keepdims=True)
            nearest = (params["W_dec"][dead] @ centred.T).argmax(1)
            np.testing.assert_allclose(params["W_dec"][dead], centred[nearest], atol=1e-5)
            assert len(set(nearest)) == dead.sum()  # each from an input of its own


def test_new_features_of_either_sign_have_the_biases_of_the_live_ones(experiment):
    stack = dataclasses.replace(experiment.stacks["gated"], architecture="signed_gated", options={})
    experiment = dataclasses.replace(experiment, stacks={"signed": stack})
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    state, _ = advance(program, state, lm_params, stream, calls=2)
    state = some_dead(state)
    old = jax.device_get(state.stacks["signed"])
    new = jax.device_get(program.resample(state)[0].stacks["signed"])
    for index, since in enumerate(old.steps_since_fired):
        dead = since >= 1000
        for name in ("b_gate", "b_mag"):
            live = old.params[name][index][~dead]
            np.testing.assert_allclose(new.params[name][index][dead], live.mean(), rtol=1e-5)
            np.testing.assert_array_equal(new.params[name][index][~dead], live)


def test_new_features_with_aligned_encoders_do_not_flood_the_reconstruction(experiment):
    """Such an encoder has the size of a live one. With a bias of 0, it would fire on half of all tokens."""
    stack = experiment.stacks["gated"]
    stacks = {"plain": stack, "aligned": dataclasses.replace(stack, options={"aligned": True})}
    experiment = dataclasses.replace(experiment, stacks=stacks)
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    state, _ = advance(program, state, lm_params, stream, calls=4)
    state, before = advance(program, state, lm_params, stream, calls=1)
    state, _ = program.resample(some_dead(state))
    state, after = advance(program, state, lm_params, stream, calls=1)
    for field in ("mse", "l0"):
        plain, aligned = (after[name][field] / before[name][field] for name in stacks)
        assert (aligned < 1.5 * plain).all(), field


def test_new_features_from_an_input_of_zeros_are_finite(experiment):
    stack = dataclasses.replace(experiment.stacks["baseline"], architecture="relu_april", options={})
    experiment = with_(dataclasses.replace(experiment, stacks={"april": stack}), activations={"center": False})
    program, state, _, _ = begin(experiment, single_device_mesh())
    state.store = jax.tree.map(jnp.zeros_like, state.store)
    after, _ = program.resample(some_dead(state))
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(jax.device_get(after.stacks["april"].params)))


@pytest.mark.variants
def test_inputs_are_drawn_by_the_square_of_their_error(experiment):
    """One feature's input, drawn many times, against the probabilities."""
    experiment = dataclasses.replace(experiment, stacks={"baseline": experiment.stacks["baseline"]})
    program, state, _, _ = begin(experiment, single_device_mesh())
    stack, only = program.stacks[0], state.stacks["baseline"]
    only.steps_since_fired = only.steps_since_fired.at[:, 0].set(10_000)
    site = stack.config.site
    x = (np.asarray(state.store[site]).reshape(-1, 64) - np.asarray(state.means[site])) * float(state.scales[site])
    params = {name: value[0] for name, value in only.params.items()}
    x_hat = stack.architecture.decode(params, stack.architecture.encode(params, jnp.asarray(x), stack.sae))
    errors, unit = np.square(x - x_hat).sum(1), x / np.linalg.norm(x, axis=1, keepdims=True)
    drawn = []
    for seed in range(200):
        state.key = jax.random.key_data(jax.random.key(seed))
        after, _ = program.resample(jax.tree.map(jnp.copy, state))
        drawn.append((unit @ np.asarray(after.stacks["baseline"].params["W_dec"][0, 0])).argmax())
    chances = np.square(errors) / np.square(errors).sum()
    expected, spread = (chances * errors).sum(), np.sqrt((chances * np.square(errors)).sum() - (chances @ errors) ** 2)
    tolerance = 4 * spread / np.sqrt(len(drawn))
    assert abs(errors[drawn].mean() - expected) < tolerance < abs(errors.mean() - expected)  # and not evenly


@pytest.mark.variants
@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_a_mesh_resamples_as_one_device(experiment, shape):
    results = []
    for mesh in (single_device_mesh(), None):
        run = experiment if mesh else with_(experiment, mesh={"data": shape[0], "latent": shape[1]})
        program, state, lm_params, stream = begin(run, mesh)
        state, _ = advance(program, state, lm_params, stream, calls=2)
        results.append(jax.device_get(program.resample(some_dead(state))))
    (alone, counts), (spread, others) = results
    for name, stack in alone.stacks.items():
        np.testing.assert_array_equal(counts[name], others[name])
        np.testing.assert_array_equal(stack.steps_since_fired, spread.stacks[name].steps_since_fired)
        for key, value in stack.params.items():
            np.testing.assert_allclose(value, spread.stacks[name].params[key], atol=2e-3, err_msg=f"{name} {key}")


def test_resampling_brings_dead_features_back(experiment):
    """From a start at which nothing fires; alive is what fired in the last 60 of 240 steps."""
    alive = {}
    experiment = with_(experiment, train={"steps": 240, "dead_after": 60, "resample_warmup_steps": 20})
    for resample_steps in ((), (60, 120)):
        program, state, lm_params, stream = begin(with_(experiment, train={"resample_steps": resample_steps}))
        state = with_bad_start(program, state)
        step = 0
        while step < 240:
            state, metrics = advance(program, state, lm_params, stream, calls=1)
            step = int(state.step)
            if step in program.config.resampled_at:
                state, _ = program.resample(state)
        alive[resample_steps] = [1 - metrics[s.name]["dead"] / s.config.width for s in program.stacks]
    assert np.concatenate(alive[()]).max() < 0.5
    assert np.concatenate(alive[(60, 120)]).min() > 0.95


def test_the_learning_rate_returns_on_a_cosine(experiment):
    config = with_(
        experiment, train={"steps": 1000, "dead_after": 1, "resample_steps": (101,), "resample_warmup_steps": 200}
    )
    assert config.resampled_at == (104,)  # the end of a call of four updates
    factor = optimiser.schedule(config.train, config.resampled_at)
    found = [float(factor(step)) for step in (103, 104, 204, 304, 999)]
    assert found == pytest.approx([1, 0.1, 0.55, 1, 1])
