"""What a device holds and what devices tell each other, from the compiled train step."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gsae_jax.activations import scaling
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.planning import collectives
from gsae_jax.training.step import Program


def program_on(experiment, data, latent, width=1024):
    devices = jax.devices()[: data * latent]
    mesh = jax.make_mesh((data, latent), ("data", "latent"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    stacks = {name: dataclasses.replace(stack, width=width) for name, stack in experiment.stacks.items()}
    config = dataclasses.replace(experiment, stacks=stacks)
    return Program.build(config, mesh, Checkpoint.open(experiment.lm.path), special_tokens=(0,))


def first_state(program):
    return program.init(scaling.standard(program.widths))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1), (2, 4), (1, 8)])
def test_every_device_holds_its_part_of_the_state(experiment, shape):
    """Of stacks over all devices; the buffer lies along `data`."""
    state = first_state(program_on(experiment, *shape))
    for part, ways in ((state.stacks, shape[0] * shape[1]), (state.store, shape[0])):
        leaves = jax.tree.leaves(part)
        here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        assert here == pytest.approx(sum(leaf.nbytes for leaf in leaves) / ways, rel=0.05)


def test_eight_bytes_per_parameter(experiment):
    """The master weight and its second moment, and nothing else of that size."""
    for stack in first_state(program_on(experiment, 1, 1)).stacks.values():
        parameters = sum(x.size for x in jax.tree.leaves(stack.params))
        assert sum(x.nbytes for x in jax.tree.leaves(stack)) == pytest.approx(8 * parameters, rel=0.02)


def compiled_step(experiment, data, latent, width=1024):
    program = program_on(experiment, data, latent, width)
    lm_params = abstract_params(program.module, "float32")
    tokens = jax.ShapeDtypeStruct(
        (experiment.rows_per_call, experiment.data.context_length),
        jnp.int32,
        sharding=NamedSharding(program.mesh, PartitionSpec("data")),
    )
    return program.train_step.lower(first_state(program), lm_params, tokens).compile().as_text()


def exchanged(text):
    """How many of each kind the SAEs' part of a compiled step has; the language model's come from the compiler."""
    found = re.findall(rf"^.* = .*? ({collectives.KINDS})(?:-start)?\(.*shard_map", text, re.MULTILINE)
    return dict(collections.Counter(found))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Of two gated SAEs five arrays each are gathered and of a baseline three, and their gradients scattered, as is
        # which features fired. The rest reduces decoder biases' gradients and statistics, and along `latent` both
        # decodes of an SAE at once. The last tells whether gradients are finite.
        ((8, 1), {"all-gather": 13, "reduce-scatter": 15, "all-reduce": 3}),
        ((1, 8), {"all-reduce": 5}),
        ((4, 2), {"all-gather": 13, "reduce-scatter": 15, "all-reduce": 4}),
    ],
)
def test_collectives_do_not_creep_up(experiment, shape, expected):
    assert exchanged(compiled_step(experiment, *shape)) == expected


@pytest.mark.parametrize("shape", [(1, 8), (4, 2)])
def test_exchanges_along_latent_do_not_grow_with_the_dictionary(experiment, shape):
    """Reconstructions are exchanged there. Along `data` it is parameters and gradients, each device's own part."""
    mesh = dict(zip(("data", "latent"), shape, strict=True))
    found = [collectives.compiled(compiled_step(experiment, *shape, width), mesh) for width in (1024, 2048)]

    def sent(found, axis):
        return sum(size for (_, axes), (_, size) in found.items() if axes == (axis,))

    assert sent(found[0], "latent") == sent(found[1], "latent") > 0
    assert sent(found[1], "data") == pytest.approx(2 * sent(found[0], "data"), rel=0.1)
