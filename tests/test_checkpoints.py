"""Loading under bad input, from the hub, and from pickles."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_loading
from gsae_jax.lms import gelu, weights
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.conversion import convert
from gsae_jax.lms.weights import INDEX, WEIGHTS
from gsae_jax.storage import run_directory
from gsae_jax.storage.facts import Facts
from tests.fixtures.lms import make
from tests.refusals import refused

FIXTURES = Path(make.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in three shards with an index."""
    shutil.copytree(FIXTURES / "mistral", tmp_path / "model")
    return tmp_path / "model"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def rewrite(file, edit):
    tensors = safetensors.numpy.load_file(file)
    edit(tensors)
    safetensors.numpy.save_file(tensors, file)


def edit_index(edit):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        edit(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def truncate(folder):
    shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-100])


def forget_a_shard(weight_map):
    last = max(weight_map.values())
    for name in [name for name, file in weight_map.items() if file == last]:
        del weight_map[name]


def misplace(weight_map):
    weight_map["model.norm.weight"] = min(weight_map.values())


def set_value(name, value):
    def damage(folder):
        for file in shards(folder):
            if name in safetensors.numpy.load_file(file):
                rewrite(file, lambda tensors: tensors.update({name: value(tensors[name])}))

    return damage


def with_nan(x):
    x = x.copy()
    x[0, 0] = np.nan
    return x


def as_pickle(folder):
    for file in [*shards(folder), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (truncate, ("model-00002-of-00003.safetensors cannot be read", "truncated")),
        (lambda folder: shards(folder)[0].unlink(), (INDEX, "model-00001-of-00003.safetensors", "not there")),
        (edit_index(forget_a_shard), ("model-00003-of-00003.safetensors", "not in the index", "missing")),
        (
            edit_index(misplace),
            ("model.norm.weight is in model-00003-of-00003.safetensors", "but the index says otherwise"),
        ),
        (lambda folder: (folder / INDEX).write_text("["), (INDEX, "not a JSON object")),
        (lambda folder: (folder / INDEX).write_text("[]"), (INDEX, "not a JSON object", "list")),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), (INDEX, "weight_map")),
        (
            set_value("model.norm.weight", lambda x: x.astype(np.int8)),
            ("model.norm.weight", "type I8", "F32, F16, BF16"),
        ),
        (
            set_value("model.layers.0.self_attn.q_proj.weight", with_nan),
            ("NaN or infinite", "float32", "model.layers.0.self_attn.q_proj.weight", "allow_nan=True"),
        ),
        (set_value("model.layers.0.mlp.up_proj.weight", lambda x: x.T.copy()), ("up_proj.weight", "shape", "not [")),
        (as_pickle, ("pickle (pytorch_model.bin)", "python -m gsae_jax.convert_lm", "model OUT")),
        (lambda folder: [file.unlink() for file in folder.iterdir()], ("no config.json", "Hugging Face")),
    ],
)
def test_damaged_checkpoints_are_refused(folder, damage, facts):
    damage(folder)
    with refused("path", *facts):
        gsae_jax.load_lm(folder)


def test_a_fused_tensor_with_nan_is_found_in_any_of_its_parts(tmp_path):
    shutil.copytree(FIXTURES / "gpt2", tmp_path / "gpt2")

    def edit(tensors):
        tensors["transformer.h.1.attn.c_attn.weight"][0, 0] = np.inf  # of W_Q

    rewrite(tmp_path / "gpt2" / WEIGHTS, edit)
    with refused("path", "NaN or infinite", "transformer.h.1.attn.c_attn.weight"):
        gsae_jax.load_lm(tmp_path / "gpt2")


def test_nan_weights_may_be_allowed(folder):
    set_value("model.layers.0.self_attn.q_proj.weight", with_nan)(folder)
    lm = gsae_jax.load_lm(folder, allow_nan=True)
    assert int(jnp.isnan(lm.params["blocks.0"]["attn"]["W_Q"]).sum()) == 1


def test_a_revision_is_for_hub_names(folder):
    with refused("revision", "'main'", str(folder), "not a hub name", "write ''"):
        gsae_jax.load_lm(folder, revision="main")


@pytest.fixture
def hub(tmp_path, monkeypatch, lm_dir):
    """Offline, with one model in the hub's cache: two commits of it, of which `main` is the second."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--someone--small"
    for commit in (COMMIT, COMMIT[::-1]):
        shutil.copytree(lm_dir, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT[::-1])
    (repo / "refs" / "old").write_text(COMMIT)
    return repo


def begun(path, config):
    """A run directory that seems to have a checkpoint."""
    run = run_directory.Workdir(path)
    run.create(config, None)
    run.release()
    (path / "checkpoints" / "8").mkdir(parents=True)
    (path / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("{}")
    return run


def test_a_run_that_knew_no_revisions_goes_on(experiment, tmp_path):
    config = config_trees.to_dict(experiment)
    older = config | {"lm": {name: value for name, value in config["lm"].items() if name != "revision"}}
    run = begun(tmp_path / "run", older)
    run.check(config)
    facts = Facts(rows="")
    run.check_model(facts, experiment.lm, {})
    with refused("", "no fingerprint", " at main"):
        run.check_model(facts, dataclasses.replace(experiment.lm, revision="main"), {})


def test_hub_names_are_pinned_to_a_commit(hub, experiment, tmp_path):
    assert Checkpoint.open("someone/small").revision == COMMIT[::-1]
    assert Checkpoint.open("someone/small", "old").revision == COMMIT
    assert gsae_jax.load_lm("someone/small", revision=COMMIT).path.endswith(COMMIT)

    def asked(revision, path=tmp_path / "run"):
        lm = config_lib.LM(path="someone/small", dtype="float32", revision=revision)
        config = config_trees.to_dict(experiment) | {"lm": vars(lm)}
        return sae_loading.pinned(config_trees.from_dict(config_lib.Experiment, config), path)

    assert asked("old").lm.revision == COMMIT
    first = asked("")
    assert first.lm.revision == COMMIT[::-1]
    begun(tmp_path / "run", config_trees.to_dict(first))
    (hub / "refs" / "main").write_text(COMMIT)  # the branch moves on; the run stays
    assert asked("", tmp_path / "other").lm.revision == COMMIT
    assert asked("") == first


@pytest.mark.parametrize(
    ("name", "revision", "facts"),
    [
        ("someone/large", "", ("'someone/large'", "not a directory here", "never fetched", "network")),
        ("someone/small", "tag", ("'someone/small'", "not a directory here", "never fetched", "network")),
        ("someone--x/small", "", ("'someone--x/small'", "not a directory here", "hub refuses")),
        ("models/some/where", "", ("'models/some/where'", "not a directory;", "hub name (owner/model)")),
    ],
)
def test_what_the_hub_cannot_give_is_one_sentence(hub, name, revision, facts):
    with refused("path", *facts) as error:
        gsae_jax.load_lm(name, revision=revision)
    assert "\n" not in str(error.value)


def test_a_hub_model_without_safetensors_says_how_to_convert(hub):
    (hub / "snapshots" / COMMIT / WEIGHTS).unlink()
    with refused("path", "no safetensors", f"convert_lm someone/small OUT --revision={COMMIT},"):
        gsae_jax.load_lm("someone/small", revision="old")


def test_a_transformer_lens_model_on_the_hub_says_how_to_convert(hub):
    snapshot = hub / "snapshots" / COMMIT
    settings = json.loads((snapshot / "config.json").read_text())
    del settings["model_type"]
    (snapshot / "config.json").write_text(json.dumps(settings))
    with refused("path", "TransformerLens", "convert_lm someone/small OUT --revision="):
        gsae_jax.load_lm("someone/small", revision="old")


def transformer_lens(lm_dir, folder, **settings):
    """The layout of TransformerLens' published models: its config.json, and a state_dict with its constants."""
    import torch

    folder.mkdir()
    sizes = {name: json.loads((lm_dir / "config.json").read_text())[name] for name in gelu.SIZES}
    style = {"act_fn": "gelu", "normalization": "LN", "ln_eps": 1e-5, "attn_only": False, "shortformer_pos": False}
    (folder / "config.json").write_text(json.dumps(sizes | style | {"tokenizer_name": str(lm_dir)} | settings))
    tensors = safetensors.numpy.load_file(lm_dir / WEIGHTS)
    state = {name: torch.tensor(np.asarray(value, np.float32)) for name, value in tensors.items()}
    for layer in range(sizes["n_layers"]):
        state[f"blocks.{layer}.attn.mask"] = torch.ones(4, 4, dtype=torch.bool)
        state[f"blocks.{layer}.attn.IGNORE"] = torch.tensor(-1e5)
    torch.save(state, folder / "model_final.pth")
    return folder


@pytest.mark.torch
def test_transformer_lens_models_are_converted(lm_dir, tmp_path):
    source = transformer_lens(lm_dir, tmp_path / "source")
    with refused("path", "pickle (model_final.pth)", "convert_lm"):
        gsae_jax.load_lm(source)
    convert(str(source), tmp_path / "out")
    tokens = np.arange(20).reshape(2, 10)
    lm, original = gsae_jax.load_lm(tmp_path / "out"), gsae_jax.load_lm(lm_dir)
    np.testing.assert_array_equal(lm.logits(tokens), original.logits(tokens))
    assert lm.tokenizer("import os")["input_ids"] == original.tokenizer("import os")["input_ids"]
    with refused("out", f"{tmp_path / 'out'} exists"):
        convert(str(source), tmp_path / "out")


@pytest.mark.torch
def test_a_conversion_needs_a_tokenizer(lm_dir, tmp_path):
    source = transformer_lens(lm_dir, tmp_path / "source", tokenizer_name="")
    with refused("tokenizer", f"{source} has no tokenizer", "hub name"):
        convert(str(source), tmp_path / "out")
    convert(str(source), tmp_path / "out", str(lm_dir))
    assert len(gsae_jax.load_lm(tmp_path / "out").tokenizer) == 4096


@pytest.mark.torch
@pytest.mark.parametrize("case", ["gpt_neox", "mistral"])
def test_hugging_face_pickles_are_converted(case, tmp_path):
    import torch

    source = tmp_path / case
    shutil.copytree(FIXTURES / case, source)
    weight_map = {}
    for number, file in enumerate(shards(source)):
        state = {name: torch.tensor(value) for name, value in safetensors.numpy.load_file(file).items()}
        torch.save(state, source / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(state, f"pytorch_model-{number}.bin")
        file.unlink()
    (source / INDEX).unlink(missing_ok=True)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(str(source), tmp_path / "out")
    assert len(shards(tmp_path / "out")) == len(set(weight_map.values()))
    with np.load(source / "expected.npz") as expected:
        ours = gsae_jax.load_lm(tmp_path / "out").logits(expected["tokens"], expected["mask"])
        np.testing.assert_allclose(ours[0], expected["logits"][0], atol=1e-4)


class Malicious:
    def __reduce__(self):
        return print, ("this code ran",)


@pytest.mark.torch
def test_pickles_that_are_not_tensors_are_refused(lm_dir, tmp_path, capsys):
    import torch

    source = transformer_lens(lm_dir, tmp_path / "source")
    torch.save({"blocks": Malicious()}, source / "model_final.pth")
    with refused("source", "model_final.pth", "pickle of tensors alone"):
        convert(str(source), tmp_path / "out")
    assert "this code ran" not in capsys.readouterr().out
    torch.save({"epoch": 3, "state": {}}, source / "model_final.pth")
    with refused("source", "model_final.pth", "more than a dictionary of tensors", "state_dict"):
        convert(str(source), tmp_path / "out")
    torch.save({"embed.W_E": torch.zeros(2, 2)}, source / "model_final.pth")
    with refused("source", str(source), "config.json", "blocks.0.attn.W_Q is missing"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "file").write_text("")
    with refused("out", f"{tmp_path / 'file' / 'out'} cannot be written"):
        convert(str(source), tmp_path / "file" / "out")


def test_conversion_needs_torch_and_a_model_we_have(lm_dir, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(dict.fromkeys(gelu.SIZES, 8) | {"act_fn": "solu_ln"}))
    (source / "model_final.pth").write_bytes(b"")
    with refused("source", "act_fn = 'solu_ln'", "'gelu'"):
        convert(str(source), tmp_path / "out")
    (source / "config.json").write_text(json.dumps(dict.fromkeys(gelu.SIZES, 8)))
    monkeypatch.setitem(sys.modules, "torch", None)
    with refused("source", "pickle", "pip install 'gsae_jax[torch]'"):
        convert(str(source), tmp_path / "out", str(lm_dir))
    (source / "model_final.pth").unlink()
    with refused("source", "one pickle", "pytorch_model.bin.index.json", "none"):
        convert(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fingerprint_is_of_what_the_model_computes(lm_dir, tmp_path, monkeypatch):
    """Not of how its tensors lie in files, nor of who wrote its config.json."""
    shutil.copytree(lm_dir, tmp_path / "lm")
    file, settings = tmp_path / "lm" / "model.safetensors", tmp_path / "lm" / "config.json"
    tensors = safetensors.numpy.load_file(file)
    names = sorted(tensors)

    def prints():
        return Checkpoint.open(tmp_path / "lm").fingerprint()

    before = prints()
    assert before == Checkpoint.open(lm_dir).fingerprint()
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"transformers_version": "9", "architectures": []})
    )
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, held in parts.items():
        safetensors.numpy.save_file({tensor: tensors[tensor] for tensor in held}, tmp_path / "lm" / name)
    index = {tensor: name for name, held in parts.items() for tensor in held}
    (tmp_path / "lm" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert prints() == before
    (tmp_path / "lm" / "model.safetensors.index.json").unlink()
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"layer_norm_eps": 0.1}))
    assert {part for part, value in prints().items() if value != before[part]} == {"config.json"}
    for name in names:  # one number of each tensor
        changed = tensors[name].copy()
        changed.flat[changed.size // 2] += 1
        safetensors.numpy.save_file(tensors | {name: changed}, file)
        assert prints()["weights"] != before["weights"], name
    # Of large checkpoints some pages, the first and the last among them.
    monkeypatch.setattr(weights, "WHOLE", 0)
    monkeypatch.setattr(weights, "PAGE", 64)
    safetensors.numpy.save_file(tensors, file)
    before, name = prints(), "embed.W_E"
    assert tensors[name].nbytes > 64 * 64
    for at in (0, -1):
        changed = tensors[name].copy()
        changed.flat[at] += 1
        safetensors.numpy.save_file(tensors | {name: changed}, file)
        assert prints()["weights"] != before["weights"]
