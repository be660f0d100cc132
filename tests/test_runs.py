"""Runs from their first step to the report: what they keep, continue and refuse."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_loading
from gsae_jax import mesh as mesh_lib
from gsae_jax import train as train_command
from gsae_jax.activations import sources
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluate import evaluate
from gsae_jax.saes import gated
from gsae_jax.storage import run_directory
from gsae_jax.training import interruption, loop
from tests.refusals import refused
from tests.training import Interrupting, assert_same, begin_calls, metrics_without_time, params_of, with_


def test_train_evaluate_load(experiment, tmp_path, capsys):
    path = tmp_path / "run"
    assert train_command.run(experiment, path) == 0
    saes = gsae_jax.load(path)
    assert list(saes) == ["baseline_0", "gated_0", "gated_1"]
    coefficients = experiment.stacks["gated"].l1_coefficients  # and not the nearest numbers of 32 bits
    assert tuple(saes[name].l1_coefficient for name in ("gated_0", "gated_1")) == coefficients
    assert list(gsae_jax.load(f"{path}:gated")) == ["gated_0", "gated_1"]
    with refused("", f"{path} has no stack 'gate'", "did you mean 'gated'?"):
        gsae_jax.load(f"{path}:gate")
    with pytest.raises(TypeError):
        gsae_jax.load(path, "gated_1")
    lm = gsae_jax.load_lm(experiment.lm.path)
    x = lm.activations(np.arange(1, 33).reshape(2, 16), [saes["gated_0"].site])[saes["gated_0"].site]
    f = saes["gated_0"].encode(x)
    assert f.shape == (2, 16, 64)
    assert saes["gated_0"].decode(f).shape == x.shape
    np.testing.assert_allclose(jnp.linalg.norm(saes["baseline_0"].params["W_dec"], axis=-1), 1, atol=1e-6)
    for name, sae in sae_loading.load(path, mesh=mesh_lib.make_mesh(experiment.mesh)).items():
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


@pytest.mark.variants
def test_an_aligned_stack_is_loaded_and_starts_others(experiment, tmp_path):
    """With the encoder that it computes with; a stack with the option starts from no other."""
    stacks = {
        name: dataclasses.replace(stack, options={"aligned": True} if name == "gated" else {})
        for name, stack in experiment.stacks.items()
    }
    path = tmp_path / "run"
    assert loop.train(dataclasses.replace(experiment, stacks=stacks), path)
    on_mesh = sae_loading.load(path, mesh=mesh_lib.make_mesh(experiment.mesh))
    for name, sae in gsae_jax.load(path).items():
        if sae.stack == "gated":
            np.testing.assert_allclose(jnp.einsum("df,fd->f", sae.W_gate, sae.W_dec), 1, rtol=1e-5)
            assert np.abs(sae.W_gate - sae.W_dec.T).max() > 1e-3
            np.testing.assert_allclose(on_mesh[name].W_gate, sae.W_gate, rtol=1e-5, atol=1e-6)
            assert on_mesh[name].W_gate.addressable_shards[0].data.size == sae.W_gate.size // 8
            form = sae.functions.encode(sae.params, x := jnp.ones((3, 32)), gated.Config(32, 64))
            np.testing.assert_allclose(form, sae.encode(x), rtol=1e-4, atol=1e-5)

    def start(like, source, **options):
        stack = dataclasses.replace(experiment.stacks[like], architecture="gated", options=options)
        stack = dataclasses.replace(stack, start_from=f"{path}:{source}")
        return sae_loading.starts(dataclasses.replace(experiment, stacks={"a": stack}))["a"]

    for options in ({}, {"aligned": True}):
        np.testing.assert_array_equal(
            start("gated", "gated", **options)["W_gate"][1], gsae_jax.load(path)["gated_1"].W_gate
        )
    assert start("baseline", "baseline")["W_gate"].shape == (1, 64, 128)
    with refused("stacks.a.options", "aligned=True", f"{path}:baseline"):
        start("baseline", "baseline", aligned=True)


def test_a_save_does_not_ask_when_the_run_should_end(experiment, tmp_path, monkeypatch):
    """The trainer alone does, in calls: a save's number of updates would put the end of a run far ahead."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    monkeypatch.setattr(interruption.Signals, "__enter__", lambda signals: signals)
    monkeypatch.setattr(interruption.Signals, "__exit__", lambda *_: None)
    monkeypatch.setattr(interruption.Signals, "_together", True, raising=False)  # as where there are several processes
    assert loop.train(experiment, tmp_path / "run")
    assert asked == [0, 1, 2, 3, 4]  # before each of four calls, and before the SAEs are measured


def test_a_signal_in_the_last_call_ends_before_measuring(experiment, tmp_path, monkeypatch, capsys):
    def save(self, call, divergence):
        if call.step == experiment.train.steps:
            signal.raise_signal(signal.SIGTERM)
        saved(self, call, divergence)

    saved = loop._Loop._save
    monkeypatch.setattr(loop._Loop, "_save", save)
    assert train_command.run(experiment, tmp_path / "run") == train_command.INTERRUPTED
    assert "SIGTERM: training is complete" in capsys.readouterr().out
    assert not (tmp_path / "run" / "report").exists()
    monkeypatch.undo()
    assert train_command.run(experiment, tmp_path / "run") == 0
    assert (tmp_path / "run" / "report" / "report.md").exists()


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
    config = json.loads((run / "config.json").read_text())
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


def test_an_sae_without_an_input_bias_computes_in_float32_after_training(experiment, tmp_path):
    """The sites' means are then in its inputs. With another one, they are subtracted in float32 first."""
    gated_stack = experiment.stacks["gated"]
    stacks = {"gated": gated_stack, "jump": dataclasses.replace(gated_stack, architecture="jumprelu", options={})}
    experiment = with_(dataclasses.replace(experiment, stacks=stacks), train={"compute_dtype": "bfloat16", "steps": 8})
    assert loop.train(experiment, tmp_path)
    saes = gsae_jax.load(tmp_path)
    assert (saes["gated_0"].config.dtype, saes["jump_0"].config.dtype) == ("bfloat16", "float32")


def test_the_report_of_a_run_without_checkpoints_is_kept_from_other_runs(experiment, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    recorded = config_trees.to_dict(experiment)
    (path / "config.json").write_text(json.dumps(recorded))
    (path / "metrics.jsonl").write_text("")
    workdir = run_directory.Workdir(path)
    workdir.check(recorded | {"seed": 5})  # training ended before its first checkpoint
    (path / "report").mkdir()
    workdir.check(recorded)
    with refused("--workdir", "report"):
        workdir.check(recorded | {"seed": 5})


def test_a_refused_run_leaves_nothing(experiment, tmp_path):
    path = tmp_path / "run"
    for bad, field, *facts in (
        ({"data": {"test_split": "tst"}}, "data.test_split", "'tst'", "train, test"),
        ({"data": {"test_split": "train"}}, "data.test_split", "data.train_split"),
        ({"data": {"test_split": "test+train[90%:]"}}, "data.test_split", "data.train_split"),
        ({"evaluation": {"rows_per_forward": 8 * 10**5}}, "evaluation.rows_per_forward", "800000", "held-out text"),
    ):
        with refused(field, *facts):
            loop.train(with_(experiment, **bad), path)
        assert not path.exists()
    # Nor does one that was killed before its first checkpoint stand in another's way.
    path.mkdir()
    (path / "config.json").write_text('{"seed": 3, "lm": {}, "stacks": {}}')
    assert loop.train(experiment, path)


def test_workdirs_that_cannot_be_used(experiment, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for name in ("file", "full"):
        with refused("--workdir", f"{tmp_path / name} exists", "not a run"):
            loop.train(experiment, tmp_path / name)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    other = '{"seed": 1, "data": {"path": "mine"}, "train": {"epochs": 3}, "model": "resnet"}'  # of another program
    (tmp_path / "full" / "config.json").write_text(other)
    with refused("--workdir", "not a run"):
        loop.train(experiment, tmp_path / "full")
    assert (tmp_path / "full" / "config.json").read_text() == other
    with refused("--workdir", "is empty"):
        loop.train(experiment, "")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with refused("--workdir", f"{tmp_path} is not writable"):
        loop.train(experiment, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("pack", ["stream", pytest.param("documents", marks=pytest.mark.variants)])
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
