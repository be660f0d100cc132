"""Runs, language models and texts that were moved, replaced or named otherwise since training."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_loading, train
from gsae_jax.lms import checkpoints as lm_checkpoints
from gsae_jax.measuring import evaluate
from gsae_jax.saes import contract, parameters
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.storage import paths, run_directory
from gsae_jax.training import loop
from tests.conftest import tiny
from tests.faults.test_inputs import digest, seal
from tests.refusals import refused


def with_(experiment, **changes):
    return dataclasses.replace(
        experiment, **{group: dataclasses.replace(getattr(experiment, group), **new) for group, new in changes.items()}
    )


def retrained(folder, seed=0):
    """The same model's other weights, as after more training."""
    file = folder / "model.safetensors"
    draw = np.random.default_rng(seed)
    tensors = safetensors.numpy.load_file(file)
    noise = {name: 1e-2 * draw.standard_normal(value.shape) for name, value in tensors.items()}
    changed = {name: (value.astype(np.float32) + noise[name]).astype(value.dtype) for name, value in tensors.items()}
    safetensors.numpy.save_file(changed, file, metadata={"format": "flax"})


@pytest.fixture(scope="module")
def places(tmp_path_factory, text_dir, lm_dir):
    """A folder with a model and a text."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(lm_dir, folder / "lm")
    shutil.copytree(text_dir, folder / "text")
    return folder


@pytest.fixture(scope="module")
def halfway(places, text_dir, lm_dir, tmp_path_factory):
    """A run of relative paths, at step 8 of 16, and its experiment."""
    tree = tiny(text_dir, lm_dir, tmp_path_factory.getbasetemp() / "tfds")
    tree.lm.path, tree.data.path = "lm", "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(places)
        first = config_trees.from_dict(config_lib.Experiment, tree)
        assert loop.train(first, places / "run")
    recorded = json.loads((places / "run" / "config.json").read_text())
    assert recorded["lm"]["path"] == str(places / "lm")
    assert recorded["data"]["path"] == str(places / "text")
    shutil.rmtree(places / "run" / "checkpoints" / "16")  # as if it had been interrupted
    return config_trees.from_dict(config_lib.Experiment, recorded)


@pytest.fixture
def moved(places, halfway, tmp_path):
    """Copies of all three elsewhere, and the experiment with their paths."""
    shutil.copytree(places, tmp_path / "new")
    paths = {"lm": {"path": str(tmp_path / "new" / "lm")}, "data": {"path": str(tmp_path / "new" / "text")}}
    return tmp_path / "new", with_(halfway, **paths)


def test_a_run_of_relative_paths_is_measured_from_elsewhere(places, halfway, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(places / "run", tmp_path / "run")
    assert "gated_0" in evaluate(tmp_path / "run", tokens=512)


def test_a_moved_run_continues_with_moved_files(places, halfway, moved, tmp_path):
    new, experiment = moved
    shutil.copytree(places / "run", tmp_path / "stayed")
    assert train.run(experiment, new / "run") == 0
    assert train.run(halfway, tmp_path / "stayed") == 0
    expected = gsae_jax.load(tmp_path / "stayed")
    for name, sae in gsae_jax.load(new / "run").items():
        for key, value in sae.params.items():
            np.testing.assert_array_equal(value, expected[name].params[key])
    assert json.loads((new / "run" / "config.json").read_text())["lm"]["path"] == str(new / "lm")


def test_other_weights_are_noticed(places, moved):
    """On resuming and on measuring; nothing of the run is changed."""
    new, experiment = moved
    before = (new / "run" / "config.json").read_bytes()
    retrained(new / "lm")
    with refused("lm.path", str(new / "lm"), "not the language model", "differ in weights;"):
        loop.train(experiment, new / "run")
    with refused("--model", str(new / "lm"), "differ in weights;"):
        evaluate(new / "run", tokens=512, model=str(new / "lm"))
    with refused("lm.path", str(new / "lm"), "differ in weights;"):
        evaluate(new / "run", tokens=512, config=config_trees.to_dict(experiment))
    with refused("--model", str(new / "nowhere"), "not a directory"):
        evaluate(new / "run", tokens=512, model=str(new / "nowhere"))
    assert (new / "run" / "config.json").read_bytes() == before
    assert not (new / "run" / "report").exists()
    settings = json.loads((places / "lm" / "config.json").read_text()) | {"layer_norm_eps": 0.1}
    shutil.copy(places / "lm" / "model.safetensors", new / "lm")
    (new / "lm" / "config.json").write_text(json.dumps(settings))
    with refused("lm.path", "differ in config.json"):
        loop.train(experiment, new / "run")


def test_a_moved_model_and_text_are_measured(moved, capsys, caplog):
    new, experiment = moved
    config = config_trees.to_dict(experiment)
    for folder in ("lm", "text"):
        (new.parent / folder).mkdir()
        shutil.move(new / folder, new.parent / folder / "x")
    recorded = json.loads((new / "run" / "config.json").read_text())
    for group in ("lm", "data"):
        recorded[group]["path"] = f"/nowhere/{group}"
    (new / "run" / "config.json").write_text(json.dumps(recorded))
    with refused("lm.path", "/nowhere/lm", "--model DIRECTORY"):
        evaluate(new / "run", tokens=512)
    config["lm"]["path"], config["data"]["path"] = str(new.parent / "lm" / "x"), str(new.parent / "text" / "x")
    assert "gated_0" in evaluate(new / "run", tokens=512, config=config)
    assert "warning" not in capsys.readouterr().err
    unread = config | {"activations": config["activations"] | {"max_norm_multiple": 7.0}}
    with caplog.at_level("WARNING"):
        evaluate(new / "run", tokens=512, config=unread)
    assert "max_norm_multiple: 0.0 != 7.0" in caplog.text
    other = config | {"data": config["data"] | {"context_length": 8}}
    with refused("--config", "data.context_length: 16 != 8", "--sae"):
        evaluate(new / "run", tokens=512, config=other)
    file = new.parent / "text" / "x" / "a.txt"
    file.write_text(file.read_text().replace("def", "fed"))
    with refused("data.path", str(new.parent / "text" / "x"), "does not hold the text"):
        evaluate(new / "run", tokens=512, config=config)


@pytest.mark.variants
def test_runs_of_earlier_versions_have_no_fingerprints(moved, capsys):
    """They continue where the model lies as it lay."""
    new, experiment = moved
    facts = new / "run" / "checkpoints" / "8" / "facts" / "metadata"
    told = json.loads(facts.read_text())
    del told["lm"], told["held_out"]
    facts.write_text(json.dumps(told))
    manifest = new / "run" / "checkpoints" / "8" / checkpoints_lib.MANIFEST
    names = json.loads(manifest.read_text())["files"]
    files = {name: ((manifest.parent / name).stat().st_size, digest(manifest.parent / name)) for name in names}
    seal(manifest.parent, files)
    with refused("lm.path", str(new / "lm"), "no fingerprint"):
        loop.train(experiment, new / "run")
    with refused("baseline_0", "width 64", "width 1024"):
        evaluate(new / "run", tokens=512, model=str(lm_checkpoints.EMBEDDED))
    capsys.readouterr()
    assert "gated_0" in evaluate(new / "run", tokens=512, model=str(new / "lm"))
    assert "recorded no fingerprint of its language model; it is used with" in capsys.readouterr().err
    recorded = json.loads((new / "run" / "config.json").read_text())
    del recorded["data"]["held_out"]  # it held text out in another way
    (new / "run" / "config.json").write_text(json.dumps(recorded))
    assert "gated_0" in evaluate(new / "run", tokens=512, config=config_trees.to_dict(experiment))


def test_what_is_no_run_is_not_written_over(experiment, lm_dir, tmp_path):
    """A language model's folder has a config.json as well."""
    shutil.copytree(lm_dir, tmp_path / "lm")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lm").iterdir()}
    with refused("--workdir", f"{tmp_path / 'lm'} exists", "not a run"):
        loop.train(experiment, tmp_path / "lm")
    with refused("--workdir", f"{tmp_path / 'lm'} holds no run"):
        evaluate(tmp_path / "lm")
    with refused(str(tmp_path / "lm"), "holds a language model"):
        gsae_jax.load(tmp_path / "lm")
    assert {path.name: path.read_bytes() for path in (tmp_path / "lm").iterdir()} == before
    settings = json.loads(before["config.json"]) | {"seed": 0}  # as TransformerLens writes
    (tmp_path / "lm" / "config.json").write_text(json.dumps(settings))
    with refused("--workdir", f"{tmp_path / 'lm'} exists", "not a run"):
        loop.train(experiment, tmp_path / "lm")


def test_paths_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "[a]" / "texts").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "[a]")
    monkeypatch.setenv("HOME", str(tmp_path))
    here = str(tmp_path / "[a]")
    for path, expected in {
        "": "",
        "texts": f"{here}/texts",
        "./texts/../texts/": f"{here}/texts",
        "~/[a]": here,
        "gs://bucket/a": "gs://bucket/a",
        "owner/model": "owner/model",
        "texts/*.txt": f"{tmp_path}/[[]a]/texts/*.txt",
        "/elsewhere/*.txt": "/elsewhere/*.txt",
        "a" * 5000: "a" * 5000,
    }.items():
        assert paths.absolute(path) == expected
    assert run_directory.Workdir("~/[a]").path.exists()


@pytest.mark.variants
def test_the_saes_that_a_stack_started_from_may_move(places, halfway, tmp_path, monkeypatch):
    shutil.copytree(places / "run", tmp_path / "first")
    shutil.copytree(places / "run", tmp_path / "other")
    stack = dataclasses.replace(halfway.stacks["baseline"], start_from=f"{tmp_path}/first:baseline")
    experiment = dataclasses.replace(with_(halfway, train={"steps": 8}), stacks={"again": stack})
    starts = sae_loading.starts(experiment)
    assert loop.train(experiment, tmp_path / "second", starts)
    shutil.move(tmp_path / "first", tmp_path / "moved")

    def named(start):
        return dataclasses.replace(experiment, stacks={"again": dataclasses.replace(stack, start_from=start)})

    place = run_directory.Workdir(tmp_path / "second")
    for start in (f"{tmp_path}/first:baseline", f"{tmp_path}/moved:baseline"):
        assert sae_loading.pinned(named(start), tmp_path / "second") == contract.with_recipes(experiment)
    place.check(config_trees.to_dict(contract.with_recipes(experiment)))
    assert place.facts(8).starts == {"again": parameters.fingerprint(starts["again"])}
    shutil.copytree(places / "run", tmp_path / "finished")
    loop.train(halfway, tmp_path / "finished")  # other parameters
    other = sae_loading.pinned(named(f"{tmp_path}/finished:baseline"), tmp_path / "second")
    with refused("--workdir", "another config", "stacks.again.start_from"):
        place.check(config_trees.to_dict(other))
