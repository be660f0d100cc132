"""Penalties on the activations z >= 0 of a gate. Each is z itself near 0, so that a coefficient means the same in all.

    l1    z
    tanh  tanh(c z) / c       at most 1 / c; the slope is nearly 0 where z is far above 1 / c
    log   log(1 + c z) / c    has no largest value; the slope falls as 1 / z

`c` is the scale. At z = 1 / c the slope is 0.42 of that at 0 with tanh, and half of it with log.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from gsae_jax.errors import UserError

Name = Literal["l1", "tanh", "log"]


def check(penalty: Name, scale: float) -> None:
    """Raises `UserError` for a scale that is not above 0, or that the penalty does not have."""
    if not scale > 0:
        raise UserError(f"is {scale}; write a number above 0", "penalty_scale")
    if penalty == "l1" and scale != 1:
        raise UserError(f'is {scale}, but the penalty "l1" has no scale; leave it out', "penalty_scale")


def of(penalty: Name, scale: float, z: jax.Array) -> jax.Array:
    """The penalty of each activation."""
    match penalty:
        case "tanh":
            return jnp.tanh(scale * z) / scale
        case "log":
            return jnp.log1p(scale * z) / scale
    return z
