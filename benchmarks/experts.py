"""A layer's experts in three ways: `lms.experts.mixture`, `jax.lax.ragged_dot`, and all experts for all tokens.

    python benchmarks/experts.py [--tokens 1024] [--experts 8] [--per_token 2] [--d_mlp 512] [--gradient]

Prints the best of several rounds of each, taken in turn, and the ratios. With `--gradient`: the gradient by the inputs.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp

from gsae_jax.lms.experts import Experts, mixture


def ragged(x_NxD, logits_NxE, W, experts):
    """With the tokens sorted by expert."""
    logits_NxA, chosen_NxA = jax.lax.top_k(logits_NxE, experts.experts_per_token)
    order = jnp.argsort(chosen_NxA.ravel())
    sizes = jnp.bincount(chosen_NxA.ravel(), length=experts.n_experts)
    product = partial(jax.lax.ragged_dot, group_sizes=sizes)
    x = x_NxD[order // experts.experts_per_token]
    y = product(jax.nn.silu(product(x, W["W_gate"])) * product(x, W["W_in"]), W["W_out"])
    each = jnp.zeros_like(y).at[order].set(y).reshape(*chosen_NxA.shape, -1)
    return (jax.nn.softmax(logits_NxA)[..., None] * each).sum(1)


def all_experts(x_NxD, logits_NxE, W, experts):
    """One expert after the other."""
    logits_NxA, chosen_NxA = jax.lax.top_k(logits_NxE, experts.experts_per_token)
    rows = jnp.arange(len(x_NxD))[:, None]
    shares_NxE = jnp.zeros_like(logits_NxE).at[rows, chosen_NxA].set(jax.nn.softmax(logits_NxA))

    def add(total, inputs):
        share, gate, up, down = inputs
        return total + share[:, None] * ((jax.nn.silu(x_NxD @ gate) * (x_NxD @ up)) @ down), None

    return jax.lax.scan(add, jnp.zeros_like(x_NxD), (shares_NxE.T, W["W_gate"], W["W_in"], W["W_out"]))[0]


def blocks(x_NxD, logits_NxE, W, experts):
    """The package's."""
    return mixture(x_NxD[None], logits_NxE[None], W, experts, jax.nn.silu, None)[0]


def main():
    """Time all three."""
    parser = argparse.ArgumentParser()
    sizes = {"tokens": 1024, "experts": 8, "per_token": 2, "d_model": 256, "d_mlp": 512, "rounds": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--gradient", action="store_true")
    args = parser.parse_args()
    N, E, D, M = args.tokens, args.experts, args.d_model, args.d_mlp
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"W_gate": (E, D, M), "W_in": (E, D, M), "W_out": (E, M, D)}
    W = {
        name: jax.random.normal(key, shape) * shape[1] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x, logits = jax.random.normal(keys[3], (N, D)), jax.random.normal(keys[4], (N, E))
    experts = Experts(E, args.per_token, M)
    functions = {}
    for way in (blocks, ragged, all_experts):
        function = partial(way, experts=experts)
        if args.gradient:
            function = jax.grad(lambda *inputs, way=function: way(*inputs).sum())
        functions[way.__name__] = jax.jit(function)
    results = {name: function(x, logits, W) for name, function in functions.items()}
    error = max(float(jnp.abs(y - results["blocks"]).max()) for y in results.values())
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(args.rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(x, logits, W).block_until_ready()
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{N} tokens, {E} experts of {M} neurons, {args.per_token} per token, width {D}; they differ by {error:.1e}")
    for name, seconds in best.items():
        print(f"  {name:<12}{1e3 * seconds:>9.1f} ms {seconds / best['blocks']:>7.1f} x")


if __name__ == "__main__":
    main()
