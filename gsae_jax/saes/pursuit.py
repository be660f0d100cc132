"""Inference-time optimisation: gradient pursuit on a trained dictionary (Appendix A; Blumensath & Davies 2008)."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gsae_jax.saes.inference import floats_at_once


def tokens_at_once(platform: str, F: int, D: int, k: int) -> int:
    """The number of inputs that a caller should give to `pursue`, so that [B, F] and [B, k, D] are small.

    On a CPU, a small number is faster, because the atoms stay in its cache.
    """
    most = 256 if platform == "cpu" else 4096
    return max(1, min(most, floats_at_once(platform) // max(F, k * D)))


class Codes(NamedTuple):
    """Codes of at most K atoms.

    Attributes:
        indices: [B, K], which atoms.
        alpha: [B, K], their coefficients, not negative unless `signed`; 0 where a round found nothing that helps, NaN
            where an input or an atom is not finite.
        x_hat: [B, D], alpha @ atoms.
    """

    indices: jax.Array
    alpha: jax.Array
    x_hat: jax.Array


@partial(jax.jit, static_argnames=("ks", "signed"))
def pursue(W_dec_FxD: jax.Array, x_BxD: jax.Array, ks: Sequence[int], signed: bool = False) -> list[Codes]:
    """Codes with small ||x - alpha @ W_dec||^2, for each number of atoms in `ks`.

    Each round adds the atom of largest positive correlation with the residual, then takes one step along the gradient
    of the chosen atoms' coefficients, of the length that minimises the error, and clips them at 0. So the first rounds
    are the same for all `ks`, and are made once.

    Args:
        W_dec_FxD: unit atoms.
        x_BxD: inputs, less the decoder's bias. Of many, give `tokens_at_once` at a time.
        ks: the L0 allowed, ascending, at most F.
        signed: coefficients may be negative. Then the atom whose correlation is the largest in size is added, and
            nothing is clipped.
    """
    (B, D), F = x_BxD.shape, len(W_dec_FxD)
    rows_Bx1, W_dec_DxF = jnp.arange(B)[:, None], W_dec_FxD.T

    def round_(i: jax.Array, so_far: tuple[Codes, jax.Array]) -> tuple[Codes, jax.Array]:
        (index, alpha, x_hat), atoms = so_far
        residual = x_BxD - x_hat
        correlation = residual @ W_dec_DxF
        # The gradient of a chosen atom's coefficient is its correlation.
        gradient = correlation.at[rows_Bx1, index].get(mode="fill", fill_value=0)
        size = jnp.abs(correlation) if signed else correlation
        size = size.at[rows_Bx1, index].set(-jnp.inf, mode="drop")
        largest = size.max(-1)
        # The first of the largest. XLA's argmax takes as long as the product on a CPU.
        best = jnp.where(size == largest[:, None], jnp.arange(F)[None], F - 1).min(-1)
        helps = ~(largest <= 0)  # NaN is chosen, so that the codes are NaN as well
        if signed:
            largest *= jnp.sign(jnp.take_along_axis(correlation, best[:, None], 1)[:, 0])
        best = jnp.where(helps, best, F)
        index, gradient = index.at[:, i].set(best), gradient.at[:, i].set(jnp.where(helps, largest, 0))
        atoms = atoms.at[:, i].set(W_dec_FxD.at[best].get(mode="fill", fill_value=0))
        # Products and sums that the compiler joins into one loop; an einsum would be a slow product for each token.
        direction = (gradient[..., None] * atoms).sum(1)
        square = jnp.square(direction).sum(-1)
        length = jnp.where(square > 0, (direction * residual).sum(-1) / jnp.where(square > 0, square, 1), 0)
        alpha += length[:, None] * gradient
        alpha = alpha if signed else jax.nn.relu(alpha)
        return Codes(index, alpha, (alpha[..., None] * atoms).sum(1)), atoms

    # Places for more atoms have an index of F, which no atom has, and atoms of zeros.
    codes = Codes(jnp.zeros((B, 0), jnp.int32), jnp.zeros((B, 0), x_BxD.dtype), jnp.zeros_like(x_BxD))
    atoms = jnp.zeros((B, 0, D), x_BxD.dtype)
    found = []
    for before, k in itertools.pairwise((0, *ks)):
        room = (0, 0), (0, k - before)
        index, alpha = jnp.pad(codes.indices, room, constant_values=F), jnp.pad(codes.alpha, room)
        start = Codes(index, alpha, codes.x_hat), jnp.pad(atoms, (*room, (0, 0)))
        codes, atoms = jax.lax.fori_loop(before, k, round_, start)
        found.append(codes._replace(indices=jnp.minimum(codes.indices, F - 1)))
    return found
