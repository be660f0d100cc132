"""What loggers write is what `metrics.jsonl` has; which there are, and what they lack."""

import dataclasses
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from gsae_jax import loggers
from gsae_jax.training import interruption, loop
from tests.refusals import refused

ROOT = Path(__file__).parent.parent


def records(content):
    """Of a TensorBoard event file."""
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def board(folder):
    """{(step, name): number}; of a step that comes again the later, as TensorBoard shows it."""
    files = sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns)
    events = [event for path in files for event in records(path.read_bytes())]
    return {(e.step, value.tag): value.simple_value for e in events for value in e.summary.value}


def lines(path):
    """The same of `metrics.jsonl`."""
    return {
        (line["step"], f"{name}/{index}" if isinstance(value, list) else name): number
        for line in map(json.loads, path.read_text().splitlines())
        for name, value in line.items()
        if name != "step"
        for index, number in enumerate(value if isinstance(value, list) else [value])
    }


def test_tensorboard_has_the_numbers_of_the_lines(experiment, tmp_path):
    assert experiment.loggers == ("tensorboard",)
    loop.train(experiment, tmp_path / "run")
    expected = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(expected) > 20
    assert board(tmp_path / "run" / "tensorboard") == pytest.approx(expected, rel=1e-6, nan_ok=True)
    loop.train(dataclasses.replace(experiment, loggers=()), tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_loggers_that_cannot_be_used_are_refused_before_anything_is_written(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    for names, *facts in (
        (("tensorbord",), "'tensorbord'", "did you mean 'tensorboard'"),
        (("wandb",), "'wandb'", "package wandb", "pip install 'gsae_jax[wandb]'"),
        (("tensorboard", "tensorboard"), "['tensorboard', 'tensorboard']", "once"),
    ):
        with refused("loggers", *facts):
            loop.train(dataclasses.replace(experiment, loggers=names), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    loggers.check(())


def history(folder):
    """{(step, name): number} of an offline run of wandb, its id and exit code: its records in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, parts, found = path.read_bytes(), b"", []
    at, block = 7, 32768  # after the header
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if kind == 0:
            break
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    rows = {}
    for record in found:
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num
            rows |= {(step, name): number for name, number in row.items() if not name.startswith("_")}
    (code,) = (record.exit.exit_code for record in found if record.HasField("exit"))
    return rows, next(record.run.run_id for record in found if record.HasField("run")), code


@pytest.mark.wandb
@pytest.mark.filterwarnings("default")
def test_wandb_tensorboard_and_the_lines_have_the_same_numbers_also_of_a_run_that_continues(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "nobody"))
    with refused("loggers", "'wandb'", "`wandb login`", "WANDB_MODE=offline"):
        loggers.check(("wandb",))
    importlib.import_module("wandb").teardown()  # else it does not look again
    monkeypatch.setenv("WANDB_MODE", "offline")
    experiment = dataclasses.replace(experiment, loggers=("tensorboard", "wandb"))
    first = dataclasses.replace(experiment, checkpoint=dataclasses.replace(experiment.checkpoint, every=8))
    real, calls = interruption.Signals.stop, []

    def stop(self, call):
        calls.append(call)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, call)

    monkeypatch.setattr(interruption.Signals, "stop", stop)
    assert not loop.train(first, tmp_path / "run")
    assert loop.train(first, tmp_path / "run")
    expected = lines(tmp_path / "run" / "metrics.jsonl")
    assert len({step for step, _ in expected}) >= 3
    assert board(tmp_path / "run" / "tensorboard") == pytest.approx(expected, rel=1e-6, nan_ok=True)
    parts = [history(folder) for folder in sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))]
    assert len(parts) == 2
    assert [code for _, _, code in parts] == [1, 0]
    assert {run for _, run, _ in parts} == {(tmp_path / "run" / "wandb_id").read_text()}
    assert parts[0][0]
    assert min(step for step, _ in parts[1][0]) > min(step for step, _ in parts[0][0])
    assert parts[0][0] | parts[1][0] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_torch_is_not_imported(tmp_path):
    """Where it is installed tensorboardX would import it, which takes over a second, and a broken one would show."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was imported')")
    (tmp_path / "torch-2.13.0.dist-info").mkdir()  # transformers asks for its version
    (tmp_path / "torch-2.13.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
    program = "import sys, gsae_jax; from gsae_jax.loggers import tensorboard; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
