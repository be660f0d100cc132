"""The JumpReLU transcoder: `transcoder` says what it computes, `jumprelu` how thresholds are trained.

It is also the exact form of gated transcoders with a tied encoder, and of ReLU and BatchTopK transcoders.
"""

import dataclasses
from typing import Any

import jax

from gsae_jax.saes import gated_transcoder, jumprelu, transcoder

PARAMETERS = transcoder.table(jumprelu.PARAMETERS)
RECIPE, learning_rate = jumprelu.RECIPE, jumprelu.learning_rate


@dataclasses.dataclass(frozen=True)
class Config(transcoder.Sizes, jumprelu.Config):
    """As of `transcoder` and `jumprelu`; the bandwidth is of inputs."""


encode, decode, skip, loss = jumprelu.encode, jumprelu.decode, transcoder.skip, jumprelu.loss
encoder, shifted, feature_facts = jumprelu.encoder, jumprelu.shifted, jumprelu.feature_facts


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """The untrained parameters."""
    return transcoder.init(jumprelu.init(key, config), key, config, centred=False)


def from_gated_transcoder(params: dict[str, jax.Array], config: gated_transcoder.Config) -> dict[str, jax.Array]:
    """The same function as a gated transcoder's.

    Raises:
        UserError: the encoder is untied, so that there is no such form.
    """
    return jumprelu.from_gated(params, config) | {name: params[name] for name in ("W_skip",) if name in params}


def from_relu_transcoder(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a ReLU transcoder's."""
    return {name: value for name, value in jumprelu.from_relu(params, config).items() if name != "b_in"}


def from_batch_topk_transcoder(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a BatchTopK transcoder's after training, with its running threshold."""
    return {name: value for name, value in jumprelu.from_batch_topk(params, config).items() if name != "b_in"}
