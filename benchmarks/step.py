"""The SAE step alone: tokens per second, and its matrix products against the machine's own rate, measured beside it.

    python benchmarks/step.py [--out benchmarks/results/step-NAME.json]

For each shape (D site width, F features, B batch, N SAEs in a stack) one line of the dense step: its seconds (the
median of several), activations per second, and the share of it that its matrix products would take at the rate of plain
products of the same sizes, run in turns with it. A gated SAE takes seven products of 2 B D F operations: the encoder,
two decoders, the gradients of both decodes' features, of the decoder and of the encoder; a baseline takes five. A gated
SAE of the recipe of 2026 takes the same seven, and selects the largest gates of the batch.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import common
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.training.stacks import Stack

PRODUCTS = {"gated": 7, "relu": 5, "gated_batch_topk": 7}
SHAPES = {  # architecture, D, F, B, N
    "cpu": [
        ("gated", 512, 8192, 2048, 1),
        ("gated_batch_topk", 512, 8192, 2048, 1),
        ("relu", 512, 12288, 2048, 1),
        ("gated", 256, 1024, 1024, 3),
        ("gated_batch_topk", 256, 1024, 1024, 3),
    ],
    "gpu": [
        ("gated", 768, 3 * 2**13, 4096, 1),
        ("gated", 2304, 2**17, 4096, 1),
        ("gated", 2304, 2**14, 4096, 1),
        ("relu", 2304, 3 * 2**15, 4096, 1),
        ("gated", 512, 2**14, 4096, 4),
    ],
}


def build(architecture, D, F, B, N, dtype, step="dense"):
    """(a stack of equal SAEs, the mesh of all devices, a batch on it); `step` as `train.step`."""
    l1_coefficients = () if architecture == "gated_batch_topk" else (1e-2,)
    settings = config_lib.Stack(architecture, "site", F, l1_coefficients, (3e-4,), tuple(range(N)))
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=0, latent=1))
    x = jax.device_put(jax.random.normal(jax.random.key(0), (B, D)), mesh_lib.sharding(mesh, "data"))
    return Stack.build("benchmark", settings, {"site": D}, dtype, step, 1, mesh_lib.platform(mesh)), mesh, x


def program(stack, mesh, x, rate=1.0, updates=1):
    """(the compiled updates (state, x) -> (state, statistics), the first state); `rate`: factor on learning rates."""
    specs = stack.specs()
    shardings = jax.tree.map(partial(jax.sharding.NamedSharding, mesh), specs)
    state = jax.jit(stack.init, out_shardings=shardings)()

    def on_device(state, x):
        def update(state, number):
            return stack.update(state, {"site": x}, number, jnp.float32(rate))

        state, statistics = jax.lax.scan(update, stack.transpose(state), jnp.arange(updates))
        return stack.transpose(state), statistics

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, PartitionSpec("data")), out_specs=(specs, PartitionSpec())
    )
    return jax.jit(mapped, donate_argnums=0).lower(state, x).compile(), state


def stepper(stack, mesh, x, rate=1.0, updates=1, prepare=lambda state: state):
    """(a function that makes `updates` from the `prepare`d state, waiting for them; the account of memory)."""
    compiled, state = program(stack, mesh, x, rate, updates)
    state = prepare(state)

    def step():
        nonlocal state
        state, _ = compiled(state, x)
        jax.block_until_ready(state)

    return step, compiled.memory_analysis()


def products(D, F, B, N, dtype):
    """A function that makes an encoder's, a decoder's and a gradient's product, waiting for them."""
    x, f, W = jnp.ones((B, D), dtype), jnp.ones((B, N * F), dtype), jnp.ones((D, N * F), dtype)
    three = jax.jit(lambda x, f, W: (x @ W, f @ W.T, x.T @ f))

    return lambda: jax.block_until_ready(three(x, f, W))


def seconds(functions, rounds):
    """The median seconds of each function, run in turns so that a slow minute slows all."""
    taken = [[] for _ in functions]
    for index in range(rounds + 1):
        for times, function in zip(taken, functions, strict=True):
            start = time.perf_counter()
            function()
            if index:  # the first compiles
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def main():
    """Print a line for each shape, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    backend = jax.default_backend()
    results = []
    for dtype in ("float32",) if backend == "cpu" else ("float32", "bfloat16"):
        for architecture, D, F, B, N in SHAPES["cpu" if backend == "cpu" else "gpu"]:
            step, memory = stepper(*build(architecture, D, F, B, N, dtype))
            step_s, three_s = seconds((step, products(D, F, B, N, dtype)), arguments.rounds)
            result = {"architecture": architecture, "D": D, "F": F, "B": B, "N": N, "dtype": dtype}
            result |= {
                "step_seconds": step_s,
                "activations_per_second": B / step_s,
                "of_product_rate": PRODUCTS[architecture] * three_s / 3 / step_s,
                "product_flops_per_second": 3 * 2 * B * D * F * N / three_s,
                "bytes_of_arguments": memory.argument_size_in_bytes,
                "bytes_of_temporaries": memory.temp_size_in_bytes,
            }
            results.append(result)
            print(
                f"{architecture:>16} D {D} F {F} B {B} N {N} {dtype}: {1e3 * step_s:.1f} ms, "
                f"{B / step_s:,.0f} activations/s, {result['of_product_rate']:.0%} of the products' own rate "
                f"({result['product_flops_per_second'] / 1e9:,.0f} GFLOP/s)"
            )
    common.write(arguments.out, results)


if __name__ == "__main__":
    main()
