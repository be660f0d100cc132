"""What transcoders share (2406.11944): they read one site and predict another, such as an MLP's input and its output.

f     = as of the SAE with the same activation, of x - b_in      (JumpReLU: of x, as its SAE does not centre inputs)
x_hat = f @ W_dec + b_dec + x @ W_skip                           of the target

The last term is that of skip transcoders (2501.18823), with the option `skip=True`. The loss is that of the SAE with
the same activation, with the target in place of the input in squared errors, which are divided by the target's width.
In a gated transcoder the auxiliary reconstruction freezes W_skip as it freezes W_dec and b_dec.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax.saes import linalg
from gsae_jax.saes.contract import Parameter, Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shape.

    Attributes:
        d_in: width of the site that is read.
        d_out: width of the target.
        skip: also predict the target by a linear function of the inputs.
    """

    d_in: int
    d_out: int
    skip: bool = False


def table(of_sae: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """`PARAMETERS` of the transcoder with the activation of an SAE."""
    centred = {"b_in": Parameter(("d_in",), Role.INPUT_BIAS)} if of_sae["b_dec"].role is Role.CENTER else {}
    return {
        **of_sae,
        **centred,
        "W_dec": Parameter(("width", "d_out"), Role.DECODER, unit_rows=True),
        "b_dec": Parameter(("d_out",), Role.OUTPUT_BIAS),
        "W_skip": Parameter(("d_in", "d_out"), Role.SKIP),
    }


def init(of_sae: dict[str, jax.Array], key: jax.Array, config: Any, centred: bool = True) -> dict[str, jax.Array]:
    """The untrained parameters of a transcoder, from those of an SAE of its inputs.

    Decoder rows are random unit directions that do not depend on the encoder's. b_in, b_dec and W_skip are zero.

    Args:
        of_sae: encoder, biases and thresholds are kept.
        key: that the SAE was made from.
        config: of the transcoder.
        centred: whether there is b_in.
    """
    D, F, D_out = config.d_in, config.width, config.d_out
    params = of_sae | {"W_dec": linalg.unit_rows(jax.random.fold_in(key, 1), F, D_out), "b_dec": jnp.zeros(D_out)}
    params |= {"b_in": jnp.zeros(D)} if centred else {}
    return params | ({"W_skip": jnp.zeros((D, D_out))} if config.skip else {})


def skip(params: dict[str, jax.Array], x_BxD: jax.Array) -> jax.Array:
    """What is added to `decode` [B, D_out] or [1, D_out]: x @ W_skip, or zero."""
    if "W_skip" not in params:
        return jnp.zeros_like(params["b_dec"])[None]
    # Of a large mean, fewer bits would leave none for the rest.
    return jnp.matmul(x_BxD.astype(jnp.float32), params["W_skip"], precision="highest")
