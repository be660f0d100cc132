"""The quickstart, whole: what the README promises of its report. Minutes long: `pytest -m quickstart`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.quickstart
def test_the_gated_frontier_is_above_the_baselines(tmp_path):
    command = [
        sys.executable,
        "-m",
        "gsae_jax.train",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    records = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["saes"]
    gated, baseline = (
        sorted((r for r in records if r["architecture"] == name), key=lambda r: r["l0"]) for name in ("gated", "relu")
    )
    assert len(gated) >= 3
    assert len(baseline) >= 3
    assert all(r["width"] * 1.5 == b["width"] for r, b in zip(gated, baseline, strict=True))
    assert all(0.95 <= r["gamma"] <= 1.05 for r in gated), [r["gamma"] for r in gated]
    assert all(b["gamma"] < r["gamma"] for r, b in zip(gated, baseline, strict=True))

    # Where both have SAEs between L0 5 and 100: the gated frontier at each baseline's L0, interpolated in log L0.
    logs = [np.log([r["l0"] for r in records]) for records in (gated, baseline)]
    low, high = max(logs[0][0], logs[1][0], np.log(5)), min(logs[0][-1], logs[1][-1], np.log(100))
    assert low < high
    for at in np.linspace(low, high, 20):
        ours, theirs = (
            np.interp(at, log, [r["loss_recovered"] for r in records])
            for log, records in zip(logs, (gated, baseline), strict=True)
        )
        assert ours > theirs, np.exp(at)
