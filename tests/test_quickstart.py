"""What the README shows: its config builds, and (minutes: `pytest -m quickstart`) its main job keeps its promises."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.training import loop

ROOT = Path(__file__).parent.parent
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_readmes_config_builds():
    (block,) = [block for block in PYTHON_BLOCKS if "def get_config" in block]
    names = {}
    exec(block, names)
    experiment = config_lib.from_dict(config_lib.Experiment, names["get_config"]())
    program, _ = loop.build(experiment, mesh_lib.make_mesh(experiment.mesh), Checkpoint.open(experiment.lm.path))
    assert [stack.name for stack in program.stacks] == ["gated", "neurons", "untied"]


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

    # The README's Python example, on this run.
    (block,) = [block for block in PYTHON_BLOCKS if "load_lm" in block]
    names = {}
    exec(block.replace("runs/quickstart", str(tmp_path / "run")), names)
    assert names["f"].shape == (*names["x"].shape[:2], 1024)
    assert 0 < (np.asarray(names["f"]) > 0).mean() < 0.5
    assert names["logits"].shape == (*names["x"].shape[:2], 4096)
