"""The TopK transcoder: `transcoder` says what it computes, `topk` how features are chosen and trained."""

import dataclasses

import jax

from gsae_jax.saes import topk, transcoder

PARAMETERS, SPARSITY = transcoder.table(topk.PARAMETERS), topk.SPARSITY
RECIPE, learning_rate = topk.RECIPE, topk.learning_rate


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, topk.Options):
    """As of `transcoder` and `topk`."""


encode, encode_shard, decode, skip = topk.encode, topk.encode_shard, topk.decode, transcoder.skip
loss, shifted, encoder, active, idle = topk.loss, topk.shifted, topk.encoder, topk.active, topk.idle


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(topk.init(key, config), key, config)
