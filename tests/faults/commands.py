"""A short run as its user starts it, in a process of its own that can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

import gsae_jax
from tests.training import metrics_without_time

ROOT = Path(__file__).parents[2]
EVERY, STEPS = 20, 1200  # between saves, and in all


def flags(lm_dir, text_dir, data_dir):
    """Of a run of four small SAEs at one site; training takes some seconds."""
    site = "blocks.0.hook_mlp_out"
    settings = {
        "lm.path": lm_dir,
        "data.corpus": "text",
        "data.path": text_dir,
        "data.data_dir": data_dir,
        "data.context_length": 16,
        "activations.rows_per_forward": 16,
        "activations.buffer_size": 512,
        "activations.scale_tokens": 1024,
        "stacks.gated.site": site,
        "stacks.gated.width": 64,
        "stacks.baseline.site": site,
        "stacks.baseline.width": 128,
        "train.batch_size": 64,
        "train.warmup_steps": 20,
        "train.steps": STEPS,
        "train.log_every": EVERY,
        "checkpoint.every": EVERY,
        "evaluation.tokens": 2048,
        "evaluation.rows_per_forward": 16,
    }
    return ["--config=configs/quickstart.py", *(f"--config.{field}={value}" for field, value in settings.items())]


def start(workdir, arguments, log):
    """`gsae_jax.train` on two devices, printing to `log`."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONUNBUFFERED": "1"}
    own["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a kill could leave half a program there
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "gsae_jax.train", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ | own,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def assert_same(ours, theirs):
    """Two runs have the same parameters, metrics (but for their speed) and reports, to the last bit."""
    expected = gsae_jax.load(theirs)
    for name, sae in gsae_jax.load(ours).items():
        jax.tree.map(np.testing.assert_array_equal, sae.params, expected[name].params)
    assert metrics_without_time(ours) == metrics_without_time(theirs)
    assert _report(ours, theirs.name) == _report(theirs, ours.name)


def _report(run, other):
    """The files of a report. Without its pages, which have the name of the run, where the other has another name."""
    files = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    if run.name != other:
        numbers = json.loads(files["report.json"])
        saes = [sae | {"run": None} for sae in numbers["saes"]]
        files |= dict.fromkeys(("report.md", "report.html"))
        files["report.json"] = numbers | {"runs": [*numbers["runs"].values()], "saes": saes}
    return files
