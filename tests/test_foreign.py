"""Files that other libraries wrote: what is read, what is refused, and what cannot harm."""

import dataclasses
import json
import math
import os
import re
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import sae_loading
from gsae_jax.lms import sites as sites_lib
from gsae_jax.saes import gated, jumprelu_transcoder, relu_crosscoder, topk
from tests import references
from tests.refusals import refused
from tests.sae_files import (
    CROSSCODER,
    EARLIER_SAELENS,
    SAES,
    SITE,
    SITES,
    SPARSIFY,
    TARGET,
    D,
    F,
    K,
    header,
    inputs,
    llamascopium,
    make,
    saelens_with,
    sparsify,
)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"normalize_activations": "layer_norm"}, ('normalize_activations "layer_norm"', "not supported")),
        ({"normalize_activations": "expected_average_only_in"}, ("normalize_activations", "not supported")),
        ({"architecture": "temporal"}, ('architecture "temporal"', "not supported", '"gated", "standard", "topk"')),
        ({"architecture": "temporal", "dtype": 3, "d_in": None}, ('architecture "temporal"', "not supported")),
        ({"architecture": "topk"}, ("k is missing",)),
        ({"k": 3}, ("k is not a field",)),
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


@pytest.mark.parametrize(
    "change",
    [{}, {"normalize_activations": "layer_norm"}, {"d_in": "x"}, {"hook_layer": None}, {"activation_fn_str": "topk"}],
)
def test_earlier_saelens_gets_one_sentence_whatever_else_is_wrong(tmp_path, change):
    path = saelens_with(tmp_path)
    (path / "cfg.json").write_text(json.dumps(EARLIER_SAELENS | change))
    with refused(str(path / "cfg.json"), "SAELens before 6", "save_model") as error:
        gsae_jax.load(path)
    assert not any(name in error.value.problem for name in change)
    for other in ({"architecture": "tanh"}, {"activation_fn_str": "tanh"}):  # which it would be there as well
        (path / "cfg.json").write_text(json.dumps(EARLIER_SAELENS | other))
        with refused(str(path / "cfg.json"), '"tanh"', "not supported"):
            gsae_jax.load(path)


def test_other_folders_are_told_for_what_they_are(tmp_path, lm_dir):
    (tmp_path / "sparsify" / "layers.0").mkdir(parents=True)
    (tmp_path / "sparsify" / "layers.0" / "sae.safetensors").touch()
    saelens_with(tmp_path / "stray")
    (tmp_path / "stray" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    lfs = saelens_with(tmp_path / "lfs")
    (lfs / "sae_weights.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "trained").mkdir()
    trainer = {"dict_class": "CrossCoder"}
    (tmp_path / "trained" / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    (tmp_path / "trained" / "ae.pt").touch()

    for path, field, *facts in (
        ("sparsify", "", "sparsify/layers.0/cfg.json is not a JSON object", "No such file"),
        ("empty", "", f"{tmp_path / 'empty'} holds no run", "config.json is not", "no SAE"),
        ("lfs", "", "sae_weights.safetensors is a git-lfs pointer"),
        ("trained", "trained/config.json", 'dict_class "CrossCoder"', "not supported"),
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


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
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
    norms = np.linalg.norm(t["W_D"], axis=-1) if by_norm else np.ones(F)
    on = pi * norms > threshold
    if act_fn == "topk":
        on = references.largest(np.maximum(pi * norms, 0), K)
    f = np.where(on, pi, 0)
    assert 0.02 < (f > 0).mean() < 0.7
    units = norms if act_fn == "topk" else 1  # of features, which have unit rows then
    np.testing.assert_allclose(sae.encode(x), f * units / scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), (f @ t["W_D"] + t["b_D"]) / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"act_fn": "batchtopk"}, ('act_fn "batchtopk"', "not supported", '"relu", "jumprelu", "topk"')),
        ({"act_fn": "topk", "top_k": F + 1}, (f"top_k is {F + 1}", f"({F})")),
        ({"use_glu_encoder": True}, ("use_glu_encoder true", "not supported")),
        ({"norm_activation": "token-wise"}, ("norm_activation", "not supported")),
        ({"something": 1}, ("something is not known",)),
        ({"use_decoder_bias": False}, ("tensor b_D", "not of this architecture")),
        ({"expansion_factor": 2}, ("tensor W_E", "shape")),
        ({"expansion_factor": 1e308}, ("d_model and expansion_factor", "above 0")),
        ({"d_model": 10**400}, ("d_model and expansion_factor", "above 0")),
        ({"sae_type": "clt"}, ('sae_type "clt"', "not supported", '"sae", "crosscoder"')),
        ({"sae_type": "crosscoder"}, ('act_fn "jumprelu"', "not supported", '"relu"')),
        ({"sae_type": "crosscoder", "act_fn": "relu"}, ("hook_points is missing", "hook_point_in is not known")),
    ],
)
def test_what_llamascopium_has_and_we_do_not_is_refused(tmp_path, change, facts):
    llamascopium(tmp_path / "a", **change)
    file = "sae_weights.safetensors" if "tensor" in facts[0] else "config.json"
    with refused(str(tmp_path / "a" / file), *facts):
        gsae_jax.load(tmp_path / "a")


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
def test_transcoders_of_llamascopium(tmp_path, architecture):
    """Against its steps in float64: inputs and outputs have norms of their own. Features have the outputs' units."""
    changes = {"act_fn": architecture, "hook_point_out": TARGET, "sparsity_include_decoder_norm": False}
    t = llamascopium(tmp_path / "a", **changes)
    sae = gsae_jax.load(tmp_path / "a")["a_0"]
    assert (sae.architecture, sae.site, sae.target) == (f"{architecture}_transcoder", SITE, TARGET)
    x = np.asarray(inputs(), np.float64)
    read, written = math.sqrt(D) / 5, math.sqrt(D) / 10
    pi = np.maximum(read * x @ t["W_E"] + t["b_E"], 0)
    on = pi > (np.exp(t["log_jumprelu_threshold"]) if architecture == "jumprelu" else 0)
    f = np.where(references.largest(pi, K) if architecture == "topk" else on, pi, 0)
    assert 0.02 < (f > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(x), f / written, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), (f @ t["W_D"] + t["b_D"]) / written, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_activation", ["dataset-wise", "inference"])
def test_crosscoders_of_llamascopium(tmp_path, norm_activation):
    """Against its steps in float64. Features have the first site's units, and each site's bias counts."""
    t = llamascopium(tmp_path / "a", **CROSSCODER | {"norm_activation": norm_activation})
    sae = gsae_jax.load(tmp_path / "a")["a_0"]
    assert (sae.architecture, sae.site, sae.target, sae.d_in) == ("relu_crosscoder", SITES, "", (D, D))
    x = [np.asarray(inputs(), np.float64), 2 * np.asarray(inputs(), np.float64)[::-1]]
    scales = [math.sqrt(D) / 5, math.sqrt(D) / 10] if norm_activation == "dataset-wise" else [1, 1]
    f = np.maximum(
        sum(scale * each @ W + b for scale, each, W, b in zip(scales, x, t["W_E"], t["b_E"], strict=True)), 0
    )
    np.testing.assert_allclose(sae.encode(x), f / scales[0], rtol=1e-5, atol=1e-5)
    for x_hat, scale, W, b in zip(sae(x), scales, t["W_D"], t["b_D"], strict=True):
        np.testing.assert_allclose(x_hat, (f @ W + b) / scale, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"act_fn": "jumprelu"}, ('act_fn "jumprelu"', '"relu"')),
        ({"use_decoder_bias": False}, ("use_decoder_bias",)),
        ({"sparsity_include_decoder_norm": False}, ("sparsity_include_decoder_norm",)),
        ({"hook_points": []}, ("hook_points",)),
        ({"hook_points": [SITE, SITE]}, ("hook_points", "different")),
        ({"hook_points": [SITE, 3]}, ("hook_points",)),
        ({"hook_points": [f"blocks.{n}.hook_resid_post" for n in range(65)]}, ("hook_points", "64")),
        ({"hook_points": [*SITES, TARGET]}, ("tensor W_E", "shape", f"[2, {D}, {F}], not [3, {D}, {F}]")),
        ({"hook_point_in": SITE}, ("hook_point_in is not known",)),
    ],
)
def test_crosscoders_of_llamascopium_that_we_do_not_have(tmp_path, change, facts):
    llamascopium(tmp_path / "a", **CROSSCODER | {"norm_activation": "inference"})
    (tmp_path / "a" / "config.json").write_text(json.dumps(CROSSCODER | {"norm_activation": "inference"} | change))
    file = "sae_weights.safetensors" if "tensor" in facts[0] else "config.json"
    with refused(str(tmp_path / "a" / file), *facts):
        gsae_jax.load(tmp_path / "a")


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_of_saelens(tmp_path, kind):
    """Against its steps in float64; outputs have another width, and come first in W_skip."""
    random, D_out = np.random.default_rng(0), D + 3
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D_out), "b_dec": (D_out,)}
    shapes |= {"threshold": (F,)} if "jumprelu" in kind else {}
    shapes |= {"W_skip": (D_out, D)} if "skip" in kind else {}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = {"architecture": kind, "d_in": D, "d_sae": F, "d_out": D_out, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    told = {"hook_name": SITE, "hook_name_out": TARGET, "model_name": "small", "sae_lens_version": "6.54.12"}
    (tmp_path / "a").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "a" / "sae_weights.safetensors")
    file = tmp_path / "a" / "cfg.json"
    file.write_text(json.dumps(config | {"metadata": told}))
    (sae,) = gsae_jax.load(tmp_path / "a").values()
    assert (sae.site, sae.target, sae.metadata["model_name"]) == (SITE, TARGET, "small")
    assert sae.architecture == ("jumprelu_transcoder" if "jumprelu" in kind else "relu_transcoder")
    x, t = np.asarray(inputs(), np.float64), {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    pi = x @ t["W_enc"] + t["b_enc"]
    f = np.where(pi > np.maximum(t.get("threshold", 0), 0), pi, 0)
    x_hat = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if "skip" in kind else 0)
    np.testing.assert_allclose(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), x_hat, rtol=1e-5, atol=1e-4)
    for change, fact in (
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input is true"),
        ({"d_out": None}, "d_out is null"),
        ({"architecture": "standard"}, "d_out is not a field"),
    ):
        file.write_text(json.dumps(config | {"metadata": told} | change))
        with refused(str(file), fact):
            gsae_jax.load(tmp_path / "a")
    # A file that does not name its target.
    file.write_text(json.dumps(config | {"metadata": told | {"hook_name_out": None}}))
    (sae,) = gsae_jax.load(tmp_path / "a").values()
    assert (sae.target, sae.targets) == ("", ("",))
    assert f"{SITE} -> an unknown site" in repr(sae)
    (sae,) = gsae_jax.load(tmp_path / "a", target=TARGET).values()
    assert (sae.site, sae.target) == (SITE, TARGET)


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_of_sparsify(tmp_path, skip):
    """Against its steps in float64. The folder has the name of the module whose output is predicted."""
    t = sparsify(tmp_path / "layers.3", transcode=True, skip_connection=skip)
    (sae,) = gsae_jax.load(tmp_path / "layers.3").values()
    assert (sae.architecture, sae.config.k, sae.config.skip) == ("topk_transcoder", K, skip)
    assert (sae.site, sae.target) == ("", SITE)
    sparsify(tmp_path / "layers.4.mlp", transcode=True)
    (of_mlp,) = gsae_jax.load(tmp_path / "layers.4.mlp").values()
    assert (of_mlp.site, of_mlp.target) == ("blocks.4.ln2.hook_normalized", "layers.4.mlp")
    x = np.asarray(inputs(), np.float64)
    pi = np.maximum(x @ t["encoder.weight"].T + t["encoder.bias"], 0)
    f = np.where(references.largest(pi, K), pi, 0)
    np.testing.assert_allclose(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    skipped = x @ t["W_skip"].T if skip else 0
    np.testing.assert_allclose(sae(x), f @ t["W_dec"] + t["b_dec"] + skipped, rtol=1e-5, atol=1e-5)


def test_the_user_says_that_a_file_of_gemma_scope_is_of_a_transcoder(tmp_path):
    """Against its steps in float64: nothing is subtracted from inputs."""
    make(jumprelu_transcoder).save(tmp_path / "a", "gemma_scope")
    (ours,) = gsae_jax.load(tmp_path / "a").values()
    assert (ours.architecture, ours.site, ours.target) == ("jumprelu_transcoder", SITE, TARGET)
    assert gsae_jax.load(tmp_path / "a", target="blocks.4.hook_mlp_out")["stack_2"].target == "blocks.4.hook_mlp_out"
    (tmp_path / "a" / "gsae_jax.json").unlink()
    (sae,) = gsae_jax.load(tmp_path / "a").values()
    assert (sae.architecture, sae.site, sae.target) == ("jumprelu", "", "")
    for path in (tmp_path / "a", tmp_path / "a" / "params.npz", tmp_path):
        (sae,) = gsae_jax.load(path, site=SITE, target=TARGET).values()
        assert (sae.architecture, sae.site, sae.target) == ("jumprelu_transcoder", SITE, TARGET)
    x, p = np.asarray(inputs(), np.float64), {key: np.asarray(value, np.float64) for key, value in ours.params.items()}
    pi = x @ p["W_enc"] + p["b_enc"]
    f = np.where(pi > np.maximum(p["threshold"], 0), pi, 0)
    np.testing.assert_allclose(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), f @ p["W_dec"] + p["b_dec"], rtol=1e-5, atol=1e-5)
    # From one width to another, it can be nothing else.
    make(jumprelu_transcoder, d_out=D + 3).save(tmp_path / "b", "gemma_scope")
    (tmp_path / "b" / "gsae_jax.json").unlink()
    with refused("target", "is missing", f"from width {D} to width {D + 3}"):
        gsae_jax.load(tmp_path / "b")
    (sae,) = gsae_jax.load(tmp_path / "b", target=TARGET).values()
    assert (sae.config.d_in, sae.config.d_out, sae.site, sae.target) == (D, D + 3, "", TARGET)
    with refused("sae", "site="):
        gsae_jax.taps.splice(dataclasses.replace(sae, target="", site=""))
    with refused("sae", "target="):
        gsae_jax.taps.splice(dataclasses.replace(sae, target="", site=SITE))


def test_sites_of_files_that_say_otherwise(tmp_path, capsys):
    make(gated).save(tmp_path / "a")
    with refused("target", f"'{TARGET}'", "stack_2", "no transcoder"):
        gsae_jax.load(tmp_path / "a", target=TARGET)
    assert gsae_jax.load(tmp_path / "a", site=SITE)["stack_2"].site == SITE
    assert capsys.readouterr().err == ""
    assert gsae_jax.load(tmp_path / "a", site=TARGET)["stack_2"].site == TARGET
    assert f"the site {SITE!r}; it is taken for {TARGET!r}" in capsys.readouterr().err
    make(gated).save(tmp_path / "b", "gemma_scope")  # with a file that says that it is an SAE
    with refused("target", "no transcoder"):
        gsae_jax.load(tmp_path / "b", target=TARGET)
    make(relu_crosscoder).save(tmp_path / "c", "llamascopium")
    with refused("site", "has 2 sites"):
        gsae_jax.load(tmp_path / "c", site=SITE)


@pytest.mark.parametrize("version", [{}, {"activation": "topk", "transcode": False, "multi_topk": True}])
def test_saes_of_sparsify(tmp_path, version):
    """Against its steps in float64, in a folder that has the name of the module."""
    t = sparsify(tmp_path / "saes" / "layers.3", **version)
    sparsify(tmp_path / "saes" / "layers.4.mlp")
    (tmp_path / "saes" / "config.json").write_text(json.dumps({"sae": SPARSIFY, "model": "small", "ctx_len": 16}))
    saes = gsae_jax.load(tmp_path / "saes")
    sae = saes["layers.3_0"]
    assert (sae.architecture, sae.config, sae.site) == ("topk", topk.Config(D, F, k=K), SITE)
    assert {"model_name": "small", "context_size": 16}.items() <= sae.metadata.items()
    assert saes["layers.4.mlp_0"].site == "layers.4.mlp"  # the language model says what follows the MLP
    x = np.asarray(inputs(), np.float64)
    pi = np.maximum((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 0)
    f = np.where(references.largest(pi, K), pi, 0)
    np.testing.assert_allclose(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae(x), f @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"activation": "groupmax"}, ('activation "groupmax"', "not supported", '"topk"')),
        ({"transcode": True, "k": F + 1}, (f"k is {F + 1}", f"({F})")),
        ({"skip_connection": True}, ("skip_connection is true", "transcode")),
        ({"k": 0}, ("k is 0", f"({F})")),
        ({"k": None}, ("k is null", "not int")),
        ({"encoder_pkm": True}, ("encoder_pkm is not known",)),
        ({"num_latents": F + 1}, ("tensor encoder.weight", "shape")),
    ],
)
def test_what_sparsify_has_and_we_do_not_is_refused(tmp_path, change, facts):
    sparsify(tmp_path / "a", **change)
    with refused(str(tmp_path / "a" / ("sae.safetensors" if "tensor" in facts[0] else "cfg.json")), *facts):
        gsae_jax.load(tmp_path / "a")


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
        ("model.layers.2.block_sparse_moe", None, "blocks.2.hook_mlp_out", None),
        ("model.layers.2.self_attn", None, "blocks.2.hook_attn_out", None),
        ("model.layers.2.post_feedforward_layernorm", None, None, "blocks.2.hook_mlp_out"),
        ("model.layers.2.post_attention_layernorm", None, None, "blocks.2.hook_attn_out"),
        ("resid_post_layer_8", *["blocks.8.hook_resid_post"] * 3),
        ("blocks.4.hook_resid_pre", *["blocks.4.hook_resid_pre"] * 3),
        ("blocks.4.attn.hook_z.hook_sae_input", *["blocks.4.attn.hook_z"] * 3),
        ("blocks.4.hook_out", *["blocks.4.hook_resid_post"] * 3),
        ("blocks.4.mlp.hook_in", *["blocks.4.ln2.hook_normalized"] * 3),
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
