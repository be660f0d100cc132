"""The device mesh: `data` splits the batch, `latent` splits the dictionary."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax.errors import UserError


def shape(config: config_lib.Mesh, devices: int) -> tuple[int, int]:
    """The sizes of `data` and `latent` on so many devices.

    Raises:
        UserError: the axes do not multiply up to the number of devices.
    """
    if devices % config.latent:
        raise UserError(f"is {config.latent}; write a divisor of the number of devices ({devices})", "mesh.latent")
    data = config.data or devices // config.latent
    if data * config.latent != devices:
        what = f"is {config.data}, times mesh.latent {config.latent}, but there are {devices} devices"
        raise UserError(f"{what}; write {devices // config.latent}, or 0 for all", "mesh.data")
    return data, config.latent


def make_mesh(config: config_lib.Mesh, among: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given; raises `UserError` as `shape` does."""
    sizes = shape(config, len(among or jax.devices()))
    # The language model and the loss around the SAEs are left to the compiler (Auto); the SAE step is mapped by hand.
    axis_types = (AxisType.Auto, AxisType.Auto)
    try:
        return jax.make_mesh(sizes, ("data", "latent"), axis_types=axis_types, devices=among)
    except NotImplementedError:  # a TPU's torus with no sides of these sizes: parts of sides, then
        placed = mesh_utils.create_device_mesh(sizes, among, allow_split_physical_axes=True)
        return Mesh(placed, ("data", "latent"), axis_types=axis_types)


def check(config: config_lib.Experiment, mesh: Mesh | AbstractMesh) -> None:
    """Raises `UserError` for a size that the mesh does not divide."""
    data, latent = mesh.shape["data"], mesh.shape["latent"]
    for field, value in (
        ("train.batch_size", config.train.batch_size),
        ("activations.rows_per_forward", config.activations.rows_per_forward),
    ):
        if value % data:
            raise UserError(f"is {value}, not divisible by the mesh's `data` axis; write a multiple of {data}", field)
    for name, stack in config.stacks.items():
        if stack.width % (latent * data):
            raise UserError(
                f"is {stack.width}, not divisible by the number of devices; write a multiple of {latent * data}",
                f"stacks.{name}.width",
            )


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The kind of its devices: "cpu", "gpu" or "tpu"; an abstract mesh is of GPUs (`planning.hardware`)."""
    return "gpu" if isinstance(mesh, AbstractMesh) else str(mesh.devices.flat[0].platform)


def device_bytes(tree: Any) -> int:
    """What one device holds of an abstract tree of placed arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(mesh: Mesh) -> float:
    """Bytes of each device; infinite where that is not known."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":  # all of them share the machine's
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(mesh.local_devices)
    return float((device.memory_stats() or {}).get("bytes_limit", math.inf))


def check_memory(mesh: Mesh, needed: Mapping[str, int]) -> None:
    """Raises `UserError` where what is certainly needed, in bytes on each device by field, is more than there is."""
    available = memory(mesh)
    if sum(needed.values()) > available:
        field = max(needed, key=lambda field: needed[field])
        raise UserError(
            f"needs {needed[field] / 2**30:,.1f} GiB on each device. The run needs {sum(needed.values()) / 2**30:,.1f} "
            f"GiB there in all, and {available / 2**30:,.1f} GiB are available. Write less (python -m gsae_jax.plan "
            "estimates the memory of a run)",
            field,
        )


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The placement of an array whose dimensions lie along these mesh axes (None: every device has all of it)."""
    return NamedSharding(mesh, PartitionSpec(*axes))


FEATURES = ("latent", "data")  # features lie over all devices, first along `latent`


def over_features(axis: int | None) -> PartitionSpec:
    """The mesh axes of an array whose `axis` runs over features; None: every device has all of it."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FEATURES)


def spread(mesh: Mesh, shape: tuple[int, ...], axis: int | None) -> NamedSharding:
    """The placement of a parameter whose `axis` runs over features: over all devices, if they divide it."""
    fits = axis is not None and shape[axis] % mesh.size == 0
    return NamedSharding(mesh, over_features(axis if fits else None))


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of so many rows, split along `data`, lie on this process's devices: their numbers, in order."""
    parts = sharding(mesh, "data").addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for part in parts]))


def place_rows(mesh: Mesh, local: np.ndarray, rows: int) -> jax.Array:
    """An array of so many rows along `data`, of which each process gives its `local_rows`."""
    mine = local_rows(mesh, rows)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(rows)
        return local[np.searchsorted(mine, start) : np.searchsorted(mine, stop)]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding(mesh, "data"), part)


def local_values(mesh: Mesh, x: jax.Array) -> np.ndarray:
    """This process's `local_rows` of an array whose rows lie along `data`."""
    mine = local_rows(mesh, len(x))
    values = np.empty((len(mine), *x.shape[1:]), x.dtype)
    for shard in x.addressable_shards:
        start = np.searchsorted(mine, shard.index[0].start or 0)
        values[start : start + len(shard.data)] = shard.data
    return values


def fetch(tree: Any) -> Any:
    """Arrays of the mesh, wherever their parts lie, as NumPy arrays; every process calls it."""
    return multihost_utils.process_allgather(tree, tiled=True)
