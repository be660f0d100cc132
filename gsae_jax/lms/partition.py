"""Where a language model's parameters lie on a mesh: in shards over all devices, gathered where they are used.

Heads, MLP neurons and vocabulary are split over `latent` (tensor parallel: they stay split in use), and one more
dimension of every matrix over `data` (FSDP: a layer's matrices are gathered when the layer runs).
"""

import math
from collections.abc import Mapping
from typing import Any

import flax
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The dimension of each matrix that tensor parallelism splits. Those of experts have one more dimension, the first.
TENSOR_PARALLEL = {"W_Q": 0, "W_K": 0, "W_V": 0, "W_O": 0, "W_gate": -1, "W_in": -1, "W_out": -2, "W_U": 1, "W_E": 0}


def spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter `name` lies on the mesh; biases and gains are on every device."""
    axes = _in_use(name, shape, mesh)
    if name.startswith("W_"):
        left = ("data",) if "latent" in axes else ("data", "latent")
        ways = math.prod(mesh.shape[axis] for axis in left)
        free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % ways == 0]
        if free:
            axes[max(free, key=lambda i: shape[i])] = left
    return PartitionSpec(*axes)


def shardings(shapes: Mapping[tuple[str, ...], Any], mesh: Mesh | None) -> dict[tuple[str, ...], jax.sharding.Sharding]:
    """The placement of each parameter, by path; without a mesh, all on this process's first device."""
    if mesh is None:
        return dict.fromkeys(shapes, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    return {path: NamedSharding(mesh, spec(_short(path), leaf.shape, mesh)) for path, leaf in shapes.items()}


def gathered(name: str, value: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A parameter as it is used: whole along `data`, so that the batch can lie there."""
    if mesh is None:
        return value
    return _constrain(value, mesh, *_in_use(name, value.shape, mesh))


def gather_head(params: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """What reads the residual stream out, gathered once: a loop over chunks of tokens would gather it for each."""
    flat = flax.traverse_util.flatten_dict(
        {name: value for name, value in params.items() if not name.startswith("blocks.")}
    )
    return flax.traverse_util.unflatten_dict({path: gathered(_short(path), x, mesh) for path, x in flat.items()})


def rows(x_BxTxD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Activations with their batch along `data`, where it divides."""
    if mesh is None or x_BxTxD.shape[0] % mesh.shape["data"]:
        return x_BxTxD
    return _constrain(x_BxTxD, mesh, "data", None, None)


def logits(rows: int, d_vocab: int, mesh: Mesh | None) -> tuple[int, int]:
    """How many rows of logits, and how many of their columns, are on each device."""
    if mesh is None:
        return rows, d_vocab
    data, latent = mesh.shape["data"], mesh.shape["latent"]
    return rows if rows % data else rows // data, d_vocab if d_vocab % latent else d_vocab // latent


def lookup(W_E: jax.Array, tokens_BxT: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Embeddings [B, T, D] of tokens."""
    if mesh is None:
        return W_E[tokens_BxT]
    # Every device looks all tokens up in its columns: what moves is activations, never the table.
    x = W_E[_constrain(tokens_BxT, mesh, None, None)]
    _, columns = spec("W_E", W_E.shape, mesh)
    return rows(_constrain(x, mesh, None, None, columns), mesh)


def _short(path: tuple[str, ...]) -> str:
    return path[-1].rsplit(".", 1)[-1]


def _in_use(name: str, shape: tuple[int, ...], mesh: Mesh) -> list[Any]:
    axes: list[Any] = [None] * len(shape)
    split = TENSOR_PARALLEL.get(name)
    if split is not None and shape[split] % mesh.shape["latent"] == 0:
        axes[split] = "latent"
    return axes


def _constrain(x: jax.Array, mesh: Mesh, *axes: Any) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))
