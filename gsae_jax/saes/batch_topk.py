"""The BatchTopK SAE (Bussmann et al. 2024, 2412.06410): a batch has its B * k largest features, tokens differ.

pi    = ReLU((x - b_dec) @ W_enc + b_enc)
f     = pi of the B * k largest of the batch, else 0        in training
f     = pi where pi > threshold, else 0                     afterwards, as features then do not depend on other tokens
x_hat = f @ W_dec + b_dec
loss  = ||x - x_hat||^2 / D + auxk_coefficient * AuxK       (`selection.auxiliary_error`)

The threshold is a running mean over training batches of the smallest value that is selected. It is 0 before training:
then all positive features are active, as in a ReLU SAE. The batch is that of all devices. `topk` says of which units
the constants are, and which learning rate others take.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg, relu, selection, topk
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Features

# Every feature has the same threshold until rows of the decoder are made unit, which changes the units of features.
PARAMETERS = relu.PARAMETERS | {"threshold": Parameter(("width",), Role.FEATURE, trained=False)}
SPARSITY, RECIPE = "k", topk.RECIPE
DECAY = 0.99  # of the running threshold, in a step

shifted, decode, learning_rate = relu.shifted, relu.decode, topk.learning_rate
encoder, active, idle = topk.encoder, partial(topk.active, of_batch=True), topk.idle


@dataclasses.dataclass(frozen=True)
class Config(topk.Config):
    """As of `topk`; `k` is the mean number of active features of a token."""


def init(key: jax.Array, config: Any) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases and thresholds zero."""
    return topk.init(key, config) | {"threshold": jnp.zeros(config.width)}


def from_jumprelu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The function of a JumpReLU SAE, which is the form of BatchTopK SAEs in other libraries' files.

    Training moves all thresholds towards one.
    """
    b_enc = linalg.shifted(params["b_enc"], params["b_dec"], params["W_enc"])
    return params | {"b_enc": b_enc, "threshold": jax.nn.relu(params["threshold"])}


def from_matryoshka(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same parameters."""
    return dict(params)


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Any) -> jax.Array:
    """Feature activations [B, F]."""
    f_BxF = linalg.rectified(x_BxD, linalg.center(params), params["W_enc"], params["b_enc"], config.dtype)
    # NaN <= 0 is False, so that a feature that is not a number shows.
    return jnp.where(f_BxF <= jax.nn.relu(params["threshold"])[None], 0, f_BxF)


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: topk.Options,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Squared error over D plus AuxK (`contract.Trainable.loss`)."""
    features = features or AllFeatures.of(batch.inputs, encoder(params, config), config.dtype)
    pi = jax.nn.relu(features.pre + features.each(params["b_enc"]))
    f, state = selected(pi, state, coefficients, config, shards)
    x_hat_BxD = topk.decoded(params, batch.inputs, f, config, shards, features)
    total, statistics = topk.with_auxiliary(params, batch, pi, f, [x_hat_BxD], config, shards, features)
    return total, statistics._replace(state=state)


def selected(
    pi: jax.Array,
    state: dict[str, jax.Array],
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Any,
    shards: Shards,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(The B * k largest values, else 0, the next state) of positive values of a batch."""
    largest = selection.largest(pi, config.k_at(coefficients), shards, of_batch=True, usual=config.k)
    before_F, here = state["threshold"], largest.smallest[0]
    after_F = jnp.where(before_F > 0, DECAY * before_F + (1 - DECAY) * here, here)
    return largest.of(pi), {"threshold": after_F}
