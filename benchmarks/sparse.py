"""The SAE step by active features against the dense step of the same state, in turns.

    python benchmarks/sparse.py [--out benchmarks/results/sparse-NAME.json] [--growth] [--plot docs/images/growth.svg]

A step is the whole update of one SAE: gradients, optimiser, unit rows; a call makes four, as in training. The gate
biases open about as many features as the table says, as in a trained SAE; the learning rate is 0, so that they stay
open. One line for each shape: both medians, how many times the dense step takes, and the compiler's account of
temporary memory. With `--growth` the shapes are widths from 4,096 to 65,536 at a fixed L0, which `--plot` draws.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import common
import jax.numpy as jnp
from step import build, seconds, stepper

UPDATES = 4  # in a call
SHAPES = [  # architecture, D, F, B, active features in the mean
    ("gated", 512, 8192, 2048, 48),
    ("gated", 512, 32768, 2048, 48),
    ("gated", 2304, 16384, 2048, 48),
    ("gated", 768, 24576, 4096, 40),
    ("gated", 256, 4096, 1024, 80),
    ("relu", 512, 12288, 2048, 48),
    ("gated_batch_topk", 512, 8192, 2048, 32),  # its default k
]
GROWTH = [("gated", 512, F, 2048, 48) for F in (4096, 8192, 16384, 32768, 65536)]


def opened(state, x, active):
    """The state with biases that open about `active` features of a token, where the loss does not select as many."""
    params = dict(state.params)
    if "threshold" in params:
        return state
    W = params["W_gate" if "W_gate" in params else "W_enc"]
    bias = -jnp.quantile((x[:64] @ W[0]).reshape(-1), 1 - active / W.shape[-1])
    params |= {name: jnp.full_like(params[name], bias) for name in ("b_gate", "b_mag", "b_enc") if name in params}
    return dataclasses.replace(state, params=params)


def compare(architecture, D, F, B, active, rounds):
    """The line of a shape."""
    steps, memory = {}, {}
    for how in ("dense", "sparse"):
        stack, mesh, x = build(architecture, D, F, B, 1, "float32", how)
        prepare = partial(opened, x=x, active=active)
        steps[how], account = stepper(stack, mesh, x, rate=0.0, updates=UPDATES, prepare=prepare)
        memory[how] = account.temp_size_in_bytes
    dense, sparse = (taken / UPDATES for taken in seconds(steps.values(), rounds))
    return {
        "architecture": architecture,
        "D": D,
        "F": F,
        "B": B,
        "active": active,
        "dense_seconds": dense,
        "sparse_seconds": sparse,
        "times_faster": dense / sparse,
        "bytes_of_dense_temporaries": memory["dense"],
        "bytes_of_sparse_temporaries": memory["sparse"],
    }


def plot(path, results):
    """Seconds of a step against width, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    widths = [line["F"] for line in results]
    for how, marker in (("dense", "o-"), ("sparse", "s-")):
        axis.plot(widths, [line[f"{how}_seconds"] for line in results], marker, label=how)
    axis.set(xscale="log", yscale="log", xlabel="features", ylabel="seconds of a step")
    axis.set_xticks(widths, [f"{width:,}" for width in widths])
    axis.set_xticks([], minor=True)
    axis.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main():
    """Print a line for each shape, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    results = []
    for shape in GROWTH if arguments.growth else SHAPES:
        results.append(line := compare(*shape, arguments.rounds))
        print(
            "{architecture:>16} D {D} F {F} B {B}, {active} active: dense {dense_seconds:.3f} s, sparse "
            "{sparse_seconds:.3f} s, {times_faster:.2f} times".format(**line),
            f"| temporaries {line['bytes_of_dense_temporaries'] / 2**20:,.0f} and "
            f"{line['bytes_of_sparse_temporaries'] / 2**20:,.0f} MiB",
            flush=True,
        )
    common.write(arguments.out, results)
    if arguments.plot:
        plot(arguments.plot, results)


if __name__ == "__main__":
    main()
