"""Activations in files of other programs: .npy, .npz, .safetensors, .parquet, .arrow, and `datasets.save_to_disk`.

An array or column has a row for each token, [N, D], or for each sequence, [S, T, D]. Its name is that of its site; a
.npy file has no names. Arrays `tokens`, `token_ids` or `input_ids`, and `mask` or `attention_mask`, are beside them.
Tokens are taken one after the other and cut into new rows, which are shuffled. So sequences may have any length.
"""

import bisect
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import grain
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epy

from gsae_jax import config as config_lib
from gsae_jax.activations import store
from gsae_jax.errors import UserError, known_names

with epy.lazy_imports():  # slow to import, and needed by some formats only
    import pyarrow
    import pyarrow.parquet

FIELD = "--from"
TOKENS, MASKS = ("tokens", "token_ids", "input_ids"), ("mask", "attention_mask")
KINDS = (".npy", ".npz", ".safetensors", ".parquet", ".arrow")
SAMPLE = 2**20  # bytes at both ends of a file that its fingerprint is of


@dataclasses.dataclass(frozen=True)
class Settings:
    """How files are read.

    Attributes:
        sites: names of the arrays to take; by default all that can be activations. For a .npy file, the site's name.
        context_length: tokens in a row of the store.
        held_out: fraction of the rows for measuring.
        seed: of the order of the rows.
        special_tokens: ids that SAEs never see, where there are tokens.
        model: what the model is called.
    """

    sites: Sequence[str] = ()
    context_length: int = 128
    held_out: float = 0.05
    seed: int = 0
    special_tokens: tuple[int, ...] = ()
    model: str = ""

    def __post_init__(self) -> None:
        """Raises `UserError` for values that cannot be used."""
        if self.context_length < 2:
            raise UserError(f"is {self.context_length}; write 2 or more", "--context_length")
        if not 0 <= self.held_out < 1:
            raise UserError(f"is {self.held_out:g}; write a fraction from 0 to below 1", "--held_out")
        if not 0 <= self.seed <= config_lib.INT32:
            raise UserError(f"is {self.seed}; write an integer from 0 to {config_lib.INT32}", "--seed")


class Sliced(Protocol):
    """What is read by slices of tokens."""

    def __getitem__(self, part: slice) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Part:
    """The arrays of one file, or of a part of it: [tokens, D], or [tokens] of what is beside the activations."""

    file: Path
    count: int
    arrays: Mapping[str, Sliced]


@dataclasses.dataclass(frozen=True)
class Source:
    """The activations of all files.

    Attributes:
        name: of the files.
        dtype: of the activations, one that a store has.
        widths: of the sites.
        rows: in each split of the store.
        has_tokens: whether the files have tokens.
        fingerprint: of the files and how they are read.
    """

    name: str
    dtype: str
    widths: dict[str, int]
    rows: dict[str, int]
    has_tokens: bool
    fingerprint: str
    settings: Settings
    parts: Sequence[_Part]
    ends: Sequence[int]  # of the parts, in tokens
    order: Any

    def read(self, split: str, rows: range) -> dict[str, np.ndarray]:
        """The arrays of a store's rows."""
        T, first = self.settings.context_length, 0 if split == "train" else self.rows["train"]
        dtype = jnp.dtype(self.dtype)
        values = {site: np.zeros((len(rows), T, D), dtype) for site, D in self.widths.items()}
        values["mask"] = np.zeros((len(rows), T), bool)
        if self.has_tokens:
            values["tokens"] = np.zeros((len(rows), T), np.int32)
        places = [(self.order[first + row], number) for number, row in enumerate(rows)]
        for row, number in sorted(places):  # in the order of the files
            for name, at, piece in self._pieces(row * T, min((row + 1) * T, self.ends[-1])):
                target = values[name][number]
                with np.errstate(over="ignore"):  # the check names what is too large
                    target[at : at + len(piece)] = piece.astype(target.dtype, copy=False)
        for site in self.widths:
            broken = np.argwhere(values["mask"] & ~np.isfinite(values[site]).all(-1))
            for number, at in broken:
                self._refuse(site, self.order[first + rows[number]] * T + int(at))
        return values

    def _refuse(self, site: str, token: int) -> NoReturn:
        """Raises `UserError` for an activation that is not finite."""
        file = self.parts[bisect.bisect_right(self.ends, token)].file
        before = next(end - part.count for part, end in zip(self.parts, self.ends, strict=True) if part.file == file)
        raise UserError(
            f"{file} has a value of {site} in row {token - before:,} that is not finite in {self.dtype}; leave out "
            "that row, set its mask to False, or write another --dtype",
            FIELD,
        )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """(array, place in the row, values) of the tokens from start to stop."""
        begin = start
        while start < stop:
            number = bisect.bisect_right(self.ends, start)
            part, offset = self.parts[number], self.ends[number] - self.parts[number].count
            until = min(stop, self.ends[number])
            inside = slice(start - offset, until - offset)
            for name, array in part.arrays.items():
                yield name, start - begin, array[inside]
            if "mask" not in part.arrays:
                yield "mask", start - begin, np.ones(until - start, bool)
            start = until


@contextlib.contextmanager
def opened(paths: Sequence[str], settings: Settings, tokens: int | None = None, dtype: str = "") -> Iterator[Source]:
    """The activations in files and folders.

    Args:
        paths: files, folders of files, or globs; one after the other.
        settings: how they are read.
        tokens: how many to take for training; by default all.
        dtype: of the store; by default that of the files.

    Raises:
        UserError: no file, an unknown kind, or arrays that are not activations of one kind.
    """
    files = _found(paths)
    with tempfile.TemporaryDirectory(prefix="gsae_jax-") as scratch:
        parts = [part for file in files for part in _parts(file, settings, Path(scratch))]
        parts = [part for part in parts if part.count]
        if not parts:
            raise UserError("has no activations; write files that have some", FIELD)
        source = _source(files, parts, settings, tokens)
        yield dataclasses.replace(source, dtype=dtype or source.dtype)


def _source(files: Sequence[Path], parts: Sequence[_Part], settings: Settings, tokens: int | None) -> Source:
    first = parts[0]
    names = [name for name in first.arrays if name not in ("tokens", "mask")]
    if wrong := [site for site in settings.sites if site not in names]:
        raise UserError(f"is {wrong[0]!r}, but {known_names(wrong[0], names)}", "--sites")
    names = list(dict.fromkeys(settings.sites)) or names
    beside = [name for name in ("tokens", "mask") if name in first.arrays]
    looks = {name: first.arrays[name][slice(0, 1)] for name in names}
    kept = []
    for part in parts:
        if missing := {*names, *beside} - part.arrays.keys():
            raise UserError(f"{part.file} has no {', '.join(sorted(missing))}, as the files before it have", FIELD)
        for name, look in looks.items():
            here = part.arrays[name][slice(0, 1)]
            if (here.shape[1:], here.dtype) != (look.shape[1:], look.dtype):
                raise UserError(
                    f"{name} has width {here.shape[-1]} and type {here.dtype} in {part.file}, and {look.shape[-1]} and "
                    f"{look.dtype} in files before it; write files of one kind",
                    FIELD,
                )
        kept.append(_Part(part.file, part.count, {name: part.arrays[name] for name in (*names, *beside)}))
    if settings.special_tokens and "tokens" not in beside:
        raise UserError("is given, but the files have no token ids; leave it out", "--special_tokens")
    dtypes = {look.dtype.name for look in looks.values()}
    ends = list(itertools.accumulate(part.count for part in kept))
    T = settings.context_length
    if ends[-1] < T:
        raise UserError(f"is {T}, but the files have {ends[-1]:,} activations; write fewer", "--context_length")
    rows = -(-ends[-1] // T)
    test = round(rows * settings.held_out)
    train = rows - test if tokens is None else min(rows - test, -(-tokens // T))
    if not train:
        raise UserError(f"has {ends[-1]:,} tokens, too few to train on and to hold some out; write more files", FIELD)
    about = [[file.name, file.stat().st_size, _digest(file)] for file in files]
    described = [about, sorted(names), T, settings.held_out, settings.seed, sorted(settings.special_tokens)]
    # Held-out rows come last in the order, whatever number is trained on.
    shuffled = grain.MapDataset.range(rows).seed(settings.seed).shuffle()
    return Source(
        name=files[0].name if len(files) == 1 else f"{files[0].parent.name}/*",
        dtype=dtypes.pop() if len(dtypes) == 1 and dtypes <= set(store.DTYPES) else "float32",
        widths={name: looks[name].shape[-1] for name in sorted(names)},
        rows={"train": train, "test": test},
        has_tokens="tokens" in beside,
        fingerprint=config_lib.fingerprint(described),
        settings=settings,
        parts=kept,
        ends=ends,
        order=_Order(shuffled, train, rows - test),
    )


class _Order:
    """Rows of the files: those to train on, and after `train` of them the held-out ones, which begin at `test`."""

    def __init__(self, shuffled: Any, train: int, test: int):
        self._shuffled, self._train, self._test = shuffled, train, test

    def __getitem__(self, row: int) -> int:
        return int(self._shuffled[row if row < self._train else row - self._train + self._test])


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        start = content.read(SAMPLE)
        content.seek(max(0, file.stat().st_size - SAMPLE))
        return hashlib.sha256(start + content.read(SAMPLE)).hexdigest()


def _found(paths: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        expanded = os.path.expanduser(path)
        matching = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded))
        if not matching:
            raise UserError(f"{path} does not exist; write a file, a folder or a glob", FIELD)
        for place in map(Path, matching):
            if place.is_file():
                files.append(place)
                continue
            inside = [file for file in sorted(place.rglob("*"), key=_by_number) if file.suffix in KINDS]
            # `datasets` keeps what `map` computed beside the data, under such names.
            files += [file for file in inside if not file.name.startswith(("cache-", "tmp"))]
    if unknown := [file for file in files if file.suffix not in KINDS]:
        known = f"{', '.join(KINDS)}, or a folder of these"
        raise UserError(f"{unknown[0]} is not of a known kind; write {known}", FIELD)
    if twice := [file for number, file in enumerate(files) if file in files[:number]]:
        raise UserError(f"has {twice[0]} twice; write each file once", FIELD)
    if not files:
        raise UserError(f"{', '.join(paths)} has no file that ends in {', '.join(KINDS)}", FIELD)
    return files


def _by_number(file: Path) -> list[Any]:
    """Sorts `2.npy` before `10.npy`."""
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in re.split(r"(\d+)", str(file)) if word]


def _parts(file: Path, settings: Settings, scratch: Path) -> Iterator[_Part]:
    try:
        if file.suffix == ".npy":
            names = settings.sites or ("activations",)
            if len(names) > 1:
                raise UserError(f"is {', '.join(names)}, but {file} has one array; write one name", "--sites")
            yield _part(file, {names[0]: np.load(file, mmap_mode="r", allow_pickle=False)})
        elif file.suffix == ".npz":
            yield _part(file, _unzipped(file, settings, scratch))
        elif file.suffix == ".safetensors":
            opened = safetensors.safe_open(file, "np")
            yield _part(file, {name: _Tensor(opened, name) for name in _wanted(opened.keys(), settings, file)})
        elif file.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(file)
            spool = _Spool(scratch / f"{len(list(scratch.iterdir()))}")
            for batch in table.iter_batches(batch_size=256):
                spool.add({name: _column(batch, name, file) for name in _chosen(batch.schema, settings)})
            if table.metadata.num_rows:
                yield _part(file, spool.arrays())
        else:
            with pyarrow.memory_map(os.fspath(file)) as mapped:
                batches = _batches(mapped)
            for batch in batches:
                yield _part(file, {name: _column(batch, name, file) for name in _chosen(batch.schema, settings)})
    except (OSError, ValueError, safetensors.SafetensorError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())})", FIELD) from error


def _wanted(arrays: Iterable[str], settings: Settings, file: Path) -> list[str]:
    """Names of arrays: of the sites that were named, or all; and of tokens and masks."""
    names = list(arrays)
    if wrong := [site for site in settings.sites if site not in names]:
        raise UserError(f"is {wrong[0]!r}, but {file} has other arrays; {known_names(wrong[0], names)}", "--sites")
    return [name for name in names if not settings.sites or name in (*settings.sites, *TOKENS, *MASKS)]


def _batches(mapped: Any) -> list[Any]:
    """The record batches of an Arrow file or stream; their values stay on the disk."""
    try:
        opened = pyarrow.ipc.open_file(mapped)
        return [opened.get_batch(number) for number in range(opened.num_record_batches)]
    except pyarrow.ArrowInvalid:
        mapped.seek(0)
        return list(pyarrow.ipc.open_stream(mapped))


def _chosen(schema: Any, settings: Settings) -> list[str]:
    """Columns to read: those that are named, or all nested lists of numbers; and tokens and masks."""
    lists = [field.name for field in schema if _depth(field.type) >= 1]
    beside = [name for name in schema.names if name in (*TOKENS, *MASKS)]
    sites = settings.sites or [name for name in lists if name not in beside]
    if wrong := [site for site in sites if site not in schema.names]:
        raise UserError(f"is {wrong[0]!r}, but {known_names(wrong[0], lists)}", "--sites")
    return [*sites, *beside]


def _storage(kind: Any) -> Any:
    """The type under an extension type, such as those of `datasets`."""
    return kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind


def _depth(kind: Any) -> int:
    """How often it is a list."""
    kind = _storage(kind)
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)
    return 1 + _depth(kind.value_type) if is_list else 0


def _column(batch: Any, name: str, file: Path) -> np.ndarray:
    """A column as an array [tokens, D], or [tokens] of numbers beside the activations."""
    column = batch.column(name)
    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    inner = 0 if name in (*TOKENS, *MASKS) else 1  # lists that are an activation, not a sequence
    while (depth := _depth(column.type)) > inner:
        if column.null_count:
            raise UserError(f"{file} has a row without {name}", FIELD)
        column = column.flatten()
        assert _depth(column.type) < depth
    if not inner:
        return column.to_numpy(zero_copy_only=False)
    if column.null_count or not len(column):
        raise UserError(f"{file} has an activation of {name} that is missing", FIELD)
    values = column.flatten()
    D, rest = divmod(len(values), len(column))
    if rest or not D or (not pyarrow.types.is_fixed_size_list(column.type) and len(set(np.diff(column.offsets))) > 1):
        raise UserError(f"{file} has activations of {name} with different widths", FIELD)
    return values.to_numpy(zero_copy_only=False).reshape(-1, D)


class _Spool:
    """Arrays that grow on the disk, of which parts are read without the others in memory."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder, self._kinds = folder, dict[str, tuple[np.dtype, tuple[int, ...]]]()

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Append to the arrays."""
        for number, (name, array) in enumerate(arrays.items()):
            kind = array.dtype, array.shape[1:]
            if self._kinds.setdefault(name, kind) != kind:
                raise ValueError(f"{name} has rows of different widths")
            with open(self._folder / f"{number}", "ab") as file:
                np.ascontiguousarray(array).tofile(file)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was appended, by name."""
        return {
            name: np.memmap(self._folder / f"{number}", dtype, "r").reshape(-1, *row)
            for number, (name, (dtype, row)) in enumerate(self._kinds.items())
        }


def _unzipped(file: Path, settings: Settings, scratch: Path) -> dict[str, np.ndarray]:
    """The wanted arrays of a .npz, on the disk."""
    folder = scratch / f"{len(list(scratch.iterdir()))}"
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        members = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
        for number, name in enumerate(_wanted(members, settings, file)):
            path = folder / f"{number}.npy"
            path.parent.mkdir(exist_ok=True)
            with archive.open(f"{name}.npy") as packed, open(path, "wb") as plain:
                while piece := packed.read(2**20):
                    plain.write(piece)
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    return arrays


class _Tensor:
    """A tensor of a safetensors file, of which parts are read."""

    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, part: slice) -> np.ndarray:
        return np.asarray(self._slice[part])


class _Flat:
    """An array [S, T, D] or [S, T] as one of tokens, [S * T, D] or [S * T]."""

    def __init__(self, array: Any, length: int):
        self._array, self._length = array, length

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last = part.start // self._length, -(-part.stop // self._length)
        values = np.asarray(self._array[first:last])
        values = values.reshape(-1, *values.shape[2:])
        return values[part.start - first * self._length : part.stop - first * self._length]


def _part(file: Path, arrays: Mapping[str, Any]) -> _Part:
    """Arrays of one file as arrays of tokens; raises `UserError` for arrays that do not belong together."""
    flat: dict[str, Sliced] = {}
    counts: dict[str, int] = {}
    for name, array in arrays.items():
        own = "tokens" if name in TOKENS else "mask" if name in MASKS else name
        depth = len(array.shape) - (own == name and name not in ("tokens", "mask"))
        if depth not in (1, 2):
            raise UserError(f"{name} in {file} has the shape {list(array.shape)}; write [N, D] or [S, T, D]", FIELD)
        flat[own] = array if depth == 1 else _Flat(array, array.shape[1])
        counts[own] = array.shape[0] if depth == 1 else array.shape[0] * array.shape[1]
        if counts[own]:
            _check_kind(file, own, flat[own][slice(0, 1)].dtype)
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UserError(f"{file} has arrays of different numbers of tokens: {shown}", FIELD)
    if not flat.keys() - {"tokens", "mask"}:
        raise UserError(f"{file} has no array of activations", FIELD)
    return _Part(file, next(iter(counts.values())), flat)


def _check_kind(file: Path, name: str, dtype: np.dtype) -> None:
    allowed: Callable[[Any], bool] = {
        "tokens": lambda kind: np.issubdtype(kind, np.integer),
        "mask": lambda kind: np.issubdtype(kind, np.bool_) or np.issubdtype(kind, np.integer),
    }.get(name, lambda kind: jnp.issubdtype(kind, jnp.floating))
    if not allowed(dtype):
        wanted = {"tokens": "integers", "mask": "True and False, or 1 and 0"}.get(name, "float32, float16 or bfloat16")
        raise UserError(f"{name} in {file} is of type {dtype}; write {wanted}", FIELD)
