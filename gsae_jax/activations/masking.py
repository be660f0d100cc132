"""Which tokens SAEs see: the one rule that training, evaluation and everything else that looks at features share."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


def norms(x: jax.Array) -> jax.Array:
    """||x|| [...] of activations [..., D], in float32."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def not_special(tokens_RxT: jax.Array, special_tokens: Sequence[int]) -> jax.Array:
    """Which tokens [R, T] are none of `special_tokens`."""
    return ~jnp.isin(tokens_RxT, jnp.array(special_tokens, jnp.int32))


def valid(
    allowed: jax.Array,
    activations: Mapping[str, jax.Array],
    norm_limits: Mapping[str, jax.typing.ArrayLike] | None = None,
) -> jax.Array:
    """Which tokens SAEs see: allowed ones whose activations are finite and within the norm limit at every site.

    Args:
        allowed: [...], which tokens may be seen at all: not special ones, and no padding.
        activations: [..., D] of each site.
        norm_limits: of each site; none by default.
    """
    for site, x in activations.items():
        limit = jnp.inf if norm_limits is None else norm_limits[site]
        norm = norms(x)
        allowed &= jnp.isfinite(norm) & (norm <= limit)
    return allowed
