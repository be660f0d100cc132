"""A site's mean and scale, against NumPy in float64."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import sae_loading
from gsae_jax import train as train_command
from gsae_jax.activations import scaling
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import contract, gated
from gsae_jax.saes.contract import Role
from gsae_jax.training import loop, preparation, starting
from tests.refusals import refused
from tests.training import advance, begin, single_device_mesh, with_

R, T, D = 8, 64, 16


def activations(mean, batches=4, seed=0):
    """[R, T, D] for each batch; the mean of a coordinate is `mean` deviations."""
    random = np.random.default_rng(seed)
    return [(random.normal(size=(R, T, D)) * 2 + 2 * mean).astype(np.float32) for _ in range(batches)]


def measure(batches, valid=None, multiple=np.inf, center=True):
    valid = np.ones((R, T), bool) if valid is None else valid
    statistics = [scaling.statistics(jnp.asarray(x), jnp.asarray(valid), multiple) for x in batches]
    return scaling.combine(statistics, center)


@pytest.mark.parametrize("mean", [0, 0.5, 100, 1000])
def test_mean_and_scale_are_those_of_float64(mean):
    batches = activations(mean)
    x = np.concatenate(batches).reshape(-1, D).astype(np.float64)
    site, warnings = measure(batches)
    deviation = 2e-6 * mean + 1e-5
    np.testing.assert_allclose(site.mean, x.mean(0), rtol=1e-6, atol=deviation)
    assert site.mean_square == pytest.approx(np.square(x - x.mean(0)).sum(1).mean(), rel=1e-4)
    assert not warnings
    site, warnings = measure(batches, center=False)
    assert site.mean is None
    assert site.mean_square == pytest.approx(np.square(x).sum(1).mean(), rel=1e-5)
    assert [("activations.center=True" in warning) for warning in warnings] == [True] * (mean > 1)


def test_tokens_that_are_masked_do_not_count_and_batches_weigh_by_those_that_do():
    batches = [x + number for number, x in enumerate(activations(1))]
    valid = np.zeros((R, T), bool)
    valid[2:5] = True
    weighed = [
        scaling.statistics(jnp.asarray(x), jnp.asarray(valid if number else ~valid), np.inf)
        for number, x in enumerate(batches)
    ]
    site, _ = scaling.combine(weighed, True)
    x = np.concatenate([batches[0][~valid], *(batch[valid] for batch in batches[1:])]).astype(np.float64)
    np.testing.assert_allclose(site.mean, x.mean(0), rtol=1e-5)
    assert site.mean_square == pytest.approx(np.square(x - x.mean(0)).sum(1).mean(), rel=1e-5)
    nothing = scaling.statistics(jnp.asarray(batches[0]), jnp.zeros((R, T), bool), np.inf)
    again, _ = scaling.combine([nothing, *weighed], True)
    np.testing.assert_array_equal(again.mean, site.mean)
    assert np.isnan(scaling.combine([nothing], True)[0].mean_square)


@pytest.mark.parametrize("center", [True, False])
def test_a_few_tokens_of_extreme_norm_are_warned_of(center):
    batches = activations(0)
    batches[1][3, 5] *= 1000  # one token in 2,048
    site, (warning,) = measure(batches, center=center)
    assert site.mean_square > 100 * measure(activations(0), center=center)[0].mean_square
    assert "max_norm_multiple=100 would drop 0.00049 of all tokens" in warning
    limited, warnings = measure(batches, multiple=10, center=center)
    assert not warnings
    assert limited.mean_square == pytest.approx(measure(activations(0), center=center)[0].mean_square, rel=1e-2)


def test_inputs_have_no_mean_and_the_square_of_their_width():
    batches = activations(100)
    site, _ = measure(batches)
    x = np.concatenate(batches)
    inputs = scaling.inputs(jnp.asarray(x), jnp.float32(np.sqrt(D / site.mean_square)), jnp.asarray(site.mean))
    assert np.abs(np.asarray(inputs).mean((0, 1))).max() < 1e-3
    assert np.square(inputs).sum(-1).mean() == pytest.approx(D, rel=1e-3)


def test_a_large_mean_changes_nothing_that_is_trained(experiment):
    """The language model with a constant added to a site's activations trains the same SAEs, up to rounding."""
    site = "blocks.0.hook_mlp_out"
    experiment = dataclasses.replace(experiment, stacks={"gated": experiment.stacks["gated"]})

    def trained(constant):
        program, _, lm_params, _ = begin(experiment, single_device_mesh())
        lm_params["blocks.0"]["mlp"]["b_out"] += constant
        rows = rows_lib.open_rows(experiment.data, "train", Checkpoint.open(experiment.lm.path).tokenizer(), 2**20)
        stream = rows_lib.batches(rows, experiment.rows_per_call, experiment.seed)
        state = starting.start(program, lm_params, stream)
        means, scales = jax.device_get((state.means, state.scales))
        state, metrics = advance(program, state, lm_params, stream, calls=3)
        return means[site], scales[site], metrics["gated"]

    mean, scale, metrics = trained(0.0)
    shifted_mean, shifted_scale, shifted_metrics = trained(30 / scale)
    np.testing.assert_allclose(shifted_mean - mean, 30 / scale, rtol=1e-3)
    assert shifted_scale == pytest.approx(scale, rel=1e-4)
    for name, value in metrics.items():
        np.testing.assert_allclose(shifted_metrics[name], value, rtol=2e-2, err_msg=name)


def test_an_architecture_that_does_not_centre_is_refused(experiment, monkeypatch):
    table = gated.PARAMETERS | {"b_dec": dataclasses.replace(gated.PARAMETERS["b_dec"], role=Role.OUTPUT_BIAS)}
    monkeypatch.setattr(gated, "PARAMETERS", table)
    monkeypatch.delattr(gated, "shifted")
    with refused("activations.center", "is True", "'gated'", "stacks.gated", "write False"):
        preparation.build(experiment, single_device_mesh(), Checkpoint.open(experiment.lm.path))
    preparation.build(
        with_(experiment, activations={"center": False}), single_device_mesh(), Checkpoint.open(experiment.lm.path)
    )


@pytest.mark.variants
def test_a_run_that_began_before_the_setting_existed_continues_without_it(experiment, tmp_path, capsys):
    begun = with_(experiment, activations={"center": False}, train={"steps": 8})
    path = tmp_path / "run"
    assert loop.train(begun, path)
    config = json.loads((path / "config.json").read_text())
    del config["activations"]["center"]
    (path / "config.json").write_text(json.dumps(config))
    kept = sae_loading.pinned(with_(begun, activations={"center": True}), path)
    assert kept == contract.with_recipes(begun)
    assert "activations.center=False" in capsys.readouterr().err
    with refused("--workdir", str(path), "train.batch_size: 64 != 128"):
        train_command.run(with_(begun, activations={"center": True}, train={"batch_size": 128}), path)
