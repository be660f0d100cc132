"""What a run would take on machines that are not there: bytes on a device, operations, what devices send, time."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax import mesh as mesh_lib
from gsae_jax.config import ConfigError, Experiment, known_names
from gsae_jax.lms import loading, sites
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.training.step import Program

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device: bytes of its memory, and bfloat16 operations per second, from its maker's specification."""

    memory: int
    flops: float


CHIPS = {
    "v4": Chip(32 * GIB, 275e12),
    "v5e": Chip(16 * GIB, 197e12),
    "v5p": Chip(95 * GIB, 459e12),
    "v6e": Chip(32 * GIB, 918e12),
}
UTILISATION = 0.4  # of the chip's rate, assumed for the estimate of time
# What to change when a part does not fit, by the largest part.
ADVICE = {
    "language model": "more devices, or --config.lm.dtype=bfloat16",
    "SAEs": "more devices, fewer SAEs at once, or a smaller width",
    "optimiser": "more devices, fewer SAEs at once, or a smaller width",
    "buffer": "a smaller --config.activations.buffer_size, or more devices along `data`",
    "temporaries": "a smaller --config.train.batch_size or --config.activations.rows_per_forward, or a larger "
    "--config.mesh.latent",
}


def plan(config: Experiment, topology: str) -> dict[str, Any]:
    """Compile the train step of an experiment for a topology, and say what it takes; nothing is run or loaded.

    Args:
        config: the experiment; of its language model only `config.json` is read.
        topology: "v5e:4x4" and so on (needs libtpu: pip install '.[tpu]'), or "cpu:8" for this machine's own CPU.

    Raises:
        ConfigError: an unknown topology, or a config that cannot run on it.
    """
    devices, chip = devices_of(topology)
    mesh = mesh_lib.make_mesh(config.mesh, devices)
    mesh_lib.check(config, mesh)
    checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
    widths = loading.site_widths(checkpoint.module())
    for name, stack in config.stacks.items():
        sites.check(stack.site, widths, f"stacks.{name}.site")
    module = checkpoint.module(1 + max(map(sites.layer_of, config.sites)), mesh)
    program = Program.build(config, mesh, module, special_tokens=(0,))
    lm_params = abstract_params(module, config.lm.dtype)
    state = program.abstract_state()
    shape = (config.rows_per_call, config.data.context_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.sharding(mesh, "data"))
    step: Any = program.train_step
    compiled = step.lower(state, lm_params, tokens).compile()
    memory = compiled.memory_analysis()

    stacks = list(state.stacks.values())
    parts = {
        "language model": device_bytes(lm_params),
        "SAEs": device_bytes([stack.params for stack in stacks]),
        "optimiser": device_bytes([stack.second_moments for stack in stacks]),
        "buffer": device_bytes(state.store),
        "temporaries": memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
    }
    given = memory.argument_size_in_bytes
    parts["rest"] = given - sum(value for name, value in parts.items() if name != "temporaries")
    total = given + parts["temporaries"] + memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = operations(program, lm_params) / len(devices)
    report: dict[str, Any] = {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "bytes_per_device": parts | {"total": total},
        "flops_per_device_and_step": flops / config.updates_per_call,
        "collectives_per_call": collectives(compiled.as_text()),
        "updates_per_call": config.updates_per_call,
    }
    if chip:
        seconds = flops / (chip.flops * UTILISATION) / config.updates_per_call
        hours = seconds * config.train.steps / 3600
        largest = max(ADVICE, key=lambda name: parts[name])
        report |= {
            "memory_of_a_device": chip.memory,
            "fits": total <= chip.memory,
            "advice": "" if total <= chip.memory else f"most are the {largest}: {ADVICE[largest]}",
            "utilisation": UTILISATION,
            "seconds_per_step": seconds,
            "activations_per_second": config.train.batch_size / seconds,
            "hours": hours,
            "chip_hours": hours * len(devices),
        }
    return report


def devices_of(topology: str) -> tuple[Sequence[Any], Chip | None]:
    """The devices of a topology, real only for "cpu:N", and their kind."""
    kind, _, size = topology.partition(":")
    if kind == "cpu" and size.isdigit() and int(size) > 0:
        if jax.default_backend() != "cpu" or jax.device_count() < int(size):
            raise ConfigError("--topology", f"is {topology!r}, but there are {jax.device_count()} CPU devices")
        return jax.devices()[: int(size)], None
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", size):
        kinds = [*CHIPS, "cpu"]
        raise ConfigError("--topology", f"is {topology!r}; write one like v5e:4x4; {known_names(kind, kinds)}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU here to ask
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu").devices, CHIPS[kind]
    except Exception as error:  # the runtime's own kinds
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            "--topology", f"{topology!r} cannot be compiled for here ({why}); it needs libtpu: pip install '.[tpu]'"
        ) from error


def device_bytes(tree: Any) -> int:
    """What one device holds of an abstract tree of placed arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def operations(program: Program, lm_params: Any) -> float:
    """Floating-point operations of one call of the train step, as written, on all devices together."""
    config = program.config
    bare = dataclasses.replace(program.module, mesh=None)
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lm_params)
    rows = jax.ShapeDtypeStruct((config.activations.rows_per_forward, config.data.context_length), jnp.int32)
    forward = _flops(lambda params, tokens: loading.capture(bare, params, tokens, config.sites), plain, rows)
    updates = 0.0
    for stack in program.stacks:
        params = jax.eval_shape(lambda stack=stack: stack.architecture.init(jax.random.key(0), stack.sae))
        x_BxD = jax.ShapeDtypeStruct((config.train.batch_size, stack.sae.d_in), jnp.float32)
        gradient = jax.grad(lambda params, x, s=stack: s.architecture.loss(params, x, 1.0, s.sae)[0])
        updates += len(stack.config) * _flops(gradient, params, x_BxD)
    return config.forwards_per_call * forward + config.updates_per_call * updates


def _flops(function: Any, *args: Any) -> float:
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(analysis["flops"])


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: how many a compiled program has, and the bytes of their results}; those in a loop count once."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    sizes = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
    found: dict[str, dict[str, int]] = {}
    for results, kind in re.findall(rf"^.*? = (.*?) ({kinds})(?:-start)?\(", text, re.MULTILINE):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", results)
        count = found.setdefault(kind, {"count": 0, "bytes": 0})
        count["count"] += 1
        for dtype, dims in shapes:
            count["bytes"] += sizes.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
    return found
