"""What a step of an architecture costs, in matrix products of its encoder's size; and widths of equal cost."""

import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from gsae_jax import errors
from gsae_jax.saes import contract, parameters

TOKENS, INPUTS, FEATURES = 4096, 64, 256  # of the step that is counted
MULTIPLE = 8  # of a width


def count(architecture: str, **options: Any) -> float:
    """Products [tokens, d_in] x [d_in, width] in the value and gradient of a loss, by dense products.

    A gated SAE takes 7 and a baseline 5. Products that are computed only while features are dead (AuxK) do not count.

    Args:
        architecture: as in `gsae_jax.stack_config`.
        options: of the architecture.

    Raises:
        UserError: an architecture that cannot be trained, or wrong options.
    """
    with errors.about("architecture"):
        module = contract.trainable(architecture)
    hints = typing.get_type_hints(module.Config)
    kinds = {name: hints.get(name) for name in ("d_in", "d_out")}
    several = (INPUTS, INPUTS)
    d_in = (INPUTS,) if kinds["d_in"] is int else several
    d_out = None if kinds["d_out"] is None else (INPUTS,) if kinds["d_out"] is int else several
    config = contract.build_config(module, architecture, d_in, d_out, FEATURES, "float32", options)
    params, state = parameters.split(module, jax.eval_shape(lambda: module.init(jax.random.key(0), config)))

    def activations(sizes: Any) -> Any:
        arrays = tuple(jax.ShapeDtypeStruct((TOKENS, size), jnp.float32) for size in jax.tree.leaves(sizes))
        return arrays if isinstance(sizes, tuple) else arrays[0]

    def loss(params: Any, state: Any, inputs: Any, targets: Any) -> jax.Array:
        batch = contract.Batch(inputs, targets, lambda: jnp.zeros(FEATURES, bool), jnp.int32(0))
        return module.loss(params, state, batch, {"l1_coefficient": 0.1}, config)[0]

    inputs, targets = activations(config.d_in), activations(getattr(config, "d_out", config.d_in))
    traced = jax.make_jaxpr(jax.grad(loss))(params, state, inputs, targets)
    return round(_multiplications(traced.jaxpr) / (TOKENS * FEATURES * sum(d_in)), 1)


def equal_width(architecture: str, width: int, of: str = "gated", **options: Any) -> int:
    """The width at which an architecture's step takes as many multiplications as that of another; a multiple of 8.

    Args:
        architecture: whose width it is.
        width: of the other.
        of: the other architecture, with its default options.
        options: of the architecture.

    Raises:
        UserError: as `count`.
    """
    return MULTIPLE * round(width * count(of) / count(architecture, **options) / MULTIPLE)


def _multiplications(jaxpr: Any) -> float:
    """Of all products of matrices, as written; of branches, the one with the fewest."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_multiplications(sub) for sub in core.jaxprs_in_params(equation.params)]
        match equation.primitive.name:
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, product = (variable.aval for variable in (equation.invars[0], equation.outvars[0]))
                total += math.prod(product.shape) * math.prod(left.shape[axis] for axis in contracted)
            case "cond":
                total += min(inner)
            case "scan":
                total += equation.params["length"] * sum(inner)
            case _:
                total += sum(inner)
    return total
