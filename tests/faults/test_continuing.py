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
from gsae_jax import config as config_lib
from gsae_jax import train as train_command
from gsae_jax.activations import sources
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import TrainingError
from gsae_jax.storage import run_directory
from gsae_jax.training import loop
from tests.refusals import refused
from tests.test_training import assert_same, begin_calls, metrics_without_time, params_of, with_


def steps(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def back_to(run, step):
    """As if the run had been killed after that save."""
    for newer in steps(run):
        if newer > step:
            shutil.rmtree(run / "checkpoints" / str(newer))


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

    apart = with_(experiment, checkpoint={"every": 4, "keep": 1, "keep_every": 8})
    loop.train(apart, tmp_path / "apart")
    assert steps(tmp_path / "apart") == [4, 12, 16]
    for wrong in ("gated", "gated/l0", "nosuch/mse"):
        with refused("checkpoint.keep_best", repr(wrong), "STACK/loss or STACK/mse", "baseline"):
            with_(experiment, checkpoint={"keep_best": wrong})


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


def test_text_that_turns_unreadable_is_named_and_the_run_saved(experiment, tmp_path, monkeypatch):
    """And what is left of a file of tokens is made again."""
    experiment = with_(
        experiment, data={"data_dir": str(tmp_path / "data")}, train={"steps": 96}
    )  # beyond what Grain read ahead
    loop.train(experiment, tmp_path / "whole")
    tokens = max((tmp_path / "data").glob("**/tokens.bin"), key=lambda path: path.stat().st_size)  # not the held-out
    whole = tokens.read_bytes()
    monkeypatch.setattr(rows_lib, "RETRIES", (0, 0))
    placed, calls, first = sources.LanguageModel.place, [], begin_calls(experiment)

    def breaking(program, rows):
        calls.append(rows)
        if len(calls) == first + 2:
            os.truncate(tokens, 100)
        return placed(program, rows)

    monkeypatch.setattr(sources.LanguageModel, "place", breaking)
    with pytest.raises(TrainingError, match=r"tokens.bin cannot be read any more .*the same command continues"):
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
    monkeypatch.setattr(train_command, "CONFIG", SimpleNamespace(value=config_dict), raising=False)
    monkeypatch.setattr(train_command, "WORKDIR", SimpleNamespace(value=str(tmp_path)), raising=False)
    monkeypatch.setattr(train_command.loop, "train", lambda *_: True)
    monkeypatch.setattr(train_command, "evaluate", lambda path: signal.raise_signal(number))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(number, signal.SIG_DFL)  # tests in the background ignore some
    try:
        assert train_command.main() == train_command.INTERRUPTED
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    out, err = capsys.readouterr()
    assert f"{number.name}: the same command continues" in out
    assert "train.dead_after is 1,000, more than the 16 steps" in err


def test_a_run_of_an_earlier_version_is_read(experiment, tmp_path, capsys):
    """Its checkpoints have no hashes, and its config lacks fields."""
    run = tmp_path / "run"
    loop.train(experiment, run)
    expected = gsae_jax.load(run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    config = config_lib.to_dict(experiment)
    for field in ("buffer", "keep_best", "keep_every"):
        del config["checkpoint"][field]
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    loaded = gsae_jax.load(run)
    assert "earlier version, which wrote no hashes" in capsys.readouterr().err
    assert_same({name: sae.params for name, sae in loaded.items()}, {n: sae.params for n, sae in expected.items()})
