"""Checks that an architecture keeps the contract."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax import plugins
from gsae_jax.errors import UserError
from gsae_jax.saes import contract, parameters

BATCH = 16  # tokens in the batch that is traced
WIDTH = 256  # features of the dictionary that is run in shards
MEANS = ("loss", "mse", "l0", "x_hat_sq", "x_hat_dot_x")  # of Statistics.means


def check(architecture: contract.Trainable, config: Any) -> None:
    """Compare the shapes of what an architecture returns with the contract; its functions are traced, not run.

    Raises:
        UserError: a function that fails, or returns something else; with the file and the function.
    """
    file = plugins.source(architecture)

    def traced(function: Callable[..., Any], *arrays: Any) -> Any:
        try:
            return jax.eval_shape(function, *arrays)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{file} fails in {function.__name__}: {plugins.failure(error, file)}") from error

    def compare(what: str, value: Any, wanted: Any) -> None:
        if _shapes(value) != _shapes(wanted):
            raise UserError(f"{file}: {what} has {_shown(value)} instead of {_shown(wanted)}")

    def init(key: jax.Array) -> Any:
        return architecture.init(key, config)

    def encode(params: Any, inputs: Any) -> Any:
        return architecture.encode(params, inputs, config)

    def decode(params: Any, f_BxF: Any) -> Any:
        return architecture.decode(params, f_BxF)

    def loss(trained: Any, state: Any, inputs: Any, targets: Any, step: Any, l1_coefficient: Any) -> Any:
        batch = contract.Batch(inputs, targets, lambda: jnp.zeros(config.width, bool), step)
        coefficients = {"l1_coefficient": l1_coefficient}
        result = architecture.loss(trained, state, batch, coefficients, config, contract.WHOLE)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], contract.Statistics):
            raise UserError(f"{file}: loss returns {_kind(result)} instead of (value, contract.Statistics)")
        return result[0], tuple(result[1])

    table = architecture.PARAMETERS
    params = traced(init, jax.eval_shape(lambda: jax.random.key(0)))
    if not isinstance(params, dict):
        raise UserError(f"{file}: init returns {_kind(params)} instead of a dict of arrays")
    for name, value in params.items():
        if name not in table:
            raise UserError(f"{file}: init gives {name!r}, which PARAMETERS does not have")
        try:
            wanted = _array(*table[name].sizes(config))
        except (AttributeError, IndexError, TypeError) as error:
            why = f"the shape {table[name].shape} of {name!r} in PARAMETERS does not fit Config: {error}"
            raise UserError(f"{file}: {why}") from error
        compare(f"{name} of init", value, wanted)
    if parameters.decoder(architecture) not in params:
        raise UserError(f"{file}: init does not give {parameters.decoder(architecture)!r}, the decoder")

    inputs = _activations(config.d_in)
    targets = _activations(getattr(config, "d_out", config.d_in))
    features = traced(encode, params, inputs)
    compare("the result of encode", features, _array(BATCH, config.width))
    compare("the result of decode", traced(decode, params, features), targets)
    trained, state = parameters.split(architecture, params)
    value, (means, fired, after) = traced(
        loss, trained, state, inputs, targets, jax.ShapeDtypeStruct((), jnp.int32), _array()
    )
    compare("the value of loss", value, _array())
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"{file}: the value of loss is of type {value.dtype} instead of float32")
    if not isinstance(means, Mapping):
        raise UserError(f"{file}: means of Statistics is {_kind(means)} instead of a dict")
    if missing := [name for name in MEANS if name not in means]:
        raise UserError(f"{file}: means of Statistics lacks {', '.join(missing)}")
    for name, mean in means.items():
        compare(f"means[{name!r}] of Statistics", mean, _array())
    compare("fired of Statistics", fired, _array(config.width))
    compare("state of Statistics", after, state)


def check_shards(architecture: contract.Trainable, config: Any, shards: int) -> None:
    """Compare the loss of shards of a small dictionary with that of the whole; both are run.

    Raises:
        UserError: they differ, as where the loss compares features with each other, or adds them up by itself.
    """
    small = _small(config, shards)
    params = architecture.init(jax.random.key(0), small)
    keys = jax.random.split(jax.random.key(1), len(params))
    params = {
        name: value + 0.1 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }
    inputs, targets = (
        jax.tree.map(lambda array: jax.random.normal(jax.random.key(2), array.shape), _activations(sizes))
        for sizes in (small.d_in, getattr(small, "d_out", small.d_in))
    )

    def loss(params: contract.Params, shards: contract.Shards, width: int) -> tuple[Any, jax.Array]:
        batch = contract.Batch(inputs, targets, lambda: jnp.zeros(width, bool), jnp.int32(0))
        parts = parameters.split(architecture, params)
        _, statistics = architecture.loss(*parts, batch, {"l1_coefficient": 0.1}, small, shards)
        return dict(statistics.means), statistics.fired

    axes = {name: architecture.PARAMETERS[name].axis for name in params}
    split = {
        name: value if (axis := axes[name]) is None else jnp.stack(jnp.split(value, shards, axis))
        for name, value in params.items()
    }
    on_shard = functools.partial(loss, shards=contract.Shards("latent"), width=small.width // shards)
    in_axes = ({name: None if axis is None else 0 for name, axis in axes.items()},)
    means, fired = jax.vmap(on_shard, in_axes, axis_name="latent")(split)
    whole, whole_fired = loss(params, contract.WHOLE, small.width)
    names = sorted(whole, key=lambda name: name != "l0")  # which says most
    pairs = [(name, whole[name], mean) for name in names for mean in means[name]]
    pairs.append(("the number of features that fired", whole_fired.sum(), fired.sum()))
    for name, value, mean in pairs:
        if not jnp.allclose(mean, value, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UserError(
                f"is {shards}, but the loss of {plugins.source(architecture)} is another one on {shards} parts of a "
                f"dictionary: {name} is {mean:.4g} instead of {value:.4g}. Add up features by shards.sum; a loss that "
                "compares features, such as top-k, takes selection.largest, or needs mesh.latent=1",
                "mesh.latent",
            )


def _small(config: Any, shards: int) -> Any:
    """The same options on few inputs and, if the options allow it, few features."""
    sizes: dict[str, Any] = {"dtype": "float32"}
    for name in ("d_in", "d_out"):
        if hasattr(config, name):
            value = getattr(config, name)
            sizes[name] = (BATCH,) * len(value) if isinstance(value, tuple) else BATCH
    try:
        return dataclasses.replace(config, **sizes, width=shards * -(-min(config.width, WIDTH) // shards))
    except UserError:
        return dataclasses.replace(config, **sizes)


def _array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _activations(sizes: int | tuple[int, ...]) -> Any:
    """A batch of the sites with these widths."""
    return tuple(_array(BATCH, size) for size in sizes) if isinstance(sizes, tuple) else _array(BATCH, sizes)


def _shapes(tree: Any) -> Any:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def _shown(tree: Any) -> str:
    """`shape [16, 8]`, or the shapes of several arrays."""
    if hasattr(tree, "shape"):
        return f"shape {list(tree.shape)}"
    if isinstance(tree, Mapping):
        return "the arrays {" + ", ".join(f"{name}: {list(leaf.shape)}" for name, leaf in tree.items()) + "}"
    return f"{_kind(tree)} of shapes {[list(leaf.shape) for leaf in jax.tree.leaves(tree)]}"


def _kind(value: Any) -> str:
    return type(value).__name__
