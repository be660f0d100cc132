"""Products of a dictionary that visit only the active features of each token.

A token of a trained SAE has 20 to 200 active features of 8,192 or more. A decode, and the gradients of encoder and
decoder, are sums over these alone. The active features of a batch lie in `Slots`. Values in empty slots must be 0.

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
PARTS = 4  # of the slots, in loops over single tokens


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


class Slots(NamedTuple):
    """Where the active features of a batch lie: in K slots for each token, of which the first are filled.

    Attributes:
        features: [B, K], the number of the feature in each slot; the number of all features in one that is empty.
        order: [B], the tokens, those with fewer active features first.
        ends: [J], how many tokens have at most j / J of their slots filled, for j from 1 to J. A loop over single
            tokens takes no more slots of them than that.
    """

    features: jax.Array
    order: jax.Array
    ends: jax.Array

    @classmethod
    def of(cls, mask: Mask, K: int, F: int) -> "Slots":
        """The slots of a mask that opens at most K features of a token, of F in all."""
        count = mask.upto[:, -1]
        parts = PARTS if K % PARTS == 0 else 1
        limits = jnp.arange(1, parts + 1) * (K // parts)
        return cls(_find(mask, K, F), jnp.argsort(count), (count[:, None] <= limits[None]).sum(0))

    def take(self, values_BxF: jax.Array) -> jax.Array:
        """Values [B, K] of the active features; 0 in empty slots."""
        F = values_BxF.shape[1]
        picked = jnp.take_along_axis(values_BxF, jnp.minimum(self.features, F - 1), 1)
        return jnp.where(self.features < F, picked, 0)


def _find(mask: Mask, K: int, F: int) -> jax.Array:
    """`Slots.features`: the k-th active feature is found by bisection, first its word and then its bit."""
    words, upto = mask
    B, W = words.shape
    rank = jnp.broadcast_to(jnp.arange(K)[None], (B, K))
    word = jnp.zeros((B, K), jnp.int32)  # how many words end before the k-th bit; at least W where there is none
    step = 1 << (W.bit_length() - 1)
    while step:
        end = word + step
        before = jnp.take_along_axis(upto, jnp.minimum(end, W) - 1, 1) <= rank
        word = jnp.where(before, end, word)
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


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def decode(
    values_VxBxK: jax.Array, slots: Slots, W_FxD: jax.Array, trained: tuple[bool, ...], dtype: str, block: int
) -> jax.Array:
    """Sums [V, B, D] of rows of W, weighted with each of V values of the active features.

    Args:
        values_VxBxK: the weights.
        slots: the active features.
        W_FxD: a row for each feature.
        trained: for each of V whether its sum has a gradient with respect to W.
        dtype: of the products' operands.
        block: tokens of a block.
    """
    V, B, _ = values_VxBxK.shape

    def of_token(features_K: jax.Array, values_VxK: jax.Array) -> jax.Array:
        return _matmul(values_VxK[:, : len(features_K)], _rows(W_FxD, features_K, dtype), dtype)

    out = jnp.zeros((V, B, W_FxD.shape[1]), _sums(dtype))
    return _each(slots, block, of_token, values_VxBxK, varying(out, values_VxBxK, slots.features, W_FxD))


def _decode_forward(values, slots, W, trained, dtype, block):
    return decode(values, slots, W, trained, dtype, block), (values, slots, W)


def _decode_backward(trained, dtype, block, saved, d_out_VxBxD):
    values, slots, W = saved

    def of_token(features_K, d_out_VxD):
        rows = _rows(W, features_K, dtype)
        return jnp.stack([_matmul(rows, d_out_D, dtype) for d_out_D in d_out_VxD])  # faster than one product

    d_values = varying(jnp.zeros(values.shape, _sums(dtype)), values, slots.features, W)
    d_values = _each(slots, block, of_token, d_out_VxBxD, d_values)
    which = jnp.array([v for v, has in enumerate(trained) if has], jnp.int32)
    return d_values, None, add_rows(slots, values[which], d_out_VxBxD[which], len(W), dtype, block)


decode.defvjp(_decode_forward, _decode_backward)


def add_rows(slots: Slots, values_VxBxK: jax.Array, rows_VxBxD: jax.Array, F: int, dtype: str, block: int) -> jax.Array:
    """Sums [F, D], over tokens and V, of a feature's value times the token's row."""
    V, B, D = rows_VxBxD.shape

    def add(total_FxD: jax.Array, index: jax.Array, values_TxKxV: jax.Array, rows_TxVxD: jax.Array) -> jax.Array:
        if V == 1:
            update = values_TxKxV.astype(dtype).astype(_sums(dtype)) * rows_TxVxD.astype(dtype).astype(_sums(dtype))
        else:
            update = _matmul(values_TxKxV, rows_TxVxD, dtype)
        return total_FxD.at[index.reshape(-1)].add(update.reshape(-1, D), mode="drop")

    total = varying(jnp.zeros((F, D), _sums(dtype)), slots.features, values_VxBxK, rows_VxBxD)
    if block == 1:

        def of_token(total: jax.Array, token: jax.Array, K: int) -> jax.Array:
            values = values_VxBxK[:, token, :K].T
            return add(total, slots.features[token, :K], values[None], rows_VxBxD[None, :, token])

        return _over_tokens(slots, of_token, total)

    def blocks(x: jax.Array) -> jax.Array:
        size = next(size for size in range(min(block, B), 0, -1) if B % size == 0)
        return x.reshape(B // size, size, *x.shape[1:])

    inputs = slots.features, jnp.moveaxis(values_VxBxK, 0, 2), rows_VxBxD.swapaxes(0, 1)
    return jax.lax.scan(lambda total, each: (add(total, *each), None), total, jax.tree.map(blocks, inputs))[0]


def varying(tree: Any, *like: jax.Array) -> Any:
    """The arrays, unchanged, as different on the devices of a `shard_map` as those of `like` are.

    Loops, and gradients that are written by hand, must say so. The transpose sums over devices.
    """
    # A false that depends on them, as `jax.lax.pcast` would have to be told the axes that are missing.
    false = jnp.zeros((), bool)
    for x in (x for x in like if x.size):
        false |= (x.reshape(-1)[0] != 0) & False
    return jax.tree.map(lambda x: x | false if x.dtype == bool else x + false.astype(x.dtype), tree)


def _each(
    slots: Slots,
    block: int,
    function: Callable[[jax.Array, jax.Array], jax.Array],
    values_VxBx_: jax.Array,
    out_VxBx_: jax.Array,
) -> jax.Array:
    """A function of (features [K], values [V, _]) for each token, in place of `out`."""
    if block > 1:
        inputs = slots.features, values_VxBx_.swapaxes(0, 1)
        return jax.lax.map(lambda each: function(*each), inputs, batch_size=block).swapaxes(0, 1)

    def of_token(out: jax.Array, token: jax.Array, K: int) -> jax.Array:
        result = function(slots.features[token, :K], values_VxBx_[:, token])
        return jax.lax.dynamic_update_slice(out, result[:, None], (0, token, 0))

    return _over_tokens(slots, of_token, out_VxBx_)


def _over_tokens(slots: Slots, function: Callable[[Any, jax.Array, int], Any], carry: Any) -> Any:
    """carry = function(carry, token, K) for every token, with K no larger than its part of the slots."""
    parts, K = len(slots.ends), slots.features.shape[1]
    for part in range(parts):
        start = slots.ends[part - 1] if part else 0
        size = K // parts * (part + 1)
        carry = jax.lax.fori_loop(
            start, slots.ends[part], lambda n, carry, size=size: function(carry, slots.order[n], size), carry
        )
    return carry


def _rows(W_FxD: jax.Array, index: jax.Array, dtype: str) -> jax.Array:
    return W_FxD.at[index].get(mode="clip").astype(dtype)


def _matmul(x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=_sums(dtype))


def _sums(dtype: str) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _count(words: jax.Array) -> jax.Array:
    return jax.lax.population_count(words).astype(jnp.int32)
