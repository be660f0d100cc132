"""What a run that continues may change, what it keeps, and what it says."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config_trees
from gsae_jax import train as train_command
from gsae_jax.activations import sources
from gsae_jax.data import tokens as tokens_lib
from gsae_jax.errors import TrainingError
from gsae_jax.saes import contract
from gsae_jax.storage import run_directory
from gsae_jax.training import lengthening, loop
from tests.refusals import refused
from tests.training import assert_same, begin_calls, metrics_without_time, params_of, with_


def steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def back_to(run, step):
    """As if the run had been killed after that save."""
    for newer in steps(run):
        if newer > step:
            shutil.rmtree(run / "checkpoints" / str(newer))


@pytest.mark.variants
def test_which_checkpoints_are_kept(experiment, tmp_path):
    """The last ones, some far apart, and the best one so far, which can be loaded."""
    best = with_(experiment, checkpoint={"every": 4, "keep": 1, "keep_best": "gated/mse"})
    # A learning rate this high after warm-up undoes what was learnt: the mean, at first.
    best = with_(best, activations={"center": False})
    gated = dataclasses.replace(best.stacks["gated"], learning_rates=(1.0,))
    best = dataclasses.replace(with_(best, train={"warmup_steps": 15}), stacks={**best.stacks, "gated": gated})
    loop.train(best, tmp_path / "best")
    error = [np.mean(line["gated/mse"]) for line in metrics_without_time(tmp_path / "best")]
    assert int(np.argmin(error)) != 3
    assert steps(tmp_path / "best") == [4 * (1 + int(np.argmin(error))), 16]
    earlier = gsae_jax.load(tmp_path / "best", step=steps(tmp_path / "best")[0])["gated_0"]
    assert (earlier.params["W_dec"] != gsae_jax.load(tmp_path / "best")["gated_0"].params["W_dec"]).any()
    with refused("step", "12345", str(tmp_path / "best"), str(steps(tmp_path / "best"))):
        gsae_jax.load(tmp_path / "best", step=12345)

    # While λ is adjusted, losses do not compare.
    sought = dataclasses.replace(experiment.stacks["gated"], target_l0=(4.0,))
    sought = dataclasses.replace(experiment, stacks={**experiment.stacks, "gated": sought})
    sought = with_(sought, checkpoint={"every": 4, "keep": 1, "keep_best": "gated/loss"})
    loop.train(sought, tmp_path / "sought")
    assert steps(tmp_path / "sought")[0] >= 12

    apart = with_(experiment, checkpoint={"every": 4, "keep": 1, "keep_every": 8})
    loop.train(apart, tmp_path / "apart")
    assert steps(tmp_path / "apart") == [4, 12, 16]
    for wrong in ("gated", "gated/l0", "nosuch/mse"):
        with refused("checkpoint.keep_best", repr(wrong), "STACK/loss or STACK/mse", "baseline"):
            with_(experiment, checkpoint={"keep_best": wrong})


@pytest.mark.variants
def test_without_the_buffer_a_run_continues_one_way(experiment, tmp_path, capsys):
    """Its checkpoints are smaller, and it says what that changes."""
    experiment = with_(experiment, checkpoint={"buffer": False})
    runs = [tmp_path / "one", tmp_path / "two"]
    loop.train(experiment, runs[0])
    uninterrupted = params_of(runs[0])
    back_to(runs[0], 8)
    shutil.copytree(runs[0], runs[1])
    for run in runs:
        capsys.readouterr()
        assert loop.train(experiment, run)
        assert "the exchange buffer was not saved (checkpoint.buffer=False) and is filled" in capsys.readouterr().out
    assert_same(params_of(runs[0]), params_of(runs[1]))
    assert metrics_without_time(runs[0]) == metrics_without_time(runs[1])
    assert (params_of(runs[0])["gated_0"]["W_dec"] != uninterrupted["gated_0"]["W_dec"]).any()

    # One that had a buffer goes on from it.
    with_buffer = with_(experiment, checkpoint={"buffer": True})
    loop.train(with_buffer, tmp_path / "whole")
    size, smaller = (
        sum(path.stat().st_size for path in (run / "checkpoints" / "8").rglob("*"))
        for run in (tmp_path / "whole", runs[0])
    )
    assert size - smaller > 0.8 * 4 * 8 * 64 * (32 + 64)  # random numbers do not compress
    back_to(tmp_path / "whole", 8)
    loop.train(experiment, tmp_path / "whole")
    assert_same(params_of(tmp_path / "whole"), uninterrupted)


@pytest.mark.variants
def test_another_mesh_is_said_and_gives_the_same(experiment, tmp_path, capsys):
    run = tmp_path / "run"
    loop.train(experiment, run)
    expected = params_of(run)
    back_to(run, 8)
    capsys.readouterr()
    other = with_(experiment, mesh={"latent": 4})
    assert train_command.run(other, run) == 0
    assert (
        "continuing from step 8, with other mesh (data 8 x latent 1 before, data 2 x latent 4 now): "
        "equal to float tolerance, not bit for bit\n"
    ) in capsys.readouterr().out
    for name, params in params_of(run).items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, expected[name])
    assert run_directory.Workdir(run).config()["mesh"] == {"data": 0, "latent": 4}


@pytest.mark.variants
def test_a_report_of_an_earlier_step_is_not_the_end(experiment, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_command.run(experiment, run) == 0
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["step"] == 16
    (run / "report" / "report.json").write_text(json.dumps(report | {"step": 8}))
    assert train_command.run(experiment, run) == 0
    assert json.loads((run / "report" / "report.json").read_text()) == report
    capsys.readouterr()
    assert train_command.run(experiment, run) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.variants
def test_text_that_turns_unreadable_is_named_and_the_run_saved(experiment, tmp_path, monkeypatch):
    """And what is left of a file of tokens is made again."""
    experiment = with_(
        experiment, data={"data_dir": str(tmp_path / "data")}, train={"steps": 96}
    )  # beyond what Grain read ahead
    loop.train(experiment, tmp_path / "whole")
    tokens = max((tmp_path / "data").glob("**/tokens.bin"), key=lambda path: path.stat().st_size)  # not the held-out
    whole = tokens.read_bytes()
    monkeypatch.setattr(tokens_lib, "RETRIES", (0, 0))
    placed, calls, first = sources.LanguageModel.place, [], begin_calls(experiment)

    def breaking(program, rows):
        calls.append(rows)
        if len(calls) == first + 2:
            os.truncate(tokens, 100)
        return placed(program, rows)

    monkeypatch.setattr(sources.LanguageModel, "place", breaking)
    with pytest.raises(TrainingError, match=r"tokens.bin cannot be read any more .*run the same command"):
        loop.train(experiment, tmp_path / "run")
    assert run_directory.Workdir(tmp_path / "run").sound_step() in range(4, 96)
    monkeypatch.undo()
    assert loop.train(experiment, tmp_path / "run")
    assert tokens.read_bytes() == whole
    assert_same(params_of(tmp_path / "run"), params_of(tmp_path / "whole"))


SIGNALS = """
import signal, sys, time
from gsae_jax.training.interruption import Signals
with Signals() as signals:
    print("ready", flush=True)
    while not signals.stop(0):
        time.sleep(0.01)
    print("saving", signals.received, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_ends_at_once(number):
    heard = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)"  # tests in the background ignore some
    command = [sys.executable, "-c", heard + SIGNALS]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"saving {number.name}\n"
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP is under nohup."""
    command = ["nohup", sys.executable, "-c", SIGNALS]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "saving SIGTERM\n"
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_outside_of_training_has_the_same_exit_code(config_dict, tmp_path, monkeypatch, capsys, number):
    """Here while the run reports."""
    config_dict.activations.buffer_size = 2048
    monkeypatch.setattr(train_command, "CONFIG", SimpleNamespace(value=config_dict), raising=False)
    monkeypatch.setattr(train_command, "WORKDIR", SimpleNamespace(value=str(tmp_path)), raising=False)
    monkeypatch.setattr(train_command.loop, "train", lambda *_: True)
    monkeypatch.setattr(train_command.reporting, "evaluate", lambda path, **_: signal.raise_signal(number))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(number, signal.SIG_DFL)  # tests in the background ignore some
    try:
        assert train_command.main() == train_command.INTERRUPTED
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    out, err = capsys.readouterr()
    assert f"{number.name}: the same command continues from the last checkpoint, or begins" in out
    assert "train.dead_after is 1,000, more than the 16 steps" in err
    assert "activations.buffer_size is 2,048, more than the 1,024 activations" in err


def test_a_run_of_an_earlier_version_is_read(experiment, tmp_path, capsys):
    """Its checkpoints have no hashes, and its config lacks fields."""
    run = tmp_path / "run"
    loop.train(experiment, run)
    expected = gsae_jax.load(run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    config = config_trees.to_dict(experiment)
    for field in ("buffer", "keep_best", "keep_every"):
        del config["checkpoint"][field]
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    loaded = gsae_jax.load(run)
    assert "earlier version, which wrote no hashes" in capsys.readouterr().err
    assert_same({name: sae.params for name, sae in loaded.items()}, {n: sae.params for n, sae in expected.items()})


def with_stack(experiment, name, **fields):
    return dataclasses.replace(
        experiment, stacks={**experiment.stacks, name: dataclasses.replace(experiment.stacks[name], **fields)}
    )


def with_little_text(experiment, folder):
    """Text of which every run reads all, so that a longer one has the same rows."""
    folder.mkdir()
    documents = [{"text": " ".join(f"{word} of {number}" for word in "abcdefgh")} for number in range(100)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return with_(
        experiment,
        data={"path": str(folder), "train_split": "train[:70]", "test_split": "train[70:]"},
        evaluation={"tokens": 256},
    )


def test_a_finished_run_is_trained_for_more_steps(experiment, tmp_path, capsys):
    """It ends as a run that had them from the start, and both reports are there."""
    experiment = with_little_text(experiment, tmp_path / "text")
    longer, runs = with_(experiment, train={"steps": 32, "log_every": 8}), [tmp_path / "one", tmp_path / "two"]
    assert train_command.run(experiment, runs[0]) == 0
    capsys.readouterr()
    assert train_command.run(longer, runs[0]) == 0
    out = capsys.readouterr().out
    assert "continuing from step 16\ntrain.steps is 32 now (16 before)\n" in out
    assert loop.train(with_(longer, train={"log_every": 4}), runs[1])
    assert_same(params_of(runs[0]), params_of(runs[1]))
    logged = [line for line in metrics_without_time(runs[1]) if line["step"] <= 16 or line["step"] % 8 == 0]
    assert metrics_without_time(runs[0]) == logged
    for folder, step in ((runs[0] / "report", 32), (runs[0] / "earlier_reports" / "step_16", 16)):
        assert json.loads((folder / "report.json").read_text())["step"] == step
    assert run_directory.Workdir(runs[0]).config()["train"]["steps"] == 32
    assert train_command.run(longer, runs[0]) == 0
    assert "is finished" in capsys.readouterr().out
    with refused("train.steps", "is 16", "trained for 32 steps"):
        train_command.run(experiment, runs[0])


@pytest.mark.variants
def test_what_more_steps_change_is_said(experiment, tmp_path, capsys):
    """The learning rate that had fallen, the l1 coefficients that move, and the rows that are new."""
    experiment = with_(with_stack(experiment, "gated", target_l0=(8.0,)), train={"decay_fraction": 1.0})
    assert loop.train(experiment, tmp_path / "run")
    capsys.readouterr()
    assert loop.train(with_(experiment, train={"steps": 32}), tmp_path / "run")
    out = capsys.readouterr().out
    rate = 0.5 * (1 + np.cos(np.pi * (16 - 4) / (32 - 4)))
    assert f"the learning rate was at 0% of its value and continues at {rate:.0%}" in out
    assert "the loss will rise" in out
    assert "the l1 coefficients of gated to reach target_l0 until step 21 (until 10 before)" in out
    rows = [(steps + 32) * 64 // 15 for steps in (16, 32)]
    assert f"{rows[1] - rows[0]} more rows of text, after the {rows[0]} rows" in out

    # Interrupted, it continues as if it had not been.
    expected, metrics = params_of(tmp_path / "run"), metrics_without_time(tmp_path / "run")
    back_to(tmp_path / "run", 24)
    assert loop.train(with_(experiment, train={"steps": 32}), tmp_path / "run")
    assert "train.steps is" not in capsys.readouterr().out
    assert_same(params_of(tmp_path / "run"), expected)
    assert metrics_without_time(tmp_path / "run") == metrics
    facts = run_directory.Workdir(tmp_path / "run").facts(32)
    assert facts.lengths == [
        {"since": 0, "steps": 16, "tokens": (16 + 32) * 64},
        {"since": 16, "steps": 32, "tokens": (32 + 32) * 64},
    ]
    short = lengthening.consequences(with_(experiment, train={"steps": 20}), 16, 16, [10, 10])
    assert "do not change any more" in short[-1]


def test_a_run_of_an_earlier_version_is_trained_for_more_steps(experiment, tmp_path, monkeypatch):
    """Its checkpoints do not say how much text it had. Here it is killed before the next one as well."""
    run, longer = tmp_path / "run", with_(experiment, train={"steps": 24})
    assert loop.train(experiment, run)
    shutil.copytree(run, tmp_path / "cut")
    back_to(tmp_path / "cut", 8)
    workdir = run_directory.Workdir(run)
    workdir.create(config_trees.to_dict(contract.with_recipes(longer)), workdir.latest_step())
    workdir.release()
    facts = run_directory.Workdir.facts
    monkeypatch.setattr(
        run_directory.Workdir, "facts", lambda self, step: dataclasses.replace(facts(self, step), lengths=[])
    )
    assert loop.train(longer, run)
    assert [length["steps"] for length in facts(run_directory.Workdir(run), 24).lengths] == [16, 24]
    with refused("train.steps", "is 24", "step 8 of 16"):  # if it were killed now, it could not tell its length again
        loop.train(longer, tmp_path / "cut")


@pytest.mark.variants
def test_a_finished_run_is_measured_with_another_evaluation(experiment, tmp_path, capsys, monkeypatch):
    run, other = tmp_path / "run", with_(experiment, evaluation={"tokens": 1024})
    for each, words in ((experiment, "report:"), (other, "measured again"), (other, "is finished")):
        capsys.readouterr()
        assert train_command.run(each, run) == 0
        out, err = capsys.readouterr()
        assert words in out
        assert "held-out" not in err
    before, now = (
        json.loads((folder / "report.json").read_text())["saes"][0]["tokens"]
        for folder in (run / "earlier_reports" / "step_16", run / "report")
    )
    assert before == 2 * now
    assert train_command.run(experiment, run) == 0  # and back
    assert sorted(path.name for path in (run / "earlier_reports").iterdir()) == ["step_16", "step_16_2"]

    # What cannot be measured changes nothing.
    before = {path: path.read_bytes() for path in (run / "config.json", run / "report" / "report.json")}
    with refused("evaluation.rows_per_forward", "100000"):
        train_command.run(with_(experiment, evaluation={"rows_per_forward": 100_000}), run)
    with refused("lm.path", "language model"):
        train_command.run(with_(experiment, lm={"path": ""}, evaluation={"tokens": 1024}), run)
    assert {path: path.read_bytes() for path in before} == before

    # What the held-out text of an earlier version was is not known any more when its config changes.
    facts = run_directory.Workdir.facts
    monkeypatch.setattr(
        run_directory.Workdir, "facts", lambda self, step: dataclasses.replace(facts(self, step), held_out_tokens=0)
    )
    before = (run / "config.json").read_bytes()
    with refused("evaluation", "earlier version"):
        train_command.run(other, run)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.variants
def test_later_resampling_may_be_added(experiment, tmp_path):
    run = tmp_path / "run"
    first = with_(experiment, train={"dead_after": 4, "resample_steps": (8,)})
    assert loop.train(first, run)
    workdir, first = run_directory.Workdir(run), contract.with_recipes(first)
    workdir.check(config_trees.to_dict(with_(first, train={"steps": 32, "resample_steps": (8, 20)})))
    for steps in ((20,), (8, 12, 20)):
        with refused("--workdir", "train.resample_steps", "after step 16"):
            workdir.check(config_trees.to_dict(with_(first, train={"steps": 32, "resample_steps": steps})))
