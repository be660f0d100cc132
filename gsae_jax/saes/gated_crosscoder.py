"""The gated crosscoder: `crosscoder` says what it computes, and `gated` how it is gated and trained."""

import dataclasses
from collections.abc import Mapping

import jax

from gsae_jax.saes import crosscoder, gated
from gsae_jax.saes.contract import WHOLE, Batch, Shards, Statistics

PARAMETERS = crosscoder.table(gated.PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Config(gated.Options):
    """As of `gated`."""

    d_in: tuple[int, ...]


decode, normal_form, feature_facts, idle = crosscoder.decode, gated.normal_form, gated.feature_facts, gated.idle


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters: those of a gated SAE of all sites in one vector."""
    return crosscoder.split(gated.PARAMETERS, gated.init(key, config), config.d_in)


def encode(params: dict[str, jax.Array], inputs: tuple[jax.Array, ...], config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    return gated.encode(crosscoder.joined(gated.PARAMETERS, params), crosscoder.joined_inputs(inputs), config)


def gate(params: dict[str, jax.Array], inputs: tuple[jax.Array, ...], config: Config) -> jax.Array:
    """Which features' gates [B, F] are open."""
    return gated.gate(crosscoder.joined(gated.PARAMETERS, params), crosscoder.joined_inputs(inputs), config)


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, Statistics]:
    """As of `crosscoder` (`contract.Trainable.loss`)."""
    return crosscoder.loss_as(gated, params, state, batch, coefficients, config, shards)
