"""The JumpReLU form of a gated SAE with a tied encoder (Appendix E of the paper): one encoder and a threshold.

f = pi * 1[pi > theta], where pi = (x - b_dec) @ W_enc + b_enc. Exact: what a gate lets through is what exceeds theta.
"""

import jax
import jax.numpy as jnp

from gsae_jax.config import ConfigError
from gsae_jax.saes import gated, linalg


def from_gated(params: dict[str, jax.Array], config: gated.Config) -> dict[str, jax.Array]:
    """W_enc [D, F], b_enc [F], threshold [F], W_dec [F, D] and b_dec [D] of the same function.

    Raises:
        ConfigError: an untied encoder, of which there is no such form.
    """
    return {
        "W_enc": params["W_gate"] * _scale(params, config)[None],
        "b_enc": params["b_mag"],
        "threshold": threshold(params, config),
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"],
    }


def threshold(params: dict[str, jax.Array], config: gated.Config) -> jax.Array:
    """The threshold [F] of each feature's activation, in the inputs' units.

    Raises:
        ConfigError: an untied encoder, of which there is no such form.
    """
    return jax.nn.relu(params["b_mag"] - _scale(params, config) * params["b_gate"])


def _scale(params: dict[str, jax.Array], config: gated.Config) -> jax.Array:
    """What the magnitude's encoder is of the gate's [F]."""
    if not config.tie_encoder:
        raise ConfigError("tie_encoder", "is False; only a gated SAE with a tied encoder has a JumpReLU form")
    return jnp.exp(params["r_mag"]) if config.use_r_mag else jnp.ones_like(params["r_mag"])


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, dtype: str = "float32") -> jax.Array:
    """Feature activations [B, F]."""
    bias = params["b_enc"] - linalg.matmul(params["b_dec"], params["W_enc"], dtype)
    pi_BxF = linalg.matmul(x_BxD, params["W_enc"], dtype) + bias[None]
    return jnp.where(pi_BxF > params["threshold"][None], pi_BxF, 0)
