"""Next-token cross-entropy without the logits of a whole batch in memory at once."""

from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.lms import partition


def logits_per_chunk() -> int:
    """On a CPU a chunk's logits should stay in the cache; an accelerator wants large products."""
    return 2**21 if jax.default_backend() == "cpu" else 2**27


def cross_entropy(module: Any, params: Any, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Nats [B, T-1] of each token given those before it, from the residual stream after the last block.

    Chunks run over positions, so that a batch that lies along a mesh axis stays there.
    """
    B, T = tokens_BxT.shape
    params = partition.gather_head(params, module.mesh)
    positions = min(T - 1, max(1, logits_per_chunk() // (B * module.config.d_vocab)))

    def at_position(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BxD, target_B = inputs
        logits_BxV = module.apply({"params": params}, x_BxD[None], method="logits")[0]
        return jax.nn.logsumexp(logits_BxV, axis=-1) - jnp.take_along_axis(logits_BxV, target_B[:, None], axis=-1)[:, 0]

    by_position = (jnp.swapaxes(x_BxTxD[:, :-1], 0, 1), tokens_BxT[:, 1:].T)
    return jax.lax.map(at_position, by_position, batch_size=positions).T
