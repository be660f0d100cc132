"""What is summed over tokens, and how the sums become the paper's metrics (sections 2.3, 4.2, D.2)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Sums over the tokens of a row; means of means are never taken.
Sums = dict[str, Any]


def reconstruction_sums(x_RxTxD: jax.Array, x_hat_RxTxD: jax.Array, f_RxTxF: jax.Array, valid_RxT: jax.Array) -> Sums:
    """Per row, over valid tokens: what L0, gamma and FVU need; `fired` [F] counts tokens of all rows."""
    x, x_hat = x_RxTxD.astype(jnp.float32), x_hat_RxTxD.astype(jnp.float32)
    per_token = {
        "tokens": jnp.ones(valid_RxT.shape, jnp.float32),
        "l0": (f_RxTxF != 0).sum(-1).astype(jnp.float32),
        "squared_error": jnp.square(x - x_hat).sum(-1),
        "x_sq": jnp.square(x).sum(-1),
        "x_hat_sq": jnp.square(x_hat).sum(-1),
        "x_hat_dot_x": (x_hat * x).sum(-1),
    }
    sums = {name: jnp.where(valid_RxT, value, 0).sum(1) for name, value in per_token.items()}
    sums["x"] = jnp.where(valid_RxT[..., None], x, 0).sum(1)
    sums["fired"] = ((f_RxTxF != 0) & valid_RxT[..., None]).sum((0, 1))
    return sums


def add(total: Sums, batch: Sums) -> Sums:
    """Accumulate a batch in float64 on the host; rows are summed up."""
    for name, value in batch.items():
        value = np.asarray(value, np.float64)
        total[name] = total.get(name, 0.0) + (value if name == "fired" else value.sum(0))
    return total


def combine(sums: Sums) -> dict[str, float]:
    """The metrics of one SAE.

    Returns:
        l0: mean active features per token.
        loss_recovered: 1 - (ce_sae - ce_clean) / (ce_zero - ce_clean).
        ce_clean, ce_sae, ce_zero: nats per token with the activations kept, reconstructed, zeroed.
        gamma: relative reconstruction bias, E||x_hat||^2 / E[x_hat . x]; below 1 is shrinkage.
        fvu: fraction of the activations' variance that is not explained.
        alive: fraction of features that fired on at least one token.
        tokens: how many activations were measured.
    """
    n = sums["tokens"]
    clean, sae, zero = (float(sums[f"ce_{kind}"] / sums["predictions"]) for kind in ("clean", "sae", "zero"))
    variance = sums["x_sq"] - np.square(sums["x"]).sum() / n
    return {
        "l0": float(sums["l0"] / n),
        "loss_recovered": 1 - (sae - clean) / (zero - clean) if zero != clean else math.nan,
        "ce_clean": clean,
        "ce_sae": sae,
        "ce_zero": zero,
        "gamma": float(sums["x_hat_sq"] / sums["x_hat_dot_x"]) if sums["x_hat_dot_x"] else math.nan,
        "fvu": float(sums["squared_error"] / variance),
        "alive": float((sums["fired"] > 0).mean()),
        "tokens": int(n),
    }
