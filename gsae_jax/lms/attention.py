"""Causal attention: cuDNN's fused kernel where it applies, else a few blocks of queries at a time."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

QUERIES = 512  # in a block: scores take [B, H, 512, T] at most, and blocks of the future are never computed


def attend(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    mask_BxT: jax.Array | None,
    window: int,
    scale: float,
    softcap: float,
    mesh: Mesh | None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """What each query [B, T, H, K] reads from the values of the tokens up to its own.

    Args:
        q_BxTxHxK: queries; every H / G of them share a key-value head.
        k_BxTxGxK: keys.
        v_BxTxGxK: values.
        mask_BxT: False for keys that nothing may read (padding).
        window: tokens that a token sees, itself included; 0 = all before it.
        scale: of the scores.
        softcap: scores s become c * tanh(s / c); 0 = they stay.
        mesh: the batch lies along its `data` axis, heads along `latent`; None: one device.
        sinks_H: of each head, one more score of the softmax, that of no key; None: there is none.
    """
    if mask_BxT is None and not softcap and sinks_H is None and _has_fused(q_BxTxHxK):
        return _fused(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, scale, mesh)
    T = q_BxTxHxK.shape[1]
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
        blocks.append(
            _explicit(*block, seen, scale, softcap, sinks_H)
            if softcap or sinks_H is not None
            else jax.nn.dot_product_attention(*block, mask=seen, scale=scale, implementation="xla")
        )
    return jnp.concatenate(blocks, axis=1)


def attend_kept(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    first: jax.typing.ArrayLike,
    mask_BxS: jax.Array,
    window: int,
    scale: float,
    softcap: float,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """What queries at places `first`, `first` + 1 and so on read from keys and values that are kept for all S places.

    The other arguments are as for `attend`.
    """
    query = first + jnp.arange(q_BxTxHxK.shape[1])[:, None]
    key = jnp.arange(k_BxSxGxK.shape[1])[None]
    seen = key <= query
    if window:
        seen &= key > query - window
    seen = seen[None, None] & mask_BxS[:, None, None]
    arrays = q_BxTxHxK, k_BxSxGxK, v_BxSxGxK
    if softcap or sinks_H is not None:
        return _explicit(*arrays, seen, scale, softcap, sinks_H)
    return jax.nn.dot_product_attention(*arrays, mask=seen, scale=scale, implementation="xla")


def _has_fused(q_BxTxHxK: jax.Array) -> bool:
    """cuDNN's kernel takes half precision and heads of up to 128, on NVIDIA's GPUs since Ampere."""
    K, device = q_BxTxHxK.shape[-1], jax.local_devices()[0]
    half = q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16)
    ampere = "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8
    return ampere and half and K <= 128 and K % 8 == 0


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, window: int, scale: float, mesh: Mesh | None) -> jax.Array:
    kernel = partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
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


def _explicit(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    scale: float,
    softcap: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    B, T, H, K = q.shape
    q = q.reshape(B, T, k.shape[2], H // k.shape[2], K)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
    if sinks_H is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_H.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        total = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - total)
    return jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v).reshape(B, T, H, K)
