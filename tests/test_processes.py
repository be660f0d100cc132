"""Several processes as one program, for real: the quickstart, shortened, on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import processes
from tests.refusals import refused

ROOT = Path(__file__).parent.parent
SHORT = [
    "--config.train.steps=16",
    "--config.train.warmup_steps=4",
    "--config.train.log_every=4",
    "--config.checkpoint.every=8",
    "--config.activations.buffer_size=8192",
    "--config.evaluation.tokens=4096",
    "--config.stacks.gated.width=512",
    "--config.stacks.baseline.width=768",
    "--config.stacks.gated.l1_coefficients=(0.01,)",
    "--config.stacks.baseline.l1_coefficients=(0.006,)",
]


def start(workdir, count, *overrides, last=()):
    """`count` processes with 8 devices together; of the last one, other environment variables."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gsae_jax.train", "--config", "configs/quickstart.py", "--workdir", str(workdir)]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(8 // count),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,  # many runs are of the same programs
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    started = []
    for index in range(count):
        flags = [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={index}"]
        log = Path(f"{workdir}.{index}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    command + SHORT + list(overrides) + flags,
                    cwd=ROOT,
                    env=environment | dict(last if index == count - 1 else ()),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def log(workdir, index=0):
    return Path(f"{workdir}.{index}.log").read_text()


def end(started, within=300):
    """The exit codes, once all have ended."""
    deadline = time.time() + within
    try:
        return [process.wait(deadline - time.time()) for process in started]
    finally:
        for process in started:
            process.kill()


def train(workdir, count):
    codes = end(start(workdir, count))
    assert codes == [0] * count, log(workdir)
    return workdir


def until(workdir, text, within=120):
    deadline = time.time() + within
    while text not in log(workdir):
        assert time.time() < deadline, log(workdir)
        time.sleep(0.2)


def continued(run, workdir, count):
    """The run's middle checkpoint, continued elsewhere."""
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "16")
    shutil.rmtree(workdir / "report")
    train(workdir, count)
    assert "continuing from step 8" in log(workdir)
    return workdir


def same(one, other):
    """Equal, to what the order of a float32 sum can change; Adam makes much of small gradients."""
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [4, 8, 12, 16]
    for a, b in zip(*lines, strict=True):
        for name in ("gated/loss", "baseline/loss"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    stacks = json.loads((one / "config.json").read_text())["stacks"]
    ours, theirs = gsae_jax.load(one), gsae_jax.load(other)
    for name, sae in ours.items():
        (rate,) = stacks[name.removesuffix("_0")]["learning_rates"]
        for key, value in sae.params.items():
            difference = np.asarray(value) - np.asarray(theirs[name].params[key])
            # Of a feature that hardly fires, one input more or less on its edge changes single entries by up to a step.
            assert np.linalg.norm(difference) < 1e-4 * np.linalg.norm(value), f"{name} {key}"
            assert np.abs(difference).max() < rate, f"{name} {key}"
    reports = [json.loads((run / "report" / "report.json").read_text())["saes"] for run in (one, other)]
    for a, b in zip(*reports, strict=True):
        for name in ("ce_clean", "ce_sae", "loss_recovered", "l0", "tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {count: train(folder / str(count), count) for count in (1, 2)}


@pytest.mark.processes
def test_two_processes_train_what_one_trains(runs):
    same(runs[1], runs[2])
    assert "tokens/s" in log(runs[2], 0)
    assert "tokens/s" not in log(runs[2], 1)  # progress comes from the first
    assert log(runs[2], 0).count("report:") == 1


@pytest.mark.processes
@pytest.mark.parametrize(("written_by", "count"), [(2, 1), (2, 4), (1, 2)])
def test_a_checkpoint_continues_on_another_number_of_processes(runs, tmp_path, written_by, count):
    same(runs[written_by], continued(runs[written_by], tmp_path / "run", count))


@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_a_message(tmp_path, victim):
    started = start(tmp_path / "run", 2, "--config.train.steps=100_000")
    until(tmp_path / "run", "tokens/s")
    started[victim].kill()
    killed = time.time()
    codes = end(started, within=60)
    assert codes[1 - victim] != 0
    assert time.time() - killed < 60
    # The second where an exchange failed before the coordinator missed its heartbeat.
    messages = ("another task died", "another process may have failed first")
    assert any(message in log(tmp_path / "run", 1 - victim) for message in messages)


@pytest.mark.processes
def test_an_error_in_one_process_ends_the_other_with_the_reason(tmp_path):
    """Before training, where nothing else would tell the first that the second will never come."""
    (tmp_path / "file").write_text("")
    started = start(tmp_path / "run", 2, last={"TFDS_DATA_DIR": str(tmp_path / "file" / "data")})
    assert end(started, within=90) == [2, 2]
    reason = f"error: data.data_dir: {tmp_path}/file/data cannot hold prepared data"
    assert f"stopped because process 1 failed: {reason}" in log(tmp_path / "run", 0)
    assert reason in log(tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_one_process_saves_the_run_of_all(tmp_path, number):
    run = tmp_path / "run"
    before = signal.signal(number, signal.SIG_DFL)  # tests under nohup ignore SIGHUP, and so would what they start
    started = start(run, 2, "--config.train.steps=100_000", "--config.checkpoint.every=100_000")
    signal.signal(number, before)
    until(run, "tokens/s")
    started[1].send_signal(number)
    assert end(started) == [75, 75]
    assert "SIGTERM: step" in log(run)  # which is how the first process hears of it
    assert not (run / "report").exists()


def test_signals_that_are_ignored_stay_ignored(monkeypatch):
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    handlers = {
        signal.SIGTERM: signal.SIG_IGN,
        signal.SIGHUP: signal.SIG_IGN,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        replaced = processes.on_interruption(lambda *_: None)
        for number, handler in replaced.items():
            signal.signal(number, handler)
        assert replaced.keys() == {signal.SIGINT}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "field", "facts"),
    [
        (("localhost:1234", None, None), "--num_processes", ("missing", "--coordinator, --num_processes")),
        (("localhost", 2, 0), "--coordinator", ("'localhost'", "host:port of process 0")),
        (("localhost:1234", 2, 2), "--process_id", ("is 2;", "0 to 1")),
        (("localhost:1234", 0, 0), "--num_processes", ("is 0;", "1 or more")),
    ],
)
def test_processes_that_cannot_be_joined(arguments, field, facts):
    with refused(field, *facts):
        processes.join(*arguments)


@pytest.mark.parametrize(
    ("variable", "value", "count", "refuses"),
    [
        ("OMPI_COMM_WORLD_SIZE", "2", "None", True),
        ("JOB_COMPLETION_INDEX", "0", "None", True),
        ("JOB_COMPLETION_INDEX", "0", "1", False),
        ("OMPI_COMM_WORLD_SIZE", "1", "None", False),
    ],
)
def test_processes_that_nobody_finds_do_not_train_alone(variable, value, count, refuses):
    done = subprocess.run(
        [sys.executable, "-c", f"from gsae_jax import processes; processes.join(count={count})"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", variable: value},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == refuses, done.stderr
    for fact in ("UserError: --coordinator: ", f"{variable} says"):
        assert (fact in done.stderr) == refuses
