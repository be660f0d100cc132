"""The benchmarks as commands, on small shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(command, *arguments):
    script = ROOT / "benchmarks" / command
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.variants
def test_many_compares_one_run_with_runs_of_one(tmp_path):
    path = tmp_path / "many.json"
    printed = run("many.py", "--small", "--rounds", "1", "--only", "sparsities", "widths", "--out", path)
    lines = json.loads(path.read_text())["results"]
    assert [line["mode"] for line in lines] == ["sparsities", "widths"]
    assert [line["F"] for line in lines] == ["64", "64 to 128"]
    assert len(printed.splitlines()) == 2
    for line in lines:
        assert line["SAEs"] == 2
        assert line["active"] == pytest.approx(16, abs=8)
        assert line["times_cheaper"] == pytest.approx(line["apart_seconds"] / line["together_seconds"])
        assert line["forward_share"] > 0
    assert "times cheaper" in run("table.py", path)
