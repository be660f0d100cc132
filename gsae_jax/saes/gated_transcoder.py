"""The gated transcoder: `transcoder` says what it computes, and `gated` how it is gated and trained."""

import dataclasses

import jax

from gsae_jax.saes import gated, transcoder

PARAMETERS = transcoder.table(gated.PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, gated.Options):
    """As of `transcoder` and `gated`."""


encode, gate, decode, skip, loss = gated.encode, gated.gate, gated.decode, transcoder.skip, gated.loss
encoder, shifted, normal_form, feature_facts = gated.encoder, gated.shifted, gated.normal_form, gated.feature_facts


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(gated.init(key, config), key, config)
