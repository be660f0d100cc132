"""The BatchTopK transcoder: `transcoder` says what it computes, `batch_topk` how features are chosen and trained."""

import dataclasses

import jax

from gsae_jax.saes import batch_topk, topk, transcoder

PARAMETERS, SPARSITY = transcoder.table(batch_topk.PARAMETERS), batch_topk.SPARSITY
RECIPE, learning_rate = batch_topk.RECIPE, batch_topk.learning_rate


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, topk.Options):
    """As of `transcoder` and `batch_topk`."""


encode, decode, skip = batch_topk.encode, batch_topk.decode, transcoder.skip
loss, shifted = batch_topk.loss, batch_topk.shifted
encoder, active, idle = batch_topk.encoder, batch_topk.active, batch_topk.idle


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(batch_topk.init(key, config), key, config)
