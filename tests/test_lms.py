import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import batching, taps
from gsae_jax.lms import generation, loading, sites
from gsae_jax.lms.checkpoints import EMBEDDED
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.saes import gated, relu, relu_transcoder
from gsae_jax.saes.trained import SAE
from tests import references
from tests.measuring import on_mesh
from tests.refusals import refused
from tests.small_saes import away_from_init

SUFFIXES = [
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_normalized",
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
    monkeypatch.setattr(
        "gsae_jax.lms.loss.logits_per_chunk", lambda platform: 3 * 20 * lm.config.d_vocab
    )  # 7 = 3 + 3 + 1
    np.testing.assert_allclose(cross_entropy(lm.module, lm.params, hidden, tokens), expected, rtol=1e-5)

    def mean(hidden):
        return cross_entropy(lm.module, lm.params, hidden, tokens).mean()

    monkeypatch.setattr("gsae_jax.lms.loss.logits_per_chunk", lambda platform: 7 * lm.config.d_vocab)
    compiled = jax.jit(jax.grad(mean)).lower(hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * picked.size * lm.config.d_vocab / 2  # not all logits


def test_the_embedded_model_knows_python():
    lm = gsae_jax.load_lm()
    text = "<|endoftext|>import os\n\n\nclass Reader(object):\n    def __init__(self, path):\n        self."
    tokens = np.array(lm.tokenizer(text, add_special_tokens=False)["input_ids"])[None]
    assert lm.tokenizer.decode(int(jnp.argmax(lm.logits(tokens)[0, -1]))) == "path"


def test_bad_calls(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    with refused("sites", "'blocks.0.hook_mlp_ot'", "did you mean 'blocks.0.hook_mlp_out'?", "known: blocks.0."):
        lm.activations(some_tokens(lm), ["blocks.0.hook_mlp_ot"])
    with refused("tokens", "33 positions", "32"):
        lm.logits(np.zeros((1, 33), int))
    with refused("tokens", "0 to 4096", "0 to 4095"):
        lm.logits(np.array([[0, 4096]]))
    with refused("tokens", "float64[3]", "integers"):
        lm.logits(np.zeros(3))
    with refused("tokens", "several lengths", "pad"):
        lm.logits([[1, 2], [1]])


def test_tokens_are_checked_under_jit_too(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    calls = (lm.logits, lambda t: lm.run(t, sites.no_tap), lambda t: lm.activations(t, ["blocks.0.hook_mlp_out"]))
    for call in calls:
        for wrong in (jnp.zeros((1, 33), int), jnp.zeros(3, int), jnp.zeros((2, 0), int), jnp.zeros((1, 4))):
            for maybe_jit in (lambda f: f, jax.jit):
                with refused("tokens"):
                    maybe_jit(call)(wrong)
    assert jax.eval_shape(lm.logits, some_tokens(lm)).shape == (3, 20, lm.config.d_vocab)


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"])
def test_a_tap_returns_activations_of_the_same_shape(lm_dir, site):
    lm = gsae_jax.load_lm(lm_dir)
    edits = (
        lambda x: x[..., :1],
        lambda x: x[0],
        lambda x: x[:, :1],
        lambda x: x.mean(),
        lambda x: 0.0,
        lambda x: x > 0,
        lambda x: x.astype(complex),
        lambda x: "zero",
        lambda x: {"x": x},
    )
    for edit in edits:
        tap = sites.splice({site: edit})
        with refused("tap", site):
            jax.eval_shape(lambda tokens, tap=tap: lm.run(tokens, tap), some_tokens(lm))


def test_a_tap_that_returns_none_leaves_all_as_it_was(lm_dir):
    lm, seen = gsae_jax.load_lm(lm_dir), {}
    tokens = some_tokens(lm)
    np.testing.assert_array_equal(lm.run(tokens, seen.__setitem__), lm.run(tokens, sites.no_tap))
    assert list(seen) == list(lm.sites)


def test_what_a_tap_returns_has_the_models_dtype(lm_dir):
    lm = gsae_jax.load_lm(lm_dir, dtype="bfloat16")
    tokens, seen = some_tokens(lm), {}

    def tap(site, x):
        seen[site] = x.dtype
        return x.astype(jnp.float32)

    np.testing.assert_array_equal(lm.run(tokens, tap), lm.run(tokens, sites.no_tap))
    assert set(seen.values()) == {jnp.dtype("bfloat16")}


def test_an_sae_is_spliced_in_at_its_site(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    tokens, site = some_tokens(lm), "blocks.0.hook_mlp_out"
    config = relu.Config(d_in=lm.sites[site], width=48)
    sae = SAE("a_0", "relu", config, site, relu.init(jax.random.key(0), config))
    expected = lm.run(tokens, lambda name, x: sae(x) if name == site else x)
    assert not np.array_equal(expected, lm.logits(tokens))
    np.testing.assert_array_equal(lm.run(tokens, sae), expected)
    for wrong in (dataclasses.replace(sae, site=""), dataclasses.replace(sae, site="blocks.7.hook_mlp_out"), 3):
        with refused("tap"):
            lm.run(tokens, wrong)


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
    ("damage", "facts"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), ("no model.safetensors",)),
        (truncate, ("model.safetensors cannot be read", "truncated")),
        (lambda folder: (folder / "config.json").unlink(), ("no config.json", "Hugging Face")),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "not a JSON object")),
        (edit_config(model_type="gelo"), ("'gelo'", "not supported", "did you mean 'gelu'?", "known: gelu")),
        (edit_config(d_mlp=None), ("config.json lacks d_mlp",)),
        (edit_config(d_head="8"), ("config.json has d_head = '8'", "whole number from 1")),
        (edit_config(d_vocab=4000), ("4096 tokens", "embeddings for 4000")),
        (edit_config(d_mlp=63), ("config.json", "blocks.0.mlp.W_in", "[32, 64], not [32, 63]")),
        (
            edit_tensors(several),
            ("blocks.1.attn.W_Q is missing", "ln_final.w has shape [31], not [32]", "blocks.9.attn.W_Q is not of"),
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ("no tokenizer that can be read",)),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, lm_dir, damage, facts):
    with refused("path", *facts):
        gsae_jax.load_lm(damaged(tmp_path, lm_dir, damage))


def without_weights(*names, **settings):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        if settings.get("model_type") == "":
            (folder / "config.json").unlink()
        for name in names:
            (folder / name).write_text(json.dumps({"base_model_name_or_path": "someone/large", "peft_type": "LORA"}))

    return damage


def a_pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 548105171\n"
    return lambda folder: (folder / name).write_text(text)


def quantised(*names):
    def damage(tensors):
        for name in names:
            tensors[name] = np.zeros((2, 2), np.int32)

    return edit_tensors(damage)


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (without_weights("model-Q4_K_M.gguf"), ("GGUF (model-Q4_K_M.gguf)",)),
        (without_weights("small.GGUF", model_type=""), ("GGUF (small.GGUF)",)),
        (without_weights("adapter_config.json", "adapter_model.safetensors"), ("adapter_config.json has r = None",)),
        (without_weights("adapter_config.json", "adapter_model.bin", model_type=""), ("LoRA", "'someone/large'")),
        (without_weights("adapter_config.json", "adapters.safetensors"), ("LoRA", "'someone/large'")),
        (a_pointer("model.safetensors"), ("model.safetensors is a git-lfs pointer", "`git lfs pull`")),
        (a_pointer("tokenizer.json"), ("tokenizer.json is a git-lfs pointer", "`git lfs pull`")),
        (a_pointer("config.json"), ("config.json is a git-lfs pointer", "`git lfs pull`")),
        (quantised("a.qweight", "a.qzeros", "a.scales"), ("quantised with GPTQ or AWQ (a.qweight)",)),
        (quantised("a.scales", "a.biases"), ("quantised with MLX (a.scales)",)),
        (quantised("a.SCB"), ("quantised with bitsandbytes",)),
        (quantised("a.weight_scale"), ("quantised with compressed-tensors or FP8",)),
        (edit_config(model_type=None, n_layers=None), ("config.json", "no model_type")),
        (edit_config(model_type="gpt-2"), ("'gpt-2'", "not supported", "did you mean 'gpt2'")),
        (
            edit_config(model_type="shieldgemma2", text_config={"model_type": "gemma3_text"}),
            ("of type 'gemma3_text', is",),
        ),
        (edit_config(model_type="llava", text_config={"model_type": "llama"}), ("of type 'llama', is",)),
    ],
)
def test_what_other_libraries_write_is_called_what_it_is(tmp_path, lm_dir, damage, facts):
    folder = damaged(tmp_path, lm_dir, damage)
    with refused("path", *facts):
        gsae_jax.load_lm(folder)


def test_a_file_is_no_directory(tmp_path, lm_dir):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with refused("path", "small.gguf' is a file", "GGUF is not supported"):
        gsae_jax.load_lm(tmp_path / "small.gguf")
    with refused("path", "model.safetensors' is a file", "directory"):
        gsae_jax.load_lm(lm_dir / "model.safetensors")


@pytest.mark.parametrize("model_type", ["gpt_neo", "gemma3n", "qwen2_moe", "phimoe", "llama4"])
def test_another_model_is_not_taken_for_a_slip_of_the_pen(tmp_path, lm_dir, model_type):
    folder = damaged(tmp_path, lm_dir, edit_config(model_type=model_type))
    with refused("path", f"type '{model_type}'", "not supported", "known: gelu, gemma") as error:
        gsae_jax.load_lm(folder)
    assert "did you mean" not in str(error.value)


def test_an_adapter_beside_a_whole_model_is_left_alone(tmp_path, lm_dir):
    folder = damaged(tmp_path, lm_dir, lambda folder: (folder / "adapter_config.json").write_text("{}"))
    assert gsae_jax.load_lm(folder).config.n_layers == 2


def test_loading_fewer_layers_still_finds_a_stray_tensor(tmp_path, lm_dir):
    folder = damaged(tmp_path, lm_dir, edit_tensors(lambda tensors: tensors.update(extra=np.zeros(2, np.float32))))
    with refused("path", "extra is not of this model"):
        gsae_jax.load_lm(folder, num_layers=1)


def test_a_language_model_is_shown_in_a_line(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    sizes = "2 blocks of width 32, vocabulary 4096, context 32"
    parameters = sum(x.size for x in safetensors.numpy.load_file(lm_dir / "model.safetensors").values())
    assert repr(lm) == f"<LM small: {sizes}, {parameters:,} parameters, float32>"


def test_tab_completion_shows_what_is_public():
    public = {*gsae_jax.__all__, "__version__"}
    assert set(dir(gsae_jax)) == public
    assert {"LM", "SAE", "load", "load_lm"} <= public
    assert all(hasattr(gsae_jax, name) for name in public)
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", gsae_jax.__version__)


def test_texts_are_taken_for_tokens(lm_dir):
    """BOS comes first, once; shorter texts are padded, and their results are those of the text alone."""
    lm, site = gsae_jax.load_lm(lm_dir), "blocks.1.hook_resid_post"
    bos = lm.tokenizer.bos_token_id
    texts = ["def", "import numpy as np", f"{lm.tokenizer.bos_token}return self"]
    tokens, mask = lm.tokenize(texts)
    assert tokens.shape == mask.shape
    alone = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [[bos, *alone[0]], [bos, *alone[1]], alone[2]]
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == expected
    x, logits = lm.activations(texts, site)[site], lm.logits(texts)
    seen = {}
    tapped = lm.run(texts, seen.__setitem__)
    for results in (x, logits, tapped):
        assert not np.any(np.asarray(results)[~mask])
    for row, ids in enumerate(expected):
        kept = slice(len(ids))
        np.testing.assert_allclose(x[row, kept], lm.activations([ids], site)[site][0], atol=1e-5)
        for ours in (logits, tapped):
            np.testing.assert_allclose(ours[row, kept], lm.logits([ids])[0], atol=1e-4)
        np.testing.assert_allclose(seen[site][row, kept], x[row, kept], atol=1e-5)
    np.testing.assert_array_equal(lm.logits(texts[0]), lm.logits([texts[0]]))
    np.testing.assert_array_equal(lm.logits(np.array(texts)), lm.logits(tuple(texts)))
    tokenized = lm.tokenize(texts)
    np.testing.assert_array_equal(lm.activations(tokenized, site)[site], x)
    np.testing.assert_array_equal(lm.logits(tokenized), logits)
    np.testing.assert_array_equal(lm.run(tokenized, lambda site, x: None), tapped)
    np.testing.assert_allclose(jax.jit(lm.logits)(tokenized), logits, atol=1e-4)
    np.testing.assert_array_equal(lm.logits(lm.tokenize(texts[0])), lm.logits(texts[0]))
    for given in (texts, tokenized):
        with refused("mask", "leave it out"):
            lm.logits(given, mask)
    with refused("tokens", "have 82 positions", "32"):
        lm.logits("self " * 80)
    with refused("texts", "ndarray"):
        lm.tokenize(tokens)


def test_the_loss_of_each_token_is_that_of_the_logits(lm_dir):
    """Also with a tap and with padding on either side, where it is 0."""
    lm = gsae_jax.load_lm(lm_dir)
    tokens, seven = some_tokens(lm, rows=3, length=11), np.arange(11)[None] < np.array([11, 7, 2])[:, None]

    def tap(site, x):
        return 0.5 * x if site == "blocks.0.hook_mlp_out" else None

    for mask in (None, seven, seven[:, ::-1]):
        log_p = jax.nn.log_softmax(lm.run(tokens, tap, mask))[:, :-1]
        expected = -np.take_along_axis(np.asarray(log_p), tokens[:, 1:, None], -1)[..., 0]
        known = np.ones(expected.shape, bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        np.testing.assert_allclose(lm.loss(tokens, tap, mask), np.where(known, expected, 0), atol=1e-4)
    texts = ["def value", "import"]
    np.testing.assert_allclose(lm.loss(texts), lm.loss(texts, lambda site, x: x), atol=1e-6)
    assert lm.loss(texts).shape == (2, lm.tokenize(texts).tokens_BxT.shape[1] - 1)
    with refused("tokens", "one position"):
        lm.loss(tokens[:, :1])


def test_taps_where_none_goes_say_how_they_are_given(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    config = relu.Config(lm.sites["blocks.0.hook_mlp_out"], 8)
    sae = SAE("a_0", "relu", config, "blocks.0.hook_mlp_out", away_from_init(relu, config))
    tap = taps.steer(sae, 3, 1.0)
    for several in ([sae], (sae, tap)):
        with refused("tap", "taps.chain"):
            lm.run("def", several)
    for function in (lm.run, lm.loss):
        with refused("mask", "taps.chain"):
            function("def", sae, tap)
    with refused("mask", "use `run`"):
        lm.logits("def", tap)
    with refused("mask", "use `run`"):
        lm.activations("def", sae.site, tap)


@pytest.mark.parametrize("where", ["/some/model", "", "none"])
def test_a_run_is_no_language_model(tmp_path, where):
    """The error says where the language model of the run lies."""
    (tmp_path / "config.json").write_text(json.dumps({"stacks": {}, "lm": {"path": where}, "data": {}}))
    with refused(
        "path", "is a training run", "has none" if where == "none" else f"write its language model, {where!r}"
    ):
        gsae_jax.load_lm(tmp_path)


@pytest.mark.parametrize("padding", [None, "left", pytest.param("right", marks=pytest.mark.variants)])
def test_batches_give_what_one_pass_gives(lm_dir, padding, monkeypatch):
    lm, sites_ = gsae_jax.load_lm(lm_dir), ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"]
    tokens = some_tokens(lm, rows=7, length=13)
    mask = None if padding is None else np.arange(13)[None] < np.arange(7, 14)[:, None]
    mask = mask[:, ::-1] if padding == "left" else mask
    kept = np.ones(tokens.shape, bool) if mask is None else mask
    variables = {"params": lm.params}
    expected = lm.module.apply(variables, jnp.asarray(tokens), sites.no_tap, None if mask is None else jnp.array(mask))
    whole = lm.activations(tokens, sites_, mask)
    for changes in ({}, {"rows_per_forward": 3}, {"rows_per_forward": 1}):
        ours = lm.logits(tokens, mask, **changes)
        assert ours.shape == expected.shape
        np.testing.assert_allclose(np.asarray(ours)[kept], np.asarray(expected)[kept], atol=1e-4)
        for site, x in lm.activations(tokens, sites_, mask, **changes).items():
            np.testing.assert_allclose(x, whole[site], atol=1e-5)
    with refused("rows_per_forward", "is 0"):
        lm.logits(tokens, mask, rows_per_forward=0)


def test_few_shapes_are_compiled(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    before = loading._logits._cache_size()
    for rows in (5, 6):
        for length in range(17, 25):
            assert lm.logits(some_tokens(lm, rows, length)).shape[:2] == (rows, length)
    assert loading._logits._cache_size() == before + 1
    sizes = [batching.padded_size(size) for size in range(1, 2000)]
    assert all(size <= padded <= max(size, 1.5 * (size - 1)) for size, padded in enumerate(sizes, 1))
    assert sorted(set(sizes))[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]


def a_gated_sae(lm, site="blocks.0.hook_mlp_out"):
    config = gated.Config(lm.sites[site], 48)
    return SAE("a_0", "gated", config, site, away_from_init(gated, config))


def test_ready_made_taps(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    tokens, sae = some_tokens(lm), a_gated_sae(lm)
    x = np.asarray(lm.activations(tokens, sae.site)[sae.site], np.float64)
    f, W_dec = (np.asarray(array, np.float64) for array in (sae.encode(x), sae.W_dec))
    cases = {
        "steer": (taps.steer(sae, 3, -2.5), x - 2.5 * W_dec[3]),
        "ablate one": (taps.ablate(sae, 5), x - f[..., 5:6] * W_dec[5]),
        "ablate": (taps.ablate(sae, [1, 7]), x - f[..., [1, 7]] @ W_dec[[1, 7]]),
        "splice": (taps.splice(sae), f @ W_dec + np.asarray(sae.b_dec)),
    }
    for name, (tap, expected) in cases.items():
        seen = taps.read(sae.site)
        logits = lm.run(tokens, taps.chain(tap, seen))
        np.testing.assert_allclose(seen.activations[sae.site], expected, atol=1e-4, err_msg=name)
        replaced = lm.run(tokens, sites.splice({sae.site: lambda x, y=expected: jnp.asarray(y, x.dtype)}))
        np.testing.assert_allclose(logits, replaced, atol=1e-3, err_msg=name)
    assert (f[..., [1, 5, 7]] > 0).any()
    np.testing.assert_array_equal(lm.run(tokens, taps.splice(sae)), lm.run(tokens, sae))

    elsewhere = dataclasses.replace(sae, site="blocks.7.hook_mlp_out")
    for tap in (taps.steer(elsewhere, 3, 1.0), taps.read("blocks.7.hook_mlp_out"), taps.chain(taps.splice(elsewhere))):
        with refused("tap", "blocks.7.hook_mlp_out", "known"):
            lm.run(tokens, tap)
    for wrong in (48, -1, 0.5):
        with refused("feature", "0 to 47"):
            taps.steer(sae, wrong, 1.0)
    with refused("feature", "one number"):
        taps.steer(sae, [1, 2], 1.0)
    twice = taps.read(sae.site)
    lm.run(tokens, taps.chain(taps.ablate(sae, [5, 5]), twice))
    np.testing.assert_allclose(twice.activations[sae.site], cases["ablate one"][1], atol=1e-4)
    with refused("sae", "site"):
        taps.steer(dataclasses.replace(sae, site=""), 3, 1.0)
    with refused("sae", "reads", "blocks.0.hook_mlp_out"):
        taps.ablate(dataclasses.replace(sae, site="blocks.0.hook_resid_mid", target=sae.site), 3)
    with refused("saes", "two of"):
        taps.splice(sae, sae)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda lm, sae: taps.steer("gated", 1, 1.0), "sae"),
        (lambda lm, sae: taps.steer(sae, 1, "a"), "strength"),
        (lambda lm, sae: taps.ablate(None, 1), "sae"),
        (lambda lm, sae: taps.splice({"a": sae}), "sae"),
        (lambda lm, sae: taps.read([sae.site]), "sites"),
        (lambda lm, sae: taps.chain(3), "taps"),
        (lambda lm, sae: lm.activations("hi", [3]), "sites"),
        (lambda lm, sae: lm.activations("hi", None), "sites"),
        (lambda lm, sae: lm.generate("hi", max_new_tokens=1.5), "max_new_tokens"),
        (lambda lm, sae: lm.generate("hi", seed=2**80), "seed"),
        (lambda lm, sae: lm.generate("hi", temperature="hot"), "temperature"),
        (lambda lm, sae: gsae_jax.load_lm(3), "path"),
        (lambda lm, sae: gsae_jax.load(None), ""),
        (lambda lm, sae: gsae_jax.load("x" * 5000), ""),
        (lambda lm, sae: gsae_jax.held_out("run1", "9"), "tokens"),
        (lambda lm, sae: gsae_jax.held_out(None), "run"),
        (lambda lm, sae: gsae_jax.compare_models("x"), "sae"),
        (lambda lm, sae: gsae_jax.stack_config("gated", sae.site, 8, recipe=2026, k=3), "recipe"),
        (lambda lm, sae: gsae_jax.experiment("quickstart", stacks={"gatedd": None}), "stacks.gatedd"),
        (lambda lm, sae: gsae_jax.experiment("quickstart", lms={"tuned": None}), "lms.tuned"),
    ],
)
def test_arguments_of_another_kind_are_refused(lm, call, field):
    config = gated.Config(32, 8)
    sae = SAE("a", "gated", config, "blocks.0.hook_mlp_out", gated.init(jax.random.key(0), config))
    with refused(field):
        call(lm, sae)


@pytest.mark.parametrize("devices", [1, 8])
def test_generation_under_ready_made_taps_is_compiled_once_for_all_features(lm_dir, devices):
    """And gives what the same edits give as plain functions, which are compiled one by one."""
    lm = gsae_jax.load_lm(lm_dir, mesh=on_mesh(devices // 2, 2) if devices > 1 else None)
    sae = a_gated_sae(gsae_jax.load_lm(lm_dir))
    f = sae.encode

    def plain(feature, strength, ablated):
        def edit(x):
            x = x + strength * jnp.asarray(np.asarray(sae.W_dec)[feature])[None, None]
            return x - f(x)[..., ablated] @ jnp.asarray(np.asarray(sae.W_dec)[ablated])

        return sites.splice({sae.site: edit})

    generation._compiled.cache_clear()
    cases = ((3, 9.0, [1, 5]), (4, -90.0, [2, 7]), (7, 90.0, [1, 5]))
    ready = [taps.chain(taps.steer(sae, feature, strength), taps.ablate(sae, of)) for feature, strength, of in cases]
    written = [lm.generate("import os", tap, max_new_tokens=12) for tap in ready]
    assert generation._compiled.cache_info().misses == 1
    assert len({*written}) == 3
    if devices == 1:
        assert written == [lm.generate("import os", plain(*case), max_new_tokens=12) for case in cases]
        assert generation._compiled.cache_info().misses == 4
        run = jax.jit(lambda tap, tokens: lm.run(tokens, tap))
        for tap in ready:
            run(tap, some_tokens(lm))
        assert run._cache_size() == 1
    with refused("tap", "hashable"):
        lm.generate("import os", sites.splice({sae.site: Unhashable()}), max_new_tokens=2)


class Unhashable:
    __hash__ = None

    def __call__(self, x):
        return x


def test_a_transcoder_replaces_its_target(lm_dir):
    lm = gsae_jax.load_lm(lm_dir)
    tokens, read, target = some_tokens(lm), "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"
    config = relu_transcoder.Config(d_in=lm.sites[read], width=48, d_out=lm.sites[target], skip=True)
    sae = SAE("a_0", "relu_transcoder", config, read, away_from_init(relu_transcoder, config), target=target)
    p = {name: np.asarray(value, np.float64) for name, value in sae.params.items()}
    x = np.asarray(lm.activations(tokens, read)[read], np.float64)
    f = np.maximum((x - p["b_in"]) @ p["W_enc"] + p["b_enc"], 0)
    expected = f @ p["W_dec"] + p["b_dec"] + x @ p["W_skip"]
    np.testing.assert_allclose(sae(x), expected, atol=1e-4)
    logits = lm.run(tokens, sites.splice({target: lambda x: jnp.asarray(expected, x.dtype)}))
    for tap in (sae, taps.splice(sae), taps.chain(sae)):
        np.testing.assert_allclose(lm.run(tokens, tap), logits, atol=1e-3)
    np.testing.assert_allclose(jax.jit(lambda tokens: lm.run(tokens, sae))(tokens), logits, atol=1e-3)
    assert lm.generate("import", sae, max_new_tokens=3) == lm.generate("import", taps.splice(sae), max_new_tokens=3)
    with refused("tap", read, "after", target):
        lm.run(tokens, dataclasses.replace(sae, site=target, target=read))
    with refused("tap", "writes 2 sites"):
        lm.run(tokens, dataclasses.replace(sae, target=(read, target)))
