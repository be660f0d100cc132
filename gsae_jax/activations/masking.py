"""Which tokens SAEs see: the one rule that training, evaluation and everything else that looks at features share.

A row of tokens from `data.rows` says itself which of its tokens SAEs are not to see (`data.roles`): such a token is
`~token`, a negative number. So tokens and mask go the same way, and cannot be confused.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Rows = TypeVar("Rows", jax.Array, np.ndarray)


def norms(x: jax.Array) -> jax.Array:
    """||x|| [...] of activations [..., D], in float32."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1)


def tokens_of(rows: Rows) -> Rows:
    """The tokens of rows, of any shape, as the language model reads them."""
    xp = rows.__array_namespace__()
    return xp.where(rows < 0, ~rows, rows)


def allowed(rows: Rows, special_tokens: Sequence[int]) -> Rows:
    """Which tokens of rows, of any shape, SAEs may see: those that rows do not hide and none of `special_tokens`."""
    xp = rows.__array_namespace__()
    return (rows >= 0) & ~xp.isin(rows, xp.asarray(special_tokens, dtype=xp.int32))


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
