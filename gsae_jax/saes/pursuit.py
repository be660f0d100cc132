"""Inference-time optimisation: gradient pursuit on a trained dictionary (Appendix A; Blumensath & Davies 2008)."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames="k")
def pursue(W_dec_FxD: jax.Array, x_BxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Non-negative codes of at most `k` atoms with small ||x - alpha @ W_dec||^2.

    Each of `k` rounds adds the atom of largest positive correlation with the residual, then takes one step along the
    gradient of the chosen atoms' coefficients, of the length that minimises the error, and clips them at 0.

    Args:
        W_dec_FxD: unit atoms.
        x_BxD: inputs, less the decoder's bias.
        k: the L0 allowed, at most F.

    Returns:
        Which atoms [B, k], and their coefficients [B, k]; 0 where a round found nothing that helps, NaN where an
        input or an atom is not finite.
    """
    B, D = x_BxD.shape
    rows = jnp.arange(B)

    def round_(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        chosen_BxF, index_BxK, atoms_BxKxD, alpha_BxK, residual_BxD = carry
        correlation = jnp.where(chosen_BxF, -jnp.inf, residual_BxD @ W_dec_FxD.T)
        best_B = correlation.argmax(-1)
        helps_B = ~(correlation[rows, best_B] <= 0)  # NaN is chosen, so that the codes are NaN as well
        chosen_BxF = chosen_BxF.at[rows, best_B].set(helps_B)
        index_BxK = index_BxK.at[:, i].set(best_B)
        atoms_BxKxD = atoms_BxKxD.at[:, i].set(jnp.where(helps_B[:, None], W_dec_FxD[best_B], 0))

        # Atoms that are not chosen yet are rows of zeros here, and so are their gradients.
        gradient = jnp.einsum("bkd,bd->bk", atoms_BxKxD, residual_BxD)
        direction = jnp.einsum("bk,bkd->bd", gradient, atoms_BxKxD)
        square = jnp.square(direction).sum(-1)
        length = jnp.where(square > 0, (direction * residual_BxD).sum(-1) / jnp.where(square > 0, square, 1), 0)
        alpha_BxK = jax.nn.relu(alpha_BxK + length[:, None] * gradient)
        residual_BxD = x_BxD - jnp.einsum("bk,bkd->bd", alpha_BxK, atoms_BxKxD)
        return chosen_BxF, index_BxK, atoms_BxKxD, alpha_BxK, residual_BxD

    carry = (
        jnp.zeros((B, W_dec_FxD.shape[0]), bool),
        jnp.zeros((B, k), jnp.int32),
        jnp.zeros((B, k, D), x_BxD.dtype),
        jnp.zeros((B, k), x_BxD.dtype),
        x_BxD,
    )
    _, index_BxK, _, alpha_BxK, _ = jax.lax.fori_loop(0, k, round_, carry)
    return index_BxK, alpha_BxK
