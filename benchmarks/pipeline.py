"""The whole train step of an experiment and what it is made of: text, language model, SAE updates, exchange buffer.

    python benchmarks/pipeline.py --config configs/quickstart.py [--out benchmarks/results/pipeline-NAME.json]

Takes a config as `python -m gsae_jax.train` does. Measured in turns, each for one call of the train step:

    whole           the train loop: tokens are read, placed and trained on, one call ahead of the devices
    without input   the same on tokens that are placed already
    language model  its forward pass alone
    SAE updates     alone, of all stacks
    rest            of the calls without input: the exchange buffer, less what one program saves

What host input costs is the first less the second. The time that the loop itself is in reading and placing is measured
too: the most that input can cost, as the devices work meanwhile.
"""

import statistics
import time
from pathlib import Path

import common
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from step import seconds

from gsae_jax import config as config_lib
from gsae_jax import config_trees
from gsae_jax import mesh as mesh_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.training import preparation, starting


def experiment(config):
    """(train program, language model's parameters, stream of tokens, first state), as `loop.train` makes them."""
    mesh = mesh_lib.make_mesh(config.mesh)
    checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
    program, tokenizer = preparation.build(config, mesh, checkpoint)
    lm_params = checkpoint.params(program.module, config.lm.dtype)
    # The tokens that a start takes; after them the stream begins again.
    tokens = config.activations.scale_tokens + 2 * config.activations.buffer_size
    rows = rows_lib.open_rows(config.data, "train", tokenizer, tokens)
    stream = rows_lib.batches(rows, config.rows_per_call, config.seed)
    return program, lm_params, stream, starting.start(program, lm_params, stream)


def sae_updates(program):
    """(state of the stacks, batch of each site) -> (state, statistics): the updates of one call, compiled."""
    specs = program.specs().stacks

    def update(stacks, batch):
        stepped = {
            stack.name: stack.update(stacks[stack.name], batch, jnp.int32(0), jnp.float32(1))
            for stack in program.stacks
        }
        return {name: state for name, (state, _) in stepped.items()}, {name: m for name, (_, m) in stepped.items()}

    def transposed(stacks):
        return {stack.name: stack.transpose(stacks[stack.name]) for stack in program.stacks}

    def on_device(stacks, batch):
        stacks, statistics = jax.lax.scan(
            lambda stacks, _: update(stacks, batch), transposed(stacks), length=program.config.updates_per_call
        )
        return transposed(stacks), statistics

    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(on_device, mesh=program.mesh, in_specs=(specs, rows), out_specs=(specs, everywhere))
    return jax.jit(mapped, donate_argnums=0)


def measure(program, lm_params, stream, state, rounds, calls):
    """(a line for each part, a sentence about the input), each the median of `rounds` of so many `calls`."""
    config, placed, reads = program.config, program.source.place(next(stream)), []

    def read():
        start = time.perf_counter()
        tokens = program.source.place(next(stream))
        reads.append(time.perf_counter() - start)
        return tokens

    def train(tokens):
        nonlocal state
        waiting = None
        for _ in range(calls):
            state, metrics, _ = program.train_step(state, lm_params, tokens())
            jax.block_until_ready(waiting)
            waiting = metrics
        jax.block_until_ready(state)

    capture = jax.jit(program.source.__call__)

    def run_model():
        for _ in range(calls):
            jax.block_until_ready(capture(lm_params, placed))

    updates = sae_updates(program)
    stacks = jax.tree.map(jnp.copy, state.stacks)
    batch = {
        site: jax.device_put(
            jax.random.normal(jax.random.key(0), (config.train.batch_size, D)), mesh_lib.sharding(program.mesh, "data")
        )
        for site, D in program.widths.items()
    }

    def run_updates():
        nonlocal stacks
        for _ in range(calls):
            stacks, _ = jax.block_until_ready(updates(stacks, batch))

    measured = seconds((lambda: train(read), lambda: train(lambda: placed), run_model, run_updates), rounds)
    whole, without_input, model, sae = (taken / calls for taken in measured)
    reading = statistics.mean(reads[calls:])  # the first round compiles
    rest = without_input - model - sae
    results = [
        {"part": part, "call_seconds": taken, "of_whole": taken / whole}
        for part, taken in {
            "whole": whole,
            "without input": without_input,
            "language model": model,
            "SAE updates": sae,
            "rest": rest,
        }.items()
    ]
    note = (
        f"{config.updates_per_call} updates of {config.train.batch_size} activations a call: "
        f"{config.updates_per_call * config.train.batch_size / whole:,.0f} activations/s. Host input costs "
        f"{whole / without_input - 1:+.1%} as the difference; the loop is in it for {1e3 * reading:.2f} ms a call, "
        f"{reading / whole:.2%}."
    )
    return results, note


def main():
    """Print a line for each part, and write them."""
    config = config_trees.from_dict(config_lib.Experiment, cli.given(CONFIG))
    results, note = measure(*experiment(config), ROUNDS.value, CALLS.value)
    for result in results:
        print(f"{result['part']:>14}: {1e3 * result['call_seconds']:8.1f} ms, {result['of_whole']:.1%}")
    print(note)
    common.write(Path(OUT.value) if OUT.value else None, results, (note,))


if __name__ == "__main__":
    from absl import flags

    from gsae_jax import cli

    CONFIG = cli.define_config()
    OUT = flags.DEFINE_string("out", None, "File to write.")
    ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each part.")
    CALLS = flags.DEFINE_integer("calls", 5, "Calls of the train step in a turn.")
    cli.run(main)
