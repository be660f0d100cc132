"""Formats of other libraries on small random SAEs: round trips, and what is refused."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import export as export_lib
from gsae_jax import sae_loading
from gsae_jax.formats import files, jumprelu
from gsae_jax.lms import checkpoints
from gsae_jax.lms import sites as sites_lib
from gsae_jax.measuring import evaluate, evaluate_saes
from gsae_jax.saes import gated, parameters, relu, trained
from gsae_jax.training import loop
from gsae_jax.training.stacks import Stack
from tests.refusals import refused
from tests.test_saes import away_from_init

D, F = 12, 40
SITE = "blocks.3.hook_resid_post"


def make(module, **options):
    config = module.Config(D, F, **options)
    return trained.SAE(
        name="stack_2",
        architecture=module.__name__.rpartition(".")[2],
        config=config,
        site=SITE,
        params=away_from_init(module, config),
        l1_coefficient=0.01,
        learning_rate=3e-4,
        seed=7,
        scale=1.5,
        norm_limit=20.0,
        metadata={"model_name": "small", "context_size": 16, "prepend_bos": True, "dataset_path": "texts"},
    )


SAES = {
    "gated": lambda: make(gated),
    "fixed": lambda: make(gated, use_r_mag=False, freeze_aux_decoder=False),
    "relu": lambda: make(relu),
    "jumprelu": lambda: jumprelu.form(make(gated)),
}
FORMATS = ["saelens", "jumprelu", "gemma_scope", pytest.param("dictionary_learning", marks=pytest.mark.torch)]


def inputs():
    return jax.random.normal(jax.random.key(5), (200, D)) + 0.5


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", SAES)
def test_an_export_is_read_as_the_same_sae_and_written_as_the_same_bytes(tmp_path, format, kind):
    sae, x = SAES[kind](), inputs()
    if (format, kind) == ("dictionary_learning", "relu"):  # else its features are others there
        sae = dataclasses.replace(sae, params=parameters.with_unit_rows(sae.functions, sae.params))
    sae.save(tmp_path / "first", format)
    ((name, back),) = gsae_jax.load(tmp_path / "first").items()
    assert name == back.name == "stack_2"
    told = ("site", "l1_coefficient", "learning_rate", "seed", "scale", "norm_limit")
    assert [getattr(back, field) for field in told] == [getattr(sae, field) for field in told]
    assert sae.metadata.items() <= back.metadata.items()
    if format not in ("jumprelu", "gemma_scope"):
        assert (back.architecture, back.config) == (sae.architecture, sae.config)
    f = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(np.asarray(back.encode(x)) > 0, f > 0)
    np.testing.assert_allclose(back.encode(x), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(x), sae(x), rtol=1e-5, atol=1e-5)
    back.save(tmp_path / "second", format)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second"}
    for path in (tmp_path / "first").glob("*.npz"):
        assert {entry.date_time for entry in zipfile.ZipFile(path).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_files_have_the_names_that_their_readers_know(tmp_path):
    sae = make(gated)
    sae.save(tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"cfg.json", "sae_weights.safetensors", "README.md"}
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "sae_weights.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {
        "W_enc": (D, F),
        "W_dec": (F, D),
        "b_dec": (D,),
        "b_gate": (F,),
        "r_mag": (F,),
        "b_mag": (F,),
    }
    assert (tmp_path / "a" / "README.md").read_text().startswith("---\nlibrary_name: saelens\n")
    sae.save(tmp_path / "b", "gemma_scope")
    with np.load(tmp_path / "b" / "params.npz") as arrays:
        assert set(arrays) == {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
        assert (
            arrays["threshold"].min() == np.finfo(np.float32).tiny
        )  # which has a logarithm, and lets pass what 0 does
    make(relu).save(tmp_path / "c", "jumprelu")
    cfg = json.loads((tmp_path / "c" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["apply_b_dec_to_input"]) == ("jumprelu", False)


def test_heads_are_kept_apart_where_transformerlens_has_them_so(tmp_path):
    dataclasses.replace(make(relu), site="blocks.0.attn.hook_z").save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    assert gsae_jax.load(tmp_path / "a")["stack_2"].site == "blocks.0.attn.hook_z"


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    sae = make(gated)
    for format, field, fact in (("saelens", "stack_2", "tie_encoder"), ("jumprelu", "stack_2.tie_encoder", "False")):
        with refused(field, fact):
            make(gated, tie_encoder=False).save(tmp_path / "a", format)
        spoiled = sae.params | {"b_gate": sae.params["b_gate"].at[0].set(math.nan)}
        with refused("stack_2", "b_gate", "not finite"):
            dataclasses.replace(sae, params=spoiled).save(tmp_path / "a", format)
    with refused("format", "'saelense'", "did you mean 'saelens'"):
        sae.save(tmp_path / "a", "saelense")
    with refused("", "gs://bucket/a", "not a local path"):
        sae.save("gs://bucket/a")
    (tmp_path / "file").touch()
    with refused("", f"{tmp_path / 'file' / 'a'} cannot be written"):
        sae.save(tmp_path / "file" / "a")
    with refused("", "cannot be written", "a" * 300):
        sae.save(tmp_path / "new" / "parents" / ("a" * 300) / "b")

    def fails(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", fails)
        for path in (tmp_path / "a", tmp_path / "new" / "parents" / "a"):
            with refused("", f"{path} cannot be written", "no space left"):
                sae.save(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    sae.save(tmp_path / "a")
    before = contents(tmp_path / "a")
    with refused("", f"{tmp_path / 'a'} exists"):
        sae.save(tmp_path / "a", "gemma_scope")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("format", FORMATS)
def test_an_architecture_of_ones_own_is_refused(tmp_path, format):
    sae = dataclasses.replace(make(relu), architecture="tanh")
    with refused("stack_2", "'tanh'"):
        sae.save(tmp_path / "a" / "b", format)
    assert not list(tmp_path.iterdir())
    dataclasses.replace(sae, architecture="relu").save(tmp_path / "a" / "b", format)


# What a file may lack or have too much of without being refused: it says nothing of the function.
DESCRIPTIONS = {"hook_name", "model_name", "context_size", "prepend_bos", "dataset_path"}


def leaves(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def changed(tree, path, change):
    """A copy in which one field is dropped, or has another value."""
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    if change == "dropped":
        del inner[path[-1]]
    elif change == "renamed":
        inner[path[-1] + "_"] = inner.pop(path[-1])
    elif change == "flipped":
        inner[path[-1]] = not inner[path[-1]]
    else:
        inner[path[-1]] = ["of", "another", "type"] if change == "list" else None
    return tree


@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu"])
@pytest.mark.parametrize("format", ["saelens", "gemma_scope", FORMATS[-1]])
def test_fields_that_are_missing_or_wrong_are_refused(tmp_path, format, kind):
    SAES[kind]().save(tmp_path / "a", format)
    (file,) = (tmp_path / "a").glob("*.json")
    whole = json.loads(file.read_text())
    count = 0
    for path in leaves(whole):
        for change in ("dropped", "renamed", "list", "null"):
            # Of what describes, only a wrong type is wrong; and unknown numbers are null.
            mild = path[-1] in DESCRIPTIONS | {"lm_name", "submodule_name", "layer", "ctx_len"}
            number = ("l1_coefficient", "learning_rate", "seed", "scale", "norm_limit")
            if (mild and change != "list") or (path[-1] in number and change == "null"):
                continue
            if path in (("metadata", "gsae_jax"), ("gsae_jax",)) and format != "gemma_scope" and change != "list":
                continue  # then it is as one that was not exported by us
            optional = path[-2:-1] == ("options",) or path[-1] in ("run", "stack", "index")
            if optional and change == "dropped":
                continue  # then it has its default, as in exports of a version before the field
            file.write_text(json.dumps(changed(whole, path, change)))
            with refused(str(file), path[-1]) as caught:
                gsae_jax.load(tmp_path / "a")
            assert "\n" not in str(caught.value)
            count += 1
    assert count > 30
    twice = json.dumps(whole)[:-1] + ', "metadata": {}, "metadata": {}}'
    for text in ("", "[]", "{" * 200_000, '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', "\udcff", twice):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with refused("", f"{file} is not a JSON object"):
            gsae_jax.load(tmp_path / "a")


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("format", ["saelens", "gemma_scope", FORMATS[-1]])
def test_a_switch_that_is_flipped_is_refused_or_leaves_the_function(tmp_path, format, kind):
    sae, x = SAES[kind](), inputs()
    if format == "gemma_scope":
        sae = jumprelu.form(sae)
    sae.save(tmp_path / "a", format)
    (file,) = (tmp_path / "a").glob("*.json")
    whole = json.loads(file.read_text())
    f, flipped = np.asarray(gsae_jax.load(tmp_path / "a")["stack_2"].encode(x)), set()
    for path in leaves(whole):
        inner = whole
        for key in path:
            inner = inner[key]
        if not isinstance(inner, bool) or path == ("apply_b_dec_to_input",):  # which says what the biases are for
            continue
        flipped.add(path[-1])
        file.write_text(json.dumps(changed(whole, path, "flipped")))
        if path[-1] == "tie_encoder" or (path[-1] == "use_r_mag" and kind == "gated"):
            with refused(str(tmp_path / "a"), path[-1]):
                gsae_jax.load(tmp_path / "a")
        else:
            np.testing.assert_array_equal(gsae_jax.load(tmp_path / "a")["stack_2"].encode(x), f)
    options = {field.name for field in dataclasses.fields(gated.Config)} - {"d_in", "width", "dtype"}
    assert flipped == {"prepend_bos"} | (options if sae.architecture == "gated" else set())


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu"])
def test_rows_of_a_decoder_are_made_unit_as_dictionary_learning_does(tmp_path, kind):
    """Of an AutoEncoder only; with float64 norms, in what it trained and in what we write for it."""
    sae, x = SAES[kind](), inputs()
    sae.save(tmp_path / "ours", "dictionary_learning")
    norms = np.linalg.norm(np.asarray(sae.params["W_dec"], np.float64), axis=-1)
    assert np.abs(norms - 1).max() > 0.1
    if kind == "relu":
        theirs = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec"}
        written = load_tensors(tmp_path / "ours" / "ae.pt")
        np.testing.assert_allclose(np.linalg.norm(written["decoder.weight"], axis=0), 1, rtol=1e-6)
        raw = {name: np.asarray(sae.params[ours]) for name, ours in theirs.items()}
        save_tensors(tmp_path / "raw.pt", {n: value.T if n.endswith("weight") else value for n, value in raw.items()})
        (tmp_path / "theirs").mkdir()
        (tmp_path / "raw.pt").rename(tmp_path / "theirs" / "ae.pt")
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": config["trainer"], "buffer": {}}))
    for folder in (tmp_path / "ours", tmp_path / "theirs") if kind == "relu" else (tmp_path / "ours",):
        (back,) = gsae_jax.load(folder).values()
        f = np.asarray(sae.encode(x), np.float64) * (norms if kind == "relu" else 1)
        np.testing.assert_allclose(back.encode(x), f, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(back(x), sae(x), rtol=1e-5, atol=1e-5)


def save_tensors(file, tensors):
    if file.suffix == ".npz":
        np.savez(file, **tensors)
    elif file.suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
    else:
        import torch

        torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, file)


def load_tensors(file):
    if file.suffix == ".npz":
        return dict(np.load(file))
    if file.suffix == ".safetensors":
        return safetensors.numpy.load_file(file)
    import torch

    return {name: value.numpy() for name, value in torch.load(file, weights_only=True).items()}


@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu"])
@pytest.mark.parametrize("format", ["saelens", "gemma_scope", FORMATS[-1]])
def test_tensors_that_are_missing_or_wrong_are_refused(tmp_path, format, kind):
    SAES[kind]().save(tmp_path / "a", format)
    file = next(path for path in (tmp_path / "a").iterdir() if path.suffix in (".npz", ".safetensors", ".pt"))
    whole = load_tensors(file)
    save_tensors(file, whole)
    gsae_jax.load(tmp_path / "a")  # as they are
    for name, value in whole.items():
        spoiled = np.array(value)
        spoiled.flat[3] = math.nan
        for what, tensors in {
            "is missing": {other: kept for other, kept in whole.items() if other != name},
            "is not of this architecture": {other + "_" * (other == name): kept for other, kept in whole.items()},
            "has shape": whole | {name: value.T if value.ndim == 2 else value[:-1]},
            "has shape ": whole | {name: value[None]},
            "is of type": whole | {name: value.astype(np.float64)},
            "is of type ": whole | {name: value.astype(np.int32)},
            "is not finite": whole | {name: spoiled},
            "is not finite ": whole | {name: np.where(np.isnan(spoiled), np.float32(math.inf), value)},
        }.items():
            save_tensors(file, tensors)
            with refused(str(file)) as caught:
                gsae_jax.load(tmp_path / "a")
            message = caught.value.problem
            # Gemma Scope's sizes are those of its biases, so that there another tensor may not fit.
            named = r"\w+" if format == "gemma_scope" and "shape" in what else re.escape(name)
            assert re.search(rf"the tensor {named}_? {what.strip()}", message), (what, message)
    save_tensors(file, whole | {"W_skip": whole["W_dec" if "W_dec" in whole else "decoder.weight"]})
    with refused(str(file), "tensor W_skip", "not of this architecture"):
        gsae_jax.load(tmp_path / "a")
    save_tensors(file, whole)
    for cut in (10, file.stat().st_size // 2, file.stat().st_size - 1):
        short = file.read_bytes()[:cut]
        file.write_bytes(short)
        with refused(str(file), "cannot be read"):
            gsae_jax.load(tmp_path / "a")
        save_tensors(file, whole)


def saelens_with(tmp_path, change=None, tensors=None, kind="gated"):
    """A SAELens folder with some of its fields and tensors replaced."""
    SAES[kind]().save(tmp_path / "a")
    file = tmp_path / "a" / "cfg.json"
    tree = json.loads(file.read_text())
    metadata = tree["metadata"] | (change or {}).get("metadata", {})
    file.write_text(json.dumps(tree | (change or {}) | {"metadata": metadata}))
    weights = tmp_path / "a" / "sae_weights.safetensors"
    save_tensors(weights, safetensors.numpy.load_file(weights) | (tensors or {}))
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"normalize_activations": "layer_norm"}, ('normalize_activations "layer_norm"', "not supported")),
        ({"normalize_activations": "expected_average_only_in"}, ("normalize_activations", "not supported")),
        ({"architecture": "topk"}, ('architecture "topk"', "not supported", '"gated", "standard", "jumprelu"')),
        ({"architecture": "topk", "dtype": 3, "d_in": None}, ('architecture "topk"', "not supported")),
        ({"d_in": True}, ("d_in is true", "int")),
        ({"d_sae": F + 1}, ("tensor W_enc", "[12, 40], not [12, 41]")),
        ({"d_in": 10**18}, ("tensor W_enc", f"[12, 40], not [{10**18}, 40]")),
        ({"dtype": "bfloat16"}, ("tensor W_dec", "float32, not bfloat16")),
        ({"dtype": "float64"}, ('dtype is "float64"', '"float32" or "float16" or "bfloat16"')),
        ({"rescale_acts_by_decoder_norm": True}, ("rescale_acts_by_decoder_norm", "not a field")),
        ({"metadata": {"hook_head_index": 3}}, ("metadata.hook_head_index is 3", "null")),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, ("SAELens before 6", "SAELens 6", "save_model")),
        ({"metadata": {"gsae_jax": {}}}, ("metadata.gsae_jax.name is missing",)),
    ],
)
def test_what_we_do_not_have_is_refused(tmp_path, change, facts):
    path = saelens_with(tmp_path, change)
    with refused(str(path / ("sae_weights.safetensors" if "tensor" in facts[0] else "cfg.json")), *facts):
        gsae_jax.load(path)


EARLIER_SAELENS = {  # of SAELens 3
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "texts",
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "device": "cpu",
    "sae_lens_training_version": "3.5.0",
}


@pytest.mark.parametrize("change", [{}, {"normalize_activations": "layer_norm"}, {"d_in": "x"}, {"hook_layer": None}])
def test_earlier_saelens_gets_one_sentence_whatever_else_is_wrong(tmp_path, change):
    path = saelens_with(tmp_path)
    (path / "cfg.json").write_text(json.dumps(EARLIER_SAELENS | change))
    with refused(str(path / "cfg.json"), "SAELens before 6", "save_model") as error:
        gsae_jax.load(path)
    assert not any(name in error.value.problem for name in change)
    for topk in ({"architecture": "topk"}, {"activation_fn_str": "topk"}):  # which it would be there as well
        (path / "cfg.json").write_text(json.dumps(EARLIER_SAELENS | topk))
        with refused(str(path / "cfg.json"), '"topk"', "not supported"):
            gsae_jax.load(path)


def test_other_folders_are_told_for_what_they_are(tmp_path, lm_dir):
    sparsify = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32, "d_in": D, "transcode": False}
    for name in ("layers.0", "layers.1"):
        (tmp_path / "sparsify" / name).mkdir(parents=True)
        (tmp_path / "sparsify" / name / "cfg.json").write_text(json.dumps(sparsify))
        (tmp_path / "sparsify" / name / "sae.safetensors").touch()
    (tmp_path / "sparsify" / "config.json").write_text(json.dumps({"sae": sparsify, "batch_size": 32}))
    saelens_with(tmp_path / "stray")
    (tmp_path / "stray" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    lfs = saelens_with(tmp_path / "lfs")
    (lfs / "sae_weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "trained").mkdir()
    trainer = {"dict_class": "AutoEncoderTopK", "k": 32}
    (tmp_path / "trained" / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    (tmp_path / "trained" / "ae.pt").touch()

    for path, field, *facts in (
        ("sparsify", "sparsify/layers.0", "sparsify", "top-k", "not supported"),
        ("sparsify/layers.1", "sparsify/layers.1", "sparsify", "top-k"),
        ("empty", "", f"{tmp_path / 'empty'} holds no run", "config.json is not", "no SAE"),
        ("lfs", "", "sae_weights.safetensors is a git-lfs pointer"),
        ("trained", "trained/config.json", 'dict_class "AutoEncoderTopK"', "not supported"),
        ("nowhere", "", "nowhere is not here"),
        ("~nobody-is-called-so/x", "", "is not here"),
        (lm_dir, lm_dir, "language model", "no SAE"),
    ):
        with refused(field and str(tmp_path / field), *facts) as error:
            gsae_jax.load(tmp_path / path)
        assert not re.search("copy or save|--workdir|seed", str(error.value))
    assert list(gsae_jax.load(tmp_path / "stray")) == ["stack_2"]


def test_a_name_on_the_hub_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("google/gemma-scope-2b-pt-res", "google/gemma-scope-2b-pt-res/layer_20/width_16k"):
        with refused("", name, "hub", "snapshot_download('google/gemma-scope-2b-pt-res')"):
            gsae_jax.load(name)
    with refused("", "google/x is not here"):
        sae_loading._members_of("google/x:gated")


@pytest.mark.parametrize(
    "change",
    [
        {"name": name}
        for name in ("../elsewhere", ".hidden", " x", "", "a/b", "a\\b", "\x1b[2Ja", "a\nb", "a" * 121, "a|b")
    ]
    + [{name: -1} for name in ("l1_coefficient", "learning_rate", "seed", "scale", "norm_limit")]
    + [{name: 10**400} for name in ("l1_coefficient", "seed", "norm_limit")]
    + [{"scale": 0}, {"l1_coefficient": 1e39}, {"seed": 2**31}],
    ids=lambda change: json.dumps(change)[:30],
)
def test_a_record_has_a_name_for_folders_and_numbers_of_a_run(tmp_path, change):
    told = json.loads((saelens_with(tmp_path / "0") / "cfg.json").read_text())["metadata"]["gsae_jax"]
    gsae_jax.load(saelens_with(tmp_path / "1", {"metadata": {"gsae_jax": told | {"name": "Ab_1 =+.-"}}}))
    path = saelens_with(tmp_path, {"metadata": {"gsae_jax": told | change}})
    (name,) = change
    with refused(str(path / "cfg.json"), f"gsae_jax.{name} is ", "it has" if name == "name" else "not from") as caught:
        gsae_jax.load(path)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["gated", "relu", "jumprelu"])
def test_inputs_that_are_centred_otherwise(tmp_path, kind):
    """In float64: by b_dec where SAELens centres and our JumpReLU does not, and the reverse."""
    sae, x = SAES[kind](), np.asarray(inputs(), np.float64)
    centred = kind == "jumprelu"
    (back,) = gsae_jax.load(saelens_with(tmp_path, {"apply_b_dec_to_input": centred}, kind=kind)).values()
    p = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    c = x - p["b_dec"] if centred else x
    if kind == "gated":
        pi = c @ p["W_gate"]
        f = np.where(pi + p["b_gate"] > 0, np.maximum(np.exp(p["r_mag"]) * pi + p["b_mag"], 0), 0)
    else:
        pi = c @ p["W_enc"] + p["b_enc"]
        f = np.where(pi > p.get("threshold", 0), pi, 0)
    np.testing.assert_allclose(back.encode(x), f, rtol=1e-5, atol=1e-5)
    assert np.abs(sae.encode(x) - f).max() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path, dtype):
    path = saelens_with(tmp_path)
    file = path / "sae_weights.safetensors"
    tensors = {name: value.astype(jnp.dtype(dtype)) for name, value in safetensors.numpy.load_file(file).items()}
    path = saelens_with(tmp_path / "half", {"dtype": dtype}, tensors)
    (sae,) = gsae_jax.load(path).values()
    assert {value.dtype for value in sae.params.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(sae.params["W_gate"], tensors["W_enc"].astype(np.float32))


LLAMASCOPIUM = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": F / D,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "hook_point_in": SITE,
    "hook_point_out": SITE,
    "use_glu_encoder": False,
}


def llamascopium(folder, **changes):
    """A folder as OpenMOSS' library writes it, and its tensors."""
    config = LLAMASCOPIUM | changes
    random = np.random.default_rng(0)
    shapes = {
        "W_E": (D, F),
        "b_E": (F,),
        "W_D": (F, D),
        "b_D": (D,),
        "activation_function.log_jumprelu_threshold": (F,),
    }
    if config["act_fn"] == "relu":
        del shapes["activation_function.log_jumprelu_threshold"]
    tensors = {name: random.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    norm = np.float32(5.0 if config["norm_activation"] == "dataset-wise" else math.nan)  # it is not set otherwise
    folder.mkdir()
    file = folder / "sae_weights.safetensors"
    safetensors.numpy.save_file(tensors | {f"dataset_average_activation_norm.{SITE}": np.array(norm)}, file)
    (folder / "config.json").write_text(json.dumps(config))
    return {name.rpartition(".")[2]: np.asarray(value, np.float64) for name, value in tensors.items()}


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_saes_of_llamascopium(tmp_path, act_fn, norm_activation, by_norm):
    """Against its steps in float64: normalise, encode, decode, and back."""
    switches = {"act_fn": act_fn, "norm_activation": norm_activation, "sparsity_include_decoder_norm": by_norm}
    t = llamascopium(tmp_path / "a", **switches)
    sae = gsae_jax.load(tmp_path / "a")["a_0"]
    assert (sae.architecture, sae.site) == (act_fn, SITE)
    x = np.asarray(inputs(), np.float64)
    scale = math.sqrt(D) / 5 if norm_activation == "dataset-wise" else 1
    pi = scale * x @ t["W_E"] + t["b_E"]
    threshold = np.exp(t["log_jumprelu_threshold"]) if act_fn == "jumprelu" else 0
    f = np.where(pi * (np.linalg.norm(t["W_D"], axis=-1) if by_norm else 1) > threshold, pi, 0)
    assert 0.02 < (f > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(x), f / scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), (f @ t["W_D"] + t["b_D"]) / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"act_fn": "topk"}, ('act_fn "topk"', "not supported", '"relu", "jumprelu"')),
        ({"use_glu_encoder": True}, ("use_glu_encoder true", "not supported")),
        ({"norm_activation": "token-wise"}, ("norm_activation", "not supported")),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, ("hook_point_in and hook_point_out differ", "transcoder")),
        ({"something": 1}, ("something is not known",)),
        ({"use_decoder_bias": False}, ("tensor b_D", "not of this architecture")),
        ({"expansion_factor": 2}, ("tensor W_E", "shape")),
        ({"expansion_factor": 1e308}, ("d_model and expansion_factor", "above 0")),
        ({"d_model": 10**400}, ("d_model and expansion_factor", "above 0")),
        ({"sae_type": "crosscoder"}, ('sae_type "crosscoder"', "not supported")),
    ],
)
def test_what_llamascopium_has_and_we_do_not_is_refused(tmp_path, change, facts):
    llamascopium(tmp_path / "a", **change)
    file = "sae_weights.safetensors" if "tensor" in facts[0] else "config.json"
    with refused(str(tmp_path / "a" / file), *facts):
        gsae_jax.load(tmp_path / "a")


def test_an_sae_that_is_not_ours_has_the_name_of_its_folder(tmp_path):
    for name in ("layer_12", "width 16k", "(é) \x1b[1m_3"):
        make(gated).save(tmp_path / "saes" / name, "gemma_scope")
        (tmp_path / "saes" / name / "gsae_jax.json").unlink()
    saes = gsae_jax.load(tmp_path / "saes")
    assert list(saes) == ["_é_ __1m_3", "layer_12", "width 16k_0"]
    sae = saes["layer_12"]
    assert (sae.site, sae.seed, sae.norm_limit, sae.metadata) == ("", None, math.inf, {})
    assert math.isnan(sae.l1_coefficient)
    (same,) = gsae_jax.load(tmp_path / "saes" / "layer_12" / "params.npz").values()
    assert same.name == "layer_12"
    make(gated).save(tmp_path / "saes" / "x_1")
    make(relu).save(tmp_path / "saes" / "x_2")
    with refused(str(tmp_path / "saes" / "x_2"), "second SAE called 'stack_2'", "one by one"):
        gsae_jax.load(tmp_path / "saes")


def test_what_is_no_sae_among_several_is_named(tmp_path, capsys):
    for name, folder in (("a", "a"), ("b", "b"), ("c", ".export-x")):
        dataclasses.replace(make(gated), name=name).save(tmp_path / folder)
    (tmp_path / ".export-x" / "sae_weights.safetensors").unlink()  # an export that was killed
    assert list(gsae_jax.load(tmp_path)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")
    (tmp_path / "b" / "cfg.json").unlink()
    assert list(gsae_jax.load(tmp_path)) == ["a"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path} also has what is no SAE in a known format, and is left out: b\n"
    )


def header(shape, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("EleutherAI/pythia-14m", "--model EleutherAI/pythia-14m"),
        ("pythia-14m", "--model with its directory or hub name"),
        ("gelu-1l-stdlib", None),
        (None, None),
    ],
)
def test_an_sae_of_another_model_is_not_measured_on_the_embedded_one(tmp_path, name, wanted):
    sae = dataclasses.replace(make(relu), site="blocks.0.hook_mlp_out", metadata={"model_name": name})
    sae.save(tmp_path / "a")
    expected = ("--model", "stack_2", f"'{name}'", wanted) if wanted else ("stack_2", "width 12", "width 256")
    with refused(*expected):
        evaluate_saes([str(tmp_path / "a")], str(tmp_path / "report"), tokens=128)
    assert not (tmp_path / "report").exists()


def test_what_metadata_calls_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = config_lib.Data("text", "some/texts", "text", "", "", "train", "test", "", 16, True)
    for path, revision, name in (
        ("", "", "gelu-1l-stdlib"),
        (str(checkpoints.EMBEDDED), "", "gelu-1l-stdlib"),
        ("EleutherAI/pythia-14m", "f" * 40, "EleutherAI/pythia-14m"),
        ("/models/small/", "", "small"),
        ("models/small", "", "small"),
        ("~/small", "", "small"),
        (".", "", tmp_path.name),
    ):
        lm = config_lib.LM(path, "float32", revision)
        assert sae_loading.names(lm, data) == {"model_name": name, "dataset_path": "texts"}


@pytest.mark.parametrize("attack", ["huge", "compressed", "objects", "twice", "long", "negative"])
def test_an_npz_file_cannot_ask_for_more_than_it_is(tmp_path, attack):
    make(gated).save(tmp_path / "a", "gemma_scope")
    file = tmp_path / "a" / "params.npz"
    arrays = dict(np.load(file))
    if attack == "compressed":
        np.savez_compressed(file, **arrays)
    elif attack == "objects":
        np.savez(file, **arrays | {"W_enc": np.array([{}], object)})
    else:
        with zipfile.ZipFile(file, "w") as archive:
            shape = {"huge": (10**9, 10**9), "negative": (-10, D), "long": (F, D), "twice": (F, D)}[attack]
            data = header(shape) + arrays["W_dec"].tobytes() + bytes(attack == "long")
            archive.writestr("W_dec.npy", data)
            if attack == "twice":
                with pytest.warns(UserWarning, match="Duplicate name"):
                    archive.writestr("W_dec.npy", data)
            for name in set(arrays) - {"W_dec"}:
                archive.writestr(f"{name}.npy", header(arrays[name].shape) + arrays[name].tobytes())
    with refused(str(file), "cannot be read as an npz file"):
        gsae_jax.load(tmp_path / "a")


@pytest.mark.parametrize("attack", ["long header", "huge tensor", "overlap"])
def test_a_safetensors_file_cannot_ask_for_more_than_it_is(tmp_path, attack):
    path = saelens_with(tmp_path)
    file = path / "sae_weights.safetensors"
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    if attack == "long header":
        file.write_bytes(struct.pack("<Q", 10**15) + raw[8:])
    else:
        if attack == "huge tensor":
            head["W_enc"] |= {"shape": [10**9, 10**9]}
        else:
            head["W_dec"]["data_offsets"] = head["W_enc"]["data_offsets"]
        text = json.dumps(head).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    with refused(str(file), "cannot be read"):
        gsae_jax.load(path)


@pytest.mark.torch
@pytest.mark.parametrize("attack", ["code", "expanded", "compressed", "list"])
def test_a_file_of_torch_can_neither_run_code_nor_ask_for_more_than_it_is(tmp_path, attack):
    import torch

    make(gated).save(tmp_path / "a", "dictionary_learning")
    file = tmp_path / "a" / "ae.pt"
    state = torch.load(file, weights_only=True)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    if attack == "code":
        torch.save({**state, "r_mag": Code()}, file)
    elif attack == "list":
        torch.save(list(state.values()), file)
    elif attack == "expanded":
        torch.save({**state, "r_mag": torch.zeros(1).expand(10**15)}, file)
    else:
        with zipfile.ZipFile(file) as old:
            parts = {entry.filename: old.read(entry) for entry in old.infolist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in parts.items():
                new.writestr(name, data)
    with refused(str(file), "cannot be read as weights of torch"):
        gsae_jax.load(tmp_path / "a")
    assert not (tmp_path / "ran").exists()


def test_dictionary_learning_says_that_it_needs_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with refused("dictionary_learning", "torch", "`pip install 'gsae_jax[torch]'`"):
        make(gated).save(tmp_path / "a", "dictionary_learning")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "unknown", "plain", "normed"),
    [
        ("model.layers.1", *["blocks.1.hook_resid_post"] * 3),
        ("model.model.layers.01", *["blocks.1.hook_resid_post"] * 3),
        ("layers.5", *["blocks.5.hook_resid_post"] * 3),
        ("gpt_neox.layers.3.mlp", *["blocks.3.hook_mlp_out"] * 3),
        ("gpt_neox.layers.3.attention", *["blocks.3.hook_attn_out"] * 3),
        ("transformer.h.0", *["blocks.0.hook_resid_post"] * 3),
        ("transformer.h.0.mlp", *["blocks.0.hook_mlp_out"] * 3),
        ("transformer.h.0.attn.output[0]", *["blocks.0.hook_attn_out"] * 3),
        ("transformer.h.0.mlp.act", *["blocks.0.mlp.hook_post"] * 3),
        ("model.layers.2.mlp", None, "blocks.2.hook_mlp_out", None),
        ("model.layers.2.self_attn", None, "blocks.2.hook_attn_out", None),
        ("model.layers.2.post_feedforward_layernorm", None, None, "blocks.2.hook_mlp_out"),
        ("model.layers.2.post_attention_layernorm", None, None, "blocks.2.hook_attn_out"),
        ("resid_post_layer_8", *["blocks.8.hook_resid_post"] * 3),
        ("blocks.4.hook_resid_pre", *["blocks.4.hook_resid_pre"] * 3),
        ("blocks.4.attn.hook_z.hook_sae_input", *["blocks.4.attn.hook_z"] * 3),
        ("blocks.4.hook_out", *["blocks.4.hook_resid_post"] * 3),
        ("blocks." + "9" * 9000 + ".hook_in", *["blocks." + "9" * 9000 + ".hook_resid_pre"] * 3),
        ("model.layers.1.input_layernorm", None, None, None),
        ("model.layers.x", None, None, None),
        ("", None, None, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_others_call_a_site(name, unknown, plain, normed):
    """By where the families have their taps; a norm behind the MLP, as in Gemma 2, makes another place of it."""
    assert [sites_lib.hook_name(name, after) for after in (None, False, True)] == [unknown, plain, normed]


def test_fields_are_compared_by_type():
    tree = {"a": 1, "b": True, "c": None, "d": 1.0}
    assert files.misfits(tree, {"a": (int,), "b": (True,), "c": (str, None), "d": (float,), "e": (int, ...)}) == []
    assert len(files.misfits(tree, {"a": (True,), "b": (int,), "c": (str,), "d": (int,), "e": (int,)})) == 5
    assert files.misfits([], {}, "trainer.") == ["trainer is not an object"]


def test_a_stack_starts_from_an_sae_that_was_trained_elsewhere(experiment, tmp_path):
    """Its decoder rows made unit; a JumpReLU one as the gated SAE that it is."""
    stack, site = experiment.stacks["baseline"], experiment.stacks["baseline"].site
    config = relu.Config(64, 128)
    sae = dataclasses.replace(make(relu), site=site, config=config, params=away_from_init(relu, config))
    sae.save(tmp_path / "a" / "plain")
    dataclasses.replace(sae, name="other_0").save(tmp_path / "a" / "jump", "gemma_scope")
    (tmp_path / "a" / "jump" / "gsae_jax.json").unlink()

    def starts(path, **changes):
        changed = dataclasses.replace(stack, start_from=str(path), **changes)
        return sae_loading.starts(dataclasses.replace(experiment, stacks={"second": changed}))["second"]

    x = jax.random.normal(jax.random.key(2), (50, 64))
    for module, name, options in ((relu, "plain", {}), (gated, "plain", {}), (gated, "jump", {})):
        params = starts(tmp_path / "a" / name, architecture=module.__name__.rpartition(".")[2], options=options)
        params = {name: value[0] for name, value in params.items()}
        np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=-1), 1, rtol=1e-5)
        f = module.encode(params, x, module.Config(64, 128))
        assert np.asarray(f > 0).mean() > 0.1
        np.testing.assert_allclose(module.decode(params, f), sae(x), rtol=1e-4, atol=1e-4)

    field = "stacks.second.start_from"
    with refused(field, "differs in architecture (jumprelu there, relu here)"):
        starts(tmp_path / "a" / "jump")
    with refused(field, "differs in site", "blocks.0.hook_mlp_out here"):
        starts(tmp_path / "a" / "plain", site="blocks.0.hook_mlp_out")
    with refused(field, f"{tmp_path / 'a'} has 2 kinds of SAEs"):
        starts(tmp_path / "a")
    with refused(field, "google/x is not here"):
        starts("google/x:gated")
    dead = dataclasses.replace(sae, params=sae.params | {"W_dec": sae.params["W_dec"].at[3:5].set(0)})
    dead.save(tmp_path / "dead")
    with refused(field, "2 features", "decoder is zero"):
        starts(tmp_path / "dead")


HOOKS = ("transformer.h.0.mlp.output", "blocks.0.mlp.hook_out", "x.y")


@pytest.mark.parametrize(
    "hook", ["model.layers.0.mlp", *(pytest.param(hook, marks=pytest.mark.variants) for hook in HOOKS)]
)
def test_others_names_of_sites(experiment, config_dict, tmp_path, capsys, hook):
    """They are understood, and `--site` wins."""
    config = relu.Config(32, 64)
    sae = dataclasses.replace(make(relu), config=config, params=away_from_init(relu, config), site=hook)
    sae.save(tmp_path / "a")
    tree = json.loads((tmp_path / "a" / "cfg.json").read_text())
    del tree["metadata"]["gsae_jax"], tree["metadata"]["model_name"], tree["metadata"]["dataset_path"]
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(tree))
    config_dict, site = config_dict.to_dict() | {"stacks": {}}, "blocks.0.hook_mlp_out"

    def sites(out, **flags):
        evaluate_saes([str(tmp_path / "a")], str(tmp_path / out), config_dict, tokens=256, **flags)
        return {record["site"] for record in json.loads((tmp_path / out / "report.json").read_text())["saes"]}

    if hook == "x.y":
        with refused("--site", "missing", "a_0", "'x.y'"):
            sites("one")
    else:
        assert sites("one") == {site}
    assert sites("two", site=site) == {site}
    warned = "it is measured at 'blocks.0.hook_mlp_out', as --site says"
    assert (warned in capsys.readouterr().err) == (hook == "x.y")
    assert sites("three", site="model.layers.1") == {"blocks.1.hook_resid_post"}
    assert "it is measured at 'model.layers.1', as --site says" in capsys.readouterr().err


def test_jumprelu_is_for_evaluation(experiment):
    stack = dataclasses.replace(experiment.stacks["baseline"], architecture="jumprelu")
    with refused("stacks.a.architecture", "'jumprelu'", "evaluation", "gated, relu"):
        Stack.build("a", stack, {stack.site: D}, "float32")


@pytest.mark.variants
def test_exported_saes_measure_as_in_their_run(experiment, config_dict, text_dir, lm_dir, tmp_path, capsys):
    stack = experiment.stacks["gated"]
    assert loop.train(dataclasses.replace(experiment, stacks={"gated": stack}), tmp_path / "run")
    evaluate(tmp_path / "run")
    assert export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "out")) == ["gated_0", "gated_1"]
    assert export_lib.export(str(tmp_path / "run"), "gemma_scope", str(tmp_path / "one"), "gated_1") == ["gated_1"]
    (tmp_path / "one" / "gsae_jax.json").unlink()  # it says nothing of itself then
    tree = config_dict.to_dict() | {"stacks": {}}
    capsys.readouterr()
    evaluate_saes([str(tmp_path / "out"), str(tmp_path / "one")], str(tmp_path / "report"), tree, site=stack.site)
    assert "warning" not in capsys.readouterr().err
    folders = (tmp_path / "run" / "report", tmp_path / "report")
    there, here = ({r["name"]: r for r in json.loads((f / "report.json").read_text())["saes"]} for f in folders)
    assert list(here) == ["gated_0", "gated_1", "one_0"]
    for name, record in there.items():
        for field in ("l0", "loss_recovered", "gamma", "fvu", "kl", "alive", "l1_coefficient"):
            assert here[name][field] == pytest.approx(record[field], rel=1e-5), (name, field)
        assert [here[name][field] for field in ("seed", "variant")] == [record["seed"], record["variant"]]
    for field in ("l0", "loss_recovered", "fvu"):
        assert here["one_0"][field] == pytest.approx(there["gated_1"][field], rel=1e-5)
    assert here["one_0"]["l1_coefficient"] is None
    assert "nan" not in (tmp_path / "report" / "report.md").read_text()
    assert not (tmp_path / "report" / "training.png").exists()

    def measure(*paths, **options):
        evaluate_saes([str(tmp_path / path) for path in paths], str(tmp_path / "third"), tree, **options)

    with refused("--site", str(tmp_path / "one"), "blocks.0.hook_mlp_out"):
        measure("one")
    capsys.readouterr()
    with refused("--sae", "second SAE called 'gated_0'"):
        measure("out", "out/gated_0")
    with refused("--site", "'blocks.9.hook_mlp_out'"):
        measure("one", site="blocks.9.hook_mlp_out")
    assert capsys.readouterr().err == ""
    # Another model, which has another width here; and another text.
    tree["data"]["path"] = ""
    tree["data"]["corpus"] = "stdlib"
    with refused("gated_0", "width 32", "width 256"):
        measure("out", model=str(checkpoints.EMBEDDED))
    assert re.findall("warning: .*", capsys.readouterr().err) == [
        "warning: gated_0 and 1 more say that 'small' was the language model of training; measured on 'gelu-1l-stdlib'",
        f"warning: gated_0 and 1 more say that '{text_dir.name}' was the text of training; measured on 'stdlib'",
    ]
    shutil.copytree(lm_dir, tmp_path / "lm")
    (tmp_path / "lm" / "model.safetensors").write_bytes(b"")
    with refused("--model", f"{tmp_path / 'lm' / 'model.safetensors'} cannot be read"):
        measure("out", model=str(tmp_path / "lm"))
    assert not (tmp_path / "third").exists()
    with refused("--out", f"{tmp_path / 'report'} exists"):
        evaluate_saes([str(tmp_path / "one")], str(tmp_path / "report"), tree, site=stack.site)
    for name in ("", "gated_1"):
        with refused("--out", f"{tmp_path / 'out'} exists"):
            export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "out"), name)
    with refused("--step", "3", "16"):
        export_lib.export(str(tmp_path / "run"), "saelens", str(tmp_path / "new"), step=3)
    with refused("--step", "3", "16"):
        evaluate(tmp_path / "run", step=3)
