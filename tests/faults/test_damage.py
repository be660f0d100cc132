"""A damaged checkpoint is noticed, named and passed over, and one that cannot be read back replaces none."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import ocdbt_utils

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees
from gsae_jax.saes import contract
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import paths, run_directory
from gsae_jax.storage.facts import Facts
from gsae_jax.training import loop
from tests.refusals import refused


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def remove(file):
    file.unlink()


DAMAGES = (truncate, empty, flip, remove)


@pytest.fixture
def run(experiment, tmp_path):
    """A finished run with checkpoints of steps 8 and 16."""
    loop.train(experiment, tmp_path / "run")
    return tmp_path / "run"


def files(run):
    newest = run / "checkpoints" / "16"
    return [file.relative_to(newest) for file in sorted(newest.rglob("*")) if file.is_file()]


def test_every_file_and_every_damage_is_noticed(run, capsys):
    """But for orbax's two seals, whose content says nothing that is read: these must be there."""
    workdir = run_directory.Workdir(run)
    assert workdir.sound_step() == 16
    names = files(run)
    assert len(names) > 10
    for name in names:
        file = run / "checkpoints" / "16" / name
        content = file.read_bytes()
        for damage in DAMAGES:
            if not content or (str(name) in checkpoints_lib.SEALS and damage in (truncate, flip)):
                continue
            damage(file)
            assert workdir.sound_step() == 8, (name, damage)
            assert f"checkpoint 16: {name}" in capsys.readouterr().err
            file.write_bytes(content)
    assert workdir.sound_step() == 16


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.faults)])
def test_training_goes_on_from_the_one_before(run, experiment, tmp_path, capsys, every):
    """And ends as if nothing had happened, whichever file it is; the damaged checkpoint is kept."""
    expected = gsae_jax.load(run)
    for number, name in enumerate(files(run)[::every]):
        copy = tmp_path / str(number)
        shutil.copytree(run, copy)
        file = copy / "checkpoints" / "16" / name
        (empty if str(name) in checkpoints_lib.SEALS else DAMAGES[number % 4])(file)
        capsys.readouterr()
        assert loop.train(experiment, copy)
        out, err = capsys.readouterr()
        assert f"checkpoint 16: {name}" in err, name
        assert "continuing from step 8" in out
        assert (copy / "damaged" / "16-0").is_dir()
        for key, sae in gsae_jax.load(copy).items():
            jax.tree.map(np.testing.assert_array_equal, sae.params, expected[key].params)
        assert (copy / "metrics.jsonl").read_text().count("\n") == 4


def test_when_none_is_sound_nothing_is_touched(run, experiment):
    for step in (8, 16):
        flip(run / "checkpoints" / str(step) / "params" / "manifest.ocdbt")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != run_directory.LOCK}
    with refused("--workdir", str(run), "checkpoint 16: params/manifest.ocdbt", "checkpoint 8: params/manifest.ocdbt"):
        loop.train(experiment, run)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != run_directory.LOCK}
    run_directory.Workdir(run).check(config_trees.to_dict(contract.with_recipes(experiment)))


PARAMS = {"gated": {"W_dec": jnp.arange(6.0).reshape(2, 3), "b_dec": jnp.ones(3)}}
STATE = {"step": jnp.array(7)}


def save(path, steps, **which):
    """A run directory in which these steps were saved, one after the other."""
    workdir = run_directory.Workdir(path)
    workdir.create({}, workdir.latest_step())
    checkpoints = checkpoints_lib.Checkpoints(workdir, config_lib.Checkpoint(**{"every": 1, "keep": 1} | which))
    for step in steps:
        checkpoints.save(step, PARAMS, STATE, {"position": step}, Facts("all", machine={"score": float("nan")}), None)
    checkpoints.close()
    workdir.release()
    return workdir


@pytest.mark.parametrize("name", ["l1=[1e-3] #1", "[!a]*", "a?b", "**", "{a,b} 50% é'\"\n"])
def test_a_directory_of_any_name_keeps_what_is_saved_in_it(tmp_path, name):
    """Also where it would match its neighbour as a pattern."""
    neighbour = save(tmp_path / "axb" / "run", [1])
    for path in (tmp_path / name, tmp_path / name / "run"):
        workdir = save(path, [1, 2])
        assert workdir.sound_step() == 2
        assert [path.name for path in (path / "checkpoints").iterdir()] == ["2"]
        jax.tree.map(np.testing.assert_array_equal, workdir.params(2, checkpoints_lib.single_device(PARAMS)), PARAMS)
        assert workdir.facts(2).rows == "all"
    assert neighbour.sound_step() == 1


def test_a_failed_save_removes_nothing_of_a_neighbour(tmp_path):
    """Whose name the failed one's matches as a pattern."""
    workdir = run_directory.Workdir(tmp_path / "a?b")
    workdir.create({}, None)
    checkpoints = checkpoints_lib.Checkpoints(workdir, config_lib.Checkpoint(every=1, keep=1))
    ours, theirs = (tmp_path / name / "checkpoints" / "1.orbax-checkpoint-tmp" for name in ("a?b", "axb"))
    for folder in (ours, theirs):
        folder.mkdir(parents=True)

    def fail():
        raise OSError("No space left on device")

    checkpoints._saving = 1
    checkpoints._try(fail)
    checkpoints.close()
    assert not ours.exists()
    assert theirs.is_dir()


@pytest.mark.parametrize("path", ["a\\b", "a\\[1\\]/run", "gs://bucket/l1=[1e-3]", "gs://bucket/a?b/run"])
def test_a_path_that_libraries_take_for_another_is_refused(experiment, tmp_path, path, monkeypatch):
    monkeypatch.setattr(paths, "check", lambda path: None)  # whether gs:// can be used here
    workdir = run_directory.Workdir(path if path.startswith("gs:") else tmp_path / path)
    for act in (workdir.check_writable, workdir.config, lambda: workdir.check(config_trees.to_dict(experiment))):
        with refused("--workdir", str(workdir.path), "contains"):
            act()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_back_replaces_nothing(tmp_path, capsys, monkeypatch):
    """As when orbax leaves the arrays' names out of a checkpoint."""
    save(tmp_path / "run", [1])
    with monkeypatch.context() as patch:
        patch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", unmerged)
        workdir = save(tmp_path / "run", [2])
    assert "checkpoint 2 could not be saved" in capsys.readouterr().err
    assert workdir.sound_step() == workdir.latest_step() == 1
    assert workdir.params(1, checkpoints_lib.single_device(PARAMS)).keys() == PARAMS.keys()
    assert save(tmp_path / "run", [3]).sound_step() == 3


async def unmerged(*args, **kwargs):
    """Nothing."""
