"""The ReLU SAE of Anthropic's Circuits Updates of April 2024, whose decoder rows are free.

pi    = ReLU(x @ W_enc + b_enc)                              inputs are not centred
x_hat = f @ W_dec + b_dec                                    f = pi
loss  = ||x - x_hat||^2 / D + l1_coefficient * sum_i f_i ||W_dec,i||

A feature pays for what it adds to the reconstruction, so that shorter activations with longer rows gain nothing. They
sum the squared error over a site with E||x||^2 = D, as it has here, and we divide it by D: their coefficient (5) is D
times ours, and their limit of the gradient's norm (1) is that of `clip_norm`. They decay the learning rate to zero over
the last fifth of training (`train.decay_fraction = 0.2`). They start with zero biases (`initial_l0 = 0`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.saes import linalg, relu
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS = {
    "W_enc": Parameter(("d_in", "width"), Role.ENCODER),
    "b_enc": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER),
    "b_dec": Parameter(("d_in",), Role.OUTPUT_BIAS),
}
RECIPE = {"b1": 0.9, "clip_norm": 1.0, "coefficient_warmup_fraction": 0.05}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and options.

    Attributes:
        d_in: width of the site.
        width: features.
        initial_l0: about how many features are active on a token before training; 0 = half of them, by zero biases.
        initial_norm: of decoder rows and encoder columns before training.
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    initial_l0: int = linalg.INITIAL_L0
    initial_norm: float = 0.1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        linalg.check_initial_l0(self.initial_l0)
        if self.initial_norm <= 0:
            raise UserError(f"is {self.initial_norm:g}; write a number above 0, such as 0.1", "initial_norm")


def learning_rate(width: int) -> float:
    """That of the update, for any width."""
    return 5e-5


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random decoder rows of `initial_norm`, encoder = their transpose, biases for `initial_l0`, b_dec zero."""
    W_dec = config.initial_norm * linalg.unit_rows(key, config.width, config.d_in)
    b_enc = config.initial_norm * linalg.initial_bias(config.initial_l0, config.width)
    return {"W_enc": W_dec.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": jnp.zeros(config.d_in)}


def from_relu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a baseline's, whose inputs are centred."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], -params["b_dec"], params["W_enc"])}


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoder's bias, and so to all pre-activations."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], shift_D, params["W_enc"])}


def encoder(params: dict[str, jax.Array], config: Config) -> Encoder:
    """The encoder: a feature is active if its pre-activation is positive."""
    return Encoder(params["W_enc"], jnp.zeros_like(params["b_dec"]), params["b_enc"])


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    return jax.nn.relu(linalg.matmul(x_BxD, params["W_enc"], config.dtype) + params["b_enc"][None])


decode = relu.decode


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Squared error over D plus the weighted L1 penalty, averaged over the batch (`contract.Trainable.loss`)."""
    x_BxD = batch.inputs
    features = features or AllFeatures(linalg.matmul(x_BxD, params["W_enc"], config.dtype), config.dtype)
    f = jax.nn.relu(features.pre + features.each(params["b_enc"]))
    weighted = f * features.each(jnp.linalg.norm(params["W_dec"], axis=-1))
    B = x_BxD.shape[0]
    decoded, l1, l0 = shards.sum(
        (features.decode((f,), params["W_dec"], (True,)), weighted.sum() / B, jnp.sum(f > 0, dtype=jnp.float32) / B)
    )
    means = linalg.error_statistics(x_BxD, decoded[0] + params["b_dec"][None])
    total = means["mse"] + coefficients["l1_coefficient"] * l1
    return total, Statistics(means | {"loss": total, "l1": l1, "l0": l0}, features.any(f > 0), {})
