"""The accelerator kit (`benchmarks/accelerator.py`), on the CPU with its small shapes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(out, *flags):
    return [sys.executable, "benchmarks/accelerator.py", "--platform=cpu", f"--out={out}", *flags]


def run(out, *flags):
    return subprocess.run(command(out, *flags), cwd=ROOT, capture_output=True, text=True)


def results(out):
    return json.loads(out.read_text())["results"] if out.exists() else {}


@pytest.mark.variants
def test_a_killed_command_continues_after_what_it_has_measured(tmp_path):
    out = tmp_path / "card.json"
    process = subprocess.Popen(command(out, "--parts=step"), cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not results(out).get("step") and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dense, *others = results(out)["step"]
    assert not others
    done = run(out, "--parts=step")
    assert done.returncode == 0, done.stderr
    first, sparse = results(out)["step"]
    assert first == dense
    assert (dense["step"], sparse["step"]) == ("dense", "sparse")
    assert dense["step_seconds"] > 0
    assert sparse["times_faster"] == pytest.approx(dense["products"] / sparse["products"])
    assert "| gated | 64 | 512 | 128 | 1 | float32 | sparse | measured |" in done.stdout
    assert (tmp_path / "card.svg").stat().st_size > 1000

    other = json.loads(out.read_text())
    other["facts"]["jax"] = "0.1.2"
    out.write_text(json.dumps(other))
    refused = run(out, "--parts=step")
    assert refused.returncode == 1
    assert "jax (0.1.2 there" in refused.stderr
    assert "--fresh" in refused.stderr
    assert json.loads(out.read_text()) == other


def test_no_gpu_no_time_and_no_memory_are_said(tmp_path):
    late = run(tmp_path / "late.json", "--parts=step", "--minutes=0")
    assert late.returncode == 1
    assert "--minutes" in late.stderr
    unknown = run(tmp_path / "late.json", "--parts=steps")
    assert unknown.returncode == 2
    assert "known: tests, step" in unknown.stderr
    shape = {"architecture": "gated", "D": 2**16, "F": 2**20, "B": 128, "N": 1, "dtype": "float32", "step": "dense"}
    worker = [sys.executable, "benchmarks/accelerator_worker.py", json.dumps({"part": "step"} | shape)]
    measured = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(measured.stdout.splitlines()[-1]) == [{"outcome": "out of memory"}]


@pytest.mark.variants
def test_every_part_is_measured(tmp_path):
    out = tmp_path / "card.json"
    done = run(out)
    assert done.returncode == 0, done.stderr
    found = results(out)
    assert not {line["outcome"] for lines in found.values() for line in lines} & {"failed", "out of memory"}
    assert sum(line["outcome"] == "passed" for line in found["tests"]) >= 13
    assert len({line["function"] for line in found["tests"]}) == 5
    assert [line["part"] for line in found["pipeline"]][:2] == ["whole", "without input"]
    assert found["pipeline"][0]["activations_per_second"] > 0
