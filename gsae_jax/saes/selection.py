"""Which features are among the largest, exactly and without sorting them; and what dead features can explain (AuxK).

Positive floats have the order of their bits as integers. So the n-th largest is found bit by bit, each time by counting
the values that are at least as large as a candidate. Counts of shards add up, whatever the mesh. Two facts save most of
the counting. The n-th largest of the maxima of disjoint groups is at most the n-th largest value, and few values are
larger than this bound: only these are gathered and searched.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.kernels import active
from gsae_jax.saes import linalg
from gsae_jax.saes.contract import WHOLE, Shards

GROUP = 16  # features of a group
SLOTS = 4  # per feature that is selected of a token, for the values above the bound

Total = Callable[[jax.Array], jax.Array]


class Selection(NamedTuple):
    """The largest features.

    Attributes:
        on: [B, F], which they are.
        smallest: [B, 1], or [1, 1] of a batch: the smallest value that is selected; 0 where there were no more than
            n positive values, which are then all selected.
    """

    on: jax.Array
    smallest: jax.Array


def largest(values_BxF: jax.Array, k: int, shards: Shards = WHOLE, of_batch: bool = False) -> Selection:
    """The k largest values of each token, or the B * k largest of the batch; no gradient passes.

    Only positive values are selected, so there may be fewer. Of equal values those of the first tokens are selected,
    and of a token those of the first features. A value that is not a number counts as the largest, so that it shows.
    The result does not depend on the mesh.

    Args:
        values_BxF: of this device's tokens and features.
        k: features of a token.
        shards: the others' features and tokens.
        of_batch: compare the features of all tokens of the batch.
    """
    integer = jnp.int64 if values_BxF.dtype == jnp.float64 else jnp.int32
    as_bits = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(values_BxF), jnp.inf, values_BxF), integer)
    bits_BxF = jnp.maximum(as_bits, 0)  # the sign is the first bit

    axes: tuple[int, ...] = (0, 1) if of_batch else (1,)
    sum_up: Total = shards.sum_over_batch if of_batch else shards.sum

    def total(on: jax.Array) -> jax.Array:
        return sum_up(on.sum(axes, dtype=jnp.int32, keepdims=True))

    n = jnp.int32(k * shards.batch_size(len(bits_BxF)) if of_batch else k)
    nth = _nth_largest(bits_BxF, n, k, total, shards)
    on_BxF = bits_BxF >= jnp.maximum(nth, 1)
    ties = (total(on_BxF) > n).any().astype(jnp.int32)
    tied = shards.sum_over_batch(active.varying(ties, bits_BxF)) > 0
    on_BxF = jax.lax.cond(tied, lambda: _without_ties(bits_BxF, nth, n, total, shards, of_batch), lambda: on_BxF)
    return Selection(on_BxF, jax.lax.bitcast_convert_type(nth, values_BxF.dtype))


def _nth_largest(bits_BxF: jax.Array, n: jax.Array, k: int, total: Total, shards: Shards) -> jax.Array:
    """The n-th largest of the integers; 0 where fewer are positive."""
    B, F = bits_BxF.shape
    slots = min(SLOTS * k, F)
    if F % GROUP or 2 * slots > F or F * shards.count < 2 * GROUP * k:
        return _search(bits_BxF, n, total)
    bound = _search(bits_BxF.reshape(B, GROUP, F // GROUP).max(1), n, total)
    mask = active.pack(bits_BxF > bound)
    fits = shards.sum_over_batch((mask.most > slots).astype(jnp.int32)) == 0

    def among_few() -> jax.Array:
        few_BxK = active.Slots.of(mask, slots, F).take(bits_BxF)
        return jnp.maximum(bound, _search(few_BxK, n, total))

    return jax.lax.cond(fits, among_few, lambda: _search(bits_BxF, n, total))


def _search(bits_BxF: jax.Array, n: jax.Array, total: Total) -> jax.Array:
    """The largest integer that n of them reach, bit by bit from the first after the sign."""
    first = jnp.iinfo(bits_BxF.dtype).bits - 2
    start = jax.eval_shape(total, bits_BxF).shape

    def add_bit(number: jax.Array, reached: jax.Array) -> jax.Array:
        candidate = reached | jnp.left_shift(jnp.ones((), bits_BxF.dtype), (first - number).astype(bits_BxF.dtype))
        return jnp.where(total(bits_BxF >= candidate) >= n, candidate, reached)

    zeros = active.varying(jnp.zeros(start, bits_BxF.dtype), bits_BxF)
    return jax.lax.fori_loop(0, first + 1, add_bit, zeros)


def _without_ties(
    bits_BxF: jax.Array, nth: jax.Array, n: jax.Array, total: Total, shards: Shards, of_batch: bool
) -> jax.Array:
    """What is larger than the n-th largest, and of what equals it as many as there is room for, the first ones."""
    above_BxF, equal_BxF = bits_BxF > nth, (bits_BxF == nth) & (nth > 0)
    rank_BxF = jnp.cumsum(equal_BxF, 1, dtype=jnp.int32)
    here_Bx1 = rank_BxF[:, -1:]
    rank_BxF += shards.before(here_Bx1)
    if of_batch:
        of_token_Bx1 = shards.sum(here_Bx1)
        upto_Bx1 = jnp.cumsum(of_token_Bx1, 0)
        rank_BxF += upto_Bx1 - of_token_Bx1 + shards.tokens_before(upto_Bx1[-1:])
    return above_BxF | (equal_BxF & (rank_BxF <= n - total(above_BxF)))


def auxiliary_error(
    values_BxF: jax.Array,
    residual_BxD: jax.Array,
    W_dec_FxD: jax.Array,
    dead_F: jax.Array,
    config: Any,
    shards: Shards = WHOLE,
) -> jax.Array:
    """AuxK: the squared error of the residual's reconstruction from dead features, relative to its variance.

    Gao et al. 2024 (2406.04093, appendix A.2): e_hat = f @ W_dec of the k largest dead features of each token explains
    the SAE's residual e = x - x_hat, which counts as given. As in their code, ||e - e_hat||^2 is divided by
    ||e - mean(e)||^2. It is 0 where no feature is dead, or where nothing is left to explain.

    Args:
        values_BxF: activations of the features, were they not dead; only positive ones are used.
        residual_BxD: e.
        W_dec_FxD: the decoder.
        dead_F: which features are dead.
        config: of the architecture, with the fields `d_in`, `k_aux` and `dtype`.
        shards: the others' features and tokens.
    """
    residual_BxD = jax.lax.stop_gradient(residual_BxD)
    mean_D = shards.batch_mean(residual_BxD.mean(0))
    variance = shards.batch_mean(jnp.square(residual_BxD - mean_D[None]).mean())
    k = config.k_aux or max(1, config.d_in // 2)
    any_dead = shards.sum_over_batch(dead_F.sum(dtype=jnp.int32)) > 0

    def error(values_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        values_BxF = jnp.where(dead_F[None], values_BxF, 0)
        f_BxF = jnp.where(largest(values_BxF, k, shards).on, values_BxF, 0)
        return jnp.square(residual_BxD - shards.sum(linalg.matmul(f_BxF, W_dec_FxD, config.dtype))).mean()

    def nothing(values_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        return active.varying(jnp.zeros((), residual_BxD.dtype), residual_BxD)

    squared = jax.lax.cond(any_dead, error, nothing, values_BxF, W_dec_FxD)
    return jnp.where(variance > 0, squared / jnp.where(variance > 0, variance, 1), 0)


def check_auxk(coefficient: float, k: int) -> None:
    """Raises `UserError` for options `auxk_coefficient` and `k_aux` that are impossible."""
    if coefficient < 0:
        raise UserError(f"is {coefficient:g}; write a weight such as {1 / 32}, or 0 for none", "auxk_coefficient")
    if k < 0:
        raise UserError(f"is {k}; write a number of dead features, or 0 for half of d_in", "k_aux")
