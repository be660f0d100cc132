"""The baseline SAE (section 2 of the paper): f = ReLU((x - b_dec) @ W_enc + b_enc), x_hat = f @ W_dec + b_dec."""

import dataclasses

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg

FEATURE_AXES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None}
CENTRED = True  # inputs enter as x - b_dec


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape.

    Attributes:
        d_in: width of the site (the paper's n).
        width: features (the paper's M).
        dtype: of the matrix products' operands.
    """

    d_in: int
    width: int
    dtype: str = "float32"


def init(key: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Random unit decoder rows, encoder = their transpose, biases zero."""
    W_dec = linalg.unit_rows(key, config.width, config.d_in)
    return {"W_enc": W_dec.T, "b_enc": jnp.zeros(config.width), "W_dec": W_dec, "b_dec": jnp.zeros(config.d_in)}


def encode(params: dict[str, jax.Array], x_BxD: jax.Array, config: Config) -> jax.Array:
    """Feature activations [B, F]."""
    # Centred in float32, before the product: with a large mean, bfloat16 has no digits left for the rest.
    c_BxD = x_BxD.astype(jnp.float32) - params["b_dec"][None]
    return jax.nn.relu(linalg.matmul(c_BxD, params["W_enc"], config.dtype) + params["b_enc"][None])


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
    """Squared error over D plus l1_coefficient * ||f||_1, averaged over the batch.

    Args:
        sum_shards: adds up what each shard of the dictionary contributes.

    Returns:
        The loss, and statistics: batch means of its terms, `l0`, the parts of gamma; `fired` [F], whether each
        feature fired.
    """
    pi = linalg.centred_product(x_BxD, params["b_dec"], params["W_enc"], config.dtype)
    f = jax.nn.relu(pi + params["b_enc"][None])
    B = x_BxD.shape[0]
    decoded, l1, l0 = sum_shards(
        (linalg.matmul(f, params["W_dec"], config.dtype), f.sum() / B, jnp.sum(f > 0, dtype=jnp.float32) / B)
    )
    statistics = linalg.error_statistics(x_BxD, decoded + params["b_dec"][None])
    total = statistics["mse"] + l1_coefficient * l1
    return total, statistics | {"loss": total, "l1": l1, "l0": l0, "fired": (f > 0).any(0)}
