"""What a run would take on machines that are not there: bytes on a device, operations, what devices send, time.

Where a compiler for the machine is installed, the train step is compiled for it and its memory and its collectives are
read from the result. Elsewhere they are estimated: arguments from their placement (exact), the SAEs' collectives from
the step as it is written, and the rest by the rules of `memory` and `collectives.expected`. What measuring takes is
always estimated.
"""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from gsae_jax import errors
from gsae_jax import mesh as mesh_lib
from gsae_jax.config import Experiment
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params, open_others
from gsae_jax.lms.sites import layer_of, parts
from gsae_jax.planning import collectives, memory
from gsae_jax.planning.hardware import CHIPS, GIB, NODE, Topology, bandwidth
from gsae_jax.training import preparation
from gsae_jax.training.step import Program, TrainState

UTILISATION = 0.4  # of the chip's rate, assumed for the estimate of time
NO_ADVICE = "no one setting is enough: change several, train fewer SAEs at once, or take more or larger devices"


@dataclasses.dataclass(frozen=True)
class Case:
    """A train step on a mesh, and what it is called with; every array is abstract."""

    program: Program
    state: TrainState
    lm_params: Any
    whole_lm_params: Any
    tokens: jax.ShapeDtypeStruct

    @classmethod
    def build(cls, config: Experiment, topology: Topology) -> "Case":
        """Raises `UserError` for a config that cannot run on the topology."""
        if config.data.source:
            raise UserError(
                f"is {config.data.source!r}; write '', and the plan says what a store takes and saves", "data.source"
            )
        config.check_new()
        mesh = mesh_of(config, topology)
        rows_lib.check_new(config.data)
        with errors.about("lm.path", revision="lm.revision"):
            checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
        others = open_others(config.lms)
        program = Program.build(config, mesh, checkpoint, special_tokens=(0,), others=others)
        program.check_new()
        return cls.of(program, checkpoint, others)

    @classmethod
    def of(
        cls, program: Program, checkpoint: Checkpoint, others: Mapping[str, Checkpoint] = MappingProxyType({})
    ) -> "Case":
        """The train step of a program, which is of these language models."""
        config, mesh = program.config, program.mesh
        shape = (config.rows_per_call, config.data.context_length)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.sharding(mesh, "data"))
        wholes = {name: each.module(mesh=mesh) for name, each in {"": checkpoint, **others}.items()}
        read = program.source_params(lambda name, module: abstract_params(module, program.dtype_of(name)))
        whole = program.source_params(lambda name, _: abstract_params(wholes[name], program.dtype_of(name)))
        return cls(program, program.abstract_state(), read, whole, tokens)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the train step is called with."""
        return self.state, self.lm_params, self.tokens

    def held(self) -> dict[str, int]:
        """Bytes of the arguments on each device, by part."""
        stacks = list(self.state.stacks.values())
        return {
            "language model": mesh_lib.device_bytes(self.lm_params),
            "SAEs": mesh_lib.device_bytes([stack.params for stack in stacks]),
            "optimiser": mesh_lib.device_bytes([stack.second_moments for stack in stacks]),
            "buffer": mesh_lib.device_bytes(self.state.store),
        }

    def estimate(self) -> dict[str, int]:
        """Bytes on each device, by part and in total, without a compiler."""
        beside = memory.training(self.program, self.state, self.lm_params)
        return self._parts(beside, mesh_lib.device_bytes(self.arguments))

    def measuring(self, platform: str) -> dict[str, int]:
        """Bytes on each device, by part and in total, while the SAEs are measured; always an estimate."""
        return memory.measuring(self.program, self.state, self.whole_lm_params, platform)

    def measure(self) -> tuple[dict[str, int], collectives.Exchanges, dict[str, str]]:
        """Bytes and exchanges, compiled where that can be done; and, of each, "compiled" or "estimated"."""
        parts, method = self.estimate(), {"bytes": "estimated", "exchanges": "estimated"}
        if not isinstance(self.program.mesh, AbstractMesh):
            step: Any = self.program.step_at(self.program.config.train.steps - 1)  # the largest of a run
            lowered = step.lower(*self.arguments)
            method["bytes"] = "compiled"
            try:
                compiled = lowered.compile()
                memory = compiled.memory_analysis()
                kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                parts = self._parts(memory.temp_size_in_bytes + memory.generated_code_size_in_bytes, kept)
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # JAX cannot print all that libtpu makes
                    exchanges = collectives.compiled(compiled.as_text(), self.program.mesh.shape)
                    return parts, exchanges, method | {"exchanges": "compiled"}
            except jax.errors.JaxRuntimeError as error:
                # Compilers for TPUs refuse what does not fit, and say no more than this, which has the arguments in it.
                needed = re.search(r"RESOURCE_EXHAUSTED.*temporaries \(([\d.]+)G\)", str(error), re.DOTALL)
                if not needed:
                    raise
                held = mesh_lib.device_bytes(self.arguments)
                parts = self._parts(max(0, round(float(needed[1]) * GIB) - held), held)
        return parts, collectives.expected(self.program, *self.arguments), method

    def _parts(self, temporaries: int, kept: int) -> dict[str, int]:
        """`kept`: arguments and results. In the rest are tokens, the features' ages, statistics, and padding."""
        held = self.held()
        parts = held | {"temporaries": temporaries, "rest": kept - sum(held.values())}
        return parts | {"total": sum(parts.values())}


def plan(config: Experiment, topology: str, bandwidth_of_store: float = 2.0) -> dict[str, Any]:
    """The cost of an experiment on a topology. Nothing is run, and only `config.json` of the language model is read.

    Args:
        config: the experiment.
        topology: "v5e:4x4" and so on (compiled if libtpu is installed, and otherwise estimated), "gpu:h100x8"
            (estimated), or "cpu:8" for this machine's own CPU (compiled).
        bandwidth_of_store: GB/s at which all processes together read a store of the activations.

    Returns:
        A dict for JSON: bytes, seconds, operations. `method` says whether bytes and exchanges are "compiled" or
        "estimated". Times are given twice: if all communication overlaps with computation (`overlapped`), and if none
        does (`in_turn`).

    Raises:
        UserError: the topology is unknown, or the config cannot run on it.
    """
    where = Topology.parse(topology)
    case = Case.build(config, where)
    chip, mesh, updates = CHIPS.get(where.chip), dict(case.program.mesh.shape), config.updates_per_call
    parts, exchanged, method = case.measure()
    forward = sum(forward_operations(case.program).values()) * config.forwards_per_call / updates
    flops = operations(case.program) / updates
    devices = math.prod(mesh.values())
    report: dict[str, Any] = {
        "topology": topology,
        "method": method,
        "devices": devices,
        "mesh": mesh,
        "bytes_per_device": parts,
        "bytes_per_device_measuring": case.measuring(where.platform),
        "flops_per_step": flops,
        "flops_per_device_and_step": flops / devices,
        "exchanges_per_step": [
            {"kind": kind, "axes": list(axes), "count": count / updates, "bytes_sent_per_device": sent / updates}
            for (kind, axes), (count, sent) in sorted(exchanged.items(), key=lambda item: -item[1][1])
        ],
    }
    if not config.lms:  # a store is of one model
        report["store"] = _of_store(case, forward / flops, bandwidth_of_store)
    if chip is None:
        return report
    for exchange in report["exchanges_per_step"]:
        exchange["seconds"] = exchange["bytes_sent_per_device"] / bandwidth(chip, mesh, exchange["axes"])
    computation = flops / devices / (chip.flops * UTILISATION)
    waiting = sum(exchange["seconds"] for exchange in report["exchanges_per_step"])
    step = {"overlapped": max(computation, waiting), "in_turn": computation + waiting}
    hours = {name: seconds * config.train.steps / 3600 for name, seconds in step.items()}
    largest = max(parts["total"], report["bytes_per_device_measuring"]["total"])
    fits = largest <= chip.memory
    return report | {
        "memory_of_a_device": chip.memory,
        "fits": fits,
        "advice": [] if fits else list(advice(case, where, parts["total"])),
        "utilisation": UTILISATION,
        "seconds_per_step": {"computation": computation, "exchanges": waiting} | step,
        "steps": config.train.steps,
        "tokens_per_second": {name: config.train.batch_size / seconds for name, seconds in step.items()},
        "hours": hours,
        "chip_hours": {name: value * devices for name, value in hours.items()},
    }


def _of_store(case: Case, forward: float, bandwidth_of_store: float) -> dict[str, Any]:
    """What a store of a run's activations takes and saves; `forward`: the share of the forward pass in a step."""
    config, widths = case.program.config, case.program.widths
    of_a_token = sum(widths.values()) * jnp.dtype(config.lm.dtype).itemsize + 5  # its id and the mask
    tokens = preparation.tokens_needed(config)
    return {
        "tokens": tokens,
        "bytes": tokens * of_a_token,
        "bandwidth": bandwidth_of_store * 1e9,
        "seconds_to_read_per_step": config.train.batch_size * of_a_token / (bandwidth_of_store * 1e9),
        "forward_share": forward,
        # The forward pass runs once, in place of once in each run.
        "operations_of_runs": {str(n): (forward + n * (1 - forward)) / n for n in (1, 2, 5, 10)},
    }


def describe(report: dict[str, Any]) -> str:
    """The result of `plan` as text."""
    sizes, exchanges = report["bytes_per_device"], report["exchanges_per_step"]
    mesh = " x ".join(f"{size} {axis}" for axis, size in report["mesh"].items())
    how = {"compiled": "from the compiled step", "estimated": "ESTIMATED, not compiled"}
    how = {part: how[method] for part, method in report["method"].items()}
    lines = [f"{report['topology']}: {report['devices']} devices, {mesh}", "", f"bytes on each device ({how['bytes']})"]
    lines += [f"  {name:<15}{size / 2**30:>9.3f} GiB" for name, size in sizes.items()]
    measuring = report["bytes_per_device_measuring"]
    lines += ["", "bytes on each device while SAEs are measured (ESTIMATED)"]
    lines += [f"  {name:<15}{size / 2**30:>9.3f} GiB" for name, size in measuring.items()]
    lines += ["", f"what each device sends in one step, an SAE update ({how['exchanges']})"]
    lines += [
        f"  {exchange['kind']:<19}{' + '.join(exchange['axes']):<15}{exchange['count']:>8.2f} times"
        f"{exchange['bytes_sent_per_device'] / 2**20:>12,.1f} MiB"
        + (f"{1e3 * exchange['seconds']:>10,.1f} ms" if "seconds" in exchange else "")
        for exchange in exchanges
    ] or ["  nothing"]
    lines += [
        "",
        f"one step: {report['flops_per_step'] / 1e12:,.2f} TFLOP, {report['flops_per_device_and_step'] / 1e12:,.3f} "
        "on each device",
    ]
    of_store = _store_lines(report["store"]) if "store" in report else []
    if "fits" not in report:
        return "\n".join(lines + of_store)
    seconds = report["seconds_per_step"]
    lines += [
        f"  {1e3 * seconds['computation']:,.1f} ms of computation, at {report['utilisation']:.0%} of the chip's rate",
        f"  {1e3 * seconds['exchanges']:,.1f} ms of exchanges, at the full rate of its links",
        f"{report['steps']:,} steps, from exchanges overlapped with computation .. to exchanges after computation:",
        f"  {_range(report['tokens_per_second'], ',.0f')} tokens/s",
        f"  {_range(report['hours'], ',.1f')} hours, {_range(report['chip_hours'], ',.0f')} chip-hours",
        *of_store,
        "",
    ]
    largest = max(sizes["total"], measuring["total"])
    used = f"{largest / 2**30:.1f} of {report['memory_of_a_device'] / 2**30:.1f} GiB"
    if report["fits"]:
        # JAX takes three quarters of a GPU's memory by itself.
        more = report["topology"].startswith("gpu") and largest > 0.75 * report["memory_of_a_device"]
        return "\n".join([*lines, f"it fits: {used}" + ", with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" * more])
    lines.append(f"it does not fit: {used}")
    changes = [f"  {change['change']}  ({change['total'] / 2**30:.1f} GiB)" for change in report["advice"]]
    lines += ["by the estimate, each of these changes is enough on its own:", *changes] if changes else [NO_ADVICE]
    return "\n".join(lines)


def _store_lines(store: dict[str, Any]) -> list[str]:
    """`_of_store` as text."""
    shares = ", ".join(f"{share:.0%} for {n}" for n, share in store["operations_of_runs"].items() if n != "1")
    return [
        "",
        f"a store of these activations (python -m gsae_jax.store): {store['tokens']:,} tokens, "
        + (f"{store['bytes'] / 1e9:,.1f} GB" if store["bytes"] < 1e12 else f"{store['bytes'] / 1e12:,.1f} TB"),
        f"  the forward pass is {store['forward_share']:.0%} of a step's operations",
        f"  runs from one store need of the operations of as many runs with the model: {shares}",
        f"  {1e3 * store['seconds_to_read_per_step']:,.1f} ms to read a step's activations, at "
        f"{store['bandwidth'] / 1e9:g} GB/s for all processes together",
    ]


def _range(values: dict[str, float], form: str) -> str:
    return f"{values['overlapped']:{form}} .. {values['in_turn']:{form}}"


def mesh_of(config: Experiment, topology: Topology) -> Any:
    """The mesh: of devices to compile for, or, where there is no compiler, its shape alone."""
    devices, sizes = topology.devices(), mesh_lib.shape(config.mesh, topology.size)
    if devices is None:
        return AbstractMesh(sizes, ("data", "latent"), axis_types=(AxisType.Auto,) * 2)
    return mesh_lib.make_mesh(config.mesh, devices)


def operations(program: Program) -> float:
    """Floating-point operations of one call of the train step, as written, on all devices together.

    In the mean over training, where only a part of it has the KL divergence. Of experts, those that a token uses count.
    """
    config = program.config
    forward, updates = forward_operations(program), 0.0
    for stack in program.stacks:
        params = jax.eval_shape(lambda stack=stack: stack.architecture.init(jax.random.key(0), stack.sae))
        B = config.train.batch_size
        batch = {site: jax.ShapeDtypeStruct((B, D), jnp.float32) for site, D in program.widths.items()}

        def loss(trained: Any, state: Any, x: Any, s: Any = stack) -> jax.Array:
            return s.loss(
                trained, state, x, lambda: jnp.zeros(s.sae.width, bool), jnp.int32(0), {"l1_coefficient": 1.0}
            )[0]

        updates += len(stack.config) * _flops(jax.grad(loss), *stack.split(params), batch)
    kl = sum(
        _kl_operations(program, name, forward[name])
        for name, model in program.models.items()
        if model.whole is not None
    )
    return config.forwards_per_call * sum(forward.values()) + config.updates_per_call * updates + kl


def forward_operations(program: Program) -> dict[str, float]:
    """Floating-point operations of one forward pass of each language model, as far as the sites."""
    config, forward = program.config, {}
    rows = jax.ShapeDtypeStruct((config.activations.rows_per_forward, config.data.context_length), jnp.int32)
    for name, model in program.models.items():
        dense, params = _dense(program, name, model.module)
        own = [hook for hook, of in map(parts, config.sites) if of == name]

        def capture(params: Any, tokens: Any, dense: Any = dense, own: list[str] = own) -> Any:
            return loading.capture(dense, params, tokens, own)

        forward[name] = _flops(capture, params, rows)
    return forward


def _dense(program: Program, name: str, module: Any) -> tuple[Any, Any]:
    """A language model on one device, with `Config.dense`, and the shapes of its parameters."""
    dense = dataclasses.replace(module, config=module.config.dense, mesh=None)
    shapes = abstract_params(dense, program.dtype_of(name))
    return dense, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def _kl_operations(program: Program, name: str, forward: float) -> float:
    """The same of the KL divergence in the language model with this name.

    `forward`: of one forward pass as far as the sites, which is longer with it.
    """
    model = program.models[name]
    config, lm, (dense, lm_params) = program.config, model.whole.config, _dense(program, name, model.whole)
    rows = jax.ShapeDtypeStruct((config.activations.rows_per_forward, config.data.context_length), jnp.int32)
    whole = _flops(lambda params, tokens: dense.apply({"params": params}, tokens, method="hidden"), lm_params, rows)
    tokens = config.rows_per_call * config.data.context_length
    # Logits of the clean predictions and of the others, and the gradient.
    logits = 3 * 2 * tokens * lm.d_model * lm.d_vocab
    total, longest = 0.0, 0.0
    for stack in program.stacks:
        if not stack.config.kl_fraction or parts(stack.config.targets[0])[1] != name:
            continue
        share = 1 - config.kl_start(stack.name) / config.train.steps
        params = jax.eval_shape(lambda stack=stack: stack.architecture.init(jax.random.key(0), stack.sae))
        batch = {site: jax.ShapeDtypeStruct((tokens, D), jnp.float32) for site, D in program.widths.items()}
        inputs, _ = stack.batch(batch)

        def reconstruction(trained: Any, state: Any, inputs: Any, s: Any = stack) -> jax.Array:
            params = trained | state
            x_hat = s.architecture.decode(params, s.architecture.encode(params, inputs, s.sae))
            return sum(x.sum() for x in jax.tree.leaves(x_hat))

        sae = _flops(jax.grad(reconstruction), *stack.split(params), inputs)
        # Of the blocks after the site: the forward pass, and the gradient by activations alone.
        after = (lm.n_layers - layer_of(stack.config.targets[0])) / lm.n_layers
        blocks = 2 * after * config.forwards_per_call * whole
        total += share * len(stack.config) * (sae + blocks + logits)
        longest = max(longest, share)
    return total + longest * config.forwards_per_call * (whole - forward)


def _flops(function: Any, *args: Any) -> float:
    analysis: Any = jax.jit(function).lower(*args).cost_analysis()
    return float(analysis["flops"])


def advice(case: Case, topology: Topology, total: int) -> Iterator[dict[str, Any]]:
    """Changes that would make training and measuring fit, the least of each kind, by what the estimate says they save.

    Yields:
        `change`, as flags, and `total`, the bytes on each device with it.
    """
    config, capacity = case.program.config, CHIPS[topology.chip].memory
    slack = max(0, total - case.estimate()["total"])  # what the compiler takes beyond the estimate
    batch, act, latent = config.train.batch_size, config.activations, config.mesh.latent
    larger = list(itertools.accumulate(range(4), lambda machine, _: machine.doubled(), initial=topology))[1:]
    kinds: list[list[dict[str, Any]]] = [
        [{"mesh.latent": latent * 2**n} for n in range(1, 10)],
        [{"lm.dtype": "bfloat16"}] if config.lm.dtype == "float32" else [],
        [{"train.compute_dtype": "bfloat16"}] if config.train.compute_dtype == "float32" else [],
        [{"activations.buffer_size": act.buffer_size // n // batch * batch} for n in (2, 4, 8)],
        [{"activations.rows_per_forward": act.rows_per_forward // n} for n in (2, 4, 8)],
        [{"train.batch_size": batch // n} for n in (2, 4, 8)],
        [{"evaluation.rows_per_forward": config.evaluation.rows_per_forward // n} for n in (2, 4, 8)],
        [{"topology": machine} | more for machine in larger for more in ({}, {"mesh.latent": NODE})],
    ]
    for kind in kinds:
        for change in kind:
            if config.mesh.data and ("mesh.latent" in change or "topology" in change):
                change = {"mesh.data": 0} | change
            try:
                other = Case.build(changed(config, change), change.get("topology", topology))
            except UserError:  # the config or the mesh does not allow it
                continue
            sizes = other.estimate()["total"] + slack, other.measuring(topology.platform)["total"]
            if (total := max(sizes)) <= capacity:
                flags = [
                    f"--topology={value}" if field == "topology" else f"--config.{field}={value}"
                    for field, value in change.items()
                ]
                yield {"change": " ".join(flags), "total": total}
                break


def changed(config: Experiment, change: Mapping[str, Any]) -> Experiment:
    """With other values of fields, {"section.name": value}; raises `UserError` for a combination that cannot be."""
    for field, value in change.items():
        section, _, name = field.partition(".")
        if name:
            config = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
            )
    return config
