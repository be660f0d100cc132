"""A store of activations on the local disk or in a bucket, which any number of processes write and read at once.

    manifest.json            what the store holds; written first
    train/tokens             [rows, T] int32, if the activations are of text
    train/mask               [rows, T] bool: which tokens SAEs may see; padding is False
    train/SITE               [rows, T, D] in the store's dtype, one array for each site
    train/shards/0.json      the SHA-256 of each array in shard 0; written when the shard is whole
    test/...                 the same for rows that are held out
    index.json               the records of all shards, and the scale of each site; written last

Arrays have the format Zarr 3, so other programs can read them. A shard is one file of each array. Its blocks of rows
have checksums, which every read compares.

Rows lie in random order: a store of text has the order in which a run of its seed reads the text, and other activations
are shuffled when they are written. So long pieces of the disk are read, and batches are still of random rows.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax.errors import TrainingError, UserError, known_names
from gsae_jax.storage import paths, reading

FORMAT = 1
PREFIX = "store:"
MANIFEST, INDEX = "manifest.json", "index.json"
SPLITS = ("train", "test")
DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 2**26  # of the widest array of a shard
BLOCK_BYTES = 2**20  # about what is read at once
CACHE_BYTES = 2**28  # of blocks that a batch needs a part of


class Batch(NamedTuple):
    """Rows of a store.

    Attributes:
        tokens: [R, T] int32; None where the activations are not of text.
        mask: [R, T], which tokens SAEs may see.
        activations: [R, T, D] of each site.
    """

    tokens: np.ndarray | None
    mask: np.ndarray
    activations: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        dtype: of the activations.
        context_length: tokens in a row (T).
        stride: tokens of text in a row, which is one less where each row begins with BOS.
        widths: of the sites (D).
        rows: in each split.
        planned_rows: that the order of the rows is of; more than `rows` if writing ended early.
        shard_rows, block_rows: in a shard and in a block.
        seed: runs with this seed read the rows in their order in the first pass.
        has_tokens: whether the tokens are there.
        special_tokens: ids that `activations.drop_special_tokens` excludes.
        model: fingerprints of the language model; empty where there is none.
        tokenizer: fingerprint of its tokenizer.
        text: fingerprint of the rows of tokens, or of the files that the activations are from.
        source: what the model and the text are called; of a language model also `held_out`, the fingerprint of
            held-out rows, and `held_out_tokens`, how many were asked for. Stores of earlier versions do not have these.
    """

    dtype: str
    context_length: int
    stride: int
    widths: dict[str, int]
    rows: dict[str, int]
    planned_rows: dict[str, int]
    shard_rows: int
    block_rows: int
    seed: int
    has_tokens: bool
    special_tokens: tuple[int, ...]
    model: dict[str, str]
    tokenizer: str
    text: str
    source: dict[str, str]

    @classmethod
    def planned(cls, shard_bytes: int = SHARD_BYTES, **fields: Any) -> "Manifest":
        """A manifest with shards of about `shard_bytes` of the widest array.

        Raises:
            UserError: a site's name cannot be that of a folder, or a shard has too many rows.
        """
        for site in fields["widths"]:
            if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,199}", site, re.ASCII) or site in ("tokens", "mask", "shards"):
                raise UserError(f"{site!r} cannot be the name of a site; write letters, digits, ., _ and -", "--sites")
        row = max(fields["widths"].values()) * fields["context_length"] * jnp.dtype(fields["dtype"]).itemsize
        block_rows = max(1, min(BLOCK_BYTES, shard_bytes // 8) // row)
        shard_rows = max(1, shard_bytes // (row * block_rows)) * block_rows
        if shard_rows > config_lib.INT32:
            raise UserError(f"gives a shard {shard_rows:,} rows; write less", "--shard_megabytes")
        return cls(shard_rows=shard_rows, block_rows=block_rows, **fields)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Manifest":
        """Raises `ValueError` for what no store writes."""
        if tree.get("format") != FORMAT:
            raise ValueError(f"its format is {tree.get('format')!r}, and this version reads {FORMAT}")
        kinds: dict[str, type] = {
            "dtype": str,
            "tokenizer": str,
            "text": str,
            "has_tokens": bool,
            "special_tokens": list,
        }
        kinds |= dict.fromkeys(("widths", "rows", "planned_rows", "model", "source"), dict)
        known: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            kind = kinds.get(field.name, int)
            value: Any = tree.get(field.name)
            fits = isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
            if not fits or (kind is int and value < 0):
                raise ValueError(f"{field.name} is {value!r}")
            known[field.name] = tuple(value) if kind is list else value
        counts = [*known["widths"].values(), *(known[name] for name in ("context_length", "shard_rows", "block_rows"))]
        if (
            known["dtype"] not in DTYPES
            or not known["widths"]
            or any(known[name].keys() != set(SPLITS) for name in ("rows", "planned_rows"))
        ):
            raise ValueError("dtype, widths or rows are not those of a store")
        if not all(isinstance(n, int) and 0 < n <= config_lib.INT32 for n in counts):
            raise ValueError("a size is not a positive number")
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes back."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    def shards(self, split: str) -> int:
        """Shards of a split."""
        return -(-self.rows[split] // self.shard_rows)

    def part(self, split: str, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows[split]))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all arrays."""
        of_a_token = sum(self.widths.values()) * jnp.dtype(self.dtype).itemsize + 1 + 4 * self.has_tokens
        return self.context_length * of_a_token

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape of a row and the dtype of each array."""
        row = (self.context_length,)
        beside = {"mask": (row, "bool")} | ({"tokens": (row, "int32")} if self.has_tokens else {})
        return beside | {site: ((*row, D), self.dtype) for site, D in self.widths.items()}


def location(source: str) -> str:
    """The path in a config's `data.source`; "" if there is none.

    Raises:
        UserError: it is not `store:PATH`.
    """
    if source and (not source.startswith(PREFIX) or source == PREFIX):
        raise UserError(
            f"is {source!r}; write 'store:PATH' with the path of a store, or '' to run the language model",
            "data.source",
        )
    return source.removeprefix(PREFIX)


class Arrays:
    """The arrays of one split, to read or to write.

    Reading raises `TrainingError` where a shard is missing or damaged.
    """

    def __init__(self, path: paths.Path, manifest: Manifest, split: str, sites: Sequence[str] = (), make: bool = False):
        """`sites`: those to open; by default all. `make`: write the arrays' metadata if it is not there yet."""
        self.path, self.manifest, self.split = path / split, manifest, split
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays = {}
        for name, (row, dtype) in manifest.arrays.items():
            if name in manifest.widths and sites and name not in sites:
                continue
            spec = _spec(self.path / name, (manifest.planned_rows[split], *row), dtype, manifest)
            try:
                self._arrays[name] = tensorstore.open(spec, open=True, create=make, context=context).result()
            except (ValueError, OSError) as error:
                problem = f"{self.path / name} cannot be {'written' if make else 'read'} ({_line(error)})"
                raise UserError(f"{problem}; write the path of a whole store") from error

    def read(self, rows: range) -> Batch:
        """A batch of neighbouring rows; raises `TrainingError` as the class says."""
        return self.gather([rows])

    def gather(self, parts: Sequence[range]) -> Batch:
        """The rows of several parts, one part after the other; all are read at once."""
        waiting = {
            name: [array[part.start : part.stop].read() for part in parts] for name, array in self._arrays.items()
        }
        values = {}
        for name, reads in waiting.items():
            pieces = [self._result(name, part, read) for part, read in zip(parts, reads, strict=True)]
            values[name] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        tokens, mask = values.pop("tokens", None), values.pop("mask")
        return Batch(tokens, mask, values)

    def _result(self, name: str, part: range, read: Any) -> np.ndarray:
        try:
            return np.asarray(read.result())
        except (ValueError, OSError) as error:
            first, last = part.start // self.manifest.shard_rows, (part.stop - 1) // self.manifest.shard_rows
            file = re.search(r"/c/(\d+)/", str(error))
            shard = int(file[1]) if file else first
            which = f"shard {shard}" if file or first == last else f"one of the shards {first} to {last}"
            raise TrainingError(
                f"{which} of {self.path / name} is missing or damaged ({_line(error)}); run the command that wrote the "
                "store with --check, which writes damaged shards again, and then this command, which continues"
            ) from error

    def write(self, shard: int, values: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Write a shard, and return its record; raises `OSError` where that fails."""
        part = self.manifest.part(self.split, shard)
        try:
            waiting = [self._arrays[name][part.start : part.stop].write(value) for name, value in values.items()]
            digests = {name: digest(value) for name, value in values.items()}
            for write in waiting:
                write.result()
        except ValueError as error:  # tensorstore's error for a full disk, among others
            raise OSError(_line(error)) from error
        return digests


def _spec(path: paths.Path, shape: tuple[int, ...], dtype: str, manifest: Manifest) -> dict[str, Any]:
    """What tensorstore opens: little-endian values in blocks with checksums, blocks in shards."""
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if jnp.dtype(dtype).itemsize == 1:
        codecs[0] = {"name": "bytes"}
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [manifest.block_rows, *shape[1:]], "codecs": codecs, "index_codecs": index}
    grid = {"chunk_shape": [manifest.shard_rows, *shape[1:]]}
    where = os.fspath(path)
    return {
        "driver": "zarr3",
        "kvstore": f"{where}/" if path.local is None else {"driver": "file", "path": f"{path.absolute()}/"},
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "fill_value": False if dtype == "bool" else 0,
            "chunk_grid": {"name": "regular", "configuration": grid},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Without these, a missing shard would be read as zeros, and a shard of zeros would not be written.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
    }


def digest(value: np.ndarray) -> str:
    """The SHA-256 of an array's values in C order."""
    return hashlib.sha256(np.ascontiguousarray(value).view(np.uint8).data).hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def record_path(path: paths.Path, split: str, shard: int) -> paths.Path:
    """Where the record of a shard lies."""
    return path / split / "shards" / f"{shard}.json"


def read_manifest(path: epath.PathLike) -> Manifest | None:
    """The manifest of a store that may not be whole; None if nothing is there.

    Raises:
        UserError: something else is there.
    """
    folder = paths.of_user(path)
    try:
        return Manifest.from_json(reading.load_json(folder / MANIFEST))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is not that of a store ({error}); write another path") from error
    except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
        raise UserError(folder.unreadable(error)) from error


def whole_shards(path: paths.Path, manifest: Manifest) -> dict[str, dict[int, dict[str, str]]]:
    """The records of the shards that are whole, by split and shard. Damaged records are left out."""
    records: dict[str, dict[int, dict[str, str]]] = {split: {} for split in SPLITS}
    for split in SPLITS:
        folder = path / split / "shards"
        for file in folder.iterdir() if folder.exists() else ():
            number = file.name.removesuffix(".json")
            if number.isdecimal() and int(number) < manifest.shards(split):
                try:
                    record = reading.load_json(file)
                except ValueError:
                    continue
                if record.keys() == manifest.arrays.keys():
                    records[split][int(number)] = record
    return records


@dataclasses.dataclass(frozen=True)
class Store:
    """A whole store.

    Attributes:
        path: where it lies.
        manifest: what it holds.
        fingerprint: of everything in it.
    """

    path: paths.Path
    manifest: Manifest
    fingerprint: str

    @classmethod
    def open(cls, path: epath.PathLike) -> "Store":
        """Raises `UserError` where there is no whole store."""
        folder = paths.of_user(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} has no store; write the path of one (python -m gsae_jax.store makes it)")
        try:
            index = reading.load_json(folder / INDEX)
            shards = {split: len(index["shards"][split]) for split in SPLITS}
            if shards != {split: manifest.shards(split) for split in SPLITS}:
                raise ValueError("it does not have the number of shards that manifest.json says")
        except FileNotFoundError as error:
            whole = sum(map(len, whole_shards(folder, manifest).values()))
            number = sum(map(manifest.shards, SPLITS))
            raise UserError(
                f"{folder} has {whole} of {number} shards; run the command that writes it again, which continues"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error}); remove it and write the store again") from error
        return cls(folder, manifest, config_lib.fingerprint(manifest.to_json(), index))

    def rows(self, split: str, sites: Sequence[str] = ()) -> "StoredRows":
        """The rows of a split; `sites`: those to read, by default all."""
        return StoredRows(self, split, tuple(sites))

    def check_sites(self, sites: Mapping[str, str]) -> None:
        """Raises `UserError` for a site that is not in the store; `sites` has the field that names each."""
        for site, field in sites.items():
            if site not in self.manifest.widths:
                known = known_names(site, list(self.manifest.widths))
                raise UserError(f"is {site!r}, which is not in the store {self.path}; {known}", field)


@dataclasses.dataclass(frozen=True)
class StoredRows:
    """Rows of a store. It has what training needs of `data.rows.TokenRows`.

    Attributes:
        store: which it reads.
        split: "train" or "test".
        sites: to read; () = all.
        most: rows that are read; None = all.
    """

    store: Store
    split: str
    sites: tuple[str, ...]
    most: int | None = None

    def __len__(self) -> int:
        rows = self.store.manifest.rows[self.split]
        return rows if self.most is None else min(self.most, rows)

    def limited(self, tokens: int) -> "StoredRows":
        """Only the rows that so many tokens of text give."""
        return dataclasses.replace(self, most=tokens // self.store.manifest.stride)

    @property
    def fingerprint(self) -> str:
        """A name for the rows."""
        return config_lib.fingerprint(self.store.fingerprint, self.split, len(self))

    @cached_property
    def arrays(self) -> Arrays:
        """The arrays that they are in."""
        return Arrays(self.store.path, self.store.manifest, self.split, self.sites)

    def batches(
        self, rows_per_batch: int, seed: int, local: Sequence[int] | np.ndarray, parts: Sequence[int]
    ) -> "grain.DatasetIterator":
        """Endless batches of rows; of each only those numbered `local`. The arguments are those of `data.rows.batches`.

        The first pass of a run with the store's seed reads the rows as they lie. Every other pass has its own order of
        blocks.

        Raises:
            UserError: the store has fewer rows than one batch.
        """
        if len(self) < rows_per_batch:
            raise UserError(
                f"the store gives {len(self)} rows, fewer than one batch of {rows_per_batch}; write more into it, or "
                "take fewer rows at once",
                "data.source",
            )
        in_order = seed == self.store.manifest.seed
        order = Order(sorted({*parts, len(self)} - {0}), self.store.manifest.block_rows, seed, in_order)
        source = grain.MapDataset.source(_Batches(self, order, rows_per_batch, np.asarray(local)))
        return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


class Batches(Sequence[Batch]):
    """Every row once, in order, in batches, each read when it is asked for; the last one may have fewer rows.

    Attributes:
        parts: the rows of each batch.
    """

    def __init__(self, rows: StoredRows, rows_per_batch: int):
        self._rows, count = rows, len(rows)
        self.parts = [range(at, min(at + rows_per_batch, count)) for at in range(0, count, rows_per_batch)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(self)))]
        return self._rows.arrays.read(self.parts[number])


class Order:
    """Which row lies at each place of endless passes over the rows: blocks in random order, and their rows in order."""

    def __init__(self, ends: Sequence[int], block_rows: int, seed: int, in_order: bool):
        """`ends`: of the parts, which are shuffled by themselves. `in_order`: the first pass reads rows as they lie."""
        self._starts, self._ends, self._block_rows = np.array([0, *ends[:-1]]), np.array(ends), block_rows
        self._in_order = in_order
        self._blocks = [
            grain.MapDataset.range(max(1, (end - start) // block_rows)).seed(seed).shuffle().repeat()
            for start, end in zip(self._starts, self._ends, strict=True)
        ]

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """The rows at these places."""
        passes, within = np.divmod(places, self._ends[-1])
        rows = within.copy()
        for place in np.flatnonzero((passes > 0) | (not self._in_order)):
            number = int(np.searchsorted(self._ends, within[place], side="right"))
            start, blocks = self._starts[number], (self._ends[number] - self._starts[number]) // self._block_rows
            block, row = divmod(int(within[place] - start), self._block_rows)
            if block < blocks:  # the rows after the last whole block stay where they are
                rows[place] = start + self._blocks[number][int(passes[place]) * blocks + block] * self._block_rows + row
        return rows


class _Batches:
    """The batches of `StoredRows.batches`."""

    def __init__(self, rows: StoredRows, order: Order, per_batch: int, local: np.ndarray):
        self._rows, self._order, self._per_batch, self._local = rows, order, per_batch, local

    def __len__(self) -> int:
        return 2**62 // self._per_batch

    def __getitem__(self, batch: int) -> Batch:
        rows = self._order[batch * self._per_batch + self._local]
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        return self._rows.arrays.gather([range(int(p[0]), int(p[-1]) + 1) for p in np.split(rows, cuts)])
