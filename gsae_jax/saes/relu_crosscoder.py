"""The ReLU crosscoder (Lindsey et al. 2024): `crosscoder` says what it computes; its penalty is l1_coefficient n f."""

import dataclasses
from collections.abc import Mapping

import jax

from gsae_jax.saes import crosscoder, relu
from gsae_jax.saes.contract import WHOLE, Batch, Shards, Statistics

PARAMETERS = crosscoder.table(relu.PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Config(relu.Options):
    """As of `relu`."""

    d_in: tuple[int, ...]


decode = crosscoder.decode


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters: those of a ReLU SAE of all sites in one vector."""
    return crosscoder.split(relu.PARAMETERS, relu.init(key, config), config.d_in)


def encode(params: dict[str, jax.Array], inputs: tuple[jax.Array, ...], config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    return relu.encode(crosscoder.joined(relu.PARAMETERS, params), crosscoder.joined_inputs(inputs), config)


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, Statistics]:
    """As of `crosscoder` (`contract.Trainable.loss`)."""
    return crosscoder.loss_as(relu, params, state, batch, coefficients, config, shards)
