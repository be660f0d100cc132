"""Next-token cross-entropy without the logits of a whole batch in memory at once."""

from typing import Any

import jax
import jax.numpy as jnp


def logits_per_chunk() -> int:
    """On a CPU a chunk's logits should stay in the cache; an accelerator wants large products."""
    return 2**21 if jax.default_backend() == "cpu" else 2**27


def cross_entropy(module: Any, params: Any, x_BxTxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Nats [B, T-1] of each token given those before it, from the residual stream after the last block."""
    B, T = tokens_BxT.shape
    rows_per_chunk = min(B, max(1, logits_per_chunk() // (T * module.config.d_vocab)))

    def row(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_TxD, tokens_T = args
        logits_TxV = module.apply({"params": params}, x_TxD[None, :-1], method="logits")[0]
        target = jnp.take_along_axis(logits_TxV, tokens_T[1:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits_TxV, axis=-1) - target

    return jax.lax.map(row, (x_BxTxD, tokens_BxT), batch_size=rows_per_chunk)
