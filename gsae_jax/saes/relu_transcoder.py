"""The ReLU transcoder (2406.11944): `transcoder` says what it computes; its penalty is the baseline's (`relu`)."""

import dataclasses

import jax

from gsae_jax.saes import relu, transcoder

PARAMETERS = transcoder.table(relu.PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, relu.Options):
    """As of `transcoder` and `relu`."""


encode, decode, skip, loss = relu.encode, relu.decode, transcoder.skip, relu.loss
encoder, shifted = relu.encoder, relu.shifted


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(relu.init(key, config), key, config)
