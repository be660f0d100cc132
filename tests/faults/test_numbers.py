"""Numbers that are not finite reach nobody but the SAE that has them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax import measuring
from gsae_jax import mesh as mesh_lib
from gsae_jax.errors import TrainingError
from gsae_jax.lms.loading import capture
from gsae_jax.storage import metrics_log, run_directory
from gsae_jax.training import loop
from tests.training import advance, begin, single_device_mesh, with_


def four(experiment, **changes):
    """The experiment with one stack, of four gated SAEs."""
    stack = dataclasses.replace(
        experiment.stacks["gated"], l1_coefficients=(0.01, 0.02, 0.03, 0.04), learning_rates=(1e-2,), seeds=(0, 1, 2, 3)
    )
    return dataclasses.replace(experiment, stacks={"gated": dataclasses.replace(stack, **changes)})


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.variants), (2, 4)])
def test_one_saes_nan_leaves_the_others_bit_identical(experiment, shape):
    """A NaN in one SAE's loss during the second of three calls."""
    experiment = with_(four(experiment), mesh={"data": shape[0], "latent": shape[1]})
    mesh = single_device_mesh() if shape == (1, 1) else None

    def train(poison):
        program, state, lm_params, stream = begin(experiment, mesh)
        state, _ = advance(program, state, lm_params, stream, 1)
        before, l1 = jax.device_get(state), state.stacks["gated"].l1_coefficient
        if poison:
            state.stacks["gated"].l1_coefficient = jax.device_put(l1.at[1].set(jnp.nan), l1.sharding)
        state, metrics = advance(program, state, lm_params, stream, 1)
        during, l1 = jax.device_get(state), state.stacks["gated"].l1_coefficient
        state.stacks["gated"].l1_coefficient = jax.device_put(l1.at[1].set(0.02), l1.sharding)
        after, _ = advance(program, state, lm_params, stream, 1)
        return before, during, metrics["gated"], jax.device_get(after)

    *_, sane = train(poison=False)
    before, during, metrics, after = train(poison=True)
    stack = during.stacks["gated"]
    np.testing.assert_array_equal(stack.skipped, [0, 4, 0, 0])
    np.testing.assert_array_equal(stack.skipped_in_row, [0, 4, 0, 0])
    np.testing.assert_array_equal(after.stacks["gated"].skipped_in_row, 0)
    counted = ("skipped", "skipped_in_row", "dead")
    for name, value in metrics.items():  # it made no update of which there could be a mean
        np.testing.assert_array_equal(np.isfinite(value), [True, name in counted, True, True], name)
    parts = (lambda s: s.params, lambda s: s.second_moments.nu, lambda s: s.steps_since_fired)
    for part in parts:
        for old, kept, new, other in zip(
            *(jax.tree.leaves(part(state.stacks["gated"])) for state in (before, during, after, sane)), strict=True
        ):
            if part is not parts[2]:
                np.testing.assert_array_equal(kept[1], old[1])
            assert np.isfinite(new).all()
            np.testing.assert_array_equal(np.delete(new, 1, 0), np.delete(other, 1, 0))
    assert (after.stacks["gated"].params["W_dec"][1] != during.stacks["gated"].params["W_dec"][1]).any()


def test_an_sae_that_diverges_ends_training(experiment, tmp_path):
    """By name, with its step and tokens on disk, and the others' progress saved."""
    experiment = with_(four(experiment, learning_rates=(1e-2, 1e-2, 1e30, 1e-2)), train={"max_skipped": 6})
    run, record = tmp_path / "run", tmp_path / "run" / "diverged.json"
    with pytest.raises(TrainingError, match=r"gated_2 since step 4; step 8 is saved") as caught:
        loop.train(experiment, run)
    assert str(record) in str(caught.value)
    found = json.loads(record.read_text())
    assert list(found) == ["gated_2"]
    assert np.shape(found["gated_2"]["tokens"]) == (16, 16)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert lines[-1]["gated/skipped"][:2] == [0, 0]
    assert lines[-1]["gated/skipped"][2] >= 6
    # The same command says the same, and what is on disk stays.
    before = record.read_text(), (run / "metrics.jsonl").read_text()
    with pytest.raises(TrainingError, match=r"gated_2 since step 4; step 8 is saved"):
        loop.train(experiment, run)
    assert (record.read_text(), (run / "metrics.jsonl").read_text()) == before


def test_one_that_diverges_has_no_score_and_spoils_no_report(experiment, tmp_path):
    """Its mean of the first call is the best there was; a loss of 0 would have been better."""
    rates = {"learning_rates": (1e-2, 1e-2, 1e30, 1e-2)}
    checkpoint = {"every": 4, "keep": 1, "keep_best": "gated/loss"}
    experiment = with_(four(experiment, **rates), checkpoint=checkpoint)
    assert loop.train(experiment, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["16", "4"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in ("gated/loss", "gated/mse", "gated/l0", "gated/gamma"):
        assert [value is None for value in lines[-1][name]] == [False, False, True, False]
    assert len(metrics_log.read_metrics(run_directory.Workdir(tmp_path / "run"))) == len(lines)
    measuring.evaluate(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert [record["l0"] is None for record in found["saes"]] == [False, False, True, False]
    assert [record["fvu"] is None for record in found["saes"]] == [False, False, True, False]
    assert any("gated_2" in note for note in found["notes"])


def test_finite_divergence_is_told_and_training_goes_on(experiment, tmp_path, capsys):
    assert loop.train(four(experiment, learning_rates=(1e-2, 1e-2, 10.0, 1e-2)), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if "has diverged" in line]
    assert len(said) == 1
    assert "gated_2 has diverged: its squared error is more than 10 times" in said[0]


def test_activations_that_are_not_finite_are_dropped_and_counted(experiment):
    """A token whose embedding is NaN spoils itself and what attends to it; no SAE sees any of that."""
    program, state, lm_params, stream = begin(experiment, mesh_lib.make_mesh(experiment.mesh))
    tokens = next(stream)
    W_E = lm_params["embed.W_E"]
    spoilt = int(tokens[3, 5])
    lm_params = lm_params | {"embed.W_E": W_E.at[spoilt].set(jnp.nan)}
    placed = program.source.place(tokens)
    finite = np.stack(
        [np.isfinite(x).all(-1) for x in capture(program.module, lm_params, placed, program.widths).values()]
    ).all(0)
    bad = ~finite & ~np.isin(tokens, program.special_tokens)
    assert bad[3, 5:].any()
    state, metrics, dropped = program.train_step(state, lm_params, placed)
    assert int(dropped) == int(state.dropped) == bad.sum() > 0
    for leaf in jax.tree.leaves((state.stacks, state.store, metrics)):
        assert np.isfinite(leaf).all()
    for stack in state.stacks.values():
        np.testing.assert_array_equal(stack.skipped, 0)
