"""The baseline SAE (section 2 of the paper): f = ReLU((x - b_dec) @ W_enc + b_enc), x_hat = f @ W_dec + b_dec.

With the option `aligned`, the columns of `linalg.aligned(W_enc, W_dec)` take the place of W_enc.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS = {
    "W_enc": Parameter(("d_in", "width"), Role.ENCODER),
    "b_enc": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER, unit_rows=True),
    "b_dec": Parameter(("d_in",), Role.CENTER),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape.

    Attributes:
        d_in: width of the site (the paper's n).
        width: features (the paper's M).
        initial_l0: about how many features are active on a token before training; 0 = half of them, by zero biases.
        aligned: each feature's encoder column and decoder row keep an inner product of one.
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    initial_l0: int = linalg.INITIAL_L0
    aligned: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        linalg.check_initial_l0(self.initial_l0)


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases for `initial_l0`, b_dec zero."""
    W_dec, b_enc = (
        linalg.unit_rows(key, config.width, config.d_in),
        linalg.initial_bias(config.initial_l0, config.width),
    )
    return {"W_enc": W_dec.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": jnp.zeros(config.d_in)}


def from_relu_april(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function with unit rows and centred inputs."""
    unit = linalg.with_unit_rows(params)
    return unit | {"b_enc": linalg.shifted(unit["b_enc"], unit["b_dec"], unit["W_enc"])}


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoder's bias, and so to all pre-activations."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], shift_D, params["W_enc"])}


def normal_form(params: dict[str, jax.Array], config: Config) -> dict[str, jax.Array]:
    """The same function with the encoder that is in use."""
    return params | ({"W_enc": linalg.once_aligned(params["W_enc"], params["W_dec"])} if config.aligned else {})


def encoder(params: dict[str, jax.Array], config: Config) -> Encoder:
    """The encoder: a feature is active if its pre-activation is positive."""
    W_enc = linalg.aligned(params["W_enc"], params["W_dec"]) if config.aligned else params["W_enc"]
    return Encoder(W_enc, params["b_dec"], params["b_enc"])


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    return linalg.rectified(x_BxD, params["b_dec"], encoder(params, config).W, params["b_enc"], config.dtype)


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Squared error over D plus l1_coefficient * ||f||_1, averaged over the batch (`contract.Trainable.loss`)."""
    x_BxD = batch.inputs
    features = features or AllFeatures.of(x_BxD, encoder(params, config), config.dtype)
    f = jax.nn.relu(features.pre + features.each(params["b_enc"]))
    B = x_BxD.shape[0]
    decoded, l1, l0 = shards.sum(
        (features.decode((f,), params["W_dec"], (True,)), f.sum() / B, jnp.sum(f > 0, dtype=jnp.float32) / B)
    )
    means = linalg.error_statistics(x_BxD, decoded[0] + params["b_dec"][None])
    total = means["mse"] + coefficients["l1_coefficient"] * l1
    return total, Statistics(means | {"loss": total, "l1": l1, "l0": l0}, features.any(f > 0), {})
