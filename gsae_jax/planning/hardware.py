"""Machines that a run can be planned for: chips by their makers' specifications, and how topologies are written."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from gsae_jax.errors import UserError, known_names

GIB = 2**30
MOST_CPUS, MOST_CHIPS = 2**10, 2**20  # devices of a topology
NODE = 8  # GPUs that are linked to each other
# libtpu looks for the TPU that it runs on, and locks it; to compile it needs none, of whichever kind.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, from its maker's specification.

    Attributes:
        memory: bytes.
        flops: dense bfloat16 operations per second.
        links: bytes per second that it sends, over all its links to its neighbours (TPU) or to its node (GPU).
        network: bytes per second that it sends to other nodes; 0: there are no nodes.
    """

    memory: int
    flops: float
    links: float
    network: float = 0.0


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 300e9),
    "v5e": Chip(16 * GIB, 197e12, 200e9),
    "v5p": Chip(95 * GIB, 459e12, 600e9),
    "v6e": Chip(32 * GIB, 918e12, 400e9),
    "gpu:a100": Chip(80 * 10**9, 312e12, 300e9, 25e9),
    "gpu:h100": Chip(80 * 10**9, 989e12, 450e9, 50e9),
    "gpu:h200": Chip(141 * 10**9, 989e12, 450e9, 50e9),
    "gpu:b200": Chip(180 * 10**9, 2250e12, 900e9, 50e9),
}
EXAMPLES = {"v4": (2, 2, 2), "v5e": (4, 4), "v5p": (2, 2, 2), "v6e": (4, 4)}  # sides; others have 8 devices


class Topology(NamedTuple):
    """A machine: `chip` is a key of CHIPS, or "cpu"; `sides` are [16], or [4, 4] of a torus."""

    chip: str
    sides: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Of "v5e:4x4", "gpu:h100x8", "cpu:8"; raises `UserError` for what is none."""
        match = re.fullmatch(r"(gpu:\w+?)x(\d+)|(\w+):(\d+(?:x\d+)*)", text)
        gpu, number, kind, size = match.groups() if match else (None, None, None, None)
        chip, sides = gpu or kind, tuple(int(side) for side in (number or size or "0").split("x"))
        known = [*CHIPS, "cpu"]
        if chip not in known or min(sides) < 1 or (chip == "cpu" and len(sides) > 1):
            written = next((name for name in known if re.match(rf"{name}(?!\w)|{name}x", text)), None)
            if written is None:
                what = f"write one like v5e:4x4, gpu:h100x8 or cpu:8; {known_names(chip or text, known)}"
            else:
                what = f"write how many devices there are, such as {cls(written, EXAMPLES.get(written, (8,)))}"
            raise UserError(f"is {text!r}; {what}", "--topology")
        if math.prod(sides) > (most := MOST_CPUS if chip == "cpu" else MOST_CHIPS):
            raise UserError(f"is {text!r}; write at most {most:,} devices", "--topology")
        return cls(chip, sides)

    @property
    def platform(self) -> str:
        """JAX's name of the kind: "cpu", "gpu" or "tpu"."""
        return self.chip.partition(":")[0] if self.chip.startswith(("cpu", "gpu")) else "tpu"

    def __str__(self) -> str:
        return f"{self.chip}{'x' if self.chip.startswith('gpu') else ':'}{'x'.join(map(str, self.sides))}"

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(self.sides)

    def doubled(self) -> "Topology":
        """With the shortest side twice as long."""
        first, *rest = sorted(self.sides)
        return Topology(self.chip, tuple(sorted((2 * first, *rest))))

    def devices(self) -> Sequence[Any] | None:
        """Devices to compile for, real ones only of "cpu"; None where there is no compiler.

        Raises:
            UserError: more CPU devices than there are, or a topology that libtpu does not know.
        """
        if self.chip == "cpu":
            if jax.default_backend() != "cpu" or jax.device_count() < self.size:
                raise UserError(f"is {str(self)!r}, but there are {jax.device_count()} CPU devices", "--topology")
            return jax.devices()[: self.size]
        if self.chip.startswith("gpu") or not importlib.util.find_spec("libtpu"):
            return None
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        # Else each of a v4's two cores would be a device.
        options = {"chip_config_name": "megacore"} if self.chip == "v4" else {}
        try:
            return topologies.get_topology_desc(str(self), "tpu", **options).devices
        except Exception as error:  # the runtime's own kinds
            why = " ".join(str(error).split())[:300]
            raise UserError(f"is {str(self)!r}, which libtpu refuses ({why})", "--topology") from error


def bandwidth(chip: Chip, shape: Mapping[str, int], axes: Collection[str]) -> float:
    """Bytes per second that a device sends, at most, in an exchange along axes of a mesh {axis: size}."""
    devices, ways = math.prod(shape.values()), math.prod(shape[axis] for axis in axes)
    if not chip.network:  # a torus: an axis of the mesh has the links of the sides that it lies along
        return chip.links * math.log(ways) / math.log(devices)
    stride = 1 if "latent" in axes else shape["latent"]
    inside = min(ways, max(1, NODE // stride))  # a ring enters and leaves a node through all of its members
    return chip.links if inside == ways else min(chip.links, inside * chip.network)
