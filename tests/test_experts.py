"""Layers with experts: against all experts for all tokens, on meshes, and their checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax.lms import experts as experts_lib
from gsae_jax.lms import weights
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.experts import Experts, mixture
from gsae_jax.lms.transformer import ACTIVATIONS
from tests.measuring import on_mesh
from tests.refusals import refused
from tests.test_families import FIXTURES, check, copy, expected
from tests.variants import variants

CASES = ("mixtral", "qwen3_moe", "qwen3_moe_fused", "gpt_oss")
D, M = 6, 8
KINDS = {
    "normalized": Experts(5, 2, M),
    "probabilities": Experts(5, 3, M, normalized=False),
    "gpt_oss": Experts(4, 2, M, bias=True, limit=0.5, slope=1.7),
    "one": Experts(3, 1, M),
    "all": Experts(3, 3, M),
}


def silu(x):
    return x / (1 + np.exp(-x))


def draw(kind, rows, tokens, seed=0):
    """Inputs, logits and weights."""
    experts, rng = KINDS[kind], np.random.default_rng(seed)
    E = experts.n_experts
    W = {"W_gate": (E, D, M), "W_in": (E, D, M), "W_out": (E, M, D)}
    if experts.bias:
        W |= {"b_gate": (E, M), "b_in": (E, M), "b_out": (E, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in W.items()}
    x = rng.normal(size=(rows, tokens, D)).astype(np.float32)
    return x, rng.normal(size=(rows, tokens, E)).astype(np.float32), arrays


def reference(x, logits, W, experts):
    """One token and one expert after the other, in float64."""
    x, logits, W = jax.tree.map(lambda each: np.asarray(each, np.float64), (x, logits, W))
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        order = np.argsort(-logits[place], kind="stable")[: experts.experts_per_token]
        shares = np.exp(logits[place])
        shares /= shares[order].sum() if experts.normalized else shares.sum()
        for e in order:
            gate, inner = (
                x[place] @ W[f"W_{name}"][e] + W.get(f"b_{name}", np.zeros((9, M)))[e] for name in ("gate", "in")
            )
            if experts.limit:
                gate, inner = np.minimum(gate, experts.limit), np.clip(inner, -experts.limit, experts.limit)
                neurons = gate / (1 + np.exp(-experts.slope * gate)) * (inner + 1)
            else:
                neurons = silu(gate) * inner
            out[place] += shares[e] * (neurons @ W["W_out"][e] + W.get("b_out", np.zeros((9, D)))[e])
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_dropped(kind):
    """However many tokens choose an expert; of equal logits the first ones count."""
    ours = jax.jit(lambda *inputs: mixture(*inputs, KINDS[kind], ACTIVATIONS["silu"], None))
    for shape in ((1, 1), (3, 30)):
        x, logits, W = draw(kind, *shape)
        one_expert = logits + 9 * (np.arange(logits.shape[-1]) == 1)
        for each in (logits, one_expert.astype(np.float32), np.zeros_like(logits)):
            wanted = reference(x, each, W, KINDS[kind])
            np.testing.assert_allclose(ours(x, each, W), wanted, atol=2e-5, rtol=1e-5)


def test_blocks_of_several_rows():
    """So the test above has blocks of one row, and of more."""
    assert [experts_lib.block_rows(uses, 5) for uses in (2, 180, 320, 2**20)] == [1, 8, 16, 256]


def with_all_experts(x, logits, W, experts):
    """The mixture as products with the matrices of all experts."""
    top, chosen = jax.lax.top_k(logits, experts.experts_per_token)
    shares = jax.nn.softmax(top) if experts.normalized else jnp.take_along_axis(jax.nn.softmax(logits), chosen, -1)
    each = (jax.nn.one_hot(chosen, experts.n_experts) * shares[..., None]).sum(-2)

    def affine(x, name, to):
        y = jnp.einsum(to, x, W[f"W_{name}"])
        return y + W[f"b_{name}"][None, None] if experts.bias else y

    inner = experts.neurons(affine(x, "gate", "btd,edm->btem"), affine(x, "in", "btd,edm->btem"), jax.nn.silu)
    return (each[..., None] * affine(inner, "out", "btem,emd->bted")).sum(-2)


@pytest.mark.parametrize("kind", ["probabilities", "gpt_oss"])
@pytest.mark.parametrize("shape", [None, (2, 4), *variants((8, 1))])
def test_gradients_are_those_of_all_experts(kind, shape):
    """With respect to inputs, logits and weights; on a mesh also rows that `data` does not divide."""
    mesh = shape and on_mesh(*shape)
    for rows in (8, 3) if shape else (3,):
        x, logits, W = draw(kind, rows, 12)
        weigh = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

        def loss(function, weigh=weigh):
            return lambda *inputs: (weigh * function(*inputs)).sum()

        ours = loss(lambda *a: mixture(*a, KINDS[kind], jax.nn.silu, mesh))
        theirs = loss(lambda *a: with_all_experts(*a, KINDS[kind]))
        found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, logits, W) for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), found, wanted)


@pytest.mark.parametrize("case", ["qwen3_moe", *variants("gpt_oss")])
@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_on_a_mesh(case, shape):
    """Experts lie over all devices; three rows, which `data` does not divide, and eight."""
    lm, reference = gsae_jax.load_lm(FIXTURES / case, mesh=on_mesh(*shape)), expected(case)
    W = lm.params["blocks.0"]["mlp"]
    for name in ("W_gate", "W_in", "W_out"):
        assert len({str(shard.index) for shard in W[name].addressable_shards}) == 8, name
    check(lm, reference)
    tokens, logits = np.repeat(reference["tokens"][:1], 8, axis=0), reference["logits"][:1]
    np.testing.assert_allclose(lm.logits(tokens), np.repeat(logits, 8, axis=0), atol=1e-4)


def test_several_taps_at_once():
    """Under `vmap`, as with a dense MLP."""
    lm, tokens = gsae_jax.load_lm(FIXTURES / "mixtral"), expected("mixtral")["tokens"][:1]

    @jax.jit
    def run(scale):
        return lm.run(jnp.array(tokens), lambda site, x: x * scale if site == "blocks.0.hook_attn_out" else x)

    both = jax.jit(jax.vmap(run))(jnp.array([1.0, 0.5]))
    for scale, logits in zip((1.0, 0.5), both, strict=True):
        np.testing.assert_allclose(logits, run(scale), atol=1e-5)


def test_a_layer_with_experts_has_no_neurons():
    lm = gsae_jax.load_lm(FIXTURES / "qwen3_moe")
    assert [site for site in lm.sites if "hook_post" in site] == ["blocks.1.mlp.hook_post"]
    with refused("sites", "blocks.0.mlp.hook_post", "experts", "'blocks.0.hook_mlp_out'"):
        lm.activations("w4 w5", "blocks.0.mlp.hook_post")
    with refused("site", "experts"):
        lm.logit_effects(np.zeros(12), "blocks.2.mlp.hook_post")


def fused(tensors):
    """The tensors of experts joined, as transformers has them in memory."""
    joined = {name: value for name, value in tensors.items() if ".experts." not in name}
    for start in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
        each = {name: value for name, value in tensors.items() if name.startswith(f"{start}.experts.")}

        def stack(*names, each=each, start=start):
            count = len(each) // 3
            return np.stack(
                [np.concatenate([each[f"{start}.experts.{e}.{name}.weight"] for name in names]) for e in range(count)]
            )

        new = start.replace("block_sparse_moe", "mlp") + ".experts."
        names = ("w1", "w3", "w2") if "block_sparse_moe" in start else ("gate_proj", "up_proj", "down_proj")
        joined |= {new + "gate_up_proj": stack(*names[:2]), new + "down_proj": stack(names[2])}
    return {name.replace("block_sparse_moe", "mlp"): value for name, value in joined.items()}


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_both_layouts(case, tmp_path):
    ours, theirs = (gsae_jax.load_lm(each) for each in (FIXTURES / case, copy(case, tmp_path, tensors=fused)))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_the_published_spelling_of_the_number_of_experts(tmp_path):
    folder = copy("qwen3_moe", tmp_path, lambda s: s | {"num_experts": s.pop("num_local_experts")})
    assert Checkpoint.open(folder).config == Checkpoint.open(FIXTURES / "qwen3_moe").config


def test_faults_of_experts_are_named(tmp_path):
    start = "model.layers.2.mlp.experts."

    def tensors(t):
        del t[f"{start}4.up_proj.weight"]
        t[f"{start}6.up_proj.weight"] = t[f"{start}0.up_proj.weight"].copy()
        t[f"{start}1.down_proj.weight"] = t[f"{start}1.down_proj.weight"][:-1].copy()
        return t

    facts = "4.up_proj.weight is missing", "6.up_proj.weight is not of this", "1.down_proj.weight has shape [23, 12]"
    with refused("path", *facts):
        gsae_jax.load_lm(copy("qwen3_moe", tmp_path, tensors=tensors))

    def not_finite(t):
        t[f"{start}5.up_proj.weight"][0, 0] = np.nan
        return t

    with refused("path", "NaN or infinite", f"{start}0.up_proj.weight to {start}5.up_proj.weight"):
        gsae_jax.load_lm(copy("qwen3_moe", tmp_path / "other", tensors=not_finite))


def four_bit(shape, seed=0):
    """Random MXFP4 blocks and scales [..., G], every byte among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16), dtype=np.uint8)
    blocks.flat[:256] = np.arange(256)
    return blocks, rng.integers(120, 127, blocks.shape[:-1], dtype=np.uint8)


def numbers(blocks, scales):
    """What they mean, one after the other, from the bits: a sign, two of an exponent, one of a fraction."""
    values = []
    for byte in blocks.reshape(-1).tolist():
        for bits in (byte & 15, byte >> 4):
            sign, exponent, fraction = bits >> 3, bits >> 1 & 3, bits & 1
            size = 2.0 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2
            values.append(-size if sign else size)
    return np.array(values).reshape(*blocks.shape[:-1], 32) * 2.0 ** (scales.astype(int)[..., None] - 127)


def test_four_bit_numbers():
    blocks, scales = four_bit((2, 8, 64))
    scales.flat[:4] = 0, 1, 253, 254
    ours = weights.dequantised(blocks, scales)
    assert ours.dtype == jnp.bfloat16
    assert ours.shape == (2, 8, 64)
    wanted = numbers(blocks, scales)
    wanted[np.abs(wanted) > 3.4e38] = np.inf * np.sign(wanted[np.abs(wanted) > 3.4e38])
    np.testing.assert_array_equal(ours.astype(np.float64), wanted.reshape(2, 8, 64))
    scales[0, 0, 0] = 255
    assert not np.isfinite(weights.dequantised(blocks, scales)[0, 0, :32].astype(np.float32)).any()


@pytest.mark.torch
def test_four_bit_numbers_are_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = four_bit((2, 8, 64))
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    ours = weights.dequantised(blocks, scales)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy().swapaxes(1, 2))


def test_a_checkpoint_with_four_bit_numbers(tmp_path):
    """As GPT-OSS is published."""
    stored = {}

    def quantised(t):
        for number, name in enumerate(sorted(name for name in t if name.endswith(("gate_up_proj", "down_proj")))):
            E, inner, outer = t.pop(name).shape
            t[f"{name}_blocks"], t[f"{name}_scales"] = stored[name] = four_bit((E, outer, inner), number)
        return t

    def plain(t):
        return t | {
            name: numbers(*pair).reshape(4, pair[0].shape[1], -1).swapaxes(1, 2) for name, pair in stored.items()
        }

    def said(s):
        return s | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}}

    folder = copy("gpt_oss", tmp_path / "small", said, quantised)
    small = gsae_jax.load_lm(folder, mesh=on_mesh(4, 2))
    large = gsae_jax.load_lm(
        copy(
            "gpt_oss",
            tmp_path / "large",
            tensors=lambda t: {n: np.ascontiguousarray(v, np.float32) for n, v in plain(t).items()},
        )
    )
    jax.tree.map(np.testing.assert_array_equal, small.params, large.params)
    assert gsae_jax.load_lm(folder, num_layers=1).params.keys() == {"embed.W_E", "blocks.0"}

    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.layers.1.mlp.experts.down_proj_"
    tensors[f"{name}scales"] = tensors[f"{name}scales"].astype(np.float32)
    del tensors["model.layers.0.mlp.experts.gate_up_proj_scales"]
    safetensors.numpy.save_file(tensors, file)
    with refused("path", "gate_up_proj_scales is missing", f"{name}scales is of type F32, not one of U8"):
        gsae_jax.load_lm(folder)


def test_sinks_take_their_part():
    """With a large sink, attention reads little."""
    lm = gsae_jax.load_lm(FIXTURES / "gpt_oss")
    assert all(layer.window == (0, 4)[number == 0] for number, layer in enumerate(lm.config.layers))
    params = jax.tree.map(lambda x: x, lm.params)
    params["blocks.1"]["attn"]["sinks"] += 30
    z = dataclasses.replace(lm, params=params).activations("w4 w5 w6", "blocks.1.attn.hook_z")["blocks.1.attn.hook_z"]
    assert 0 < np.abs(z).max() < 1e-6
