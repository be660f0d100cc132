"""What a device holds and what devices tell each other, from the compiled train step."""

import collections
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gsae_jax.config import ConfigError, Mesh
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.training import planning
from gsae_jax.training.step import Program

ROOT = Path(__file__).parent.parent


def program_on(experiment, data, latent):
    devices = jax.devices()[: data * latent]
    mesh = jax.make_mesh((data, latent), ("data", "latent"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    stacks = {name: dataclasses.replace(stack, width=1024) for name, stack in experiment.stacks.items()}
    config = dataclasses.replace(experiment, stacks=stacks)
    return Program.build(config, mesh, Checkpoint.open(experiment.lm.path).module(1, mesh), special_tokens=(0,))


def first_state(program):
    ones = dict.fromkeys(program.config.sites, 1.0)
    return program.init(ones, ones)


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


def test_a_plan_has_the_bytes_that_a_run_allocates(experiment):
    program = program_on(experiment, 4, 2)
    report = planning.plan(dataclasses.replace(program.config, mesh=Mesh(data=4, latent=2)), "cpu:8")
    checkpoint = Checkpoint.open(experiment.lm.path)
    lm_params = checkpoint.params(checkpoint.module(1, program.mesh), experiment.lm.dtype)
    state = first_state(program)
    planned = report["bytes_per_device"]

    def here(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert planned["language model"] == here(lm_params)
    assert planned["SAEs"] == here([stack.params for stack in state.stacks.values()])
    assert planned["optimiser"] == here([stack.second_moments for stack in state.stacks.values()])
    assert planned["buffer"] == here(state.store)
    arguments = sum(planned[name] for name in ("language model", "SAEs", "optimiser", "buffer", "rest"))
    tokens = experiment.rows_per_call // 4 * experiment.data.context_length * 4
    assert arguments == pytest.approx(here(lm_params) + here(state) + tokens, rel=0.02)


def test_a_plans_operations_are_the_products_of_the_method(experiment):
    """Seven products for a gated SAE and five for a baseline, of 2 B D F operations each, and little else."""
    program = program_on(experiment, 1, 1)
    lm_params = abstract_params(program.module, "float32")
    alone = planning.operations(dataclasses.replace(program, stacks=()), lm_params)
    B, updates = experiment.train.batch_size, experiment.updates_per_call
    for stack in program.stacks:
        products = {"gated": 7, "relu": 5}[stack.config.architecture]
        found = planning.operations(dataclasses.replace(program, stacks=(stack,)), lm_params) - alone
        expected = updates * len(stack.config) * products * 2 * B * stack.sae.d_in * stack.sae.width
        assert expected < found < 1.25 * expected


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:4x4", "--topology: is 'v9:4x4'; write one like v5e:4x4; .*known: v4, v5e, v5p, v6e, cpu"),
        ("v5e", "is 'v5e'; write one like v5e:4x4"),
        ("cpu:16", "is 'cpu:16', but there are 8 CPU devices"),
    ],
)
def test_topologies_that_there_are_not(experiment, topology, message):
    with pytest.raises(ConfigError, match=message):
        planning.plan(experiment, topology)


@pytest.mark.tpu
def test_a_plan_for_a_tpu():
    command = [sys.executable, "-m", "gsae_jax.plan", "--config", "configs/gemma_2_2b.py", "--topology", "v5e:4x4"]
    command += ["--config.lm.path=tests/fixtures/configs/gemma_2_2b", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fits"]
    assert report["devices"] == 16
    assert 4 * 2**30 < report["bytes_per_device"]["total"] < 16 * 2**30


def collectives(compiled):
    """How many of each kind the SAEs' part of a compiled step has; the language model's come from the compiler."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"^.* = .*? ({kinds})(?:-start)?\(.*shard_map", compiled.as_text(), re.MULTILINE)
    return dict(collections.Counter(found))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # Two stacks' eight arrays are gathered and their gradients scattered, as is which features fired. The rest
        # reduces decoder biases' gradients and statistics, and along `latent` both decodes of an SAE at once.
        ((8, 1), {"all-gather": 8, "reduce-scatter": 10, "all-reduce": 2}),
        ((1, 8), {"all-reduce": 4}),
        ((4, 2), {"all-gather": 8, "reduce-scatter": 10, "all-reduce": 3}),
    ],
)
def test_collectives_do_not_creep_up(experiment, shape, expected):
    program = program_on(experiment, *shape)
    lm_params = abstract_params(program.module, "float32")
    tokens = jax.ShapeDtypeStruct(
        (experiment.rows_per_call, experiment.data.context_length),
        jnp.int32,
        sharding=NamedSharding(program.mesh, PartitionSpec("data")),
    )
    step = program.train_step.lower(first_state(program), lm_params, tokens).compile()
    assert collectives(step) == expected
