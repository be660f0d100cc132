"""Eight gated SAEs in one run against eight runs of one, on a language model of GPT-2 small's size.

    python benchmarks/many.py [--out benchmarks/results/many-NAME.json] [--only MODE ...] [--rounds 3] [--small]

The language model has random weights, made on the spot, and reads random tokens. What is measured is a call of the
train program: the forward pass, the exchange buffer and one update of each SAE. The eight SAEs are of one of these
kinds (MODE):

    sparsities        one stack of eight l1 coefficients, at the residual stream after the last block
    sites             eight stacks, at two sites of each of the last four blocks
    widths            eight stacks of different widths, at the site of `sparsities`
    wide              as sparsities, with wide dictionaries, few of whose features are active (the sparse step)
    wide-dense        the same by the dense step, as at the beginning of training, where most features are active

In the first three the forward pass is most of a step of one SAE, in the others it is not. A run of one SAE starts from
the part of the other run's state that is its own, and its forward pass ends at its own site. All calls take turns, and
a figure is the median. Eight l1 coefficients make eight equal runs, of which one is measured. Learning rates are next
to 0, so that as many features stay active. `--small` has two SAEs and a small language model, for tests.
"""

import argparse
import dataclasses
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
from sparse import opened
from step import seconds

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import scaling
from gsae_jax.lms import gpt2
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.training import starting
from gsae_jax.training.step import Program

# Features of a token in a sample. Norms differ more in a random model than in a trained one: the busiest of 1,024
# tokens has twenty times as many, and the sparse step has room for 512.
ACTIVE = 16
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is trained on what: `config.json` of the language model, rows in a call, and the SAEs."""

    lm: dict[str, int]
    rows: int
    context: int
    saes: int
    narrow: int
    wide: int
    unit: int  # the widths are multiples of it


FULL = Sizes(GPT2, rows=8, context=128, saes=8, narrow=1024, wide=24_576, unit=256)
SMALL = Sizes({"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}, 2, 16, saes=2, narrow=64, wide=128, unit=64)
MODES = ("sparsities", "sites", "widths", "wide", "wide-dense")


def stacks(mode, sizes):
    """The stacks of a mode, by name."""
    last = sizes.lm["n_layer"] - 1
    site, N = f"blocks.{last}.hook_resid_post", sizes.saes
    coefficients = tuple(1e-3 * 2**n for n in range(N))

    def stack(site, width, l1_coefficients):
        return config_lib.Stack("gated", site, width, l1_coefficients, learning_rates=(1e-30,))

    if mode == "sites":
        sites = [f"blocks.{last - n // 2}.hook_{('resid_post', 'mlp_out')[n % 2]}" for n in range(N)]
        return {f"sae{n}": stack(site, sizes.narrow, coefficients[:1]) for n, site in enumerate(sites)}
    if mode == "widths":
        return {f"sae{n}": stack(site, sizes.unit * (n + 1), coefficients[:1]) for n in range(N)}
    return {"saes": stack(site, sizes.wide if mode.startswith("wide") else sizes.narrow, coefficients)}


def experiment(mode, sizes):
    """The run of all SAEs of a mode."""
    tokens = sizes.rows * sizes.context
    return config_lib.Experiment(
        data=config_lib.Data(context_length=sizes.context),
        activations=config_lib.Activations(sizes.rows, buffer_size=4 * tokens, scale_tokens=tokens),
        stacks=stacks(mode, sizes),
        train=config_lib.Train(batch_size=tokens, step="dense" if mode == "wide-dense" else "auto"),
    )


def token_rows(sizes):
    """Batches of rows of random tokens."""
    random = np.random.default_rng(0)
    while True:
        yield random.integers(sizes.lm["vocab_size"], size=(sizes.rows, sizes.context), dtype=np.int32)


def first_state(program, lm_params, stream):
    """The state that training begins with, but with biases that open about `ACTIVE` features of a token."""
    state = starting.start(program, lm_params, stream)
    # `opened` looks at 64 tokens; neighbours in the buffer are not a sample.
    sample = {site: x[:: max(1, len(x) // 64), 0] for site, x in state.store.items()}
    inputs = scaling.all_inputs(sample, state.scales, state.means)
    opened_stacks = {
        stack.name: opened(state.stacks[stack.name], inputs[stack.config.site], ACTIVE) for stack in program.stacks
    }
    return dataclasses.replace(state, stacks=opened_stacks)


def part(state, program):
    """The state of a run of one SAE: a copy of its own part of the run of all."""

    def of_sites(values):
        return {site: values[site] for site in program.config.sites}

    own = dataclasses.replace(
        state,
        stacks={
            name: jax.tree.map(lambda x: x[:1] if x.ndim else x, state.stacks[name]) for name in program.config.stacks
        },
        **{field: of_sites(getattr(state, field)) for field in ("store", "scales", "means", "norm_limits")},
    )
    return jax.device_put(jax.tree.map(jnp.copy, own), program.shardings())


def step(program, lm_params, stream, state):
    """A function that makes a call of the train program and waits for it, and answers its statistics."""

    def call():
        nonlocal state
        state, metrics, _ = program.train_step(state, lm_params, program.source.place(next(stream)))
        return jax.block_until_ready((state, metrics))[1]

    return call


def forward(program, lm_params, stream):
    """A function that makes the forward pass of a call and waits for it."""
    placed, capture = program.source.place(next(stream)), jax.jit(program.source.__call__)
    return lambda: jax.block_until_ready(capture(lm_params, placed))


def compare(mode, sizes, checkpoint, lm_params, rounds):
    """The line of a mode."""
    config, stream = experiment(mode, sizes), token_rows(sizes)
    mesh = mesh_lib.make_mesh(config.mesh)
    together = Program.build(config, mesh, checkpoint, (sizes.lm["vocab_size"] - 1,))
    runs = {}  # name of a stack -> the program of one of its SAEs
    for name, stack in config.stacks.items():
        one = dataclasses.replace(stack, l1_coefficients=stack.l1_coefficients[:1])
        own = dataclasses.replace(config, stacks={name: one})
        runs[name] = Program.build(own, mesh, checkpoint, together.special_tokens)
    layers = {name: program.module.config.n_layers for name, program in runs.items()}
    state = first_state(together, lm_params, stream)
    functions = {("run", name): step(run, lm_params, stream, part(state, run)) for name, run in runs.items()}
    functions |= {("forward", layers[name]): forward(run, lm_params, stream) for name, run in runs.items()}
    functions["together"] = step(together, lm_params, stream, state)
    del state  # the run has it
    taken = dict(zip(functions, seconds(functions.values(), rounds), strict=True))
    many = {name: len(stack) for name, stack in config.stacks.items()}
    apart = sum(many[name] * taken["run", name] for name in runs)
    forwards = sum(many[name] * taken["forward", layers[name]] for name in runs)
    metrics = functions["together"]()
    widths = [stack.width for stack in config.stacks.values()]
    updated = sizes.saes * sizes.rows * sizes.context
    return {
        "mode": mode,
        "SAEs": sizes.saes,
        "F": f"{min(widths)} to {max(widths)}" if len(set(widths)) > 1 else str(widths[0]),
        "active": float(np.mean([np.mean(of_stack["l0"]) for of_stack in metrics.values()])),
        "forward_share": forwards / apart,
        "apart_seconds": apart,
        "together_seconds": taken["together"],
        "seconds_per_sae_and_activation": taken["together"] / updated,
        "times_cheaper": apart / taken["together"],
    }


def main():
    """Print a line for each mode, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES, metavar="MODE")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else FULL
    lm = gpt2.config({"model_type": "gpt2", **sizes.lm})
    checkpoint = Checkpoint("random", Path(), "", "gpt2", gpt2, lm)
    module = checkpoint.module(lm.n_layers)
    init = jax.jit(lambda key: module.init(key, jnp.zeros((1, 1), jnp.int32), method="hidden")["params"])
    lm_params = init(jax.random.key(0))
    results = []
    for mode in arguments.only:
        results.append(line := compare(mode, sizes, checkpoint, lm_params, arguments.rounds))
        print(
            "{mode:>10}, F {F}, {active:.0f} active: {SAEs} runs of one {apart_seconds:.2f} s (forward pass "
            "{forward_share:.0%}), one run {together_seconds:.2f} s, {times_cheaper:.2f} times cheaper".format(**line),
            f"| {1e6 * line['seconds_per_sae_and_activation']:.1f} us for an SAE and activation",
            flush=True,
        )
    note = (
        f"Seconds are of {sizes.rows * sizes.context:,} tokens, one update of each SAE. The forward pass's share is of "
        "the runs of one SAE."
    )
    common.write(arguments.out, results, (note,))


if __name__ == "__main__":
    main()
