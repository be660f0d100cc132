"""The BatchTopK crosscoder: `crosscoder` says what it computes, and `batch_topk` how features are chosen and trained.

A batch has its B * k largest n_i f_i. The running threshold is that of n_i f_i; it is kept as one of each f_i.
"""

import dataclasses
from collections.abc import Mapping

import jax

from gsae_jax.saes import batch_topk, crosscoder, topk
from gsae_jax.saes.contract import WHOLE, Batch, Shards, Statistics

PARAMETERS, SPARSITY = crosscoder.table(batch_topk.PARAMETERS), batch_topk.SPARSITY
RECIPE, learning_rate = batch_topk.RECIPE, batch_topk.learning_rate


@dataclasses.dataclass(frozen=True)
class Config(topk.Options):
    """As of `batch_topk`."""

    d_in: tuple[int, ...]


decode, idle = crosscoder.decode, topk.idle


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters: those of a BatchTopK SAE of all sites in one vector."""
    return crosscoder.split(batch_topk.PARAMETERS, batch_topk.init(key, config), config.d_in)


def encode(params: dict[str, jax.Array], inputs: tuple[jax.Array, ...], config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    whole = crosscoder.joined(batch_topk.PARAMETERS, params)
    return batch_topk.encode(whole, crosscoder.joined_inputs(inputs), config)


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, Statistics]:
    """As of `crosscoder` (`contract.Trainable.loss`)."""
    return crosscoder.loss_as(batch_topk, params, state, batch, coefficients, config, shards)
