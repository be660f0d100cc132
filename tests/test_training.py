import dataclasses
import io
import json
import os
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_loading
from gsae_jax import mesh as mesh_lib
from gsae_jax import train as train_command
from gsae_jax.activations import scaling, sources
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluate import evaluate
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.loading import capture
from gsae_jax.saes import gated
from gsae_jax.storage import run_directory
from gsae_jax.training import interruption, loop, preparation, progress, starting
from tests import references
from tests.refusals import refused


def begin(experiment, mesh=None):
    """A program, its first state, language-model parameters and the stream of tokens."""
    mesh = mesh or mesh_lib.make_mesh(experiment.mesh)
    checkpoint = Checkpoint.open(experiment.lm.path)
    program, tokenizer = preparation.build(experiment, mesh, checkpoint)
    lm_params = checkpoint.params(program.module, experiment.lm.dtype)
    rows = rows_lib.open_rows(experiment.data, "train", tokenizer, 2**20)
    stream = rows_lib.batches(rows, experiment.rows_per_call, experiment.seed)
    return program, starting.start(program, lm_params, stream), lm_params, stream


def advance(program, state, lm_params, stream, calls):
    for _ in range(calls):
        state, metrics, _ = program.train_step(state, lm_params, program.source.place(next(stream)))
    return state, jax.device_get(metrics)


def with_(experiment, **changes):
    """The experiment with fields of groups replaced: `train={"steps": 3}`."""
    groups = {name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(experiment, **groups)


def single_device_mesh():
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((1, 1), ("data", "latent"), devices=jax.devices()[:1], axis_types=(auto, auto))


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_a_mesh_gives_the_single_device_result(experiment, shape):
    alone = begin(experiment, single_device_mesh())
    spread = begin(with_(experiment, mesh={"data": shape[0], "latent": shape[1]}))
    for site in experiment.sites:
        np.testing.assert_allclose(alone[1].store[site], spread[1].store[site], rtol=1e-5, atol=1e-5)
    (alone, metrics_alone), (spread, metrics_spread) = advance(*alone, calls=3), advance(*spread, calls=3)
    assert int(alone.step) == int(spread.step) == 12
    for name, stack in alone.stacks.items():
        for key, value in stack.params.items():
            # Adam moves a weight with a vanishing gradient by its sign, so single entries may differ by a step.
            difference = np.abs(np.asarray(value) - np.asarray(spread.stacks[name].params[key]))
            assert difference.mean() < 1e-5, (name, key)
        np.testing.assert_array_equal(stack.steps_since_fired, spread.stacks[name].steps_since_fired)
        # Adam hides a gradient that is too large by a factor; its second moment does not.
        moments, others = (jax.tree.leaves(s.stacks[name].second_moments) for s in (alone, spread))
        for ours, theirs in zip(moments, others, strict=True):
            np.testing.assert_allclose(np.mean(ours), np.mean(theirs), rtol=1e-2)
        for key, value in metrics_alone[name].items():
            np.testing.assert_allclose(value, metrics_spread[name][key], rtol=1e-3, err_msg=f"{name} {key}")
    for leaf in jax.tree.leaves((spread.stacks["gated"].params["W_dec"], spread.stacks["gated"].steps_since_fired)):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8  # whatever the mesh's shape


def test_a_step_is_the_papers_loss_and_adam(experiment):
    """Ten updates of every SAE against float64 gradients and optax.adam, on the batches that the buffer served."""
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    config = experiment.train
    start = jax.device_get(state)
    tokens = [next(stream) for _ in range(3)]
    served = replay(program, start, lm_params, tokens)
    for call in tokens:
        state, *_ = program.train_step(state, lm_params, program.source.place(call))
    adam = optax.adam(lambda step: jnp.minimum(1.0, (step + 1) / config.warmup_steps), b1=0.0)
    update = jax.jit(adam.update)
    for stack in program.stacks:
        for index, (l1, rate, _) in enumerate(stack.config.numbers()):
            params = {
                name: np.asarray(value[index], np.float64) for name, value in start.stacks[stack.name].params.items()
            }
            moments = adam.init({name: jnp.array(value, jnp.float32) for name, value in params.items()})
            for batch in served[stack.config.site]:
                reference = references.gated_sae if stack.architecture is gated else references.relu_sae
                _, grads, _ = reference(params, batch, l1)
                along = (grads["W_dec"] * params["W_dec"]).sum(-1, keepdims=True)
                grads["W_dec"] -= along * params["W_dec"]
                updates, moments = update({name: np.asarray(g, np.float32) for name, g in grads.items()}, moments)
                params = {name: value + rate * np.asarray(updates[name], np.float64) for name, value in params.items()}
                params["W_dec"] /= np.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
            for name, value in params.items():
                difference = np.abs(np.asarray(state.stacks[stack.name].params[name][index]) - value)
                assert difference.mean() < 2e-5, (stack.name, index, name)


def replay(program, state, lm_params, tokens):
    """The batches {site: [update, B, D]} that the train program serves, by plain indexing of the store."""
    store = {site: np.array(value) for site, value in state.store.items()}
    batch, slots = next(iter(store.values())).shape[:2]
    updates, served = program.config.updates_per_call, {site: [] for site in store}
    for call, rows in enumerate(tokens):
        fresh = jax.jit(lambda tokens: capture(program.module, lm_params, tokens, program.config.sites))(rows)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), call * updates)
        picks = jax.random.randint(jax.random.fold_in(key, 1), (updates, batch), 0, slots)
        shift = int(jax.random.randint(jax.random.fold_in(key, 2), (), 0, rows.shape[1]))
        valid = np.roll(~np.isin(rows, program.special_tokens), shift, axis=1).reshape(batch, updates)
        for update in range(updates):
            for site, values in store.items():
                incoming = np.roll(np.asarray(fresh[site]), shift, axis=1).reshape(batch, updates, -1)[:, update]
                served[site].append(
                    (values[np.arange(batch), picks[update]] - state.means[site]) * float(state.scales[site])
                )
                for stratum in range(batch):
                    if valid[stratum, update]:
                        values[stratum, picks[update, stratum]] = incoming[stratum]
    return served


def test_the_store_starts_full_of_valid_scaled_activations(experiment):
    program, state, lm_params, _ = begin(experiment)
    for site, width in program.widths.items():
        x = np.asarray(state.store[site])
        assert np.abs(x).sum(-1).min() > 0  # no slot is empty
        inputs = (x - np.asarray(state.means[site])) * float(state.scales[site])
        assert np.square(inputs).sum(-1).mean() == pytest.approx(width, rel=0.1)
        assert np.abs(inputs.mean((0, 1))).max() < 0.3 < np.abs(x * float(state.scales[site])).mean((0, 1)).max()
    tokens = next(begin(experiment)[3])
    bos = capture(program.module, lm_params, jnp.array(tokens), ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][
        0, 0
    ]
    distance = np.abs(np.asarray(state.store["blocks.0.hook_mlp_out"]) - np.asarray(bos)).max(-1)
    assert distance.min() > 1e-3  # BOS, the same in every row, is not among them


def test_tokens_of_extreme_norm_are_dropped(experiment):
    limited = with_(experiment, activations={"max_norm_multiple": 1.05})
    program, state, _, _ = begin(limited)
    _, unlimited, _, _ = begin(experiment)
    for site in program.widths:
        norms = np.linalg.norm(np.asarray(state.store[site]), axis=-1)
        assert norms.max() <= float(state.norm_limits[site]) * (1 + 1e-5)
        assert np.linalg.norm(np.asarray(unlimited.store[site]), axis=-1).max() > float(state.norm_limits[site])


@pytest.mark.variants
def test_a_batch_may_take_several_forward_passes(experiment):
    """Two forwards of 8 rows per update and one of 16 see the same tokens in the same order."""
    one = with_(experiment, train={"batch_size": 256}, activations={"buffer_size": 2048})
    two = with_(one, activations={"rows_per_forward": 8})
    assert (one.forwards_per_call, two.forwards_per_call, two.rows_per_call) == (1, 2, 16)
    (one, _), (two, _) = advance(*begin(one), calls=2), advance(*begin(two), calls=2)
    np.testing.assert_allclose(one.stacks["gated"].params["W_dec"], two.stacks["gated"].params["W_dec"], atol=1e-4)


@pytest.mark.variants
def test_one_row_a_call(experiment):
    """On eight devices, which then all lie along the dictionary, as on one."""
    one = with_(experiment, activations={"rows_per_forward": 1}, train={"batch_size": 8})
    alone, _ = advance(*begin(one, single_device_mesh()), calls=3)
    spread, _ = advance(*begin(with_(one, mesh={"latent": 8})), calls=3)
    assert int(alone.step) == int(spread.step) == 6
    for name, stack in alone.stacks.items():
        for key, value in stack.params.items():
            difference = np.abs(np.asarray(value) - np.asarray(spread.stacks[name].params[key]))
            assert difference.mean() < 1e-5, (name, key)


def lm_flops(experiment):
    """FLOPs of the compiled forward pass that feeds the stacks."""
    checkpoint = Checkpoint.open(experiment.lm.path)
    program, _ = preparation.build(experiment, single_device_mesh(), checkpoint)
    lm_params = checkpoint.params(program.module, "float32")
    tokens = jnp.zeros((experiment.rows_per_call, experiment.data.context_length), jnp.int32)
    return jax.jit(program.source.__call__).lower(lm_params, tokens).compile().cost_analysis()["flops"]


def step_flops(experiment):
    """FLOPs of the whole compiled train program (XLA counts a scan's body once, whatever its length)."""
    checkpoint = Checkpoint.open(experiment.lm.path)
    program, _ = preparation.build(experiment, single_device_mesh(), checkpoint)
    lm_params = checkpoint.params(program.module, "float32")
    tokens = jnp.zeros((experiment.rows_per_call, experiment.data.context_length), jnp.int32)
    return (
        program.train_step.lower(program.init(scaling.standard(program.widths)), lm_params, tokens)
        .compile()
        .cost_analysis()["flops"]
    )


def test_one_forward_pass_serves_every_stack(experiment):
    """A stack more, at the same or an earlier site, costs its own update only; the language model's FLOPs stay."""
    stack = experiment.stacks["gated"]
    elsewhere = dataclasses.replace(stack, site="blocks.0.hook_resid_pre")

    def with_stacks(**stacks):
        return dataclasses.replace(experiment, stacks=stacks)

    alone = with_stacks(a=stack)
    same, other = with_stacks(a=stack, b=stack), with_stacks(a=stack, b=elsewhere)
    assert lm_flops(same) == lm_flops(alone) == lm_flops(other)
    lm, one, two, both = lm_flops(alone), step_flops(alone), step_flops(with_stacks(b=elsewhere)), step_flops(other)
    # Two runs would pay for two forward passes; together they pay for one, and for one set of random draws.
    assert both < one + two - 0.9 * min(lm, lm_flops(with_stacks(b=elsewhere)))
    assert step_flops(same) - one < one - 0.9 * lm


def test_the_train_step_moves_nothing_between_host_and_device(experiment):
    """Under a transfer guard: tokens are placed before a step, and statistics are fetched by an explicit call."""
    program, state, lm_params, stream = begin(experiment)
    state, _ = advance(program, state, lm_params, stream, calls=1)  # compiling places constants
    batches = [program.source.place(next(stream)) for _ in range(2)]
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics, dropped = program.train_step(state, lm_params, batch)
        jax.device_get((metrics, dropped))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.jit(lambda x: x + 1)(np.ones(3, np.float32))


def params_of(path):
    return {name: jax.device_get(sae.params) for name, sae in gsae_jax.load(path).items()}


def test_train_evaluate_load(experiment, tmp_path, capsys):
    path = tmp_path / "run"
    assert train_command.run(experiment, path) == 0
    saes = gsae_jax.load(path)
    assert list(saes) == ["baseline_0", "gated_0", "gated_1"]
    lm = gsae_jax.load_lm(experiment.lm.path)
    x = lm.activations(np.arange(1, 33).reshape(2, 16), [saes["gated_0"].site])[saes["gated_0"].site]
    f = saes["gated_0"].encode(x)
    assert f.shape == (2, 16, 64)
    assert saes["gated_0"].decode(f).shape == x.shape
    np.testing.assert_allclose(jnp.linalg.norm(saes["baseline_0"].params["W_dec"], axis=-1), 1, atol=1e-6)
    for name, sae in sae_loading.load(path, mesh_lib.make_mesh(experiment.mesh)).items():
        for key, value in sae.params.items():
            np.testing.assert_array_equal(value, saes[name].params[key])
            if key != "b_dec":  # what a device holds, as in training
                assert value.addressable_shards[0].data.size == value.size // 8
    records = json.loads((path / "report" / "report.json").read_text())["saes"]
    assert [record["name"] for record in records] == list(saes)
    assert all(np.isfinite(record["loss_recovered"]) for record in records)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16]
    assert set(lines[0]) >= {"step", "tokens_per_second", "gated/l0", "gated/gamma", "gated/auxiliary", "baseline/loss"}
    assert len(lines[0]["gated/l0"]) == 2
    assert list((path / "tensorboard").glob("events.*"))

    # The same command again says so and changes nothing.
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    capsys.readouterr()
    assert train_command.run(experiment, path) == 0
    assert "is finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before

    # Another config is refused, with what differs.
    other = with_(experiment, train={"max_skipped": 32, "warmup_steps": 2})
    with refused("--workdir", str(path), "train.max_skipped: 100 != 32", "train.warmup_steps: 4 != 2"):
        train_command.run(other, path)


@pytest.mark.variants
def test_rescale_and_shift_starts_from_a_trained_baseline(experiment, tmp_path):
    """The ablation of section 5.2: what was trained stays, the magnitudes learn."""
    assert loop.train(experiment, tmp_path / "first")
    options = {"only_magnitude": True}
    stack = dataclasses.replace(
        experiment.stacks["baseline"],
        architecture="gated",
        options=options,
        start_from=f"{tmp_path / 'first'}:baseline",
    )
    second = dataclasses.replace(experiment, stacks={"rescaled": stack})
    assert train_command.run(second, tmp_path / "second") == 0
    before, after = gsae_jax.load(tmp_path / "first")["baseline_0"], gsae_jax.load(tmp_path / "second")["rescaled_0"]
    for ours, theirs in (("W_gate", "W_enc"), ("b_gate", "b_enc"), ("W_dec", "W_dec"), ("b_dec", "b_dec")):
        np.testing.assert_allclose(after.params[ours], before.params[theirs], atol=1e-6)
    assert np.abs(after.params["r_mag"]).min() > 0
    assert np.abs(after.params["b_mag"] - before.params["b_enc"]).max() > 1e-4
    x = jax.random.normal(jax.random.key(0), (100, 64))
    same = dataclasses.replace(after, params=gated.from_relu(before.params, before.config))
    np.testing.assert_allclose(same(x), before(x), atol=1e-6)

    def refuse(field, *facts, **changes):
        other = dataclasses.replace(second, stacks={"rescaled": dataclasses.replace(stack, **changes)})
        with refused(f"stacks.rescaled.{field}", *facts):
            train_command.run(other, tmp_path / "third")
        assert not (tmp_path / "third").exists()

    path = tmp_path / "first"
    refuse("start_from", "'x'", "RUN_DIRECTORY:STACK", start_from="x")
    refuse("start_from", "nowhere is not here", start_from="nowhere:baseline")
    refuse("start_from", f"{path} has no stack 'basline'", "'baseline'", start_from=f"{path}:basline")
    refuse("start_from", "width (128 there, 64 here)", width=64)
    refuse(
        "start_from",
        "architecture (gated there, relu here)",
        architecture="relu",
        start_from=f"{path}:gated",
        options={},
        site="blocks.0.hook_mlp_out",
        width=64,
        seeds=(0, 1),
    )
    refuse("options", "W_mag", f"{path}:baseline", options={"tie_encoder": False})


def test_a_save_does_not_ask_when_the_run_should_end(experiment, tmp_path, monkeypatch):
    """The trainer alone does, in calls: a save's number of updates would put the end of a run far ahead."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    monkeypatch.setattr(interruption.Signals, "__enter__", lambda signals: signals)
    monkeypatch.setattr(interruption.Signals, "__exit__", lambda *_: None)
    monkeypatch.setattr(interruption.Signals, "_together", True, raising=False)  # as where there are several processes
    assert loop.train(experiment, tmp_path / "run")
    assert asked == [0, 1, 2, 3]


def test_a_target_moves_the_l1_coefficients(experiment, tmp_path):
    """Up where too many features fire, down where too few, and only until two thirds of training."""
    stacks = {"gated": dataclasses.replace(experiment.stacks["gated"], target_l0=(1.0, 60.0))}
    experiment = dataclasses.replace(with_(experiment, train={"log_every": 4}), stacks=stacks)
    assert loop.train(experiment, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = zip(*(line["gated/l1_coefficient"] for line in lines), strict=True)
    assert first[0] == pytest.approx(0.01)  # warm-up
    assert first[0] < first[1] < first[2] < first[3]  # means over four steps
    assert second[0] > second[1] > second[2] > second[3]
    saes = gsae_jax.load(tmp_path / "run")
    assert [sae.l1_coefficient for sae in saes.values()] == pytest.approx([first[3], second[3]])


class Interrupting:
    """A stream that sends this process a SIGTERM with its last batch but `ahead`."""

    def __init__(self, stream, after):
        self.stream, self.left = stream, after

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)
        return next(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_an_interrupted_run_continues_as_if_it_had_not_been(experiment, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.train(experiment, whole)
    to_start = begin_calls(experiment)
    real = rows_lib.batches
    with monkeypatch.context() as patch:
        patch.setattr(rows_lib, "batches", lambda *args: Interrupting(real(*args), to_start + 3))
        assert not loop.train(experiment, parts)
    assert [line["step"] for line in metrics_without_time(parts)] == [4, 8, 12]
    assert loop.train(experiment, parts)
    expected, lines = params_of(whole), metrics_without_time(whole)
    assert_same(params_of(parts), expected)
    assert metrics_without_time(parts) == lines

    # The checkpoint of step 8 was written while training went on and reused its memory.
    shutil.rmtree(whole / "checkpoints" / "16")
    assert loop.train(experiment, whole)
    assert_same(params_of(whole), expected)
    assert metrics_without_time(whole) == lines


def assert_same(ours, theirs):
    for name, params in theirs.items():
        for key, value in params.items():
            np.testing.assert_array_equal(ours[name][key], value, err_msg=f"{name} {key}")


def begin_calls(experiment):
    """How many batches of tokens measuring and filling take."""
    counting = []
    stream = begin(experiment)[3]
    position = stream.get_state()
    fresh = rows_lib.batches(
        rows_lib.open_rows(experiment.data, "train", gsae_jax.load_lm(experiment.lm.path).tokenizer, 2**20),
        experiment.rows_per_call,
        experiment.seed,
    )
    while fresh.get_state() != position:
        counting.append(next(fresh))
    return len(counting)


def metrics_without_time(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.variants
def test_evaluating_an_unfinished_run_does_not_finish_it(experiment, tmp_path, monkeypatch):
    path, real, after = tmp_path / "run", rows_lib.batches, begin_calls(experiment) + 2
    with monkeypatch.context() as patch:
        patch.setattr(rows_lib, "batches", lambda *args: Interrupting(real(*args), after))
        assert train_command.run(experiment, path) == train_command.INTERRUPTED
    evaluate(path)
    assert (path / "report" / "report.json").exists()
    assert train_command.run(experiment, path) == 0
    assert metrics_without_time(path)[-1]["step"] == experiment.train.steps


def test_a_run_continues_only_on_the_text_it_began_with(experiment, tmp_path, text_dir):
    text = tmp_path / "text"
    shutil.copytree(text_dir, text)
    mine = with_(experiment, data={"path": str(text)})
    assert loop.train(mine, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "16")
    (text / "a.txt").write_text((text / "a.txt").read_text()[::-1])
    with refused("data", "text has changed", "--workdir"):
        loop.train(mine, tmp_path / "run")


@pytest.mark.variants
def test_a_run_of_an_earlier_version_keeps_what_it_held_out(experiment, tmp_path, capsys):
    """The same command continues it, and it is measured on what it did not train on."""
    run = tmp_path / "run"
    before = with_(experiment, data={"held_out": "position"})
    assert loop.train(before, run)
    config = config_trees.to_dict(before)
    for field in ("held_out", "on_bad_row"):
        del config["data"][field]
    (run / "config.json").write_text(json.dumps(config))
    assert experiment.data.held_out == "hash"
    shutil.rmtree(run / "checkpoints" / "16")
    capsys.readouterr()
    assert train_command.run(experiment, run) == 0
    out, err = capsys.readouterr()
    assert "data.held_out=position" in err
    assert "continuing from step 8" in out
    assert run_directory.Workdir(run).experiment().data.held_out == "position"
    assert train_command.run(experiment, run) == 0  # also when it has continued once
    assert "is finished" in capsys.readouterr().out
    with refused("--workdir", str(run), "data.held_out: 'position' != 'hash'"):
        loop.train(experiment, run)


@pytest.mark.variants
def test_a_scale_is_measured_on_the_text_that_there_is(experiment, tmp_path, monkeypatch):
    """At most once over, however many tokens are asked for."""
    placed, calls = sources.LanguageModel.place, []
    monkeypatch.setattr(sources.LanguageModel, "place", lambda *args: calls.append(args) or placed(*args))
    tokenizer = gsae_jax.load_lm(experiment.lm.path).tokenizer
    rows = rows_lib.open_rows(experiment.data, "train", tokenizer, 2**40)
    once = len(rows) // experiment.rows_per_call
    assert loop.train(with_(experiment, activations={"scale_tokens": 10**9}), tmp_path / "run")
    assert once < len(calls) < once + 100


def test_a_token_that_cannot_be_used_ends_training_with_what_was_trained_saved(experiment, tmp_path, monkeypatch):
    """As a last line of defence: such text is refused while it is prepared."""
    placed, calls, first = sources.LanguageModel.place, [], begin_calls(experiment)

    def place(program, tokens):
        calls.append(tokens)
        return placed(program, tokens + 10**6 if len(calls) == first + 4 else tokens)

    monkeypatch.setattr(sources.LanguageModel, "place", place)
    with refused("data", "token ids", "language model"):
        loop.train(experiment, tmp_path / "run")
    assert run_directory.Workdir(tmp_path / "run").sound_step() == 3 * experiment.updates_per_call
    # No text is passed over: the run continues with the same rows.
    assert loop.train(experiment, tmp_path / "run")
    np.testing.assert_array_equal(calls[first + 4], calls[first + 3])


def test_a_refused_run_leaves_nothing(experiment, tmp_path):
    path = tmp_path / "run"
    for bad, field, *facts in (
        ({"data": {"test_split": "tst"}}, "data.test_split", "'tst'", "train, test"),
        ({"evaluation": {"rows_per_forward": 8 * 10**5}}, "evaluation.rows_per_forward", "800000", "held-out text"),
    ):
        with refused(field, *facts):
            loop.train(with_(experiment, **bad), path)
        assert not path.exists()
    # Nor does one that was killed before its first checkpoint stand in another's way.
    path.mkdir()
    (path / "config.json").write_text('{"seed": 3}')
    assert loop.train(experiment, path)


@pytest.mark.variants
@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"tie_encoder": False}},
        {"options": {"use_r_mag": False}},
        {"options": {"freeze_aux_decoder": False}},
        {"train": {"compute_dtype": "bfloat16"}, "lm": {"dtype": "bfloat16"}},
        {"activations": {"drop_special_tokens": False}},
    ],
    ids=str,
)
def test_every_variant_trains_on_a_mesh(experiment, changes):
    options = changes.pop("options", {})
    stacks = {"gated": dataclasses.replace(experiment.stacks["gated"], options=options)}
    experiment = dataclasses.replace(with_(experiment, mesh={"data": 2, "latent": 4}, **changes), stacks=stacks)
    program, state, lm_params, stream = begin(experiment)
    before = jax.device_get(state.stacks["gated"].params)
    state, first = advance(program, state, lm_params, stream, calls=1)
    state, last = advance(program, state, lm_params, stream, calls=4)
    assert (last["gated"]["loss"] < first["gated"]["loss"]).all()
    moved = {name for name, value in state.stacks["gated"].params.items() if np.any(np.asarray(value) != before[name])}
    assert moved == set(before) - ({"r_mag"} if options.get("use_r_mag") is False else set())
    assert all(value.dtype == np.float32 for value in before.values())


def test_workdirs_that_cannot_be_used(experiment, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for name in ("file", "full"):
        with refused("--workdir", f"{tmp_path / name} exists", "not a run"):
            loop.train(experiment, tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with refused("--workdir", f"{tmp_path} is not writable"):
        loop.train(experiment, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("pack", [pytest.param("stream", marks=pytest.mark.variants), "documents"])
def test_a_run_says_what_it_reads(config_dict, tmp_path, text_dir, pack, capsys):
    """In a line when it begins, in the facts of its checkpoints, and in the report."""
    (tmp_path / "lines.txt").write_text("\n".join((text_dir / name).read_text() for name in ("a.txt", "b.md")))
    config_dict.data.path, config_dict.data.separator = str(tmp_path / "lines.txt"), "\n"
    config_dict.data.data_dir, config_dict.data.pack = str(tmp_path / "tfds"), pack
    config_dict.data.context_length = 8
    experiment = config_trees.from_dict(config_lib.Experiment, config_dict)
    assert loop.train(experiment, tmp_path / "run")
    workdir = run_directory.Workdir(tmp_path / "run")
    text = workdir.facts(workdir.latest_step()).text
    read = 16 * 64 + 1024 + 8 * 64
    assert (text.documents, text.tokens_read, text.is_estimate) == (10_000, read, True)
    assert text.tokens == pytest.approx(130_000 if pack == "stream" else 9_500 * 7, rel=0.1)
    assert text.held_out == pytest.approx(0.05, abs=0.02)
    # A row of 8 has BOS and 7 of the text's tokens; with "documents", a document has one row.
    rows = text.tokens / 7 if pack == "stream" else 9_500
    assert text.passes == pytest.approx(read / 8 / rows, rel=0.1)
    assert text.too_short == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "this run reads" in line)
    assert "10,000 documents" in line
    assert f"{read:,} tokens" in line
    evaluate(tmp_path / "run", tokens=512)
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    recorded = report["runs"]["run"]
    assert (recorded["documents"], recorded["tokens_read"], recorded["text_is_estimated"]) == (10_000, read, True)
    assert recorded["passes_over_the_text"] == pytest.approx(text.passes, rel=0.01)


def run_of_calls(monkeypatch, seconds, total):
    """A progress that has seen calls of ten steps each, which took so many seconds."""
    clock = iter(np.cumsum(seconds).tolist())
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    shown = progress.Progress(total, 0, ["gated", "many"])
    for call in range(len(seconds)):
        shown.ended(10 * (call + 1))
    return shown


def test_the_remaining_time_is_estimated_without_compiling(monkeypatch):
    seconds = [60.0, 30.0, 0.5, 0.5, 0.5]  # the first two compile
    assert run_of_calls(monkeypatch, seconds[1:3], 1000).left(20) == ""
    assert run_of_calls(monkeypatch, seconds, 1050).left(50) == "0:00:50 left"


VALUES = {"tokens_per_second": 12345.6} | {
    f"{stack}/{name}": [scale * n for n in range(1, count + 1)]
    for stack, count in (("gated", 2), ("many", 12))
    for name, scale in (("l0", 10), ("loss", 0.1), ("gamma", 0.3), ("dead", 7))
}


def test_a_log_file_gets_one_line_for_each_step_that_is_logged(monkeypatch, capsys):
    shown = run_of_calls(monkeypatch, [60.0, 0.5, 0.5], 1030)
    with shown:
        shown.show(30, VALUES)
        shown.say("step 30: something")
    out, err = capsys.readouterr()
    assert out == (
        "step 30 of 1,030 | 12,346 tokens/s | 0:00:50 left | gated: L0 10.0 20.0, loss 0.1000 0.2000, γ 0.300 0.600, "
        "dead 7 14 | many: L0 10.0 to 120.0, loss 0.1000 to 1.2000, γ 0.300 to 3.600, dead 7 to 84\n"
    )
    assert err == "step 30: something\n"


def test_a_terminal_gets_a_bar_with_a_line_for_each_stack(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = run_of_calls(monkeypatch, [60.0, 0.5, 0.5], 1030)
    with shown:
        shown.show(30, VALUES)
        shown.say("step 30: something")
    text = terminal.getvalue()
    assert "gated: L0 10.0 20.0, loss 0.1000 0.2000" in text
    assert "/1030 steps" in text
    assert "step 30: something\n" in text
