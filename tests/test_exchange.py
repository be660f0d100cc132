"""Formats of other libraries on small random SAEs: round trips, and what is refused."""

import dataclasses
import json
import math
import re
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import exporting as export_lib
from gsae_jax.errors import UserError
from gsae_jax.formats import files, jumprelu, records
from gsae_jax.saes import (
    contract,
    gated,
    linalg,
    parameters,
    relu,
    relu_crosscoder,
    relu_transcoder,
    topk,
    topk_transcoder,
)
from tests import references
from tests.refusals import refused
from tests.sae_files import (
    FORMATS,
    SAES,
    SITE,
    SITES,
    D,
    F,
    K,
    config_of,
    contents,
    holds,
    inputs,
    inputs_of,
    load_tensors,
    make,
    pairs,
    saelens_with,
    save_tensors,
)


@pytest.mark.parametrize(("format", "kind"), pairs())
def test_an_export_is_read_as_the_same_sae_and_written_as_the_same_bytes(tmp_path, format, kind):
    sae = SAES[kind]()
    x = inputs_of(sae)
    if (format, kind) == ("dictionary_learning", "relu"):  # else its features are others there
        sae = dataclasses.replace(sae, params=parameters.with_unit_rows(sae.functions, sae.params))
    if kind == "relu_april":  # which is stored with unit rows
        sae = dataclasses.replace(sae, params=linalg.with_unit_rows(sae.params))
    sae.save(tmp_path / "first", format)
    ((name, back),) = gsae_jax.load(tmp_path / "first").items()
    assert name == back.name == "stack_2"
    told = ("site", "target", "l1_coefficient", "learning_rate", "seed", "scale", "norm_limit", "input_norm_limit")
    assert [getattr(back, field) for field in told] == [getattr(sae, field) for field in told]
    assert sae.metadata.items() <= back.metadata.items()
    if holds(format, kind)[1]:
        assert (back.architecture, back.config) == (sae.architecture, sae.config)
    else:
        forms = (
            {"relu_april": "relu", "gated_batch_topk": "gated"} if format in ("saelens", "dictionary_learning") else {}
        )
        assert back.architecture == forms.get(kind, "jumprelu" + "_transcoder" * bool(sae.target))
    f = np.asarray(sae.encode(x))
    np.testing.assert_array_equal(np.asarray(back.encode(x)) > 0, f > 0)
    np.testing.assert_allclose(back.encode(x), f, rtol=1e-5, atol=1e-5)
    for theirs, ours in zip(jax.tree.leaves(back(x)), jax.tree.leaves(sae(x)), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
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


def test_an_export_names_every_sae_that_a_format_cannot_store(tmp_path):
    saes = {kind: dataclasses.replace(SAES[kind](), name=kind) for kind in ("gated", "topk", "relu")}
    with refused("gated", "'gated'", "relu: is of the kind 'relu'", "--sae=topk"):
        export_lib.write(saes, "sparsify", tmp_path / "a")
    assert not list(tmp_path.iterdir())
    assert export_lib.write({"topk": saes["topk"]}, "sparsify", tmp_path / "a") == ["topk"]


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
    for kind, format, fact in (
        ("topk", "gemma_scope", "no JumpReLU form"),
        ("gated", "sparsify", "it holds topk"),
    ):
        with refused("stack_2", fact):
            SAES[kind]().save(tmp_path / "a", format)
    with refused("format", "'saelense'", "did you mean 'saelens'"):
        sae.save(tmp_path / "a", "saelense")
    with refused("", "gs://bucket/a", "not a local path"):
        sae.save("gs://bucket/a")
    (tmp_path / "file").touch()
    with refused("", f"{tmp_path / 'file' / 'a'} is not writable"):
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


@pytest.mark.parametrize(
    ("format", "kind", "facts"),
    [
        ("saelens", "topk_transcoder", ("'topk_transcoder", "it holds gated")),
        ("saelens", "relu_crosscoder", ("'relu_crosscoder'", "cannot hold")),
        ("jumprelu", "topk_transcoder", ("no JumpReLU form",)),
        ("jumprelu", "relu_crosscoder", ("no JumpReLU form",)),
        ("gemma_scope", "jumprelu_transcoder skip", ("skip=True", "cannot hold")),
        ("sparsify", "relu_transcoder", ("'relu_transcoder'", "it holds topk, topk_transcoder")),
        ("llamascopium", "topk_transcoder skip", ("skip=True", "cannot hold")),
        pytest.param("dictionary_learning", "relu_transcoder", ("cannot hold",), marks=pytest.mark.torch),
        pytest.param("dictionary_learning", "relu_crosscoder", ("cannot hold",), marks=pytest.mark.torch),
    ],
)
def test_transcoders_and_crosscoders_that_a_format_cannot_hold(tmp_path, format, kind, facts):
    with refused("stack_2", *facts):
        SAES[kind]().save(tmp_path / "a", format)
    assert not list(tmp_path.iterdir())


def test_sites_that_a_format_cannot_hold(tmp_path):
    """Of two widths, of none and of the same name; and rows of zeros, by whose norms llamascopium divides."""
    for module, format in ((relu_transcoder, "llamascopium"), (topk_transcoder, "sparsify")):
        with refused("stack_2", f"from width {D} to width {D + 1}", "saelens"):
            make(module, d_out=D + 1).save(tmp_path / "a", format)
    for site in ("", SITE):
        with refused("stack_2", f"reads and writes {site!r}", "target="):
            dataclasses.replace(make(relu_transcoder), site=site, target=site).save(tmp_path / "a", "llamascopium")
    crosscoder = make(relu_crosscoder)
    widths = relu_crosscoder.Config(d_in=(D, D + 1), width=F)
    params = relu_crosscoder.init(jax.random.key(0), widths)
    with refused("stack_2", f"different widths ({crosscoder.sites[0]} {D}, {crosscoder.sites[1]} {D + 1})"):
        dataclasses.replace(crosscoder, config=widths, params=params).save(tmp_path / "a", "llamascopium")
    params = crosscoder.params | {"W_dec_1": crosscoder.params["W_dec_1"].at[3].set(0)}
    with refused("stack_2", "1 features", crosscoder.sites[1], "zero"):
        dataclasses.replace(crosscoder, params=params).save(tmp_path / "a", "llamascopium")
    assert not list(tmp_path.iterdir())


def test_a_file_of_several_sites_says_as_much_of_each(tmp_path):
    make(relu_crosscoder).save(tmp_path / "a", "llamascopium")
    file = tmp_path / "a" / "gsae_jax.json"
    whole = json.loads(file.read_text())
    assert (whole["site"], whole["gsae_jax"]["norm_limit"]) == (list(SITES), [20.0, None])
    for change, field, fact in (
        ({"site": SITE}, "gsae_jax.json", "not a list of sites"),
        ({"site": [SITE, 3]}, "gsae_jax.json", "not a list of names"),
        ({"site": [*SITES, SITE]}, "", "site is a list of 3, but the tensors are of 2 sites"),
        ({"target": list(SITES)}, "gsae_jax.json", "target is given"),
        ({"gsae_jax": whole["gsae_jax"] | {"norm_limit": [1.0]}}, "", "norm_limit is a list of 1"),
        ({"gsae_jax": whole["gsae_jax"] | {"norm_limit": [1.0, -1]}}, "gsae_jax.json", "not from 0"),
        ({"gsae_jax": whole["gsae_jax"] | {"norm_limit": [1.0, "x"]}}, "gsae_jax.json", "not from 0"),
    ):
        file.write_text(json.dumps(whole | change))
        with refused(str(tmp_path / "a" / field), fact):
            gsae_jax.load(tmp_path / "a")
    make(relu_transcoder).save(tmp_path / "b", "llamascopium")
    file = tmp_path / "b" / "gsae_jax.json"
    whole = json.loads(file.read_text())
    for change, fact in (
        ({"site": [SITE]}, "not one site"),
        ({"target": [SITE]}, "not one site"),
        ({"gsae_jax": whole["gsae_jax"] | {"norm_limit": [1.0]}}, "norm_limit is a list"),
    ):
        file.write_text(json.dumps(whole | change))
        with refused(str(file), fact):
            gsae_jax.load(tmp_path / "b")


@pytest.mark.parametrize("format", FORMATS)
def test_an_architecture_of_ones_own_is_refused(tmp_path, format):
    sae = dataclasses.replace(make(relu), architecture="tanh")
    with refused("stack_2", "'tanh'"):
        sae.save(tmp_path / "a" / "b", format)
    assert not list(tmp_path.iterdir())
    if holds(format, "relu")[0]:
        dataclasses.replace(sae, architecture="relu").save(tmp_path / "a" / "b", format)


# What a file may lack or have too much of without being refused: it says nothing of the function.
DESCRIPTIONS = {"hook_name", "hook_name_out", "target", "model_name", "context_size", "prepend_bos", "dataset_path"}


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


# One of each architecture.
JUST = ["gated", "relu", "jumprelu", "topk", "batch_topk", "matryoshka", "relu_crosscoder"]
JUST += ["relu_transcoder", "relu_transcoder to others", "jumprelu_transcoder skip", "topk_transcoder skip"]
JUST += ["batch_topk_transcoder"]


@pytest.mark.parametrize(("format", "kind"), pairs(["saelens", "gemma_scope", "dictionary_learning"], JUST))
def test_fields_that_are_missing_or_wrong_are_refused(tmp_path, format, kind):
    SAES[kind]().save(tmp_path / "a", format)
    file = config_of(tmp_path / "a")
    whole = json.loads(file.read_text())
    count = 0
    for path in leaves(whole):
        for change in ("dropped", "renamed", "list", "null"):
            # Of what describes, only a wrong type is wrong; and unknown numbers are null.
            mild = path[-1] in DESCRIPTIONS | {"lm_name", "submodule_name", "layer", "ctx_len"}
            number = ("l1_coefficient", "learning_rate", "seed", "scale", "norm_limit", "input_norm_limit")
            if (mild and change != "list") or (path[-1] in number and change == "null"):
                continue
            if path in (("metadata", "gsae_jax"), ("gsae_jax",)) and format != "gemma_scope" and change != "list":
                continue  # then it is as one that was not exported by us
            later = ("run", "stack", "index", "architecture", "input_norm_limit")
            optional = path[-2:-1] == ("options",) or path[-1] in later
            optional &= path != ("architecture",)  # of SAELens
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


@pytest.mark.parametrize(("format", "kind"), pairs(["saelens", "gemma_scope", "dictionary_learning"]))
def test_a_switch_that_is_flipped_is_refused_or_leaves_the_function(tmp_path, format, kind):
    sae, x = SAES[kind](), inputs()
    sae.save(tmp_path / "a", format)
    sae = gsae_jax.load(tmp_path / "a")["stack_2"]  # it may have another form
    file = config_of(tmp_path / "a")
    whole = json.loads(file.read_text())
    f, flipped = np.asarray(gsae_jax.load(tmp_path / "a")["stack_2"].encode(x)), set()
    for path in leaves(whole):
        inner = whole
        for key in path:
            inner = inner[key]
        # These say what the biases and the rows of the decoder are for.
        if not isinstance(inner, bool) or path[0] in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
            continue
        flipped.add(path[-1])
        file.write_text(json.dumps(changed(whole, path, "flipped")))
        unlike = {"tie_encoder", "aligned"} | ({"use_r_mag"} if kind in ("gated", "gated_batch_topk") else set())
        if path[-1] == "skip":  # which the file says elsewhere
            with refused(str(file if format == "saelens" else tmp_path / "a"), "skip"):
                gsae_jax.load(tmp_path / "a")
        elif kind == "aligned" and path[-1] in ("tie_encoder", "only_magnitude"):  # which exclude each other
            with refused(str(file), path[-1]):
                gsae_jax.load(tmp_path / "a")
        elif kind != "aligned" and path[-1] in unlike:
            with refused(str(tmp_path / "a"), path[-1]):
                gsae_jax.load(tmp_path / "a")
        else:
            rounding = 1e-5 if path[-1] == "aligned" else 0
            np.testing.assert_allclose(
                gsae_jax.load(tmp_path / "a")["stack_2"].encode(x), f, rtol=rounding, atol=rounding
            )
    switches = {field.name for field in dataclasses.fields(sae.config) if isinstance(field.default, bool)}
    assert flipped == {"prepend_bos"} | switches


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


@pytest.mark.parametrize(("format", "kind"), pairs(kinds=JUST))
def test_tensors_that_are_missing_or_wrong_are_refused(tmp_path, format, kind):
    SAES[kind]().save(tmp_path / "a", format)
    file = next(path for path in (tmp_path / "a").iterdir() if path.suffix in (".npz", ".safetensors", ".pt"))
    whole = load_tensors(file)
    save_tensors(file, whole)
    gsae_jax.load(tmp_path / "a")  # as they are
    for name, value in whole.items():
        if not value.ndim or value.dtype != np.float32:
            continue
        spoiled = np.array(value)
        spoiled.flat[3] = math.nan
        for what, tensors in {
            "is missing": {other: kept for other, kept in whole.items() if other != name},
            "is not of this architecture": {other + "_" * (other == name): kept for other, kept in whole.items()},
            "has shape": whole | {name: value.T if value.T.shape != value.shape else value[:-1]},
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
    save_tensors(file, whole | {"W_other": next(value for value in whole.values() if value.ndim >= 2)})
    with refused(str(file), "tensor W_other", "not of this architecture"):
        gsae_jax.load(tmp_path / "a")
    save_tensors(file, whole)
    for cut in (10, file.stat().st_size // 2, file.stat().st_size - 1):
        short = file.read_bytes()[:cut]
        file.write_bytes(short)
        with refused(str(file), "cannot be read"):
            gsae_jax.load(tmp_path / "a")
        save_tensors(file, whole)


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


def test_fields_are_compared_by_type():
    tree = {"a": 1, "b": True, "c": None, "d": 1.0}
    assert files.misfits(tree, {"a": (int,), "b": (True,), "c": (str, None), "d": (float,), "e": (int, ...)}) == []
    assert len(files.misfits(tree, {"a": (True,), "b": (int,), "c": (str,), "d": (int,), "e": (int,)})) == 5
    assert files.misfits([], {}, "trainer.") == ["trainer is not an object"]


def write_as_theirs(folder, kind):
    """A folder of SAELens without our record, as of an SAE that it trained."""
    SAES[kind]().save(folder)
    tree = json.loads((folder / "cfg.json").read_text())
    del tree["metadata"]["gsae_jax"]
    (folder / "cfg.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_what_batches_select_is_a_jumprelu_sae_where_nothing_says_more(tmp_path, kind):
    sae, x = SAES[kind](), np.asarray(inputs(), np.float64)
    p = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    pi = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    f = np.where(pi > 0.4, pi, 0)
    write_as_theirs(tmp_path / "a", kind)
    for form in (gsae_jax.load(tmp_path / "a")["a_0"], jumprelu.form(sae)):
        assert form.architecture == "jumprelu"
        np.testing.assert_allclose(form.encode(x), f, rtol=1e-5, atol=1e-5)
    for target in ("gated", "batch_topk", "matryoshka"):
        module = contract.module_of(target)
        for source in (sae, gsae_jax.load(tmp_path / "a")["a_0"]):
            params = contract.converter(source.architecture, target)(source.params, source.config)
            np.testing.assert_allclose(module.encode(params, x, module.Config(D, F)), f, rtol=1e-5, atol=1e-5)


def test_a_topk_sae_is_read_with_its_number_of_features(tmp_path):
    """Also where features are compared by what they add to the reconstruction."""
    write_as_theirs(tmp_path / "a", "topk")
    tree = json.loads((tmp_path / "a" / "cfg.json").read_text())
    sae, x = SAES["topk"](), np.asarray(inputs(), np.float64)
    p = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    for rescaled in (False, True):
        change = {"k": 3, "rescale_acts_by_decoder_norm": rescaled}
        (tmp_path / "a" / "cfg.json").write_text(json.dumps(tree | change))
        (back,) = gsae_jax.load(tmp_path / "a").values()
        assert back.config == topk.Config(D, F, k=3)
        norms = np.linalg.norm(p["W_dec"], axis=-1) if rescaled else np.ones(F)
        pi = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norms
        f = np.where(references.largest(pi, 3), pi, 0)
        np.testing.assert_allclose(back.encode(x), f, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(back(x), f / norms @ p["W_dec"] + p["b_dec"], rtol=1e-5, atol=1e-5)
    for k in (0, F + 1):
        (tmp_path / "a" / "cfg.json").write_text(json.dumps(tree | {"k": k}))
        with refused(str(tmp_path / "a" / "cfg.json"), f"k is {k}"):
            gsae_jax.load(tmp_path / "a")


@pytest.mark.torch
def test_what_dictionary_learning_says_twice_is_the_same(tmp_path):
    """The number of active features, the groups, and one threshold for all features."""
    import torch

    sae = SAES["matryoshka"]()
    sae.save(tmp_path / "a", "dictionary_learning")
    file, state = tmp_path / "a" / "ae.pt", torch.load(tmp_path / "a" / "ae.pt", weights_only=True)
    assert {name: state[name].tolist() for name in ("k", "group_sizes")} == {"k": K, "group_sizes": [10, 30]}
    assert state["threshold"].item() == np.float32(0.4)
    for name, value in (("k", 5), ("group_sizes", [10, 31]), ("group_sizes", [0, 40]), ("group_sizes", [20, 20])):
        torch.save(state | {name: torch.tensor(value)}, file)
        with refused(str(file if value != [20, 20] else tmp_path / "a" / "ae.pt"), name):
            gsae_jax.load(tmp_path / "a")
    torch.save(state | {"group_sizes": torch.tensor([20, 20]), "threshold": torch.tensor(-1.0)}, file)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({"trainer": config["trainer"], "buffer": {}}))
    (back,) = gsae_jax.load(tmp_path / "a").values()  # as theirs, of few steps
    assert (back.architecture, back.config.k, back.config.sizes) == ("matryoshka", K, (20, 40))
    x, p = np.asarray(inputs()), {name: np.asarray(value) for name, value in sae.params.items()}
    pi = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    np.testing.assert_allclose(back.encode(x), np.maximum(pi, 0), rtol=1e-5, atol=1e-5)
    uneven = dataclasses.replace(sae, params=sae.params | {"threshold": sae.params["threshold"].at[3].set(1)})
    with refused("stack_2", "thresholds from 0.4 to 1", "saelens or jumprelu"):
        uneven.save(tmp_path / "b", "dictionary_learning")


def test_what_is_wrong_with_several_saes_is_said_once():
    failed = {name: UserError("needs torch", "dictionary_learning") for name in ("a", "b", "c")}
    with refused("dictionary_learning") as caught:
        records.raise_for(failed | {"d": UserError("has no form", "d")}, [])
    assert caught.value.problem == "needs torch; d: has no form"
