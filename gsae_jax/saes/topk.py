"""The TopK SAE (Gao et al. 2024, 2406.04093): each token has its k largest features.

pi    = (x - b_dec) @ W_enc + b_enc
f     = ReLU(pi) of the k largest of a token, else 0
x_hat = f @ W_dec + b_dec
loss  = ||x - x_hat||^2 / D + auxk_coefficient * AuxK        (`selection.auxiliary_error`)

There is no sparsity coefficient: `k` is L0, where so many pre-activations are positive. The paper divides the squared
error by the variance of x; here E||x||^2 = D, so that the error over D is nearly the same number, and the coefficient
1/32 of AuxK is the paper's. Their best learning rate falls as 1 / sqrt(width); the default is dictionary_learning's,
2e-4 / sqrt(width / 2**14).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.saes import linalg, relu, selection
from gsae_jax.saes.contract import WHOLE, Batch, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS = relu.PARAMETERS
SPARSITY = "k"
RECIPE = {"b1": 0.9}


@dataclasses.dataclass(frozen=True)
class Options:
    """Shape and options, for transcoders and crosscoders as well.

    Attributes:
        d_in: width of the site; a tuple of widths if there are several sites.
        width: features.
        k: active features of a token, at most.
        initial_k: the same at the first update, from which the number falls linearly to k during the stack's
            `coefficient_warmup_fraction`; 0 = k.
        auxk_coefficient: weight of the loss by which dead features learn to explain the residual; 0 = none.
        k_aux: dead features of a token that explain it; 0 = half of the residual's width.
        dtype: of the matrix products' operands.
    """

    d_in: int | tuple[int, ...]
    width: int
    k: int = 32
    auxk_coefficient: float = 1 / 32
    k_aux: int = 0
    initial_k: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.width:
            raise UserError(f"is {self.k}; write active features per token, from 1 to the width ({self.width})", "k")
        if self.initial_k and not self.k <= self.initial_k <= self.width:
            raise UserError(f"is {self.initial_k}; write 0, or from k ({self.k}) to the width", "initial_k")
        selection.check_auxk(self.auxk_coefficient, self.k_aux)

    def k_at(self, coefficients: Mapping[str, jax.typing.ArrayLike]) -> jax.typing.ArrayLike:
        """Active features of a token at this update."""
        if not self.initial_k:
            return self.k
        more = (1 - jnp.asarray(coefficients.get("warmup", 1.0))) * (self.initial_k - self.k)
        return self.k + jnp.round(more).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Shape and options of an SAE."""

    d_in: int


shifted, decode, idle = relu.shifted, relu.decode, selection.idle


def learning_rate(width: int) -> float:
    """For a dictionary of so many features."""
    return 2e-4 / math.sqrt(width / 2**14)


def init(key: jax.Array, config: Any) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases zero."""
    F, D = config.width, linalg.total(config.d_in)
    W_dec = linalg.unit_rows(key, F, D)
    return {"W_enc": W_dec.T, "b_enc": jnp.zeros(F), "W_dec": W_dec, "b_dec": jnp.zeros(D)}


def encoder(params: dict[str, jax.Array], config: Options) -> Encoder:
    """The encoder."""
    return Encoder(params["W_enc"], linalg.center(params), params["b_enc"])


def active(
    pre_BxF: jax.Array,
    dead: Callable[[], jax.Array],
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Options,
    shards: Shards = WHOLE,
    of_batch: bool = False,
) -> jax.Array:
    """The features [B, F] that are selected, of a token or of the batch, and dead ones for AuxK."""
    pi_BxF = jax.nn.relu(pre_BxF)
    k = config.k_at(coefficients)
    # One that is not a number is among them, so that the loss shows it.
    on_BxF = ~(selection.largest(pi_BxF, k, shards, of_batch, usual=config.k).of(pi_BxF) <= 0)
    return on_BxF | (dead()[None] & (pi_BxF > 0)) if config.auxk_coefficient else on_BxF


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Options) -> jax.Array:
    """Feature activations [B, F]."""
    return encode_shard(params, x_BxD, config, WHOLE)


def encode_shard(params: dict[str, jax.Array], x_BxD: jax.Array, config: Any, shards: Shards) -> jax.Array:
    """Those of one shard of the dictionary."""
    f_BxF = linalg.rectified(x_BxD, linalg.center(params), params["W_enc"], params["b_enc"], config.dtype)
    return selection.largest(f_BxF, config.k, shards).of(f_BxF)


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Options,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Squared error over D plus AuxK (`contract.Trainable.loss`)."""
    features = features or AllFeatures.of(batch.inputs, encoder(params, config), config.dtype)
    pi = jax.nn.relu(features.pre + features.each(params["b_enc"]))
    f = selection.largest(pi, config.k_at(coefficients), shards, usual=config.k).of(pi)
    x_hat_BxD = decoded(params, batch.inputs, f, config, shards, features)
    return with_auxiliary(params, batch, pi, f, [x_hat_BxD], config, shards, features)


def decoded(
    params: dict[str, jax.Array], x_BxD: jax.Array, f: jax.Array, config: Any, shards: Shards, features: Features
) -> jax.Array:
    """The reconstruction [B, D] by the features of all shards, for training."""
    x_hat_BxD = shards.sum(features.decode((f,), params["W_dec"], (True,))[0])
    return x_hat_BxD + linalg.offset(params, x_BxD, config.dtype)


def with_auxiliary(
    params: dict[str, jax.Array],
    batch: Batch,
    pi: jax.Array,
    f: jax.Array,
    x_hats: Sequence[jax.Array],
    config: Any,
    shards: Shards,
    features: Features,
) -> tuple[jax.Array, Statistics]:
    """The loss and its statistics, without state, from what a selection gives.

    Args:
        params: of the SAE.
        batch: which it is of.
        pi: ReLU(pi) of `features`.
        f: the same of the selected features, else 0.
        x_hats: reconstructions [B, D] whose squared errors over D are summed; the last is that by all features.
        config: with the options of AuxK.
        shards: of dictionary and batch.
        features: those that the loss sees.
    """
    l0 = shards.sum(jnp.sum(f > 0, dtype=jnp.float32) / len(f))
    means = linalg.error_statistics(batch.targets, x_hats[-1]) | {"l0": l0}
    total = sum((jnp.square(batch.targets - x_hat_BxD).mean() for x_hat_BxD in x_hats[:-1]), means["mse"])
    if config.auxk_coefficient:
        residual_BxD = batch.targets - x_hats[-1]
        means["auxk"] = selection.auxiliary_error(
            pi, residual_BxD, params["W_dec"], batch.dead(), config, shards, features
        )
        total += config.auxk_coefficient * means["auxk"]
    return total, Statistics(means | {"loss": total}, features.any(f > 0), {})
