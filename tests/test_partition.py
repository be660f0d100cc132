"""A language model spread over a mesh: its share of memory, and the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gsae_jax
from gsae_jax.lms.checkpoints import abstract_params
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.lms.transformer import Config, Layer, Model
from tests.fixtures.lms import make

FIXTURES = Path(make.__file__).parent


def on_mesh(data, latent):
    return jax.make_mesh((data, latent), ("data", "latent"), axis_types=(AxisType.Auto,) * 2)


def model(layers, mesh=None, tied=False, D=256):
    """A model with grouped heads; biases and gains are a small part of its parameters when D is 256."""
    layer = Layer(attention_scale=(D // 8) ** -0.5, frequencies=(1.0, 0.1, 0.01))
    sizes = dict(d_model=D, n_heads=8, n_key_value_heads=4, d_head=D // 8, d_mlp=4 * D, d_vocab=8 * D, n_ctx=64)
    config = Config(layers=(layer,) * layers, activation="silu", norm_eps=1e-5, gated_mlp=True, tied=tied, **sizes)
    return Model(config, mesh=mesh)


def memory(mesh, layers, tied=False):
    """Per-device bytes of the parameters and of the temporaries of a compiled loss, and all parameters' bytes."""
    module = model(layers, mesh, tied)
    params = abstract_params(module, "float32")
    total = sum(4 * x.size for x in jax.tree.leaves(params))
    tokens = jax.ShapeDtypeStruct((16, 32), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def loss(params, tokens):
        return cross_entropy(module, params, module.apply({"params": params}, tokens, method="hidden"), tokens)

    analysis = jax.jit(loss).lower(params, tokens).compile().memory_analysis()
    given = analysis.argument_size_in_bytes - 16 * 32 * 4 // mesh.shape["data"]
    return given, analysis.temp_size_in_bytes, total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_device_holds_its_share(shape, tied):
    given, _, total = memory(on_mesh(*shape), layers=2, tied=tied)
    assert given == pytest.approx(total / 8, rel=0.1)


def test_layers_are_gathered_one_by_one():
    """Twice the layers take no more temporary memory (the CPU's other scheduler trades memory for concurrency)."""
    script = (
        "import jax, json; jax.config.update('jax_num_cpu_devices', 8); from tests.test_partition import *\n"
        "print(json.dumps([memory(on_mesh(8, 1), layers=n)[1:] for n in (3, 6)]))"
    )
    flags = {"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(gsae_jax.__file__).parent.parent,
        env=flags,
        capture_output=True,
        text=True,
        check=True,
    )
    (three, total_of_three), (six, total_of_six) = json.loads(done.stdout)
    assert total_of_six > 1.6 * total_of_three
    assert six < 1.05 * three


@pytest.mark.parametrize(
    ("shape", "tied"),
    [
        pytest.param((8, 1), False, marks=pytest.mark.variants),
        ((4, 2), True),
        pytest.param((1, 8), False, marks=pytest.mark.variants),
    ],
)
def test_a_spread_model_computes_the_same(shape, tied):
    bare = model(2, tied=tied, D=64)
    params = bare.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    lm = gsae_jax.LM("", bare, params, None)
    spread = lm.on(on_mesh(*shape))
    for path, x in flax.traverse_util.flatten_dict(spread.params).items():
        if path[-1].split(".")[-1].startswith("W_"):
            assert len({str(shard.index) for shard in x.addressable_shards}) == 8, path
    for rows in (8, 3):  # 3: not divisible by `data`
        tokens = np.random.default_rng(0).integers(0, 512, (rows, 16))
        mask = np.arange(16)[None] >= np.arange(rows)[:, None]
        np.testing.assert_allclose(spread.logits(tokens, mask), lm.logits(tokens, mask), atol=1e-4)
        theirs = lm.activations(tokens, lm.sites)
        for site, x in spread.activations(tokens, spread.sites).items():
            np.testing.assert_allclose(x, theirs[site], atol=1e-4, err_msg=site)

    def losses(model):
        def loss(params, tokens):
            hidden = model.module.apply({"params": params}, tokens, method="hidden")
            return cross_entropy(model.module, params, hidden, tokens)

        return jax.jit(loss)(model.params, jnp.array(tokens))

    np.testing.assert_allclose(losses(spread), losses(lm), atol=1e-4)


@pytest.mark.parametrize("case", ["gemma", "gpt2", "gpt_neox", "llama_3"])
def test_sizes_that_the_mesh_does_not_divide(case):
    """Odd head counts, a vocabulary of 61: loaded straight onto the mesh, whatever can be spread is."""
    with np.load(FIXTURES / case / "expected.npz") as expected:
        lm = gsae_jax.load_lm(FIXTURES / case, mesh=on_mesh(4, 2))
        W_in = lm.params["blocks.0"]["mlp"]["W_in"]
        assert W_in.sharding.shard_shape(W_in.shape) != W_in.shape
        ours = lm.logits(expected["tokens"], expected["mask"])
        mask = expected["mask"]
        np.testing.assert_allclose(np.asarray(ours)[mask], expected["logits"][mask], atol=1e-4)
