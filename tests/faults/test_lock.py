"""One directory, one training process."""

import os
import signal
import subprocess
import sys

from gsae_jax import config as config_lib
from gsae_jax import config_trees
from gsae_jax.storage import run_directory
from gsae_jax.training import loop
from tests.refusals import refused

HOLDER = """
import sys, time
from gsae_jax.storage import run_directory
held = run_directory.Workdir(sys.argv[1])
held.hold()
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_ends(experiment, tmp_path):
    """However the first ends: here by SIGKILL. The refused one changes nothing."""
    run = tmp_path / "run"
    assert loop.train(experiment, run)
    experiment = config_trees.from_dict(config_lib.Experiment, config_trees.to_dict(experiment))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        with refused("--workdir", "another process", str(run)):
            loop.train(experiment, run)
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    assert loop.train(experiment, run)


def test_a_lock_alone_does_not_make_a_directory_taken(experiment, tmp_path):
    """A run that was killed before its config was written leaves one."""
    (tmp_path / run_directory.LOCK).touch()
    workdir = run_directory.Workdir(tmp_path)
    workdir.check(config_trees.to_dict(experiment))
    workdir.create(config_trees.to_dict(experiment), None)
    with refused("--workdir", "another process", str(tmp_path)):
        run_directory.Workdir(tmp_path).hold()
    workdir.release()
    run_directory.Workdir(tmp_path).hold()


def test_a_run_that_ended_meanwhile_keeps_its_config(experiment, tmp_path):
    """A second process checked the empty directory before, and started after it."""
    run, second = tmp_path / "run", run_directory.Workdir(tmp_path / "run")
    other = config_trees.to_dict(experiment) | {"seed": 7}
    second.check(other)
    assert second.latest_step() is None
    assert loop.train(experiment, run)
    before = (run / "config.json").read_bytes()
    with refused("--workdir", "meanwhile"):
        second.create(other, None)
    assert (run / "config.json").read_bytes() == before
