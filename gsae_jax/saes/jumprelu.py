"""JumpReLU SAEs (Rajamanoharan et al. 2024, arXiv 2407.14435), and the exact form of gated and baseline ones.

    pi    = ReLU(x @ W_enc + b_enc)                 inputs are not centred
    f     = pi * 1[pi > theta]                      theta = max(threshold, 0)
    x_hat = f @ W_dec + b_dec
    loss  = squared error / D + lambda * L0         L0 = sum_i 1[pi_i > theta_i]

Steps have no gradient. So theta gets that of a kernel of bandwidth eps around it, K = 1[|pi - theta| < eps / 2] / eps
(the paper's equations 11 and 12; nothing else is changed by it): df / dtheta = -theta K, and dL0 / dtheta = -K.

The paper's constants, eps = theta_0 = 0.001, are for inputs with E||x||^2 = 1. Ours have E||x||^2 = D, so both are
multiplied by sqrt(D). lambda needs no conversion: squared errors are divided by D here.

Two differences from the paper. It trains log(theta), which Adam moves by the learning rate in a step, over some 500,000
steps; in a few thousand steps theta would hardly leave theta_0. Here theta itself is trained. It cannot get lost below
0, where it counts as 0: there the penalty alone has a gradient, which raises it. And the kernel leaves out pi = 0,
which counts all features that are off once theta is below eps / 2.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.saes import gated, linalg
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics
from gsae_jax.saes.features import AllFeatures, Encoder, Features

PARAMETERS = {
    "W_enc": Parameter(("d_in", "width"), Role.ENCODER),
    "b_enc": Parameter(("width",), Role.FEATURE),
    "threshold": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER, unit_rows=True),
    "b_dec": Parameter(("d_in",), Role.OUTPUT_BIAS),
}


# lambda rises over the first 10,000 of about a million steps in Gemma Scope (arXiv 2408.05147); b1 is 0 as in both.
RECIPE = {"b1": 0.0, "coefficient_warmup_fraction": 0.01}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape, and the constants of training.

    Attributes:
        d_in: width of the site.
        width: features.
        dtype: of the matrix products' operands.
        bandwidth: eps, in units of E||x||^2 = 1, as in the paper.
        initial_threshold: theta_0, in the same units.
        initial_l0: about how many features are active on a token before training; 0 = half of them, by zero biases.
    """

    d_in: int
    width: int
    dtype: str = "float32"
    bandwidth: float = 0.001
    initial_threshold: float = 0.001
    initial_l0: int = linalg.INITIAL_L0

    def __post_init__(self) -> None:
        linalg.check_initial_l0(self.initial_l0)
        if self.bandwidth <= 0:
            raise UserError(f"is {self.bandwidth:g}; write a number above 0, such as 0.001", "bandwidth")
        if self.initial_threshold < 0:
            raise UserError(f"is {self.initial_threshold:g}; write 0 or more", "initial_threshold")


def learning_rate(width: int) -> float:
    """The paper's, for any width."""
    return 7e-5


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, every threshold theta_0, biases for `initial_l0`."""
    F, D = config.width, config.d_in
    W_dec = linalg.unit_rows(key, F, D)
    threshold = jnp.full(F, config.initial_threshold * math.sqrt(D))
    b_enc = linalg.initial_bias(config.initial_l0, F)
    return {"W_enc": W_dec.T, "b_enc": b_enc, "threshold": threshold, "W_dec": W_dec, "b_dec": jnp.zeros(D)}


def from_gated(params: dict[str, jax.Array], config: gated.Options) -> dict[str, jax.Array]:
    """The same function (Appendix E of the paper): a gate is open if the pre-activation exceeds the threshold.

    Raises:
        UserError: the encoder is untied, so that there is no such form.
    """
    W_enc = params["W_gate"] * gated.magnitude_scale(params, config)[None]
    return {
        "W_enc": W_enc,
        "b_enc": linalg.shifted(params["b_mag"], -linalg.center(params), W_enc),
        "threshold": gated.threshold(params, config),
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"],
    }


def from_gated_batch_topk(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """As `from_gated`, of the gated SAE with the same function."""
    as_gated = gated.Config(config.d_in, config.width)
    return from_gated(gated.from_gated_batch_topk(params, config), as_gated)


def from_relu(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as the baseline: every threshold is 0."""
    b_enc = linalg.shifted(params["b_enc"], -linalg.center(params), params["W_enc"])
    return params | {"b_enc": b_enc, "threshold": jnp.zeros_like(b_enc)}


def from_relu_april(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function with unit rows: every threshold is 0."""
    unit = linalg.with_unit_rows(params)
    return unit | {"threshold": jnp.zeros_like(unit["b_enc"])}


def from_batch_topk(params: dict[str, jax.Array], config: Any) -> dict[str, jax.Array]:
    """The same function as a BatchTopK SAE's after training, with its running threshold."""
    b_enc = linalg.shifted(params["b_enc"], -linalg.center(params), params["W_enc"])
    return params | {"b_enc": b_enc, "threshold": jax.nn.relu(params["threshold"])}


from_matryoshka = from_batch_topk


def shifted(params: dict[str, jax.Array], shift_D: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Parameters with shift @ encoder added to the encoder's bias, and so to all pre-activations."""
    return params | {"b_enc": linalg.shifted(params["b_enc"], shift_D, params["W_enc"])}


def feature_facts(params: dict[str, jax.Array], config: Config) -> dict[str, jax.Array]:
    """The `threshold` [F] that is used, which is not negative."""
    return {"threshold": jax.nn.relu(params["threshold"])}


def encoder(params: dict[str, jax.Array], config: Config) -> Encoder:
    """What exceeds its threshold, or lies so close below it that the threshold has a gradient."""
    lowest_F = jax.nn.relu(_theta(params) - _bandwidth(config) / 2)
    return Encoder(params["W_enc"], jnp.zeros(config.d_in), params["b_enc"] - lowest_F)


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    pi_BxF = linalg.matmul(x_BxD, params["W_enc"], config.dtype) + params["b_enc"][None]
    threshold = _theta(params)[None]
    # Comparisons with NaN are False, which would hide NaN as a feature that is off.
    is_nan = jnp.isnan(pi_BxF) | jnp.isnan(threshold)
    return jnp.where(is_nan, jnp.nan, jnp.where(pi_BxF > threshold, pi_BxF, 0))


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
    features: Features | None = None,
) -> tuple[jax.Array, Statistics]:
    """Squared error over D plus l1_coefficient * L0, averaged over the batch (`contract.Trainable.loss`)."""
    x_BxD = batch.inputs
    features = features or AllFeatures(linalg.matmul(x_BxD, params["W_enc"], config.dtype), config.dtype)
    pi = jax.nn.relu(features.pre + features.each(params["b_enc"]))
    # max(threshold, 0) in value, and the threshold itself in gradients, which then raise one that is below 0.
    value, theta = features.each(params["threshold"]), jax.lax.stop_gradient(features.each(_theta(params)))
    width = _bandwidth(config)
    on = ~(pi <= theta)  # NaN counts as on, so that the loss shows it
    near = (pi > 0) & (jnp.abs(pi - theta) < width / 2)
    # It is 0, and has the gradient of the step 1[pi > theta] by theta.
    step = jax.lax.stop_gradient(jnp.where(near, -1 / width, 0.0)) * (value - jax.lax.stop_gradient(value))
    f = jnp.where(on, pi, 0.0) + theta * step
    l0 = (on.astype(jnp.float32) + step).sum()
    B = x_BxD.shape[0]
    decoded, l0 = shards.sum((features.decode((f,), params["W_dec"], (True,)), l0 / B))
    means = linalg.error_statistics(batch.targets, decoded[0] + linalg.offset(params, x_BxD, config.dtype))
    total = means["mse"] + coefficients["l1_coefficient"] * l0
    return total, Statistics(means | {"loss": total, "l0": l0}, features.any(on), {})


def _theta(params: dict[str, jax.Array]) -> jax.Array:
    """The thresholds [F] in use."""
    return jax.nn.relu(params["threshold"])


def _bandwidth(config: Config) -> float:
    """eps in the units of training, where E||x||^2 = D."""
    return config.bandwidth * math.sqrt(config.d_in)
