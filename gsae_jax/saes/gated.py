"""The Gated SAE (Rajamanoharan et al. 2024, section 3.2), with the switches of its ablations (section 5).

With c = x - b_dec:
    pi_gate = c @ W_gate + b_gate                   which features are on
    pi_mag  = exp(r_mag) * (c @ W_gate) + b_mag     how much (equation 7: the encoders share directions)
    f       = 1[pi_gate > 0] * ReLU(pi_mag)
    x_hat   = f @ W_dec + b_dec
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg

# Which axis of each parameter runs over features: what can be sharded, and resampled.
FEATURE_AXES = {"W_gate": 1, "W_mag": 1, "b_gate": 0, "r_mag": 0, "b_mag": 0, "W_dec": 0, "b_dec": None}
CENTRED = True  # inputs enter as x - b_dec


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and switches.

    Attributes:
        d_in: width of the site (the paper's n).
        width: features (the paper's M).
        tie_encoder: W_mag = exp(r_mag) * W_gate; False gives W_mag [D, F] of its own instead of r_mag.
        use_r_mag: False fixes r_mag at 0.
        freeze_aux_decoder: the auxiliary reconstruction does not train the decoder.
        only_magnitude: r_mag and b_mag alone are trained: rescale and shift, for a stack that starts from a baseline.
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    tie_encoder: bool = True
    use_r_mag: bool = True
    freeze_aux_decoder: bool = True
    only_magnitude: bool = False
    dtype: str = "float32"


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, the rest zero."""
    F, D = config.width, config.d_in
    W_dec = linalg.unit_rows(key, F, D)
    params = {"W_gate": W_dec.T, "b_gate": jnp.zeros(F), "b_mag": jnp.zeros(F), "W_dec": W_dec, "b_dec": jnp.zeros(D)}
    if not config.tie_encoder:
        return params | {"W_mag": W_dec.T}
    return params | {"r_mag": jnp.zeros(F)}


def from_relu(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same function as a baseline's."""
    same = {name: params[name] for name in ("W_dec", "b_dec")}
    b_enc = params["b_enc"]
    return same | {"W_gate": params["W_enc"], "b_gate": b_enc, "b_mag": b_enc, "r_mag": jnp.zeros_like(b_enc)}


def from_jumprelu(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same function as a JumpReLU SAE's."""
    same = {name: params[name] for name in ("W_dec", "b_dec")}
    b_mag = linalg.shifted(params["b_enc"], params["b_dec"], params["W_enc"])
    b_gate = b_mag - jax.nn.relu(params["threshold"])
    return same | {"W_gate": params["W_enc"], "b_gate": b_gate, "b_mag": b_mag, "r_mag": jnp.zeros_like(b_mag)}


def pre_activations(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """(pi_gate, pi_mag), each [B, F]; one product with x when the encoder is tied."""
    # Centred in float32, before the product: with a large mean, bfloat16 has no digits left for the rest.
    c_BxD = x_BxD.astype(jnp.float32) - params["b_dec"][None]
    return _pre_activations(params, lambda W: linalg.matmul(c_BxD, W, config.dtype), config)


def _pre_activations(
    params: dict[str, jax.Array], encode_with: Callable[[jax.Array], jax.Array], config: Config
) -> tuple[jax.Array, jax.Array]:
    """(pi_gate, pi_mag); `encode_with` computes c @ W."""
    gate = encode_with(params["W_gate"])
    if not config.tie_encoder:
        magnitude = encode_with(params["W_mag"])
    elif config.use_r_mag:
        magnitude = gate * jnp.exp(params["r_mag"])[None]
    else:
        magnitude = gate
    return gate + params["b_gate"][None], magnitude + params["b_mag"][None]


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    pi_gate, pi_mag = pre_activations(params, x_BxD, config)
    # NaN > 0 is False, which would hide NaN as a feature that is off.
    return jnp.where(jnp.isnan(pi_gate), pi_gate, jnp.where(pi_gate > 0, jax.nn.relu(pi_mag), 0.0))


def decode(params: dict[str, jax.Array], f_BxF: jax.Array) -> jax.Array:
    """Reconstructions [B, D]."""
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(
    params: dict[str, jax.Array],
    x_BxD: jax.Array,
    l1_coefficient: jax.typing.ArrayLike,
    config: Config,
    sum_shards: linalg.Sum = linalg.whole,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Equation 8, squared errors divided by D, averaged over the batch.

    Args:
        sum_shards: adds up what each shard of the dictionary contributes.

    Returns:
        The loss, and statistics: batch means of its terms, `l0`, the parts of gamma; `fired` [F], whether each
        feature fired.
    """
    if config.only_magnitude:
        trained = ("r_mag", "b_mag")
        params = {name: value if name in trained else jax.lax.stop_gradient(value) for name, value in params.items()}
    pi_gate, pi_mag = _pre_activations(
        params, partial(linalg.centred_product, x_BxD, params["b_dec"], dtype=config.dtype), config
    )
    gate = jax.nn.relu(pi_gate)
    f = jnp.where(pi_gate > 0, jax.nn.relu(pi_mag), 0.0)
    frozen = jax.lax.stop_gradient if config.freeze_aux_decoder else linalg.whole
    B = x_BxD.shape[0]
    decoded, l1, l0 = sum_shards(
        (
            jnp.stack(
                [
                    linalg.matmul(f, params["W_dec"], config.dtype),
                    linalg.matmul(gate, frozen(params["W_dec"]), config.dtype),
                ]
            ),
            gate.sum() / B,
            jnp.sum(f > 0, dtype=jnp.float32) / B,
        )
    )
    x_hat, x_hat_gate = decoded[0] + params["b_dec"][None], decoded[1] + frozen(params["b_dec"])[None]
    statistics = linalg.error_statistics(x_BxD, x_hat)
    auxiliary = jnp.square(x_BxD - x_hat_gate).mean()
    total = statistics["mse"] + l1_coefficient * l1 + auxiliary
    return total, statistics | {"loss": total, "l1": l1, "auxiliary": auxiliary, "l0": l0, "fired": (f > 0).any(0)}
