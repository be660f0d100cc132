"""A disk that fills up while a run is saved, on a file system that really is full."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gsae_jax.storage import run_directory
from tests.faults import commands

ALONE = ["unshare", "--map-root-user", "--mount"]  # a mount that only this process and its children see
IN_IT = "mount -t tmpfs -o size=12m none {disk} && exec {python} -m tests.faults.test_full_disk {disk} {arguments}"


def wait_until(condition, process, log):
    deadline = time.time() + 240
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.time() < deadline, log.read_text()
        time.sleep(0.01)


def fill(path):
    """Take what is left of the disk."""
    with path.open("ab", buffering=0) as file:
        for size in (2**20, 2**10, 1):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue


def main(disk, *arguments):
    """Inside of the mount: the disk is full for a while in the middle of training."""
    run, log, ballast = disk / "run", disk.parent / "log", disk / "ballast"
    workdir = run_directory.Workdir(run)
    process = commands.start(run, arguments, log)
    wait_until(lambda: (workdir.latest_step() or 0) >= 5 * commands.EVERY, process, log)

    def failed():
        fill(ballast)  # also what a failed save gave back
        return log.read_text().count("could not be saved") >= 6

    wait_until(failed, process, log)
    during = workdir.sound_step()
    assert during, "the checkpoints before are gone"
    ballast.unlink()
    wait_until(lambda: (workdir.latest_step() or 0) > during, process, log)
    assert process.wait() == 0, log.read_text()
    assert "No space left on device" in log.read_text()
    assert "metrics.jsonl cannot be written" in log.read_text()
    shutil.copytree(run, disk.parent / "run")

    # Full to the end: the reason, and exit code 1.
    shutil.rmtree(run)
    process = commands.start(run, arguments, log)
    wait_until(lambda: (workdir.latest_step() or 0) >= commands.STEPS // 2, process, log)
    while process.poll() is None:
        fill(ballast)
        time.sleep(0.01)
    saved = workdir.sound_step()
    assert process.returncode == 1, log.read_text()
    message = f"error: step {commands.STEPS:,} could not be saved, the newest checkpoint is of step {saved:,};"
    assert message in log.read_text(), log.read_text()[-5000:]

    # The same command goes on when there is room; the last save is tried again.
    ballast.unlink()
    process = commands.start(run, arguments, log)
    wait_until(lambda: workdir.latest_step() > saved, process, log)

    def last_failed():
        fill(ballast)
        return f"checkpoint {commands.STEPS} could not be saved" in log.read_text()

    wait_until(last_failed, process, log)
    ballast.unlink()
    assert process.wait() == 0, log.read_text()
    assert f"continuing from step {saved:,}\n" in log.read_text()
    shutil.copytree(run, disk.parent / "later")


@pytest.mark.processes
def test_a_full_disk_stops_neither_training_nor_later_saves(lm_dir, text_dir, tmp_path):
    """What comes out is what comes out of a run on a disk with room; no line of metrics is lost."""
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk (unshare --map-root-user --mount)")
    arguments = commands.flags(lm_dir, text_dir, tmp_path / "data")
    assert commands.start(tmp_path / "expected", arguments, tmp_path / "log").wait() == 0
    (tmp_path / "disk").mkdir()
    inside = IN_IT.format(disk=tmp_path / "disk", python=sys.executable, arguments=" ".join(arguments))
    done = subprocess.run(
        [*ALONE, "bash", "-c", inside], cwd=commands.ROOT, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for run in ("run", "later"):
        commands.assert_same(tmp_path / run, tmp_path / "expected")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
