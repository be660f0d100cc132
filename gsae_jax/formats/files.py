"""What the formats share: files that are checked before their tensors are read.

Nothing here allocates more than about the size of the file that asks for it.
"""

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from gsae_jax.errors import UserError
from gsae_jax.storage import reading

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Shape = tuple[int, ...]
# Of each tensor its shape and its type, and a function that reads one.
Contents = tuple[dict[str, tuple[Shape, str]], Callable[[str], np.ndarray]]


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """JSON with sorted keys: equal contents are equal files."""
    file.write_text(json.dumps(tree, indent=2, sort_keys=True, allow_nan=False) + "\n")


def misfits(tree: Any, kinds: Mapping[str, tuple[Any, ...]], where: str = "") -> list[str]:
    """What is wrong with the fields of a JSON object, each of which is one of some types, or one of some values.

    Args:
        kinds: `None` among a field's types is null; a field that has `...` may be absent.
        where: what the fields' names begin with.
    """
    if not isinstance(tree, dict):
        return [f"{where.rstrip('.')} is not an object"]
    faults = []
    for name, allowed in kinds.items():
        if name not in tree:
            faults += [] if ... in allowed else [f"{where}{name} is missing"]
        elif not any(_is(tree[name], kind) for kind in allowed):
            known = [kind.__name__ if isinstance(kind, type) else json.dumps(kind) for kind in allowed if kind != ...]
            faults.append(f"{where}{name} is {json.dumps(tree[name])[:60]}, not {' or '.join(known)}")
    return faults


def _is(value: Any, kind: Any) -> bool:
    # By type, as True is an int to isinstance, and equal to 1.
    return type(value) is kind if isinstance(kind, type) else type(value) is type(kind) and value == kind


def check_supported(path: Path, tree: Any, kinds: Mapping[str, tuple[Any, ...]], names: Iterable[str]) -> None:
    """Raises `UserError` for fields that have a valid value which this package does not support.

    Args:
        path: of the file.
        tree: what it holds.
        kinds: of its fields, as for `misfits`.
        names: of the fields that choose what an SAE computes.
    """
    if not isinstance(tree, dict):
        return
    lacking = []
    for name in names:
        known = [kind for kind in kinds[name] if isinstance(kind, str | bool)]
        value = tree.get(name)
        if type(value) in {type(kind) for kind in known} and value not in known:
            supported = ", ".join(json.dumps(kind) for kind in known)
            lacking.append(f"{name} {json.dumps(value)[:60]} is not supported (supported: {supported})")
    if lacking:
        raise UserError(f"{'; '.join(lacking)}; write another SAE", str(path))


def refuse(path: Path, faults: list[str]) -> None:
    """Raises `UserError` with all faults of a file, if there are any."""
    if faults:
        raise UserError(f"{'; '.join(faults)}; copy or save it again", str(path))


def safetensors_contents(file: Path) -> Contents:
    """Of a safetensors file; the library refuses a header that does not describe just this file."""
    try:
        opened = safetensors.safe_open(file, "np")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        reading.check_fetched(file)
        raise UserError(f"cannot be read ({error}); copy it again", str(file)) from error
    about = {
        name: (tuple(part.get_shape()), FLOATS.get(part.get_dtype(), part.get_dtype())) for name, part in slices.items()
    }
    return about, opened.get_tensor


def npz_contents(file: Path) -> Contents:
    """Of an npz file as `np.savez` writes it: neither compressed nor pickled."""
    about = {}
    try:
        with zipfile.ZipFile(file) as archive:
            check_archive(file, archive)
            for entry in archive.infolist():
                with archive.open(entry) as member:
                    version = np.lib.format.read_magic(member)
                    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, dtype = readers[version](member)
                    size = dtype.itemsize * math.prod(shape)
                    if dtype.hasobject or member.tell() + size != entry.file_size:
                        raise ValueError(f"{entry.filename} is not as long as its header says, or holds objects")
                name = entry.filename.removesuffix(".npy")
                if name in about:
                    raise ValueError(f"two of its parts are called {name}")
                about[name] = (tuple(shape), dtype.name)
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        reading.check_fetched(file)
        raise UserError(f"cannot be read as an npz file ({error}); copy it again", str(file)) from error

    def read(name: str) -> np.ndarray:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[name]

    return about, read


def check_archive(file: Path, archive: zipfile.ZipFile) -> None:
    """Raises `ValueError` for a zip file that would unpack to more than its own size."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, and only plain ones are read")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise ValueError("its parts are larger than the file")


def read_tensors(
    file: Path, contents: Contents, wanted: Mapping[str, Shape], dtypes: tuple[str, ...] = tuple(FLOATS.values())
) -> dict[str, np.ndarray]:
    """Exactly these tensors, of these shapes, in float32, which holds each of `dtypes` exactly.

    Raises:
        UserError: everything that is not so, or not finite.
    """
    about, read = contents
    faults = [f"the tensor {name} is missing" for name in wanted if name not in about]
    faults += [f"the tensor {name} is not of this architecture" for name in sorted(set(about) - set(wanted))]
    for name in sorted(set(about) & set(wanted)):
        shape, dtype = about[name]
        if shape != wanted[name]:
            faults.append(f"the tensor {name} has shape {list(shape)}, not {list(wanted[name])}")
        if 0 in shape:
            faults.append(f"the tensor {name} is empty")
        if dtype not in dtypes:
            faults.append(f"the tensor {name} is of type {dtype}, not {' or '.join(dtypes)}")
    refuse(file, faults)
    tensors = {name: np.asarray(read(name), np.float32, order="C") for name in wanted}
    refuse(
        file, [f"the tensor {name} is not finite" for name, value in tensors.items() if not np.isfinite(value).all()]
    )
    return tensors
