"""A damaged checkpoint is noticed, named and passed over."""

import shutil

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import ConfigError
from gsae_jax.training import loop


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
    workdir = workdir_lib.Workdir(run)
    assert workdir.sound_step() == 16
    names = files(run)
    assert len(names) > 10
    for name in names:
        file = run / "checkpoints" / "16" / name
        content = file.read_bytes()
        for damage in DAMAGES:
            if not content or (str(name) in workdir_lib.SEALS and damage in (truncate, flip)):
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
        (empty if str(name) in workdir_lib.SEALS else DAMAGES[number % 4])(file)
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
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != workdir_lib.LOCK}
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole \(checkpoint 16: params/manifest.ocdbt was"):
        loop.train(experiment, run)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != workdir_lib.LOCK}
    workdir_lib.Workdir(run).check(config_lib.to_dict(experiment))
