"""An architecture that only the tests have: reads two sites, writes the first, and has a running threshold.

pi = (x - b_first) @ W_first + (y - b_second) @ W_second + b_enc
f  = pi where pi > max(threshold, 0), else 0
The threshold follows `share` times each feature's mean activation.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError
from gsae_jax.saes import linalg
from gsae_jax.saes.contract import WHOLE, Parameter, Role, Statistics

PARAMETERS = {
    "W_first": Parameter(("d_in", "width"), Role.ENCODER),
    "W_second": Parameter(("d_in", "width"), Role.ENCODER, site=1),
    "b_first": Parameter(("d_in",), Role.INPUT_BIAS),
    "b_second": Parameter(("d_in",), Role.INPUT_BIAS, site=1),
    "b_enc": Parameter(("width",), Role.FEATURE),
    "threshold": Parameter(("width",), Role.FEATURE, trained=False),
    "W_dec": Parameter(("width", "d_out"), Role.DECODER, unit_rows=True),
    "b_dec": Parameter(("d_out",), Role.OUTPUT_BIAS),
}


@dataclasses.dataclass(frozen=True)
class Config:
    d_in: tuple[int, ...]
    d_out: int
    width: int
    share: float = 0.1
    dtype: str = "float32"

    def __post_init__(self):
        if not 0 <= self.share < 1:
            raise UserError(f"is {self.share}; write a number from 0 to less than 1", "share")


def init(key, config):
    first, second = config.d_in
    W_dec = linalg.unit_rows(key, config.width, config.d_out)
    W_first, W_second = (
        linalg.unit_rows(jax.random.fold_in(key, n), config.width, size).T for n, size in enumerate((first, second))
    )
    zeros_F = jnp.zeros(config.width)
    weights = {"W_first": W_first, "W_second": W_second, "W_dec": W_dec}
    biases = {"b_first": jnp.zeros(first), "b_second": jnp.zeros(second), "b_dec": jnp.zeros(config.d_out)}
    return weights | biases | {"b_enc": zeros_F, "threshold": zeros_F}


def encode(params, inputs, config):
    pi = params["b_enc"][None]
    for x, name in zip(inputs, ("first", "second"), strict=True):
        pi = pi + linalg.matmul(x - params[f"b_{name}"][None], params[f"W_{name}"], config.dtype)
    return jnp.where(pi > jax.nn.relu(params["threshold"])[None], pi, 0)


def decode(params, f_BxF):
    return f_BxF @ params["W_dec"] + params["b_dec"][None]


def loss(params, state, batch, coefficients, config, shards=WHOLE):
    f = encode(params | state, batch.inputs, config)
    B = len(f)
    decoded, l1, l0 = shards.sum(
        (linalg.matmul(f, params["W_dec"], config.dtype), f.sum() / B, (f > 0).sum(dtype=jnp.float32) / B)
    )
    means = linalg.error_statistics(batch.targets, decoded + params["b_dec"][None])
    total = means["mse"] + coefficients["l1_coefficient"] * l1
    threshold = 0.9 * state["threshold"] + 0.1 * config.share * jax.lax.stop_gradient(f.mean(0))
    statistics = Statistics(means | {"loss": total, "l1": l1, "l0": l0}, (f > 0).any(0), {"threshold": threshold})
    return total, statistics
