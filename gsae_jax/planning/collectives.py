"""What devices send each other in one call of the train step: read from the compiled program, or expected of it."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from gsae_jax.lms.sites import layer_of, parts
from gsae_jax.training.step import Program

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
PRIMITIVES = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "reduce_scatter": "reduce-scatter",
}


class Exchanges(dict[tuple[str, tuple[str, ...]], tuple[float, float]]):
    """{(kind, axes of the mesh): (how often, bytes that a device sends)}, for a mesh {axis: size}."""

    def __init__(self, shape: Mapping[str, int]):
        super().__init__()
        self.shape = shape

    def count(self, kind: str, axes: Collection[str], times: int, size: float, ways: int = 0) -> None:
        """Add exchanges whose result has `size` bytes, among `ways` devices (by default all along the axes)."""
        axes = tuple(axis for axis in axes if self.shape[axis] > 1)
        n = ways or math.prod(self.shape[axis] for axis in axes)
        if axes and n > 1:
            # In a ring, which no way of doing it sends less than.
            share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
            before, sent = self.get((kind, axes), (0, 0.0))
            self[kind, axes] = before + times, sent + times * size * share.get(kind, (n - 1) / n)


def expected(program: Program, state: Any, lm_params: Any, tokens: Any) -> Exchanges:
    """Without a compiler.

    The SAEs' exchanges are those of the step as written (a compiler joins small ones), with matrices gathered in the
    type of the products. The language model gathers each block's parameters, sums what attention and MLP return along
    `latent`, and turns embeddings from columns into rows. If only a part of training has the KL
    divergence, the step is of this part.
    """
    config, shape = program.config, program.mesh.shape
    compute = jnp.dtype(config.train.compute_dtype).itemsize
    exchanges = Exchanges(shape)

    def visit(jaxpr: Any, times: int) -> None:
        for eqn in jaxpr.eqns:
            kind = PRIMITIVES.get(eqn.primitive.name)
            for aval in (var.aval for var in eqn.outvars if kind):
                axes = eqn.params.get("axes") or eqn.params["axis_name"]
                size = compute if kind == "all-gather" and aval.ndim == 2 else aval.dtype.itemsize
                exchanges.count(str(kind), (axes,) if isinstance(axes, str) else axes, times, aval.size * size)
            for inner in jaxprs_in_params(eqn.params):
                visit(inner, times * eqn.params.get("length", 1))

    visit(jax.make_jaxpr(program.step_at(config.train.steps - 1))(state, lm_params, tokens).jaxpr, 1)

    times = config.forwards_per_call
    rows = config.activations.rows_per_forward // shape["data"]
    for name, model in program.models.items():
        width = model.module.config.d_model * jnp.dtype(program.dtype_of(name)).itemsize
        stream = rows * config.data.context_length * width
        for path, leaf, axes, size in gathered(program.lm_params(lm_params, name), shape):
            exchanges.count("all-gather", axes, times, size)
            if path.endswith(("W_O", "W_out")) and leaf.sharding.spec[0] == "latent":
                exchanges.count("all-reduce", ("latent",), times, stream)
        exchanges.count("all-to-all", ("data", "latent"), times, stream)
    _count_kl(exchanges, program, lm_params)
    return exchanges


def _count_kl(exchanges: Exchanges, program: Program, lm_params: Any) -> None:
    """Add those of the KL divergence: of each SAE the parameters, their gradients, and the blocks after its site."""
    config, shape = program.config, program.mesh.shape
    for stack in program.stacks:
        if not stack.config.kl_fraction:
            continue
        params = jax.eval_shape(lambda stack=stack: stack.architecture.init(jax.random.key(0), stack.sae))
        trained, _ = stack.split(params)
        size = 4 * sum(math.prod(value.shape) for value in trained.values()) / shape["latent"]
        times = len(stack.config) * config.updates_per_call * config.forwards_per_call
        exchanges.count("all-gather", ("data",), times, size)
        exchanges.count("reduce-scatter", ("data",), times, size / shape["data"])
        first = layer_of(stack.config.targets[0])
        predicting = program.lm_params(lm_params, parts(stack.config.targets[0])[1])
        for path, _, axes, size in gathered(predicting, shape):
            block = re.match(r"blocks\.(\d+)/", path)
            if block is None or int(block[1]) >= first:  # once for the predictions, and once for the gradient
                exchanges.count("all-gather", axes, 2 * times, size)


def gathered(lm_params: Any, shape: Mapping[str, int]) -> Iterator[tuple[str, Any, tuple[str, ...], int]]:
    """(path, parameter, axes along which it is gathered for use, its bytes then), of all but embeddings of tokens."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(lm_params):
        path = "/".join(key.key for key in keys)
        entries = [(entry,) if isinstance(entry, str) else entry or () for entry in leaf.sharding.spec]
        axes = next((entry for entry in entries if "data" in entry), ())
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        if not path.endswith("W_E"):
            yield path, leaf, axes, size * math.prod(shape[axis] for axis in axes)


def compiled(text: str, shape: Mapping[str, int]) -> Exchanges:
    """From a compiled program's text; those in a loop count as often as it runs, asynchronous ones once."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            entry = header[2] if header[1] else entry
            lines = computations.setdefault(header[2], [])
        lines.append(line)
    exchanges = Exchanges(shape)

    def exchange(line: str, times: int, kind: str, results: str, start: bool) -> None:
        ids = _group(line, math.prod(shape.values()))
        places = zip(*(divmod(number, shape["latent"]) for number in ids), strict=True)
        axes = [axis for axis, along in zip(("data", "latent"), places, strict=True) if len(set(along)) > 1]
        size = float(sum(map(_bytes, re.findall(r"(\w+)\[([\d,]*)\]", results))))
        if start and kind == "all-gather":  # the operands are there too
            size *= len(ids) / (len(ids) + 1)
        elif start and kind == "collective-permute":
            size /= 2
        exchanges.count(kind, axes, times, size, len(ids))

    def visit(computation: str, times: int) -> None:
        for line in computations[computation]:
            if match := re.search(rf" = (.*?) ({KINDS})(-start)?\(", line):
                exchange(line, times, match[2], match[1], bool(match[3]))
            # TPUs have a kernel for the sum of which every device keeps its part, written as a sum and a slice.
            elif match := re.search(r" = (\S+) fusion\(.*calls=%?(all-reduce-scatter[\w.-]*)", line):
                summed = next(inner for inner in computations[match[2]] if " all-reduce(" in inner)
                exchange(summed, times, "reduce-scatter", match[1], start=False)
            elif " while(" in line:
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                # TPUs' loops do not say; ours count up from zero to the constant of the condition.
                condition, body = (re.findall(rf"{name}=%?([\w.-]+)", line)[0] for name in ("condition", "body"))
                limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(computations[condition]))
                visit(body, times * (int(known[1]) if known else max(map(int, limits), default=1)))
            # TPUs' asynchronous exchanges start in a fusion of this name; other fusions carry them on.
            elif re.search(r" (call|async-start)\(|%async-collective-start\S* = ", line):
                for name in re.findall(r"(?:to_apply|calls)=%?([\w.-]+)", line):
                    visit(name, times)

    visit(entry, 1)
    return exchanges


def _group(line: str, devices: int) -> list[int]:
    """The first group of devices of an exchange, in whichever way its line has it."""
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line):
        return [int(number) for number in pairs[1].split(",")]
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        sizes, order = ([int(n) for n in numbers.split(",")] if numbers else None for numbers in iota.group(2, 3))
        return np.arange(devices).reshape(sizes).transpose(order).ravel()[: int(iota[1])].tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        axes = re.findall(r"('\w+')=(\d+)", named[1])
        places = np.arange(devices).reshape([int(size) for _, size in axes])
        return places[tuple(slice(None) if axis in named[2] else 0 for axis, _ in axes)].ravel().tolist()
    return list(range(devices))


def _bytes(result: tuple[str, str]) -> int:
    """Of an array's type and dimensions as in `f32[8,128]`."""
    bits = re.search(r"\d+", result[0])
    return math.prod(int(n) for n in result[1].split(",") if n) * (int(bits[0]) // 8 if bits else 1)
