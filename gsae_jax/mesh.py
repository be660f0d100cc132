"""The device mesh: `data` splits the batch, `latent` splits the dictionary."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gsae_jax import config as config_lib
from gsae_jax.config import ConfigError


def make_mesh(config: config_lib.Mesh, among: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
        ConfigError: the axes do not multiply up to the number of devices.
    """
    devices = len(among or jax.devices())
    if devices % config.latent:
        raise ConfigError("mesh.latent", f"is {config.latent}; write a divisor of the number of devices ({devices})")
    data = config.data or devices // config.latent
    if data * config.latent != devices:
        raise ConfigError(
            "mesh.data",
            f"is {config.data}, times mesh.latent {config.latent}, but there are {devices} devices; write 0 for all",
        )
    # The language model and the loss around the SAEs are left to the compiler (Auto); the SAE step is mapped by hand.
    axis_types = (AxisType.Auto, AxisType.Auto)
    try:
        return jax.make_mesh((data, config.latent), ("data", "latent"), axis_types=axis_types, devices=among)
    except NotImplementedError:  # a TPU's torus with no sides of these sizes: parts of sides, then
        placed = mesh_utils.create_device_mesh((data, config.latent), among, allow_split_physical_axes=True)
        return Mesh(placed, ("data", "latent"), axis_types=axis_types)


def check(config: config_lib.Experiment, mesh: Mesh) -> None:
    """Raises `ConfigError` for a size that the mesh does not divide."""
    data, latent = mesh.shape["data"], mesh.shape["latent"]
    for field, value in (
        ("train.batch_size", config.train.batch_size),
        ("activations.rows_per_forward", config.activations.rows_per_forward),
        ("evaluation.rows_per_forward", config.evaluation.rows_per_forward),
    ):
        if value % data:
            raise ConfigError(field, f"is {value}, not divisible by the mesh's `data` axis; write a multiple of {data}")
    for name, stack in config.stacks.items():
        if stack.width % (latent * data):
            raise ConfigError(
                f"stacks.{name}.width",
                f"is {stack.width}, not divisible by the number of devices; write a multiple of {latent * data}",
            )


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The placement of an array whose dimensions lie along these mesh axes (None: every device has all of it)."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def spread(mesh: Mesh, shape: tuple[int, ...], axis: int | None) -> NamedSharding:
    """The placement of a parameter whose `axis` runs over features: over all devices, if they divide it."""
    if axis is None or shape[axis] % mesh.size:
        return sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ("latent", "data")))


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


def fetch(tree: Any) -> Any:
    """Arrays of the mesh, wherever their parts lie, as NumPy arrays; every process calls it."""
    return multihost_utils.process_allgather(tree, tiled=True)
