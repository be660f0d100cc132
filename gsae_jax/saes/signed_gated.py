"""The sign-aware gated SAE (arXiv 2605.28149), in its symmetric form: features may be negative.

With c = x - b_dec and z = c @ W_gate:
    pi_gate = |z| + b_gate                  a gate opens on either sign of z, where |z| is above -b_gate
    pi_mag  = exp(r_mag) * |z| + b_mag      one scale and one bias for both signs
    f       = sign(z) * 1[pi_gate > 0] * ReLU(pi_mag)
    x_hat   = f @ W_dec + b_dec

A feature stands for two features of a gated SAE, which have the weights W_gate and W_dec, and -W_gate and -W_dec. If
b_gate <= 0, at most one of the two is active, and f is the first minus the second. Therefore compare this SAE with
gated SAEs of twice the width, which have twice the parameters and need twice the compute. No format of another library
can hold it.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg, relu
from gsae_jax.saes.contract import WHOLE, Batch, Parameter, Role, Shards, Statistics

PARAMETERS = {
    "W_gate": Parameter(("d_in", "width"), Role.ENCODER),
    "b_gate": Parameter(("width",), Role.FEATURE),
    "r_mag": Parameter(("width",), Role.LOGARITHM),
    "b_mag": Parameter(("width",), Role.FEATURE),
    "W_dec": Parameter(("width", "d_in"), Role.DECODER, unit_rows=True),
    "b_dec": Parameter(("d_in",), Role.CENTER),
}
SIGNED = True

decode = relu.decode


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape.

    Attributes:
        d_in: width of the site.
        width: features.
        initial_l0: about how many features are active on a token before training; 0 = all of them, by zero biases.
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    initial_l0: int = linalg.INITIAL_L0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises `UserError` for a negative `initial_l0`."""
        linalg.check_initial_l0(self.initial_l0)


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases for `initial_l0`, the rest zero."""
    F, D = config.width, config.d_in
    # Half of the active features have either sign.
    W_dec, bias = linalg.unit_rows(key, F, D), linalg.initial_bias(config.initial_l0 / 2, F)
    params = {"W_gate": W_dec.T, "b_gate": bias, "b_mag": bias, "W_dec": W_dec, "b_dec": jnp.zeros(D)}
    return params | {"r_mag": jnp.zeros(F)}


def feature_facts(params: dict[str, jax.Array], config: Config) -> dict[str, jax.Array]:
    """`r_mag`, and the `threshold` that |f| must exceed, each [F]."""
    threshold = jax.nn.relu(params["b_mag"] - jnp.exp(params["r_mag"]) * params["b_gate"])
    return {"r_mag": params["r_mag"], "threshold": threshold}


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F], of either sign."""
    z, pi_gate = _gate(params, x_BxD, config)
    # NaN > 0 is False, which would hide NaN as a feature that is off.
    return jnp.where(jnp.isnan(pi_gate), pi_gate, _features(params, z, pi_gate))


def gate(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Which features' gates [B, F] are open."""
    return _gate(params, x_BxD, config)[1] > 0


def loss(
    params: dict[str, jax.Array],
    state: dict[str, jax.Array],
    batch: Batch,
    coefficients: Mapping[str, jax.typing.ArrayLike],
    config: Config,
    shards: Shards = WHOLE,
) -> tuple[jax.Array, Statistics]:
    """The gated SAE's loss on f_gate = sign(z) * ReLU(pi_gate), averaged over the batch (`contract.Trainable.loss`).

    It is the squared error over D, plus l1_coefficient * ||f_gate||_1, plus the squared error over D of the
    reconstruction from f_gate, which trains neither W_dec nor b_dec as the decoder's bias.
    """
    x_BxD, W_dec, b_dec = batch.inputs, params["W_dec"], params["b_dec"]
    z = linalg.centred_product(x_BxD, b_dec, params["W_gate"], config.dtype)
    pi_gate = jnp.abs(z) + params["b_gate"][None]
    excess = jax.nn.relu(pi_gate)
    f = _features(params, z, pi_gate)
    frozen = jax.lax.stop_gradient((W_dec, b_dec))
    B = x_BxD.shape[0]
    decoded, decoded_gate, l1, l0 = shards.sum(
        (
            linalg.matmul(f, W_dec, config.dtype),
            linalg.matmul(jnp.sign(z) * excess, frozen[0], config.dtype),
            excess.sum() / B,
            jnp.sum(f != 0, dtype=jnp.float32) / B,
        )
    )
    means = linalg.error_statistics(x_BxD, decoded + b_dec[None])
    auxiliary = jnp.square(x_BxD - decoded_gate - frozen[1][None]).mean()
    total = means["mse"] + coefficients["l1_coefficient"] * l1 + auxiliary
    means |= {"loss": total, "l1": l1, "auxiliary": auxiliary, "l0": l0}
    return total, Statistics(means, (f != 0).any(0), {})


def _gate(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """(z, pi_gate), each [B, F]."""
    # Centred in float32, before the product: with a large mean, bfloat16 has no digits left for the rest.
    c_BxD = x_BxD.astype(jnp.float32) - params["b_dec"][None]
    z = linalg.matmul(c_BxD, params["W_gate"], config.dtype)
    return z, jnp.abs(z) + params["b_gate"][None]


def _features(params: dict[str, jax.Array], z: jax.Array, pi_gate: jax.Array) -> jax.Array:
    """f [B, F]."""
    pi_mag = jnp.exp(params["r_mag"])[None] * jnp.abs(z) + params["b_mag"][None]
    return jnp.where(pi_gate > 0, jnp.sign(z) * jax.nn.relu(pi_mag), 0)
