"""Which features are among the largest, exactly and without sorting them; and what dead features can explain (AuxK).

Positive floats have the order of their bits as integers. So the n-th largest is found bit by bit, each time by counting
the values that are at least as large as a candidate. Counts of shards add up, whatever the mesh. Two facts save most of
the counting. The n-th largest of the maxima of disjoint groups is at most the n-th largest value, and few values are
larger than this bound: only these are gathered and searched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.kernels import active
from gsae_jax.saes import linalg
from gsae_jax.saes.contract import WHOLE, Shards

GROUP = 16  # features of a group
SLOTS = 4  # per feature that is selected of a token, for the values above the bound

Total = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The largest features.

    Attributes:
        smallest: [B, 1], or [1, 1] of a batch: the smallest value that is selected; 0 where there were no more than
            n positive values, which are then all selected.
        last: [B, 1], the last feature of this device that is selected where it equals the smallest.
    """

    smallest: jax.Array
    last: jax.Array

    def of(self, values_BxF: jax.Array) -> jax.Array:
        """The values that are selected, else 0."""
        bits_BxF, least = _bits(values_BxF), _bits(self.smallest)
        is_first = jnp.arange(values_BxF.shape[1])[None] <= self.last
        return jnp.where((bits_BxF > least) | ((bits_BxF == least) & is_first), values_BxF, 0)


def largest(values_BxF: jax.Array, k: int, shards: Shards = WHOLE, of_batch: bool = False) -> Selection:
    """The k largest values of each token, or the B * k largest of the batch; no gradient passes.

    Only positive values are selected, so there may be fewer. Of equal values those of the first tokens are selected,
    and of a token those of the first features. A value that is not a number counts as the largest, so that it shows.
    The result does not depend on the mesh.

    Args:
        values_BxF: of this device's tokens and features; none is negative.
        k: features of a token.
        shards: the others' features and tokens.
        of_batch: compare the features of all tokens of the batch.
    """
    axes: tuple[int, ...] = (0, 1) if of_batch else (1,)
    sum_up = shards.sum_over_batch if of_batch else shards.sum

    def total(on: jax.Array) -> jax.Array:
        return sum_up(on.sum(axes, dtype=jnp.int32, keepdims=True))

    n = jnp.int32(k * shards.batch_size(len(values_BxF)) if of_batch else k)
    bits_BxF = _bits(values_BxF)
    nth, reached = _nth_largest(bits_BxF, n, k, total, shards)
    too_many = ((reached > n) & (nth > 0)).any().astype(jnp.int32)
    tied = shards.sum_over_batch(active.varying(too_many, bits_BxF)) > 0

    def with_room() -> jax.Array:
        """The last of the equal ones for which there is room; -1 where there is none."""
        rank_BxF = _ranks(bits_BxF == nth, shards, of_batch)
        takes_BxF = (bits_BxF == nth) & (rank_BxF <= n - total(bits_BxF > nth))
        return jnp.where(takes_BxF, jnp.arange(F, dtype=jnp.int32)[None], -1).max(1, keepdims=True)

    B, F = values_BxF.shape
    last = jax.lax.cond(tied, with_room, lambda: active.varying(jnp.full((B, 1), F, jnp.int32), bits_BxF))
    return Selection(jax.lax.bitcast_convert_type(nth, values_BxF.dtype), last)


def _bits(values: jax.Array) -> jax.Array:
    """Integers of the same order, of values that are not negative; those that are not numbers are the largest."""
    integer = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    # Without the sign, which zero and NaN may have.
    return jax.lax.bitcast_convert_type(values, integer) & jnp.iinfo(integer).max


def _nth_largest(
    bits_BxF: jax.Array, n: jax.Array, k: int, total: Total, shards: Shards
) -> tuple[jax.Array, jax.Array]:
    """(The n-th largest of the integers, or 0 where fewer are positive; how many reach it)."""
    B, F = bits_BxF.shape
    slots = min(SLOTS * k, F)

    def search(bits_Bx_: jax.Array) -> tuple[jax.Array, jax.Array]:
        nth = _search(bits_Bx_, n, total)
        return nth, total(bits_Bx_ >= nth)

    if F % GROUP or 2 * slots > F or F * shards.count < 2 * GROUP * k:
        return search(bits_BxF)
    bound = _search(bits_BxF.reshape(B, GROUP, F // GROUP).max(1), n, total)
    mask = active.pack(bits_BxF >= jnp.maximum(bound, 1))
    fits = shards.sum_over_batch((mask.most > slots).astype(jnp.int32)) == 0
    return jax.lax.cond(fits, lambda: search(active.Slots.of(mask, slots, F).take(bits_BxF)), lambda: search(bits_BxF))


def _search(bits_Bx_: jax.Array, n: jax.Array, total: Total) -> jax.Array:
    """The largest integer that n of them reach, bit by bit from the first after the sign."""
    kind = bits_Bx_.dtype
    first = jnp.iinfo(kind).bits - 2

    def add_bit(number: jax.Array, reached: jax.Array) -> jax.Array:
        candidate = reached | jnp.left_shift(jnp.ones((), kind), (first - number).astype(kind))
        return jnp.where(total(bits_Bx_ >= candidate) >= n, candidate, reached)

    zeros = jnp.zeros(jax.eval_shape(total, bits_Bx_).shape, kind)
    return jax.lax.fori_loop(0, first + 1, add_bit, active.varying(zeros, bits_Bx_))


def _ranks(on_BxF: jax.Array, shards: Shards, of_batch: bool) -> jax.Array:
    """The numbers, from 1, of those that are on: by feature in each token, or by token and feature in the batch."""
    rank_BxF = jnp.cumsum(on_BxF, 1, dtype=jnp.int32)
    here_Bx1 = rank_BxF[:, -1:]
    rank_BxF += shards.before(here_Bx1)
    if of_batch:
        of_token_Bx1 = shards.sum(here_Bx1)
        upto_Bx1 = jnp.cumsum(of_token_Bx1, 0)
        rank_BxF += upto_Bx1 - of_token_Bx1 + shards.tokens_before(upto_Bx1[-1:])
    return rank_BxF


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
        f_BxF = largest(values_BxF, k, shards).of(values_BxF)
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
