"""Losses of next tokens without the logits of a whole batch in memory at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.lms import partition


def logits_per_chunk() -> int:
    """On a CPU a chunk's logits should stay in the cache; an accelerator wants large products."""
    return 2**21 if jax.default_backend() == "cpu" else 2**27


def cross_entropy(module: Any, params: Any, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Nats [B, T-1] of each token given those before it, from the residual stream after the last block."""

    return _by_position(module, params, _nats, (x_BxTxD[:, :-1],), tokens_BxT[:, 1:])


def cross_entropy_and_divergence(
    module: Any, params: Any, x_BxTxD: jax.Array, clean_BxTxD: jax.Array, tokens_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy`, and KL(clean || x) in nats [B, T-1] between the predictions of two residual streams."""

    def of_logits(logits_BxV: jax.Array, clean_BxV: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_q, log_p = (jax.nn.log_softmax(logits, axis=-1) for logits in (logits_BxV, clean_BxV))
        return _nats(logits_BxV, target_B), jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _by_position(module, params, of_logits, (x_BxTxD[:, :-1], clean_BxTxD[:, :-1]), tokens_BxT[:, 1:])


def _nats(logits_BxV: jax.Array, target_B: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits_BxV, axis=-1) - jnp.take_along_axis(logits_BxV, target_B[:, None], axis=-1)[:, 0]


def _by_position(
    module: Any, params: Any, of_logits: Callable[..., Any], streams: tuple[jax.Array, ...], targets_BxT: jax.Array
) -> Any:
    """`of_logits(logits [B, V] of each stream, targets [B])` at every position, results [B, T].

    Chunks run over positions, so that a batch that lies along a mesh axis stays there.
    """
    B, T = targets_BxT.shape
    params = partition.gather_head(params, module.mesh)
    positions = min(T, max(1, logits_per_chunk() // (len(streams) * B * module.config.d_vocab)))

    def at_position(inputs: tuple[tuple[jax.Array, ...], jax.Array]) -> Any:
        xs, target_B = inputs
        logits = [module.apply({"params": params}, x_BxD[None], method="logits")[0] for x_BxD in xs]
        return of_logits(*logits, target_B)

    by_position = (jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), streams), targets_BxT.T)
    found = jax.lax.map(at_position, by_position, batch_size=positions)
    return jax.tree.map(lambda x: x.T, found)
