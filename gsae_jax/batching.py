"""Large inputs in batches, and inputs of all sizes in few shapes, as every new shape is compiled anew."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gsae_jax import processes


def padded_size(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 and so on: at most a third of it is padding."""
    power = 1 << max(size - 1, 0).bit_length()
    between = power * 3 // 4
    return between if power >= 4 and size <= between else power


def in_batches(function: Callable[[Any], Any], inputs: Any, at_once: int, description: str) -> Any:
    """`function(inputs)`, computed for `at_once` rows at a time, with a bar if it takes longer than a second.

    Args:
        function: of a tree of arrays with rows along their first axis, to such a tree; each row is computed by itself.
        inputs: the tree of arrays.
        at_once: rows in a batch. Zeros fill the last of several batches, so that one shape is compiled.
        description: what the bar says.
    """
    rows = len(jax.tree.leaves(inputs)[0])
    if rows <= at_once:
        return function(inputs)
    parts = []
    starts = range(0, rows, at_once)
    for start in tqdm.tqdm(starts, description, unit="batch", delay=1, leave=False, disable=not processes.shows_bars()):
        batch = jax.tree.map(lambda x, start=start: x[start : start + at_once], inputs)
        count = min(at_once, rows - start)
        if count < at_once:
            batch = jax.tree.map(lambda x, count=count: pad(x, at_once - count), batch)
        parts.append(jax.tree.map(lambda y, count=count: y[:count], jax.block_until_ready(function(batch))))
    return jax.tree.map(lambda *ys: jnp.concatenate(ys), *parts)


def in_chunks(function: Callable[[Any], tuple[Any, Any]], inputs: Any, at_once: int) -> tuple[Any, Any]:
    """`function(inputs)` inside `jit`, computed for about `at_once` tokens at a time, one part after the other.

    Args:
        function: of a tree of arrays [R, T, ...], to (a tree of such arrays, sums over tokens). Each token is computed
            by itself, and one of zeros adds 0 to the sums.
        inputs: the tree of arrays. Parts are cut from T, as rows may lie on several devices.
        at_once: tokens of a part; a part is no smaller than one token of each row.
    """
    R, T = jax.tree.leaves(inputs)[0].shape[:2]
    parts = -(-T // max(1, at_once // max(1, R)))
    if parts <= 1 or not R:
        return function(inputs)
    size = -(-T // parts)
    split = jax.tree.map(
        lambda x: pad(x, 0, parts * size - T).reshape(R, parts, size, *x.shape[2:]).swapaxes(0, 1), inputs
    )
    per_token, sums = jax.lax.map(function, split)
    joined = jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(R, parts * size, *y.shape[3:])[:, :T], per_token)
    return joined, jax.tree.map(lambda y: y.sum(0), sums)


def pad(x: Any, *widths: int) -> Any:
    """An array with so many zeros after the end of its first axes; NumPy's stay NumPy's."""
    if not any(widths):
        return x
    every = [(0, width) for width in widths] + [(0, 0)] * (x.ndim - len(widths))
    return (np if isinstance(x, np.ndarray) else jnp).pad(x, every)
