"""A gated SAE whose gates are opened by BatchTopK: gated magnitudes, and no L1.

With c = x - b_dec:
    pi_gate = c @ W_gate + b_gate
    pi_mag  = exp(r_mag) * (c @ W_gate) + b_mag
    g       = ReLU(pi_gate) of the B * k largest of the batch, else 0     in training
    g       = ReLU(pi_gate) where pi_gate > threshold, else 0             afterwards
    f       = 1[g > 0] * ReLU(pi_mag)
    x_hat   = f @ W_dec + b_dec
    loss    = ||x - x_hat||^2 / D + ||x - (g @ W_dec + b_dec)||^2 / D + auxk_coefficient * AuxK

The second term is the Gated SAE paper's auxiliary loss (2404.16014, equation 8), with W_dec and b_dec frozen as there.
It trains gates, which are selected as features of a BatchTopK SAE are (2412.06410): `batch_topk` says what k and the
threshold are, and `topk` of which units the constants are. AuxK explains the residual with ReLU(pi_gate) of dead
features and, unlike that of `gated`, also trains W_dec. A feature whose pi_gate is never positive gets no gradient.
With b_gate - threshold as b_gate it is a gated SAE, and as such it is exported.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.saes import batch_topk, gated, linalg, topk
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS: dict[str, Parameter] = {
    **{name: parameter for name, parameter in gated.PARAMETERS.items() if name != "W_mag"},
    "threshold": batch_topk.PARAMETERS["threshold"],
}
SPARSITY, RECIPE = topk.SPARSITY, topk.RECIPE

shifted, decode, learning_rate = gated.shifted, gated.decode, topk.learning_rate
active, idle = batch_topk.active, topk.idle


@dataclasses.dataclass(frozen=True)
class Config(topk.Config):
    """As of `topk`; `k` is the mean number of active features of a token."""


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, the rest zero."""
    start = gated.init(key, gated.Config(config.d_in, config.width, initial_l0=0))
    return start | {"threshold": jnp.zeros(config.width)}


def from_gated(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a gated SAE's, with thresholds of 0; training selects gates in place of them.

    Raises:
        UserError: the encoder of the gated SAE is untied.
    """
    if "W_mag" in params:
        raise UserError("has an untied encoder; only a gated SAE with tie_encoder=True has this form", "start_from")
    return params | {"threshold": jnp.zeros_like(params["b_gate"])}


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    return gated.encode(gated.from_gated_batch_topk(params, config), x_BxD, _gated(config))


def gate(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Which features' gates [B, F] are open."""
    return gated.gate(gated.from_gated_batch_topk(params, config), x_BxD, _gated(config))


def feature_facts(params: dict[str, jax.Array], config: Config) -> dict[str, jax.Array]:
    """As of `gated`."""
    return gated.feature_facts(gated.from_gated_batch_topk(params, config), _gated(config))


def _gated(config: Config) -> gated.Config:
    return gated.Config(config.d_in, config.width, dtype=config.dtype)


def encoder(params: dict[str, jax.Array], config: Config) -> Encoder:
    """The encoder of gates."""
    return Encoder(params["W_gate"], linalg.center(params), params["b_gate"])


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Both squared errors over D plus AuxK (`contract.Trainable.loss`)."""
    features = features or AllFeatures.of(batch.inputs, encoder(params, config), config.dtype)
    gates = jax.nn.relu(features.pre + features.each(params["b_gate"]))
    pi_mag = features.pre * features.each(jnp.exp(params["r_mag"])) + features.each(params["b_mag"])
    g, state = batch_topk.selected(gates, state, coefficients, config, shards)
    f = jnp.where(g > 0, jax.nn.relu(pi_mag), 0)
    decoded_VxBxD = shards.sum(features.decode((f, g), params["W_dec"], (True, False)))
    offset_BxD = linalg.offset(params, batch.inputs, config.dtype)
    x_hat_BxD = decoded_VxBxD[0] + offset_BxD
    auxiliary = jnp.square(batch.targets - decoded_VxBxD[1] - jax.lax.stop_gradient(offset_BxD)).mean()
    total, statistics = topk.with_auxiliary(params, batch, gates, f, [x_hat_BxD], config, shards, features)
    means = statistics.means | {"loss": total + auxiliary, "auxiliary": auxiliary}
    return total + auxiliary, statistics._replace(means=means, state=state)
