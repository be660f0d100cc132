"""Every family against transformers' torch implementation, through checkpoints made by fixtures/lms/make.py."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import plugins, processes
from gsae_jax.lms import generation, multimodal
from gsae_jax.lms.checkpoints import Checkpoint
from tests.fixtures.lms import make
from tests.measuring import on_mesh
from tests.refusals import refused
from tests.variants import variants

FIXTURES = Path(make.__file__).parent


# The settings of multimodal models have those of the language model inside.
WITH_ROTARY = [case for case in make.CASES if "rope_parameters" in make.CASES[case][1]]


def check(lm, expected, atol=1e-4):
    """Logits and every site are the reference's, where there is no padding."""
    mask = expected["mask"]
    assert mask[0].all()
    assert not mask[1, 0]
    assert not mask[2, -1]
    ours = lm.activations(expected["tokens"], lm.sites, mask) | {"logits": lm.logits(expected["tokens"], mask)}
    # The references do not store what the MLP reads.
    if lm.config.norm_before:
        expected = expected | {
            f"blocks.{n}.ln2.hook_normalized": normalized(lm, n, expected) for n in range(lm.config.n_layers)
        }
    assert set(ours) == set(expected) - {"tokens", "mask"}
    for name, x in ours.items():
        np.testing.assert_allclose(np.asarray(x)[mask], expected[name][mask], atol=atol, rtol=1e-4, err_msg=name)


def normalized(lm, layer, expected):
    """What the norm before an MLP makes of the stream that it reads, in float64."""
    c, params = lm.config, lm.params[f"blocks.{layer}"]["ln2"]
    x = expected[f"blocks.{layer}.hook_resid_{'pre' if c.parallel else 'mid'}"].astype(np.float64)
    x = x - (x.mean(-1, keepdims=True) if c.normalization == "LN" else 0)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + c.norm_eps)
    return x * (np.asarray(params["w"]) + c.norm_offset) + (np.asarray(params["b"]) if "b" in params else 0)


def expected(case, folder=FIXTURES):
    with np.load(folder / case / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("case", make.CASES)
def test_logits_and_every_site_are_the_references(case):
    check(gsae_jax.load_lm(FIXTURES / case), expected(case))


@pytest.mark.torch
def test_the_committed_fixtures_are_what_torch_computes(tmp_path):
    make.make(tmp_path)
    for case in make.CASES:
        fresh, committed = expected(case, tmp_path), expected(case)
        assert set(fresh) == set(committed)
        for name, x in committed.items():
            np.testing.assert_allclose(fresh[name], x, atol=1e-5, rtol=1e-5, err_msg=f"{case} {name}")
        check(gsae_jax.load_lm(tmp_path / case), fresh)


@pytest.mark.parametrize(
    "case",
    [
        case if case in ("gpt2", "gemma2", "gpt_oss") else pytest.param(case, marks=pytest.mark.variants)
        for case in make.CASES
    ],
)
def test_bfloat16_is_near(case):
    reference = expected(case)
    mask, logits = reference["mask"], reference["logits"]
    lm = gsae_jax.load_lm(FIXTURES / case, dtype="bfloat16")
    ours = lm.logits(reference["tokens"], mask)
    assert ours.dtype == jnp.float32
    assert {x.dtype for x in lm.activations(reference["tokens"], lm.sites).values()} == {jnp.dtype("bfloat16")}
    error = np.asarray(ours)[mask] - logits[mask]
    assert np.sqrt(np.mean(error**2)) < 0.05 * np.std(logits[mask])


def copy(case, tmp_path, settings=lambda s: s, tensors=None):
    """A fixture with other settings, or other tensors (of a checkpoint in one file)."""
    folder = tmp_path / case
    shutil.copytree(FIXTURES / case, folder)
    as_read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings(as_read)))
    if tensors:
        file = folder / "model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(file)), file)
    return folder


def test_windows_and_long_texts_in_blocks(monkeypatch):
    """Blocks of queries give what one block gives."""
    for case in ("mistral", "gemma2", "gpt2"):
        lm, reference = gsae_jax.load_lm(FIXTURES / case), expected(case)
        monkeypatch.setattr("gsae_jax.lms.attention.QUERIES", 5)
        jax.clear_caches()
        check(lm, reference)
    jax.clear_caches()


def test_the_older_spellings_of_a_config_mean_the_same(tmp_path):
    def older(case):
        def settings(s):
            rope = s.pop("rope_parameters")
            if case == "olmo3":
                s["rope_theta"] = rope["full_attention"].pop("rope_theta")
                s["rope_scaling"] = rope["full_attention"]
                return s
            if case == "gemma3":
                s["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
                s["rope_theta"] = rope["full_attention"].pop("rope_theta")
                s["rope_scaling"] = rope["full_attention"]
                return s
            theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
            if case.startswith("gpt_neox"):
                return s | {"rotary_emb_base": theta, "rotary_pct": part}
            kind = rope.pop("rope_type")
            s |= {"partial_rotary_factor": part} if part else {}
            return s | {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope | {"type": kind}}

        return settings

    for case in set(WITH_ROTARY) - {"gemma4"}:
        folder = copy(case, tmp_path, older(case))
        assert "rope_parameters" not in json.loads((folder / "config.json").read_text())
        assert Checkpoint.open(folder).config == Checkpoint.open(FIXTURES / case).config, case


SCALINGS = (
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 3.0, "beta_slow": 0.2},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": None},
    {"rope_type": "longrope", "factor": 4.0},
    {"rope_type": "longrope"},
    {"rope_type": "longrope", "factor": 0.5},
    {"rope_type": "longrope", "attention_factor": 1.25},
)


def scaled(settings, scaling, pairs):
    """A `config.json` with a rotary scaling, of layers with full attention where others have their own positions."""
    rope = settings["rope_parameters"]
    by_type = "full_attention" in rope
    old = rope["full_attention"] if by_type else rope
    kept = {name: old[name] for name in ("rope_theta", *([] if by_type else ["partial_rotary_factor"])) if name in old}
    new = kept | {"original_max_position_embeddings": 32} | scaling
    if scaling["rope_type"] == "longrope":
        new |= {"short_factor": [1.0 + i / 8 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    if scaling["rope_type"] in ("linear", "dynamic"):
        del new["original_max_position_embeddings"]
    return settings | {"rope_parameters": rope | {"full_attention": new} if by_type else new}


@pytest.mark.torch
@pytest.mark.parametrize("case", WITH_ROTARY)
def test_rotary_positions_are_those_of_torch(case, tmp_path):
    """Of every family, with every scaling: texts that fill the original context, and longer ones."""
    import torch
    import transformers

    for number, scaling in enumerate(SCALINGS):
        settings = json.loads((FIXTURES / case / "config.json").read_text())
        pairs = len(Checkpoint.open(FIXTURES / case).config.layers[-1].frequencies)
        if settings["model_type"] == "phi3" and scaling["rope_type"] != "longrope":
            continue  # its config knows no other
        if settings["model_type"] == "gemma4_text" and scaling["rope_type"] == "longrope":
            continue  # its config refuses this one
        folder = copy(case, tmp_path / str(number), lambda s, scaling=scaling, pairs=pairs: scaled(s, scaling, pairs))
        theirs = transformers.AutoConfig.from_pretrained(folder)
        rotary = transformers.AutoModelForCausalLM.from_config(theirs).base_model.rotary_emb
        types = getattr(theirs, "layer_types", None) if "full_attention" in theirs.rope_parameters else None
        for index, layer in enumerate(Checkpoint.open(folder).config.layers):
            for length in (32, 33, 64):
                kind = {"layer_type": types[index]} if types else {}
                cos, sin = rotary(torch.zeros(1), torch.arange(length)[None], **kind)
                is_long = layer.long_frequencies and length > layer.long_after
                ours = np.array(layer.long_frequencies if is_long else layer.frequencies)
                angles = np.arange(length)[:, None] * np.concatenate([ours, ours])
                for turned, expected in ((np.cos(angles), cos), (np.sin(angles), sin)):
                    error = f"{scaling} {length}"
                    turned = layer.rotary_scale * turned[:, : expected.shape[-1]]  # GPT-OSS has one of the two halves
                    np.testing.assert_allclose(turned, expected[0], atol=2e-5, err_msg=error)


def test_the_length_of_a_text_chooses_the_frequencies():
    """And not that of the row that it is computed in, nor the other texts; generation may not change it."""
    lm, reference = gsae_jax.load_lm(FIXTURES / "qwen2_longrope"), expected("qwen2_longrope")
    tokens, logits = reference["tokens"], reference["logits"]
    assert lm.config.lengths == {8}
    short = tokens[1:2, make.LEFT :]
    np.testing.assert_allclose(lm.logits(short), logits[1:2, make.LEFT :], atol=1e-4)
    padded, mask = np.pad(short, ((0, 0), (0, 4))), np.arange(12)[None] < 8
    ours = [lm.logits(padded, mask), lm.run(padded, lambda site, x: None, mask)]
    ours.append(jax.jit(lambda *inputs: lm.run(inputs[0], lambda site, x: None, inputs[1]))(padded, mask))
    for each in ours:
        np.testing.assert_allclose(each[:, :8], logits[1:2, make.LEFT :], atol=1e-4)
    np.testing.assert_allclose(lm.logits(tokens[2:, : -make.RIGHT]), logits[2:, : -make.RIGHT], atol=1e-4)
    assert np.abs(lm.logits(tokens[:1, :8]) - logits[:1, :8]).max() > 0.1
    with refused("max_new_tokens", "is 5", "8 tokens", "longrope"):
        lm.generate(["w4 w5 w6", "w4"], max_new_tokens=5)
    assert lm.generate(["w4 w5 w6", "w4"], max_new_tokens=4)


def test_dynamic_scaling_changes_no_text_within_the_context(tmp_path):
    folder = copy("mistral", tmp_path, with_rope("dynamic", factor=2.0))
    assert Checkpoint.open(folder).config == Checkpoint.open(FIXTURES / "mistral").config
    with refused("tokens", "65 positions", "has 64"):
        gsae_jax.load_lm(folder).logits(np.zeros((1, 65), int))


def test_the_original_gpt2_layout(tmp_path):
    """No prefix, and the causal mask among the weights."""

    def tensors(t):
        masks = {f"h.{layer}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for layer in range(2)}
        return {name.removeprefix("transformer."): value for name, value in t.items()} | masks

    check(gsae_jax.load_lm(copy("gpt2", tmp_path, tensors=tensors)), expected("gpt2"))


def test_half_precision_checkpoints(tmp_path):
    """Stored in float16: what is loaded is the stored value."""
    folder = copy("llama_2", tmp_path, tensors=lambda t: {n: v.astype(np.float16) for n, v in t.items()})
    stored = safetensors.numpy.load_file(folder / "model.safetensors")["model.norm.weight"]
    lm = gsae_jax.load_lm(folder)
    np.testing.assert_array_equal(lm.params["ln_final"]["w"], stored.astype(np.float32))
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype("float32")}


def test_tied_embeddings_under_both_names(tmp_path):
    def both(t):
        return t | {"model.embed_tokens.weight": t["lm_head.weight"].copy()}

    check(gsae_jax.load_lm(copy("llama_3", tmp_path, tensors=both)), expected("llama_3"))

    def differing(t):
        return t | {"model.embed_tokens.weight": t["lm_head.weight"] + 1}

    with refused("path", "model.embed_tokens.weight and lm_head.weight differ", "tied"):
        gsae_jax.load_lm(copy("llama_3", tmp_path / "other", tensors=differing))


@pytest.mark.parametrize(
    ("embedding", "unembedding"), [(np.float32, "bfloat16"), ("bfloat16", np.float32), ("float16", "bfloat16")]
)
def test_tied_embeddings_in_two_dtypes(tmp_path, embedding, unembedding):
    """The finer one is read, whichever name it has; the other must be what it rounds to."""

    def both(t):
        exact = t["lm_head.weight"].astype(jnp.bfloat16 if embedding == "float16" else np.float32)
        return t | {"model.embed_tokens.weight": exact.astype(embedding), "lm_head.weight": exact.astype(unembedding)}

    folder = copy("llama_3", tmp_path, tensors=both)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    finer = max(
        (stored["model.embed_tokens.weight"], stored["lm_head.weight"]),
        key=lambda x: (x.itemsize, x.dtype == "float16"),
    )
    lm = gsae_jax.load_lm(folder)
    np.testing.assert_array_equal(lm.params["embed.W_E"], finer.astype(np.float32))
    if embedding != "float16":
        check(lm, expected("llama_3"))

    def differing(t):
        t = both(t)
        t["lm_head.weight"][-1, -1] *= 1.25
        return t

    with refused("path", "model.embed_tokens.weight and lm_head.weight differ", "tied"):
        gsae_jax.load_lm(copy("llama_3", tmp_path / "other", tensors=differing))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64}, "quantization_config": {"group_size": 64}}, "MLX"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    ],
)
def test_quantised_weights_are_named(tmp_path, settings, method):
    with refused("", f"quantised with '{method}'", "not supported"):
        Checkpoint.open(copy("llama_2", tmp_path, lambda s: s | settings))


@pytest.mark.parametrize("case", ["mistral", "gemma4"])
def test_fewer_layers(case):
    """Of a checkpoint in shards, and of one that has what each layer adds for a token in one tensor."""
    whole, first = gsae_jax.load_lm(FIXTURES / case), gsae_jax.load_lm(FIXTURES / case, num_layers=1)
    tokens = expected(case)["tokens"]
    assert "blocks.1" not in first.params
    assert "unembed.W_U" not in first.params
    theirs = whole.activations(tokens, first.sites)
    for site, x in first.activations(tokens, first.sites).items():
        np.testing.assert_array_equal(x, theirs[site])


def with_rope(kind, **more):
    return lambda s: s | {"rope_parameters": s["rope_parameters"] | {"rope_type": kind, **more}}


def without(name):
    return lambda s: {key: value for key, value in s.items() if key != name}


def with_text(**more):
    return lambda s: s | {"text_config": s["text_config"] | more}


@pytest.mark.parametrize(
    ("case", "settings", "facts"),
    [
        ("llama_2", with_rope("other", factor=2.0), ("rope scaling 'other'", "not supported", "known: default")),
        ("llama_2", with_rope("yarn", factor=2.0, attention_factor=-1.0), ("attention_factor = -1.0", "positive")),
        ("llama_3", with_rope("llama3", original_max_position_embeddings=0), ("original_max_position_embeddings = 0",)),
        ("qwen2_longrope", with_rope("longrope", long_factor=[1.0]), ("long_factor = [1.0]", "4 positive numbers")),
        ("qwen2_longrope", with_rope("longrope", short_factor=[-1.0] * 4), ("short_factor", "4 positive numbers")),
        ("llama_2", lambda s: s | {"hidden_act": "xielu"}, ("activation 'xielu'", "not supported")),
        ("llama_2", lambda s: s | {"quantization_config": {"bits": 4}}, ("quantised with",)),
        ("llama_2", lambda s: s | {"num_attention_heads": 5}, ("not valid", "not a multiple")),
        ("llama_2", lambda s: s | {"hidden_size": "24"}, ("hidden_size = '24'", "whole number")),
        ("llama_2", lambda s: {k: v for k, v in s.items() if k != "vocab_size"}, ("lacks vocab_size",)),
        ("gpt2", lambda s: {k: v for k, v in s.items() if k not in ("n_head", "n_embd")}, ("lacks n_embd, n_head",)),
        ("llama_2", lambda s: s | {"num_attention_heads": 0}, ("num_attention_heads = 0",)),
        ("llama_2", lambda s: s | {"num_hidden_layers": 0}, ("num_hidden_layers = 0", "from 1 to 1000")),
        ("llama_3", lambda s: s | {"num_key_value_heads": 4}, ("6 attention heads", "4 key-value heads")),
        ("llama_2", lambda s: s | {"head_dim": 7}, ("not valid", "even rotary dimension")),
        ("llama_2", lambda s: s | {"is_causal": False}, ("is_causal = False", "not supported")),
        ("llama_2", with_rope("default", partial_rotary_factor=0.5), ("partial_rotary_factor = 0.5", "not supported")),
        ("llama_2", with_rope("linear", factor=0.0), ("factor = 0.0", "positive")),
        ("llama_2", with_rope("default", rope_theta=0.0), ("rope_theta = 0.0", "positive")),
        ("llama_2", lambda s: s | {"rms_norm_eps": -1.0}, ("-1.0", "norms", "positive")),
        ("mistral", lambda s: s | {"sliding_window": -3}, ("window of -3",)),
        ("gemma", lambda s: s | {"head_dim": 0}, ("head_dim = 0",)),
        ("gemma2", lambda s: s | {"query_pre_attn_scalar": 0}, ("query_pre_attn_scalar = 0", "positive")),
        ("gpt2", lambda s: s | {"n_head": 0}, ("n_head = 0",)),
        ("gpt2", lambda s: s | {"add_cross_attention": True}, ("add_cross_attention = True", "not supported")),
        ("gemma", lambda s: s | {"use_bidirectional_attention": True}, ("use_bidirectional_attention = True",)),
        ("gemma3", lambda s: s | {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping",)),
        ("gemma4", lambda s: s | {"enable_moe_block": True}, ("enable_moe_block = True", "not supported")),
        ("gemma4", lambda s: s | {"use_bidirectional_attention": "all"}, ("= False",)),
        ("gemma4", lambda s: s | {"vocab_size_per_layer_input": 60}, ("vocab_size_per_layer_input = 60", "61")),
        ("gemma4", lambda s: s | {"num_kv_shared_layers": 4}, ("num_kv_shared_layers = 4", "each type")),
        ("gemma4", lambda s: s | {"per_layer_config": {"1": {"intermediate_size": 9}}}, ("intermediate_size in per_",)),
        ("gemma4", lambda s: scaled(s, {"rope_type": "longrope"}, 8), ("not valid", "head_dim")),
        ("gemma4", lambda s: s | {"per_layer_config": {"1": {"num_key_value_heads": 3}}}, ("3 key-value heads",)),
        ("gemma3_multimodal", lambda s: s | {"text_config": None}, ("lacks text_config",)),
        ("gemma3_multimodal", with_text(hidden_size=None), ("hidden_size = None",)),
        ("gemma3_multimodal", with_text(final_logit_softcapping=2.0), ("final_logit_softcapping", "not supported")),
        ("gemma3_multimodal", lambda s: s | {"quantization_config": {"quant_method": "awq"}}, ("with 'awq'",)),
        ("qwen2", lambda s: s | {"layer_types": ["chunked_attention"] * 3}, ("chunked_attention",)),
        ("mixtral", lambda s: s | {"num_experts_per_tok": 5}, ("5 experts per token, of 4",)),
        ("mixtral", lambda s: s | {"num_local_experts": 0}, ("num_local_experts = 0",)),
        ("mixtral", lambda s: s | {"num_local_experts": 10**8}, ("num_local_experts = 100000000",)),
        ("qwen3_moe", without("num_local_experts"), ("lacks num_local_experts",)),
        ("qwen3_moe", without("moe_intermediate_size"), ("lacks moe_intermediate_size",)),
        ("qwen3_moe", lambda s: s | {"decoder_sparse_step": 0}, ("decoder_sparse_step = 0",)),
        ("gpt_oss", lambda s: s | {"swiglu_limit": 0.0}, ("swiglu_limit = 0.0", "positive")),
        ("gpt_oss", lambda s: s | {"hidden_act": "gelu"}, ("hidden_act = 'gelu'", "not supported")),
        ("mixtral", lambda s: s | {"quantization_config": {"quant_method": "mxfp4"}}, ("quantised with 'mxfp4'",)),
        ("gpt_oss", lambda s: s | {"quantization_config": {"quant_method": "fp8"}}, ("quantised with 'fp8'",)),
        ("llama_2", lambda s: s | {"model_type": "mamba"}, ("type 'mamba'", "not supported", "known: gelu, gemma")),
    ],
)
def test_features_we_lack_are_refused_by_name(tmp_path, case, settings, facts):
    with refused("", str(tmp_path / case), *facts):
        Checkpoint.open(copy(case, tmp_path, settings))


@pytest.mark.parametrize("shape", [*variants(None, (4, 2)), (2, 4)])
def test_the_fused_kernel_is_called_rightly(shape, monkeypatch):
    """On a GPU, cuDNN's kernel takes the place of the blocks: the same call, with XLA's kernel in its place."""
    from gsae_jax.lms import attention

    calls = []

    def kernel(*qkv, implementation, **settings):
        calls.append(implementation)
        return original(*qkv, implementation="xla", **settings)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(attention, "_has_fused", lambda q: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    mesh = shape and jax.make_mesh(shape, ("data", "latent"), axis_types=axis_types)
    for case in ("mistral", "qwen3", "llama_3"):  # windows; heads that two devices divide, or key-value heads do not
        lm, reference = gsae_jax.load_lm(FIXTURES / case, mesh=mesh), expected(case)
        tokens, logits = np.repeat(reference["tokens"][:1], 4, axis=0), reference["logits"][:1]
        jax.clear_caches()
        np.testing.assert_allclose(lm.logits(tokens), np.repeat(logits, 4, axis=0), atol=1e-4)

        def under_vmap(scale, lm=lm, tokens=tokens):
            return lm.run(jnp.array(tokens), lambda site, x: x * scale if site == "blocks.0.hook_attn_out" else x)

        many = jax.jit(jax.vmap(under_vmap))(jnp.array([1.0, 0.5]))
        np.testing.assert_allclose(many[0], np.repeat(logits, 4, axis=0), atol=1e-4)
    assert set(calls) == {"cudnn"}
    jax.clear_caches()


def test_a_special_token_may_lie_beyond_the_embedding(tmp_path):
    """As Gemma 3's image token; a word may not."""
    for special in (True, False):
        folder = copy("gemma3", tmp_path / str(special))
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        token = {"id": 61, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False}
        tokenizer["added_tokens"].append(token | {"normalized": False, "special": special})
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        if special:
            assert len(gsae_jax.load_lm(folder).tokenizer) == 62
        else:
            with refused("path", "62 tokens", "embeddings for 61"):
                gsae_jax.load_lm(folder)


def test_a_foreign_bias_is_not_taken_for_a_mask(tmp_path):
    def tensors(t):
        return t | {"transformer.h.7.attn.c_attn.bias": np.zeros(3, np.float32)}

    with refused("path", "transformer.h.7.attn.c_attn.bias is not of this model"):
        gsae_jax.load_lm(copy("gpt2", tmp_path, tensors=tensors))


def test_the_language_model_of_a_multimodal_checkpoint(tmp_path, caplog):
    """Under the tensors' older and newer names; the log says once that the rest is not read."""

    def renamed(t):
        newer = {name: name.replace("language_model.model.", "model.language_model.") for name in t}
        return {new if new != name else f"model.{name}": t[name] for name, new in newer.items()}

    multimodal._say_once.cache_clear()
    with caplog.at_level("INFO", "gsae_jax.lms.multimodal"):
        newer = copy("gemma3_multimodal", tmp_path, tensors=renamed)
        check(gsae_jax.load_lm(newer), expected("gemma3_multimodal"))
        gsae_jax.load_lm(FIXTURES / "gemma3_multimodal")
    assert ["vision part is not read" in record.getMessage() for record in caplog.records] == [True]

    def damaged(t):
        t["language_model.model.extra.weight"] = t["language_model.model.norm.weight"]
        return {name: value for name, value in t.items() if name != "language_model.model.layers.1.mlp.up_proj.weight"}

    lost, stray = "language_model.model.layers.1.mlp.up_proj.weight is missing", "model.extra.weight is not of this"
    with refused("path", lost, stray):
        gsae_jax.load_lm(copy("gemma3_multimodal", tmp_path / "other", tensors=damaged))


def test_a_tensor_of_several_parameters_has_the_rows_of_all(tmp_path):
    """As Phi-3's of queries, keys and values: 4 heads and twice 2 of 12 dimensions."""

    def tensors(t):
        name = "model.layers.1.self_attn.qkv_proj.weight"
        return t | {name: t[name][:-12].copy()}

    with refused("path", "qkv_proj.weight has shape [84, 48], not [96, 48]"):
        gsae_jax.load_lm(copy("phi3", tmp_path, tensors=tensors))


@pytest.mark.parametrize("case", ["gemma4", *variants("olmo2", "phi3")])
def test_models_on_a_mesh(case):
    check(gsae_jax.load_lm(FIXTURES / case, mesh=on_mesh(2, 4)), expected(case))
    lm = gsae_jax.load_lm(FIXTURES / case, num_layers=1, mesh=on_mesh(4, 2))
    tokens = expected(case)["tokens"][[0] * 4]
    for site, x in lm.activations(tokens, lm.sites).items():
        if site in expected(case):
            np.testing.assert_allclose(x[3], expected(case)[site][0], atol=1e-4, err_msg=site)


def test_unused_keys_and_values_of_layers_that_read_others(tmp_path):
    """Gemma 4's checkpoints may have them."""

    def more(t):
        names = [name for name in t if ".layers.1.self_attn.k_" in name or ".layers.1.self_attn.v_" in name]
        assert len(names) == 3
        return t | {name.replace("layers.1", "layers.4"): t[name] + 1 for name in names}

    check(gsae_jax.load_lm(copy("gemma4", tmp_path, tensors=more)), expected("gemma4"))

    def fewer(t):
        return {name: value for name, value in t.items() if name != "model.layers.2.self_attn.k_norm.weight"}

    with refused("path", "model.layers.2.self_attn.k_norm.weight is missing"):
        gsae_jax.load_lm(copy("gemma4", tmp_path / "other", tensors=fewer))


def test_bad_calls():
    with refused("dtype", "'int8'", "'float32' or 'bfloat16'"):
        gsae_jax.load_lm(dtype="int8")
    lm = gsae_jax.load_lm(num_layers=1)
    with refused("num_layers", "no unembedding"):
        lm.logits(np.zeros((1, 4), int))
    with refused("mask", "[1, 3]", "[1, 4]"):
        lm.activations(np.zeros((1, 4), int), "blocks.0.hook_mlp_out", np.ones((1, 3)))


def test_the_docs_table_lists_the_model_types():
    table = (Path(gsae_jax.__file__).parent.parent / "docs" / "language_models.md").read_text()
    for family in plugins.known("lms", "MODEL_TYPES").values():
        for model_type in family.MODEL_TYPES:
            assert re.search(rf"`{model_type}`", table), model_type


@pytest.mark.parametrize("case", ["gpt2", "gemma2", *variants("gpt_neox", "llama_2", "olmo2", "gemma4_multimodal")])
def test_logit_effects(case):
    """Against float64 from the stored weights, and against finite differences of the model's own logits."""
    lm, stored = gsae_jax.load_lm(FIXTURES / case), expected(case)
    c, rng = lm.config, np.random.default_rng(0)
    directions = rng.normal(size=(3, c.d_model))
    gain = np.asarray(lm.params["ln_final"]["w"], np.float64) + c.norm_offset
    W_U = np.asarray(lm.params["embed.W_E"].T if c.tied else lm.params["unembed.W_U"], np.float64)
    centred = directions - directions.mean(-1, keepdims=True) if c.normalization == "LN" else directions
    effects = (centred * gain) @ W_U
    np.testing.assert_allclose(lm.logit_effects(directions), effects, atol=1e-4)
    np.testing.assert_allclose(lm.logit_effects(directions[0]), effects[0], atol=1e-4)

    tokens, last = stored["tokens"], f"blocks.{c.n_layers - 1}."
    at = lm.activations(tokens, last + "hook_resid_post")[last + "hook_resid_post"][0, -1]
    for site in ("hook_mlp_out", "mlp.hook_post", "attn.hook_z"):
        site, width = last + site, lm.sites[last + site]
        d = rng.normal(size=width).astype(np.float32)
        if c.norm_after and not site.endswith("out"):
            with refused("site", "normalises"):
                lm.logit_effects(d, site)
            continue
        if site.endswith("hook_z") and not c.parallel:
            continue  # the MLP of this block reads it too, so that its direct effect is not its whole effect
        step = 1e-2

        @jax.jit
        def logits(strength, site=site, d=d):
            return lm.run(tokens[:1], lambda name, x: x + strength * d[None, None] if name == site else x)[0, -1]

        change = (np.asarray(logits(step), np.float64) - np.asarray(logits(-step))) / (2 * step)
        np.testing.assert_allclose(lm.logit_effects(d, site, at), change, atol=1e-2 * np.abs(change).max())
    if last + "ln2.hook_normalized" in lm.sites:
        with refused("site", "only the MLP"):
            lm.logit_effects(np.zeros(c.d_model), last + "ln2.hook_normalized")
    with refused("directions", f"{c.d_model}"):
        lm.logit_effects(np.zeros(c.d_model + 1))


@pytest.mark.parametrize(
    "case",
    [
        *("gpt2", "gemma2", "gpt_oss"),
        *variants("gpt_neox", "qwen3", "llama_yarn", "olmo3", "phi3", "gemma4", "mixtral"),
    ],
)
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.variants), 1.5])
def test_generation_with_a_cache_is_generation_without(case, temperature):
    """Each new token is the one that a whole forward pass over all tokens before it gives, under the same tap."""
    lm, new = gsae_jax.load_lm(FIXTURES / case), 9
    texts = ["w4 w17 w9 w30 w8", "w11", "w5 w6 w7"]
    if lm.config.lengths:  # prompts are to be long ones already
        texts = [text + " w9 w8 w4 w12 w13 w5 w6 w20" for text in texts]
    site = "blocks.1.hook_resid_pre"

    def tap(name, x):
        return x + 0.5 * jnp.cos(jnp.arange(x.shape[-1]))[None, None] if name == site else x

    written = lm.generate(texts, tap, max_new_tokens=new, temperature=temperature, seed=3)
    assert written == lm.generate(texts, tap, max_new_tokens=new, temperature=temperature, seed=3)
    assert all(whole.startswith(text + " ") for whole, text in zip(written, texts, strict=True))
    tokens, mask = lm.tokenize(written)
    lengths = lm.tokenize(texts).mask_BxT.sum(1)
    logits = np.asarray(lm.run(tokens, tap, mask))
    kept, compared = mask.sum(1), 0
    for step in range(new):
        draws = jax.random.gumbel(jax.random.fold_in(jax.random.key(3), step), (3, lm.config.d_vocab))
        for row, start in enumerate(lengths):
            at = start + step - 1
            scores = logits[row, at] if temperature == 0 else logits[row, at] / temperature + np.asarray(draws[row])
            if at + 1 < kept[row]:
                assert scores[tokens[row, at + 1]] > scores.max() - 1e-3, (row, step)
                compared += 1
            elif at + 1 == kept[row]:
                assert scores[lm.tokenizer.eos_token_id] > scores.max() - 1e-3
    assert compared > 12


def test_generation_takes_one_text_or_several():
    lm = gsae_jax.load_lm(FIXTURES / "gpt2")
    assert lm.generate("w4", max_new_tokens=3) == lm.generate(["w4"], max_new_tokens=3)[0]
    assert lm.generate("w4 w5", max_new_tokens=40, temperature=1.0) != lm.generate("w4 w5", max_new_tokens=40, seed=1)
    mesh = jax.make_mesh((4, 2), ("data", "latent"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert lm.on(mesh).generate("w4", max_new_tokens=3) == lm.generate("w4", max_new_tokens=3)
    for field, texts, numbers in (
        ("texts", [[4, 5]], {}),
        ("texts", "w4 " * 60, {}),
        ("max_new_tokens", "w4", {"max_new_tokens": 0}),
        ("temperature", "w4", {"temperature": -1.0}),
    ):
        with refused(field):
            lm.generate(texts, **numbers)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_long_generation_has_a_bar(monkeypatch, capsys, devices):
    """On a terminal; the text is the same."""
    lm = gsae_jax.load_lm(FIXTURES / "gpt2", mesh=on_mesh(devices // 2, 2) if devices > 1 else None)
    written, bars, make = lm.generate("w4 w5", max_new_tokens=40), [], generation.tqdm.tqdm
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(processes, "shows_bars", lambda: True)
    at_once = {"delay": 0, "mininterval": 0}
    monkeypatch.setattr(generation.tqdm, "tqdm", lambda **options: bars.append(make(**options | at_once)) or bars[-1])
    assert lm.generate("w4 w5", max_new_tokens=40) == written
    assert [(bar.n, bar.total) for bar in bars] == [(32, 40)]
    assert "generate:" in capsys.readouterr().err
