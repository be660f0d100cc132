"""JumpReLU SAEs, to be evaluated and not trained: other projects' ones, and the exact form of gated and baseline ones.

f = pi where pi > max(theta, 0), else 0; pi = x @ W_enc + b_enc, x_hat = f @ W_dec + b_dec. Inputs are not centred.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gsae_jax.config import ConfigError
from gsae_jax.saes import gated, linalg

FEATURE_AXES = {"W_enc": 1, "b_enc": 0, "threshold": 0, "W_dec": 0, "b_dec": None}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape.

    Attributes:
        d_in: width of the site.
        width: features.
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    dtype: str = "float32"


def from_gated(params: dict[str, jax.Array], config: gated.Config) -> dict[str, jax.Array]:
    """The same function (Appendix E of the paper): what a gate lets through is what exceeds its threshold.

    Raises:
        ConfigError: an untied encoder, of which there is no such form.
    """
    W_enc = params["W_gate"] * _scale(params, config)[None]
    return {
        "W_enc": W_enc,
        "b_enc": linalg.shifted(params["b_mag"], -params["b_dec"], W_enc),
        "threshold": threshold(params, config),
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"],
    }


def from_relu(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same function as a baseline's: every threshold is 0."""
    b_enc = linalg.shifted(params["b_enc"], -params["b_dec"], params["W_enc"])
    return params | {"b_enc": b_enc, "threshold": jnp.zeros_like(b_enc)}


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


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    pi_BxF = linalg.matmul(x_BxD, params["W_enc"], config.dtype) + params["b_enc"][None]
    threshold = jax.nn.relu(params["threshold"])[None]
    # Comparisons with NaN are False, which would hide NaN as a feature that is off.
    is_nan = jnp.isnan(pi_BxF) | jnp.isnan(threshold)
    return jnp.where(is_nan, jnp.nan, jnp.where(pi_BxF > threshold, pi_BxF, 0))


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]
