"""Products of a dictionary that visit only the active features of each token.

A token of a trained SAE has 20 to 200 active features of 8,192 or more. A decode, and the gradients of encoder and
decoder, are sums over these alone. The active features of a batch are `index` [B, K]: in each row the numbers of that
token's features, and the number of all features F in slots that stay empty. Values in empty slots must be 0.

Everything is plain `jax.numpy`: loops over blocks of tokens, in each of which the rows that it needs stay in a CPU's
cache. `block` is the number of tokens of a block: 1 is best on a CPU, more on accelerators. Whether the sums over
active features are faster than dense products depends on shapes; `training.sparsity` decides.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BITS = 32


class Mask(NamedTuple):
    """Which features [B, F] of each token are active, packed.

    Attributes:
        words: [B, W], 32 bits each; bit i of word w is feature i * W + w, so that packing reads contiguous memory.
        upto: [B, W], how many bits are set in this word and those before it.
    """

    words: jax.Array
    upto: jax.Array

    @property
    def most(self) -> jax.Array:
        """The largest number of active features of a token."""
        return self.upto[:, -1].max()


def pack(on_BxF: jax.Array) -> Mask:
    """The mask of the features that are on."""
    B, F = on_BxF.shape
    W = -(-F // BITS)
    on = jnp.pad(on_BxF, ((0, 0), (0, BITS * W - F))).reshape(B, BITS, W)
    words = jnp.zeros((B, W), jnp.uint32)
    for bit in range(BITS):
        words |= on[:, bit].astype(jnp.uint32) << bit
    return Mask(words, jnp.cumsum(_count(words), 1))


def find(mask: Mask, K: int, F: int) -> jax.Array:
    """`index` [B, K] of the active features, whose k-th is found by bisection.

    A token with more than K active features loses those beyond.
    """
    words, upto = mask
    B, W = words.shape
    rank = jnp.broadcast_to(jnp.arange(K)[None], (B, K))
    word = jnp.zeros((B, K), jnp.int32)  # how many words end before the k-th bit
    step = 1 << (W.bit_length() - 1)
    while step:
        end = word + step
        before = jnp.take_along_axis(upto, jnp.minimum(end, W) - 1, 1) <= rank
        word = jnp.where(before & (end <= W), end, word)
        step //= 2
    filled = word < W
    word = jnp.minimum(word, W - 1)
    bits = jnp.take_along_axis(words, word, 1)
    rank -= jnp.take_along_axis(upto, word, 1) - _count(bits)
    bit = jnp.zeros((B, K), jnp.uint32)
    for half in (16, 8, 4, 2, 1):
        lower = _count((bits >> bit) & jnp.uint32((1 << half) - 1))
        upper = rank >= lower
        rank, bit = jnp.where(upper, rank - lower, rank), jnp.where(upper, bit + half, bit)
    return jnp.where(filled, bit.astype(jnp.int32) * W + word, F)


def take(values_BxF: jax.Array, index_BxK: jax.Array) -> jax.Array:
    """Values [B, K] of the active features; 0 in empty slots."""
    F = values_BxF.shape[1]
    picked = jnp.take_along_axis(values_BxF, jnp.minimum(index_BxK, F - 1), 1)
    return jnp.where(index_BxK < F, picked, 0)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def decode(
    values_VxBxK: jax.Array,
    index_BxK: jax.Array,
    W_FxD: jax.Array,
    trained: tuple[bool, ...],
    dtype: str,
    block: int,
) -> jax.Array:
    """Sums [V, B, D] of rows of W, weighted with each of V values of the active features.

    Args:
        values_VxBxK: the weights.
        index_BxK: the active features.
        W_FxD: a row for each feature.
        trained: for each of V whether its sum has a gradient with respect to W.
        dtype: of the products' operands.
        block: tokens of a block.
    """
    out = _map(lambda i, v: _matmul(v, _rows(W_FxD, i, dtype), dtype), block, index_BxK, values_VxBxK.swapaxes(0, 1))
    return out.swapaxes(0, 1)


def _decode_forward(values, index, W, trained, dtype, block):
    return decode(values, index, W, trained, dtype, block), (values, index, W)


def _decode_backward(trained, dtype, block, saved, d_out_VxBxD):
    values, index, W = saved
    d_values = _map(lambda i, e: _matmul(e, _rows(W, i, dtype).T, dtype), block, index, d_out_VxBxD.swapaxes(0, 1))
    which = jnp.array([v for v, has in enumerate(trained) if has], jnp.int32)
    d_W = add_rows(index, values[which], d_out_VxBxD[which], len(W), dtype, block)
    return d_values.swapaxes(0, 1), None, d_W


decode.defvjp(_decode_forward, _decode_backward)


def add_rows(
    index_BxK: jax.Array, values_VxBxK: jax.Array, rows_VxBxD: jax.Array, F: int, dtype: str, block: int
) -> jax.Array:
    """Sums [F, D], over tokens and V, of a feature's value times the token's row."""
    V, B, D = rows_VxBxD.shape
    block = _divisor(B, block)

    def one(total_FxD: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        i_TxK, v_TxKxV, r_TxVxD = inputs
        if V == 1:
            update = v_TxKxV.astype(dtype).astype(jnp.float32) * r_TxVxD.astype(dtype).astype(jnp.float32)
        else:
            update = _matmul(v_TxKxV, r_TxVxD, dtype)
        return total_FxD.at[i_TxK.reshape(-1)].add(update.reshape(-1, D), mode="drop"), None

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(B // block, block, *x.shape[1:])

    start = varying(jnp.zeros((F, D), _sums(dtype)), index_BxK, values_VxBxK, rows_VxBxD)
    inputs = index_BxK, jnp.moveaxis(values_VxBxK, 0, 2), rows_VxBxD.swapaxes(0, 1)
    return jax.lax.scan(one, start, jax.tree.map(blocks, inputs))[0]


def varying(tree: Any, *like: jax.Array) -> Any:
    """The arrays, unchanged, as different on the devices of a `shard_map` as those of `like` are.

    Loops, and gradients that are written by hand, must say so. The transpose sums over devices.
    """
    # A false that depends on them, as `jax.lax.pcast` would have to be told the axes that are missing.
    false = jnp.zeros((), bool)
    for x in like:
        false |= (x.reshape(-1)[0] != 0) & False
    return jax.tree.map(lambda x: x | false if x.dtype == bool else x + false.astype(x.dtype), tree)


def _map(function: Callable[..., jax.Array], block: int, index_BxK: jax.Array, values: jax.Array) -> jax.Array:
    batch_size = block if block > 1 else None
    return jax.lax.map(lambda inputs: function(*inputs), (index_BxK, values), batch_size=batch_size)


def _rows(W_FxD: jax.Array, index: jax.Array, dtype: str) -> jax.Array:
    return W_FxD.at[index].get(mode="clip").astype(dtype)


def _matmul(x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=_sums(dtype))


def _sums(dtype: str) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _count(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)


def _divisor(number: int, most: int) -> int:
    return next(divisor for divisor in range(min(most, number), 0, -1) if number % divisor == 0)
