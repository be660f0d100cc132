"""JumpReLU SAEs of other projects, and the exact JumpReLU form of gated SAEs and baselines. They cannot be trained.

f = pi if pi > max(theta, 0), else 0; pi = x @ W_enc + b_enc, x_hat = f @ W_dec + b_dec. Inputs are not centred.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.saes import gated, linalg
from gsae_jax.saes.contract import Parameter, Role

PARAMETERS = {
    "W_enc": Parameter(("d_in", "width"), Role.ENCODER),
    "b_enc": Parameter(("width",), Role.FEATURE),
    "threshold": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER),
    "b_dec": Parameter(("d_in",), Role.OUTPUT_BIAS),
}


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


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, the rest zero."""
    W_dec = linalg.unit_rows(key, config.width, config.d_in)
    zeros_F = jnp.zeros(config.width)
    return {"W_enc": W_dec.T, "b_enc": zeros_F, "threshold": zeros_F, "W_dec": W_dec, "b_dec": jnp.zeros(config.d_in)}


def from_gated(params: dict[str, jax.Array], config: gated.Config) -> dict[str, jax.Array]:
    """The same function (Appendix E of the paper): a gate is open if the pre-activation exceeds the threshold.

    Raises:
        UserError: the encoder is untied, so that there is no such form.
    """
    W_enc = params["W_gate"] * gated.magnitude_scale(params, config)[None]
    return {
        "W_enc": W_enc,
        "b_enc": linalg.shifted(params["b_mag"], -params["b_dec"], W_enc),
        "threshold": gated.threshold(params, config),
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"],
    }


def from_relu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as the baseline: every threshold is 0."""
    b_enc = linalg.shifted(params["b_enc"], -params["b_dec"], params["W_enc"])
    return params | {"b_enc": b_enc, "threshold": jnp.zeros_like(b_enc)}


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoder's bias, and so to all pre-activations."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], shift_D, params["W_enc"])}


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
