import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax.config import ConfigError
from gsae_jax.lms import sites
from gsae_jax.lms.checkpoints import EMBEDDED
from gsae_jax.lms.loss import cross_entropy
from tests import references

SUFFIXES = [
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]


def checkpoint(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def some_tokens(lm, rows=3, length=20):
    return np.random.default_rng(0).integers(0, lm.config.d_vocab, (rows, length))


@pytest.fixture(params=["embedded", "two layers"])
def folder(request, lm_dir):
    return EMBEDDED if request.param == "embedded" else lm_dir


def test_logits_and_every_site_match_float64(folder):
    lm = gsae_jax.load_lm(folder)
    tokens = some_tokens(lm)
    logits, found = references.gelu_lm(*checkpoint(folder), tokens)
    assert list(lm.sites) == [f"blocks.{layer}.{name}" for layer in range(lm.config.n_layers) for name in SUFFIXES]
    np.testing.assert_allclose(lm.logits(tokens), logits, atol=1e-4 * np.abs(logits).max())
    ours = lm.activations(tokens, lm.sites)
    for site, width in lm.sites.items():
        assert ours[site].shape == (*tokens.shape, width)
        np.testing.assert_allclose(ours[site], found[site], atol=1e-4 * np.abs(found[site]).max(), err_msg=site)


def test_splices(folder):
    lm = gsae_jax.load_lm(folder)
    tokens = some_tokens(lm)
    identity = sites.splice({site: lambda x: x for site in lm.sites})
    np.testing.assert_array_equal(lm.run(tokens, identity), lm.run(tokens, sites.no_tap))
    tensors, config = checkpoint(folder)
    for site in lm.sites:
        zeroed, _ = references.gelu_lm(tensors, config, tokens, replace={site: 0.0})
        ours = lm.run(tokens, sites.splice({site: jnp.zeros_like}))
        np.testing.assert_allclose(ours, zeroed, atol=1e-4 * np.abs(zeroed).max(), err_msg=site)


def test_fewer_layers_give_the_same_activations(lm_dir):
    whole, first = gsae_jax.load_lm(lm_dir), gsae_jax.load_lm(lm_dir, num_layers=1)
    tokens = some_tokens(whole)
    assert list(first.sites) == [site for site in whole.sites if site.startswith("blocks.0.")]
    assert set(first.params) == {"embed.W_E", "pos_embed.W_pos", "blocks.0"}
    expected = whole.activations(tokens, first.sites)
    for site, x in first.activations(tokens, first.sites).items():
        np.testing.assert_array_equal(x, expected[site])


def test_cross_entropy_in_chunks_is_that_of_the_logits(lm_dir, monkeypatch):
    lm = gsae_jax.load_lm(lm_dir)
    tokens = jnp.array(some_tokens(lm, rows=7))
    hidden = lm.module.apply({"params": lm.params}, tokens, method="hidden")
    logits = np.asarray(lm.logits(tokens), np.float64)[:, :-1]
    picked = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    expected = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - picked
    np.testing.assert_allclose(cross_entropy(lm.module, lm.params, hidden, tokens), expected, rtol=1e-5)
    monkeypatch.setattr("gsae_jax.lms.loss.logits_per_chunk", lambda: 3 * 20 * lm.config.d_vocab)  # 7 = 3 + 3 + 1
    np.testing.assert_allclose(cross_entropy(lm.module, lm.params, hidden, tokens), expected, rtol=1e-5)


def test_the_embedded_model_knows_python():
    lm = gsae_jax.load_lm()
    text = "<|endoftext|>import os\n\n\nclass Reader(object):\n    def __init__(self, path):\n        self."
    tokens = np.array(lm.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    assert lm.tokenizer.decode(int(jnp.argmax(lm.logits(tokens)[0, -1]))) == "path"


def test_bad_calls(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    with pytest.raises(
        ConfigError,
        match=r"'blocks.0.hook_mlp_ot' is not a site .* did you mean 'blocks.0.hook_mlp_out'\? known: blocks",
    ):
        lm.activations(some_tokens(lm), ["blocks.0.hook_mlp_ot"])
    with pytest.raises(ConfigError, match="have 33 positions; this language model has 32"):
        lm.logits(np.zeros((1, 33), int))
    with pytest.raises(ConfigError, match="go from 0 to 4096; this language model has ids 0 to 4095"):
        lm.logits(np.array([[0, 4096]]))
    with pytest.raises(ConfigError, match=r"are float64\[3\]; give integers of shape"):
        lm.logits(np.zeros(3))


def damaged(tmp_path, lm_dir, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(lm_dir, folder)
    damage(folder)
    return folder


def edit_config(**changes):
    def damage(folder):
        settings = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))

    return damage


def edit_tensors(edit):
    def damage(folder):
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        edit(tensors)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def several(tensors):
    tensors["blocks.9.attn.W_Q"] = tensors.pop("blocks.1.attn.W_Q")
    tensors["ln_final.w"] = tensors["ln_final.w"][:-1].copy()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (truncate, "model.safetensors cannot be read .* truncated"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "has no config.json; write a Hugging Face checkpoint directory",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (edit_config(model_type="gelo"), r"type 'gelo', which is not supported; did you mean 'gelu'\? known: gelu"),
        (edit_config(d_mlp=None), "config.json lacks d_mlp"),
        (edit_config(d_head="8"), "config.json has d_head = '8'; it must be a whole number from 1"),
        (edit_config(d_vocab=4000), "a tokenizer of 4096 tokens, but embeddings for 4000"),
        (edit_config(d_mlp=63), r"does not fit .*blocks.0.mlp.W_in has shape \[32, 64\], not \[32, 63\]"),
        (
            edit_tensors(several),
            r"blocks.1.attn.W_Q is missing; ln_final.w has shape \[31\], not \[32\]; blocks.9.attn.W_Q is not of",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "has no tokenizer that can be read"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, lm_dir, damage, message):
    with pytest.raises(ConfigError, match=message):
        gsae_jax.load_lm(damaged(tmp_path, lm_dir, damage))


def test_loading_fewer_layers_still_finds_a_stray_tensor(tmp_path, lm_dir):
    folder = damaged(tmp_path, lm_dir, edit_tensors(lambda tensors: tensors.update(extra=np.zeros(2, np.float32))))
    with pytest.raises(ConfigError, match="extra is not of this model"):
        gsae_jax.load_lm(folder, num_layers=1)
