"""Weights in safetensors files: which tensor holds which parameter, in what layout, and how it gets onto its shards."""

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from gsae_jax.errors import UserError
from gsae_jax.storage import reading

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")  # from fine to coarse
# Fingerprints read all of weights up to WHOLE bytes. Of larger weights they read PAGES pages of each tensor.
WHOLE, PAGE, PAGES = 2**28, 4096, 64
ParamPath = tuple[str, ...]
# MXFP4: blocks of 32 four-bit numbers, two in a byte, the lower bits first; each block has a power of two as its scale.
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FOUR_BIT = np.array([*POSITIVE, *(-x for x in POSITIVE)], np.float32)
BLOCK, BLOCKS = 32, "_blocks"


class Tensors:
    """The tensors of a directory's safetensors files.

    Attributes:
        label: the file that says which there are.
        faults: what is wrong with the files themselves.
    """

    def __init__(self, folder: Path):
        self.faults: list[str] = []
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        if (folder / INDEX).exists():
            self.label = folder / INDEX
            index = read_index(folder / INDEX)
            files = sorted(set(index.values()))
            lost = [file for file in files if not (folder / file).is_file()]
            if lost:
                raise UserError(f"{self.label} names {', '.join(lost)}, which are not there; copy them again")
            beside = {file.name for file in folder.glob("model-*.safetensors")} - set(files)
            self.faults += [f"{file} lies there but is not in the index" for file in sorted(beside)]
        else:
            self.label, index, files = folder / WEIGHTS, {}, [WEIGHTS]
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder} has no {WEIGHTS} or {INDEX}; its weights must be in that format")
            try:
                # It reads the header alone, and compares its length and every offset and shape with the file's size.
                opened = safetensors.safe_open(folder / file, "np")
            except (OSError, safetensors.SafetensorError) as error:
                raise self._unreadable(folder / file, error) from error
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                self._files[name], self._paths[name] = opened, folder / file
                if index and index.get(name) != file:
                    self.faults.append(f"{name} is in {file}, but the index says otherwise")

    def _unreadable(self, file: Path, error: Exception) -> UserError:
        reading.check_fetched(file)
        return UserError(f"{file} cannot be read ({error}); it is truncated or not a safetensors file: copy it again")

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, from the file's header."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of one tensor, in safetensors' spelling."""
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str, *more: str) -> np.ndarray:
        """One whole tensor, several of one shape as one array, or blocks with their scales as the numbers they mean."""
        first = self._files[name].get_tensor(name)
        if not more:
            return first
        if name.endswith(BLOCKS):
            return dequantised(first, self.read(*more))
        whole = np.empty((1 + len(more), *first.shape), first.dtype)
        whole[0] = first
        for number, each in enumerate(more, start=1):
            value = self.read(each)
            if value.dtype != whole.dtype:  # float32 holds all types
                whole = whole.astype(np.float32)
            whole[number] = value
        return whole

    def source(self, name: str) -> Any:
        """What a tensor is read from."""
        return self._files[name]

    def put(self, name: str, source: Any) -> None:
        """Read a tensor from something else that has `get_tensor` and `get_slice`, as a file has."""
        self._files[name] = source

    def fingerprint(self) -> str:
        """A name for the tensors: equal names, types, shapes and contents have equal fingerprints.

        How tensors are divided into files does not matter. Up to `WHOLE` bytes, every byte counts. Larger checkpoints
        would take too long to read: there `PAGES` evenly spaced pages of each tensor count.
        """
        headers = {file: _header(file) for file in sorted(set(self._paths.values()))}
        entries = [(name, *headers[file][name]) for name, file in sorted(self._paths.items())]
        whole = sum(end - begin for *_, begin, end in entries) <= WHOLE
        digest = hashlib.sha256()
        files = {file: os.open(file, os.O_RDONLY) for file in headers}
        try:
            for name, dtype, shape, begin, end in entries:
                digest.update(json.dumps([name, dtype, shape]).encode())
                if whole or end - begin <= PAGES * PAGE:
                    pieces = [(start, min(2**20, end - start)) for start in range(begin, end, 2**20)]
                else:
                    pieces = [(begin + (end - begin - PAGE) * i // (PAGES - 1), PAGE) for i in range(PAGES)]
                for start, length in pieces:
                    digest.update(os.pread(files[self._paths[name]], length, start))
        except OSError as error:
            raise self._unreadable(self.label, error) from error
        finally:
            for file in files.values():
                os.close(file)
        return digest.hexdigest()[:16]

    def fineness(self, name: str) -> int:
        """The place of a tensor's dtype in `DTYPES`. Of two copies, the one with the lower place is read."""
        return DTYPES.index(self.dtype(name)) if self.dtype(name) in DTYPES else len(DTYPES)

    def same(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors have the same values, some rows at a time; where their dtypes differ, in the coarser."""
        if self.shape(one) != self.shape(other):
            return False
        coarse, fine = sorted((one, other), key=self.fineness, reverse=True)
        pair = [self._files[name].get_slice(name) for name in (coarse, fine)]
        count = self.shape(one)[0]
        for start in range(0, count, rows):
            a, b = (part[start : min(start + rows, count)] for part in pair)
            if a.dtype != b.dtype:
                with np.errstate(over="ignore"):
                    b = b.astype(np.float32).astype(a.dtype)
            if not np.array_equal(a, b, equal_nan=True):
                return False
        return True


def digest(file: Path) -> str:
    """A hash of everything in a file."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _header(file: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """(type, shape, begin, end) of each tensor of a safetensors file that was checked before; positions in bytes."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: (about["dtype"], about["shape"], *(8 + length + offset for offset in about["data_offsets"]))
        for name, about in header.items()
    }


def match(
    tensors: Tensors,
    wanted: Mapping[ParamPath, Any],
    whole: Mapping[ParamPath, Any],
    table: Mapping[str, Any],
    prefix: str | tuple[str, ...],
    ignored: str,
    tied: bool,
) -> tuple[dict[tuple[str, ...], dict[ParamPath, Any]], list[str]]:
    """Which tensor each parameter is a part of.

    Args:
        tensors: what is there.
        wanted: the shape of each parameter that is to be loaded, by path.
        whole: of each that the checkpoint must have.
        table: the family's names and layouts of them; of several in a list, that which the checkpoint has. A `*` in
            a name stands for the number of an expert. The blocks of MXFP4 are named, and their scales lie beside them.
        prefix: what the checkpoint's names may begin with; of several that fit, the first one counts.
        ignored: a regular expression for tensors that are no parameters.
        tied: the embedding may have the unembedding's name.

    Returns:
        {tensors that are read as one array: {path: a function from it to the parameter}}, and everything that does not
        fit.
    """
    n_layers = len({path[0] for path in whole if path[0].startswith("blocks.")})
    known = (prefix,) if isinstance(prefix, str) else prefix
    prefixes = {name: next((each for each in known if name.startswith(each)), "") for name in sorted(tensors.names)}
    actual = {name.removeprefix(its_prefix): name for name, its_prefix in prefixes.items()}
    prefix = next((each for each in known if each in prefixes.values()), "")
    sources: dict[tuple[str, ...], Any] = {}
    faults, used = list(tensors.faults), set()
    for path, leaf in whole.items():
        name, pattern, part = _source(table, path, leaf.shape, actual)
        unembedding = table["unembed.W_U"][0] if tied and path == ("embed.W_E",) else name
        names = _read_together(name, leaf.shape)
        present = [each for each in dict.fromkeys((*names, unembedding)) if each in actual]
        used |= set(present)
        elsewhere = unembedding != name and unembedding in actual
        if lost := [each for each in names if each not in actual and not elsewhere]:
            faults += [f"{'' if path == ('unembed.W_U',) else prefix}{each} is missing" for each in lost]
            continue
        if len(present) == 2 and name != unembedding and not tensors.same(actual[name], actual[unembedding]):
            faults.append(f"{actual[name]} and {actual[unembedding]} differ, but config.json says they are tied")
        if len(names) > 1:
            source = tuple(actual[each] for each in names)
        else:
            source = (min((actual[each] for each in present), key=tensors.fineness),)
        shape, sizes = _layout(pattern, leaf.shape, n_layers)
        if isinstance(part, tuple):  # several parameters are the rows of one tensor
            rows = [_layout(pattern, whole[*path[:-1], each].shape, n_layers)[0][0] for each in part]
            first = sum(rows[: part.index(path[-1])])
            part, shape = slice(first, first + shape[0]), (sum(rows), *shape[1:])
        wrong = [
            f"{each} has shape {list(tensors.shape(each))}, not {list(its_shape)}"
            for each, its_shape in zip(source, _shapes_together(source, shape), strict=True)
            if tensors.shape(each) != its_shape
        ]
        faults += wrong
        if not wrong and path in wanted:
            sources.setdefault(source, {})[path] = partial(_view, pattern=pattern, sizes=sizes, part=part)
    expected = {name for short, name in actual.items() if short in used or re.search(ignored, short)}
    faults += [f"{name} is not of this model" for name in sorted(tensors.names - expected)]
    faults += [
        f"{name} is of type {tensors.dtype(name)}, not one of {', '.join(allowed)}"
        for names in sources
        for allowed in (("U8",) if names[0].endswith(BLOCKS) else DTYPES,)
        for name in names
        if tensors.dtype(name) not in allowed
    ]
    return sources, faults


def _source(
    table: Mapping[str, Any], path: tuple[str, ...], shape: tuple[int, ...], actual: Collection[str]
) -> tuple[str, str, Any]:
    """(tensor, layout, part) of one of our parameters; what is not in the table has our name and layout.

    The part is None for a whole tensor, an index of the first axis of the layout's result (in the table "layer" for
    the layer's number), or the names of all parameters that are the rows of this tensor, in their order.
    """
    name = ".".join(path)
    layer = re.match(r"blocks\.(\d+)\.", name)
    key = f"blocks.{{}}.{name[layer.end() :]}" if layer else name
    if key not in table:
        axes = " ".join("abcd"[: len(shape)])
        return name, f"{axes} -> {axes}", None
    entries = table[key] if isinstance(table[key], list) else [table[key]]
    known: list[tuple[str, str, Any]] = []
    for source, pattern, *rest in entries:
        part = rest[0] if rest else None
        if layer:
            source, part = source.format(layer[1]), int(layer[1]) if part == "layer" else part
        known.append((source, pattern, part))
    if len(known) > 1:  # layers with experts and without have parameters of one name
        known = [each for each in known if _ndim(*each[1:]) == len(shape)]
    return next((each for each in known if any(name in actual for name in _read_together(each[0], shape))), known[0])


def _ndim(pattern: str, part: Any) -> int:
    """Axes of a parameter with this layout."""
    return len(pattern.split(" -> ")[1].split()) - isinstance(part, int)


def _read_together(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The tensors that a name of the table means, for a parameter of this shape."""
    if name.endswith(BLOCKS):
        return name, name.removesuffix(BLOCKS) + "_scales"
    return tuple(name.replace("*", str(number)) for number in range(shape[0])) if "*" in name else (name,)


def _shapes_together(names: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of tensors that are read as one array of this shape."""
    if names[0].endswith(BLOCKS):
        blocks = (*shape[:-1], shape[-1] // BLOCK)
        return [(*blocks, BLOCK // 2), blocks]
    return [shape] if len(names) == 1 else [shape[1:]] * len(names)


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers [..., G * 32], bfloat16, of MXFP4 blocks [..., G, 16] and scales [..., G], both uint8. It is exact.

    The scale s means 2^(s - 127), and 255 is not a number: infinite here (OCP Microscaling Formats 1.0).
    """
    byte = np.arange(256)
    pairs = np.stack([FOUR_BIT[byte & 15], FOUR_BIT[byte >> 4]], axis=-1)
    numbers = np.empty((*scales.shape, BLOCK), jnp.bfloat16)
    for out, block, scale in zip(numbers, blocks, scales, strict=True):  # one expert at a time: the host has to hold it
        with np.errstate(invalid="ignore", over="ignore"):  # scales of 254 and 255
            factors = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
            out[:] = pairs[block].reshape(out.shape) * factors[..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


def _layout(pattern: str, shape: tuple[int, ...], n_layers: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The checkpoint's shape of a tensor, and every axis' size, from our shape and the einops pattern.

    Axes that ours lacks are `qkv`, of queries, keys and values, `glu`, of gate and other input, and `l`, of layers.
    """
    left, right = pattern.split(" -> ")
    axes = right.split()
    sizes = {"qkv": 3, "glu": 2, "l": n_layers} | dict(zip(axes[-len(shape) :], shape, strict=True))
    groups = re.findall(r"\(([^)]+)\)|(\S+)", left)
    theirs = tuple(math.prod(sizes[axis] for axis in (group or single).split()) for group, single in groups)
    return theirs, {axis: size for axis, size in sizes.items() if axis in axes}


def _view(value: np.ndarray, pattern: str, sizes: dict[str, int], part: int | slice | None) -> np.ndarray:
    ours = einops.rearrange(value[part] if isinstance(part, slice) else value, pattern, **sizes)
    return ours[part] if isinstance(part, int) else ours


def place(value: np.ndarray, dtype: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on its shards, of which the host holds one at a time."""
    shards = [
        jax.block_until_ready(jax.device_put(np.asarray(value[index], dtype, order="C"), device))
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


@jax.jit
def finite(x: jax.Array) -> jax.Array:
    """Whether all of an array is."""
    return jnp.isfinite(x).all()


def read_index(file: Path) -> dict[str, str]:
    """The file that each tensor is in; raises `UserError` for what is no index, or names no files beside it."""
    index = reading.read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{file} has no weight_map from tensors to files; copy it again")
    for name in index.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,200}", name, re.ASCII):
            raise UserError(f"{file} names {name!r}, which is not a file in the same directory; copy it again")
    return index
