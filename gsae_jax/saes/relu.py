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
class Options:
    """Shape, for transcoders and crosscoders as well.

    Attributes:
        d_in: width of the site (the paper's n); a tuple of widths if there are several sites.
        width: features (the paper's M).
        initial_l0: about how many features are active on a token before training; 0 = half of them, by zero biases.
        dtype: of the matrix products' operands.
    """

    d_in: int | tuple[int, ...]
    width: int
    initial_l0: int = linalg.INITIAL_L0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises `UserError` for a negative `initial_l0`."""
        linalg.check_initial_l0(self.initial_l0)

    @property
    def aligned(self) -> bool:
        """Whether encoder columns are aligned with decoder rows, which must be of the same site."""
        return False


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Shape of an SAE.

    Attributes:
        aligned: each feature's encoder column and decoder row keep an inner product of one.
    """

    d_in: int
    aligned: bool = False


def init(key: jax.Array, config: Options) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases for `initial_l0`, b_dec zero."""
    F, D = config.width, linalg.total(config.d_in)
    W_dec, b_enc = linalg.unit_rows(key, F, D), linalg.initial_bias(config.initial_l0, F)
    return {"W_enc": W_dec.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": jnp.zeros(D)}


def from_relu_april(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function with unit rows and centred inputs."""
    unit = linalg.with_unit_rows(params)
    return unit | {"b_enc": linalg.shifted(unit["b_enc"], unit["b_dec"], unit["W_enc"])}


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoder's bias, and so to all pre-activations."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], shift_D, params["W_enc"])}


def normal_form(params: dict[str, jax.Array], config: Options) -> dict[str, jax.Array]:
    """The same function with the encoder that is in use."""
    return params | ({"W_enc": linalg.once_aligned(params["W_enc"], params["W_dec"])} if config.aligned else {})


def encoder(params: dict[str, jax.Array], config: Options) -> Encoder:
    """The encoder: a feature is active if its pre-activation is positive."""
    W_enc = linalg.aligned(params["W_enc"], params["W_dec"]) if config.aligned else params["W_enc"]
    return Encoder(W_enc, linalg.center(params), params["b_enc"])


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Options) -> jax.Array:
    """Feature activations [B, F]."""
    W, center, b_enc = encoder(params, config)
    return linalg.rectified(x_BxD, center, W, b_enc, config.dtype)


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Options,
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
    means = linalg.error_statistics(batch.targets, decoded[0] + linalg.offset(params, x_BxD, config.dtype))
    total = means["mse"] + coefficients["l1_coefficient"] * l1
    return total, Statistics(means | {"loss": total, "l1": l1, "l0": l0}, features.any(f > 0), {})
