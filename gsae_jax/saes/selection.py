"""Which features are among the largest, exactly and without sorting them; and what dead features can explain (AuxK).

Positive floats have the order of their bits as integers. So the n-th largest is found bit by bit, each time by counting
the values that are at least as large as a candidate. Counts of shards add up, whatever the mesh. Two facts save most of
the counting. The n-th largest of the maxima of disjoint groups is at most the n-th largest value, and few values are
larger than this bound: only these are gathered and searched.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from gsae_jax.config import INT32
from gsae_jax.errors import UserError
from gsae_jax.kernels import active
from gsae_jax.saes.contract import WHOLE, Shards
from gsae_jax.saes.features import AllFeatures, Features

GROUPS = (16, 8)  # features of a group: the larger, the fewer maxima to count
SLOTS = 4  # per feature that is selected of a token, for the values above the bound


@dataclasses.dataclass(frozen=True)
class Selection:
    """The largest features.

    Attributes:
        smallest: [B, 1], or [1, 1] of a batch: the smallest value that is selected; 0 where there were fewer than n
            positive values, which are then all selected.
        last: [B, 1], the last feature of this device that is selected where it equals the smallest.
    """

    smallest: jax.Array
    last: jax.Array

    def of(self, values_BxF: jax.Array) -> jax.Array:
        """The values that are selected, else 0."""
        bits_BxF, least = _bits(values_BxF), _bits(self.smallest)
        is_first = jnp.arange(values_BxF.shape[1])[None] <= self.last
        return jnp.where((bits_BxF > least) | ((bits_BxF == least) & is_first), values_BxF, 0)


def largest(
    values_BxF: jax.Array,
    k: jax.typing.ArrayLike,
    shards: Shards = WHOLE,
    of_batch: bool = False,
    usual: int | None = None,
) -> Selection:
    """The k largest values of each token, or the B * k largest of the batch; no gradient passes.

    Only positive values are selected, so there may be fewer. Of equal values those of the first tokens are selected,
    and of a token those of the first features. A value that is not a number counts as the largest, so that it shows.
    The result does not depend on the mesh.

    Args:
        values_BxF: of this device's tokens and features; none is negative.
        k: features of a token.
        shards: the others' features and tokens.
        of_batch: compare the features of all tokens of the batch.
        usual: k in most calls, if k is only known when the program runs. With a much larger k it takes longer.
    """
    axes: tuple[int, ...] = (0, 1) if of_batch else (1,)
    sum_up = shards.sum_over_batch if of_batch else shards.sum

    B, F = values_BxF.shape
    is_many = of_batch and shards.batch_size(B) * F * shards.count > INT32

    def total(on: jax.Array) -> jax.Array:
        if not is_many:
            return sum_up(on.sum(axes, dtype=jnp.int32, keepdims=True))
        # More than 32 bits can count: in two parts, and 2**30 or above where there are as many. n is always less.
        of_token_Bx1 = on.sum(1, dtype=jnp.int32, keepdims=True)
        low, high = (sum_up(part.sum(0, keepdims=True)) for part in (of_token_Bx1 & 255, of_token_Bx1 >> 8))
        return (jnp.minimum(high + (low >> 8), 2**22) << 8) + (low & 255)

    n = jnp.asarray(k * shards.batch_size(B) if of_batch else k, jnp.int32)
    usual = cast(int, k) if usual is None else usual
    slots = min(SLOTS * usual, F)
    group = next((size for size in GROUPS if F % size == 0 and F * shards.count >= 2 * size * usual), None)
    start = active.varying(jnp.zeros((1 if of_batch else B, 1), _bits(values_BxF[:1]).dtype), values_BxF)

    def among(values_Bx_: jax.Array, features_Bx_: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(The bits of the n-th largest, the last feature where they are equal), of values that others do not reach."""
        bits_Bx_ = _bits(values_Bx_)
        nth = _last(lambda bits: total(bits_Bx_ >= bits) >= n, start)
        too_many = ((total(bits_Bx_ >= nth) > n) & (nth > 0)).any().astype(jnp.int32)
        tied = shards.sum_over_batch(active.varying(too_many, values_BxF)) > 0

        def with_room() -> jax.Array:
            equal_Bx_, room = bits_Bx_ == nth, n - total(bits_Bx_ > nth)
            first, start_at = shards.feature(F), start.astype(jnp.int32)
            if not of_batch:
                return _last(lambda at: total(equal_Bx_ & (features_Bx_ + first < at)) < room, start_at) - first
            token_Bx1 = shards.token(B) + jnp.arange(B, dtype=jnp.int32)[:, None]
            token = _last(lambda at: total(equal_Bx_ & (token_Bx1 < at)) < room, start_at)
            room -= total(equal_Bx_ & (token_Bx1 < token))
            equal_Bx_ &= token_Bx1 == token
            last = _last(lambda at: total(equal_Bx_ & (features_Bx_ + first < at)) < room, start_at) - first
            return jnp.where(token_Bx1 == token, last, jnp.where(token_Bx1 < token, F, -1))

        def all_of_them() -> jax.Array:
            return active.varying(jnp.full((B, 1), F, jnp.int32), values_BxF)

        return nth, jax.lax.cond(tied, with_room, all_of_them)

    def among_all() -> tuple[jax.Array, jax.Array]:
        return among(values_BxF, jnp.arange(F, dtype=jnp.int32)[None])

    if group is None or 2 * slots > F:
        nth, last = among_all()
    else:
        # Bits are made from values wherever they are used: an array of them would be one more pass over memory.
        maxima_BxG = _bits(values_BxF.reshape(B, group, F // group)).max(1)
        bound = _last(lambda bits: total(maxima_BxG >= bits) >= n, start)
        mask = active.pack(_bits(values_BxF) >= jnp.maximum(bound, 1))
        fits = shards.sum_over_batch((mask.most > slots).astype(jnp.int32)) == 0

        def among_few() -> tuple[jax.Array, jax.Array]:
            found = active.Slots.of(mask, slots, F)
            return among(found.take(values_BxF), found.features)

        nth, last = jax.lax.cond(fits, among_few, among_all)
    return Selection(jax.lax.bitcast_convert_type(nth, values_BxF.dtype), last)


def _bits(values: jax.Array) -> jax.Array:
    """Integers of the same order, of values that are not negative; those that are not numbers are the largest."""
    integer = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    # Without the sign, which zero and NaN may have.
    return jax.lax.bitcast_convert_type(values, integer) & jnp.iinfo(integer).max


def _last(accepts: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """The largest integers that are accepted, if all smaller ones are; bit by bit from zeros, which are accepted."""
    first = jnp.iinfo(start.dtype).bits - 2  # after the sign

    def add_bit(number: jax.Array, accepted: jax.Array) -> jax.Array:
        candidate = accepted | jnp.left_shift(jnp.ones((), start.dtype), (first - number).astype(start.dtype))
        return jnp.where(accepts(candidate), candidate, accepted)

    return jax.lax.fori_loop(0, first + 1, add_bit, start)


def auxiliary_error(
    values_BxF: jax.Array,
    residual_BxD: jax.Array,
    W_dec_FxD: jax.Array,
    dead_F: jax.Array,
    config: Any,
    shards: Shards = WHOLE,
    features: Features | None = None,
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
        config: of the architecture, with the fields `k_aux` and `dtype`.
        shards: the others' features and tokens.
        features: of the values, if they are not of all features; then all dead ones with positive values.
    """
    features = features or AllFeatures(values_BxF, config.dtype)
    residual_BxD = jax.lax.stop_gradient(residual_BxD)
    mean_D = shards.batch_mean(residual_BxD.mean(0))
    variance = shards.batch_mean(jnp.square(residual_BxD - mean_D[None]).mean())
    k = config.k_aux or max(1, residual_BxD.shape[1] // 2)
    any_dead = shards.sum_over_batch(dead_F.sum(dtype=jnp.int32)) > 0

    def error(values_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        values_BxF = jnp.where(features.each(dead_F), values_BxF, 0)
        f_BxF = largest(values_BxF, k, shards).of(values_BxF)
        return jnp.square(residual_BxD - shards.sum(features.decode((f_BxF,), W_dec_FxD, (True,))[0])).mean()

    def nothing(values_BxF: jax.Array, W_dec_FxD: jax.Array) -> jax.Array:
        return active.varying(jnp.zeros((), residual_BxD.dtype), residual_BxD)

    squared = jax.lax.cond(any_dead, error, nothing, values_BxF, W_dec_FxD)
    return jnp.where(variance > 0, squared / jnp.where(variance > 0, variance, 1), 0)


def check_auxk(coefficient: float, k: int) -> None:
    """Raises `UserError` for options `auxk_coefficient` and `k_aux` that are impossible."""
    if coefficient < 0:
        raise UserError(f"is {coefficient:g}; write a weight such as {1 / 32}, or 0 for none", "auxk_coefficient")
    if not 0 <= k <= INT32:
        raise UserError(f"is {k}; write a number of dead features, or 0 for half of the residual's width", "k_aux")


def idle(config: Any) -> dict[str, str]:
    """`contract.idle` of the options of AuxK."""
    if not config.auxk_coefficient:
        return {"k_aux": "auxk_coefficient is 0"}
    return {"k_aux": f"the dictionary has {config.width} features"} if config.k_aux > config.width else {}
