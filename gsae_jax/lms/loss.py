"""Losses of next tokens without the logits of a whole batch in memory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.lms import partition

Logits = Callable[[jax.Array], jax.Array]  # [B, V] of residual streams [B, D]


def logits_per_chunk(platform: str) -> int:
    """On a CPU a chunk's logits should stay in the cache; an accelerator wants large products."""
    return 2**21 if platform == "cpu" else 2**27


def cross_entropy(module: Any, params: Any, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Nats [B, T-1] of each token given those before it, from the residual stream after the last block."""

    def at_position(logits: Logits, streams: tuple[jax.Array, ...], target_B: jax.Array) -> jax.Array:
        return _nats(logits(streams[0]), target_B)[0]

    # A gradient computes the logits again, as those of a whole batch would have to be kept.
    return _by_position(module, params, at_position, (x_BxTxD,), tokens_BxT, again=True)


def cross_entropy_and_divergence(
    module: Any, params: Any, x_NxBxTxD: jax.Array, clean_BxTxD: jax.Array, tokens_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` of N residual streams, and KL(clean || x) in nats between their predictions, each [N, B, T-1].

    Streams go through one program, one after the other: equal ones have equal losses to the last bit.
    """

    def at_position(logits: Logits, streams: tuple[jax.Array, ...], target_B: jax.Array) -> tuple[jax.Array, ...]:
        x_NxBxD, clean_BxD = streams
        log_p_BxV = jax.nn.log_softmax(logits(clean_BxD), axis=-1)
        p_BxV = jnp.exp(log_p_BxV)

        def one(x_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_BxV = logits(x_BxD)
            nats_B, total_B = _nats(logits_BxV, target_B)
            return nats_B, jnp.sum(p_BxV * (log_p_BxV - logits_BxV + total_B[:, None]), axis=-1)

        return jax.lax.map(one, x_NxBxD)

    return _by_position(module, params, at_position, (x_NxBxTxD, clean_BxTxD), tokens_BxT)


def divergence(
    module: Any, params: Any, x_BxTxD: jax.Array, clean_BxTxD: jax.Array, tokens_BxT: jax.Array
) -> jax.Array:
    """KL(clean || x) in nats [B, T-1], for training: only `x` has a gradient.

    It is computed with the value, as logits are too large to be kept, and would have to be computed again.
    """

    def at_position(logits: Logits, streams: tuple[jax.Array, ...], _: jax.Array) -> jax.Array:
        def value_and_gradient(x_BxD: jax.Array, clean_BxD: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_BxV, transpose = jax.vjp(logits, x_BxD)
            log_q_BxV, log_p_BxV = (jax.nn.log_softmax(z, axis=-1) for z in (logits_BxV, logits(clean_BxD)))
            p_BxV = jnp.exp(log_p_BxV)
            (gradient_BxD,) = transpose((jnp.exp(log_q_BxV) - p_BxV).astype(logits_BxV.dtype))
            return jnp.sum(p_BxV * (log_p_BxV - log_q_BxV), axis=-1), gradient_BxD

        @jax.custom_vjp
        def nats(x_BxD: jax.Array, clean_BxD: jax.Array) -> jax.Array:
            return value_and_gradient(x_BxD, clean_BxD)[0]

        def backward(gradient_BxD: jax.Array, of_nats_B: jax.Array) -> tuple[jax.Array, None]:
            return (of_nats_B[:, None] * gradient_BxD).astype(gradient_BxD.dtype), None

        nats.defvjp(value_and_gradient, backward)
        return nats(*streams)

    return _by_position(module, params, at_position, (x_BxTxD, clean_BxTxD), tokens_BxT)


def _nats(logits_BxV: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Cross-entropy [B], log of the sum of exponentials [B])."""
    total_B = jax.nn.logsumexp(logits_BxV, axis=-1)
    return total_B - jnp.take_along_axis(logits_BxV, target_B[:, None], axis=-1)[:, 0], total_B


def _by_position(
    module: Any,
    params: Any,
    at_position: Callable[..., Any],
    streams: tuple[jax.Array, ...],
    tokens_BxT: jax.Array,
    again: bool = False,
) -> Any:
    """`at_position(logits, streams [..., B, D], next tokens [B])` at all positions but the last: [..., B, T-1].

    Chunks run over positions, so that a batch that lies along a mesh axis stays there.
    """
    B, T = tokens_BxT.shape
    params = partition.gather_head(params, module.mesh)
    rows, d_vocab = partition.logits(B, module.config.d_vocab, module.mesh)
    positions = min(T - 1, max(1, logits_per_chunk(jax.default_backend()) // (len(streams) * rows * d_vocab)))

    def logits(x_BxD: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x_BxD[None], method="logits")[0]

    by_position = ([jnp.moveaxis(stream, -2, 0)[:-1] for stream in streams], tokens_BxT.T[1:])

    def of(inputs: Any) -> Any:
        return at_position(logits, *inputs)

    losses = jax.lax.map(jax.checkpoint(of) if again else of, by_position, batch_size=positions)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), losses)
