"""SIGKILL at any moment loses at most the steps since the last save, and changes nothing of what comes out."""

import random
import signal
import time

import pytest

from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import run_directory, writing
from tests.faults import commands

# Where to wait before the random delay, and the delay's longest.
AIMS = {
    "starting": (lambda run, last: True, 4.0),
    "training": (lambda run, last: resumed_after(run, last), 0.6),
    "saving": (lambda run, last: unfinished(run), 0.05),
    "finalising": (lambda run, last: any((path / checkpoints_lib.MANIFEST).exists() for path in unfinished(run)), 0.01),
    "reporting": (lambda run, last: run_directory.Workdir(run).latest_step() == commands.STEPS, 3.0),
}


def unfinished(run):
    """Checkpoints that have no name yet."""
    return [path for path in (run / "checkpoints").glob("*") if not path.name.isdigit()]


def resumed_after(run, last):
    """A checkpoint is there that was not before."""
    return (run_directory.Workdir(run).latest_step() or 0) > last


def kill_at(run, arguments, log, aim, chance):
    """Start the run and kill it; returns where that was, or None if it ended before."""
    reached, longest = AIMS[aim]
    last = run_directory.Workdir(run).latest_step() or 0
    process = commands.start(run, arguments, log)
    while process.poll() is None and not reached(run, last):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, longest))
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    at = run_directory.Workdir(run).latest_step() or 0
    inside = [path.name for path in [*unfinished(run), *run.glob(f"{writing.SCRATCH}*")]]
    return None if ended else f"{aim}: checkpoint {at}{', inside ' + ' '.join(inside) if inside else ''}"


@pytest.fixture(scope="module")
def uninterrupted(lm_dir, text_dir, tmp_path_factory):
    """The flags of a run, and the run."""
    folder = tmp_path_factory.mktemp("kills")
    arguments = commands.flags(lm_dir, text_dir, folder / "tfds")
    assert commands.start(folder / "run", arguments, folder / "log").wait() == 0, (folder / "log").read_text()
    return arguments, folder / "run"


@pytest.mark.parametrize(
    "kills", [pytest.param(6, marks=pytest.mark.processes), pytest.param(40, marks=pytest.mark.faults)]
)
def test_killed_and_resumed_is_uninterrupted(uninterrupted, tmp_path, kills):
    arguments, expected = uninterrupted
    run, log, chance = tmp_path / "run", tmp_path / "log", random.Random(0)
    aims = ["starting", "saving", "training", "finalising"]
    positions = []
    while len(positions) < kills:
        aim = "reporting" if len(positions) >= kills - kills // 6 else aims[len(positions) % 4]
        saved = run_directory.Workdir(run).latest_step()
        where = kill_at(run, arguments, log, aim, chance)
        output = log.read_text()
        assert "Traceback" not in output, output
        if saved and "continuing" in output:  # it came that far
            assert f"continuing from step {saved:,}\n" in output
            assert "warning" not in output
        if where is None:
            assert "is finished" in output or "report:" in output, output
            break
        positions.append(where)
        print(f"kill {len(positions)}: {where}", flush=True)
    assert len(positions) == kills
    assert commands.start(run, arguments, log).wait() == 0
    assert "Traceback" not in log.read_text()
    commands.assert_same(run, expected)
    assert not unfinished(run)
    assert not list(run.glob(f"{writing.SCRATCH}*"))
