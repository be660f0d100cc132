"""Causal attention: cuDNN's fused kernel where it applies, else a few blocks of queries at a time."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

QUERIES = 512  # in a block: scores take [B, H, 512, T] at most, and blocks of the future are never computed


class Scores(NamedTuple):
    """How queries and keys become weights.

    Attributes:
        window: tokens that a token sees, itself included; 0 = all before it.
        scale: of the scores.
        softcap: scores s become c * tanh(s / c); 0 = they stay.
        sinks_H: of each head, one more score of the softmax, that of no key; None: there is none.
    """

    window: int
    scale: float
    softcap: float = 0.0
    sinks_H: jax.Array | None = None

    @property
    def are_plain(self) -> bool:
        """Whether JAX's own attention computes them."""
        return not self.softcap and self.sinks_H is None


def attend(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    mask_BxT: jax.Array | None,
    scores: Scores,
    mesh: Mesh | None,
) -> jax.Array:
    """What each query [B, T, H, K] reads from the values of the tokens up to its own.

    Args:
        q_BxTxHxK: queries; every H / G of them share a key-value head.
        k_BxTxGxK: keys.
        v_BxTxGxK: values.
        mask_BxT: False for keys that nothing may read (padding).
        scores: how queries and keys become weights.
        mesh: the batch lies along its `data` axis, heads along `latent`; None: one device.
    """
    if mask_BxT is None and scores.are_plain and _has_fused(q_BxTxHxK):
        return _fused(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, scores, mesh)
    T, window = q_BxTxHxK.shape[1], scores.window
    blocks = []
    for start in range(0, T, QUERIES):
        stop = min(start + QUERIES, T)
        first = max(0, start - window + 1) if window else 0
        query, key = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None]
        seen = key <= query
        if window:
            seen &= key > query - window
        seen = seen[None, None]
        if mask_BxT is not None:
            seen &= mask_BxT[:, None, None, first:stop]
        block = q_BxTxHxK[:, start:stop], k_BxTxGxK[:, first:stop], v_BxTxGxK[:, first:stop]
        blocks.append(_weighted(*block, seen, scores))
    return jnp.concatenate(blocks, axis=1)


def attend_kept(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    first: jax.typing.ArrayLike,
    mask_BxS: jax.Array,
    scores: Scores,
) -> jax.Array:
    """What queries at places `first`, `first` + 1 and so on read from keys and values that are kept for all S places.

    The other arguments are as for `attend`.
    """
    query = first + jnp.arange(q_BxTxHxK.shape[1])[:, None]
    key = jnp.arange(k_BxSxGxK.shape[1])[None]
    seen = key <= query
    if scores.window:
        seen &= key > query - scores.window
    return _weighted(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, seen[None, None] & mask_BxS[:, None, None], scores)


def _has_fused(q_BxTxHxK: jax.Array) -> bool:
    """cuDNN's kernel takes half precision and heads of up to 128, on NVIDIA's GPUs since Ampere."""
    K, device = q_BxTxHxK.shape[-1], jax.local_devices()[0]
    half = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16)
    ampere = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8
    return ampere and half and K <= 128 and K % 8 == 0


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, scores: Scores, mesh: Mesh | None) -> jax.Array:
    kernel = partial(
        jax.nn.dot_product_attention,
        scale=scores.scale,
        is_causal=True,
        local_window_size=(scores.window - 1, 0) if scores.window else None,
        implementation="cudnn",
    )
    if mesh is None:
        return kernel(q, k, v)
    # Mapped by hand: under `vmap` the compiler would gather the batch for the kernel, and it refuses queries that are
    # split over `latent` beside keys that are not.
    rows = None if q.shape[0] % mesh.shape["data"] else "data"
    heads = None if q.shape[2] % mesh.shape["latent"] else "latent"
    if heads and k.shape[2] % mesh.shape["latent"]:
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    spec = PartitionSpec(rows, None, heads, None)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _weighted(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scores: Scores) -> jax.Array:
    """The means of values, weighted by the scores of keys that are seen."""
    if scores.are_plain:
        return jax.nn.dot_product_attention(q, k, v, mask=seen, scale=scores.scale, implementation="xla")
    B, T, H, K = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], K)
    s = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scores.scale
    s = scores.softcap * jnp.tanh(s / scores.softcap) if scores.softcap else s
    s = jnp.where(seen[:, :, None], s, jnp.finfo(jnp.float32).min)
    if scores.sinks_H is None:
        weights = jax.nn.softmax(s, axis=-1)
    else:
        sinks = scores.sinks_H.astype(jnp.float32).reshape(1, *s.shape[1:3], 1, 1)
        weights = jnp.exp(s - jnp.logaddexp(jax.nn.logsumexp(s, axis=-1, keepdims=True), sinks))
    return jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v).reshape(B, T, H, K)
