"""Writing a store of activations: what a language model gives for text, or what files hold."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from gsae_jax import config as config_lib
from gsae_jax import errors, experiments, processes, sae_loading
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import imports, sources
from gsae_jax.activations import store as store_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.lms import loading, sites
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.storage import paths, writing
from gsae_jax.training import preparation

logger = logging.getLogger(__name__)

LOCK = ".lock"
Shard = tuple[str, int]  # split, number


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to write.

    Attributes:
        out: the store's path, local or gs://bucket/folder.
        sites: of the language model; by default those of the config's stacks.
        tokens: of the text to train on; by default as many as a run of the config reads.
        dtype: of the activations; by default that of the language model, or of the files.
        check: compare every shard with its recorded hash, and write damaged ones again.
        shard_bytes: size of a file of the widest site.
    """

    out: str
    sites: Sequence[str] = ()
    tokens: int | None = None
    dtype: str = ""
    check: bool = False
    shard_bytes: int = store_lib.SHARD_BYTES

    def __post_init__(self) -> None:
        """Raises `UserError` for values that cannot be used."""
        if self.dtype and self.dtype not in store_lib.DTYPES:
            raise UserError(f"is {self.dtype!r}; write {', '.join(store_lib.DTYPES)}", "--dtype")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"is {self.tokens}; write 1 or more", "--tokens")


def of_model(config: Any, wanted: Wanted) -> str:
    """Write the activations of a config's language model over its text, or continue writing.

    Args:
        config: an experiment, as `gsae_jax.experiment` accepts it. Its `lm`, `data`, `mesh`, `activations` and `seed`
            are used, and its `stacks` and `train` for what `wanted` leaves open.
        wanted: what to write.

    Returns:
        A sentence about the store.

    Raises:
        UserError: the config cannot be used, or the path has another store or no room.
        TrainingError: the store cannot be written to its end. What is whole stays.
    """
    config = experiments.experiment(config)
    if config.data.source:
        raise UserError(f"is {config.data.source!r}, but a store is written from text; write ''", "data.source")
    mesh = mesh_lib.make_mesh(config.mesh)
    mesh_lib.check(config, mesh)
    with errors.about("lm.path", revision="lm.revision"):
        checkpoint = Checkpoint.open(config.lm.path, config.lm.revision)
        tokenizer = checkpoint.tokenizer()
        fingerprint = checkpoint.fingerprint()
    whole = checkpoint.module()
    loading.check_context(whole, config.data.context_length)
    names = tuple(sorted(set(wanted.sites))) or tuple(config.sites)
    for site in names:
        sites.check(site, loading.site_widths(whole), "--sites")
    module = checkpoint.module(1 + max(map(sites.layer_of, names)), mesh)
    tokens = wanted.tokens or preparation.tokens_needed(config)
    d_vocab = checkpoint.config.d_vocab
    rows = rows_lib.open_rows(config.data, "train", tokenizer, tokens, d_vocab)
    if not len(rows):
        raise UserError(f"is {tokens}, which gives no row; write more", "--tokens")
    if wanted.tokens and len(rows) < (most := tokens // (config.data.context_length - config.data.prepend_bos)):
        logger.warning(f"--tokens: the text has {len(rows):,} rows of the {most:,} asked for")
    held_out = rows_lib.held_out_rows(config, tokenizer, config.evaluation.tokens, d_vocab)
    with errors.about("--out"):
        is_new = store_lib.read_manifest(wanted.out) is None
    if is_new:
        rows_lib.check_new(config.data)
        rows_lib.check_apart(rows, held_out)
    names_of = sae_loading.names(config.lm, config.data)
    source = sources.LanguageModel(module, mesh, names, (), config.rows_per_call, config.forwards_per_call)
    manifest = store_lib.Manifest.planned(
        wanted.shard_bytes,
        dtype=wanted.dtype or config.lm.dtype,
        context_length=config.data.context_length,
        stride=config.data.context_length - config.data.prepend_bos,
        widths=dict(sorted(source.widths.items())),
        rows={"train": len(rows), "test": len(held_out)},
        planned_rows={"train": len(rows), "test": len(held_out)},
        seed=config.seed,
        has_tokens=True,
        special_tokens=tuple(loading.special_tokens(tokenizer)),
        model=fingerprint,
        tokenizer=config_lib.fingerprint(tokenizer.backend_tokenizer.to_str()),
        text=config_lib.fingerprint(rows.fingerprint, held_out.fingerprint),
        source={
            "model": names_of["model_name"],
            "text": names_of["dataset_path"],
            "held_out": held_out.fingerprint,
            "held_out_tokens": str(rows_lib.held_out_tokens(config, config.evaluation.tokens)),
        },
    )
    processes.agree("--out", manifest.to_json(), "start every process with the same command and the same files")
    with _opened(wanted, manifest) as writer:
        if writer.missing:
            params = checkpoint.params(module, config.lm.dtype)
            texts = {"train": rows_lib.shuffled(rows, config.seed), "test": held_out}
            writer.write(_forward(source, params, writer, texts))
        return writer.finish()


def of_files(files: Sequence[str], wanted: Wanted, settings: "imports.Settings") -> str:
    """Write the activations that files hold, or continue writing; returns and raises as `of_model` does.

    Args:
        files: paths of files or folders, as `activations.imports` reads them.
        wanted: what to write.
        settings: how the files are read.
    """
    if jax.process_count() > 1:
        raise UserError("is above 1; convert files in one process", "--num_processes")
    with imports.opened(files, settings, wanted.tokens, wanted.dtype) as source:
        manifest = store_lib.Manifest.planned(
            wanted.shard_bytes,
            dtype=source.dtype,
            context_length=settings.context_length,
            stride=settings.context_length,
            widths=source.widths,
            rows=source.rows,
            planned_rows=source.rows,
            seed=settings.seed,
            has_tokens=source.has_tokens,
            special_tokens=settings.special_tokens,
            model={},
            tokenizer="",
            text=source.fingerprint,
            source={"model": settings.model, "text": source.name},
        )
        with _opened(wanted, manifest) as writer:
            if writer.missing:
                writer.write((shard, source.read(shard[0], writer.part(shard))) for shard in writer.missing)
            return writer.finish()


def check(wanted: Wanted) -> str:
    """Compare every shard of a whole store with its recorded hash; raises `UserError` for damaged ones."""
    with errors.about("--out"):
        store = store_lib.Store.open(wanted.out)
    damaged = _damaged(store.path, store.manifest, store_lib.whole_shards(store.path, store.manifest))
    if damaged:
        raise UserError(
            f"{_listed(damaged)} of {store.path} are damaged; run the command that wrote the store with --check, which "
            "writes them again",
            "--out",
        )
    return f"{store.path} is whole: {_described(store.manifest)}"


@contextlib.contextmanager
def _opened(wanted: Wanted, manifest: store_lib.Manifest) -> Iterator["_Writer"]:
    """A writer of the store, with the lock of its folder."""
    with errors.about("--out"):
        folder = paths.of_user(wanted.out)
        folder.check_writable()
        before = store_lib.read_manifest(folder)
        if before is None:
            if not folder.is_empty(ignored=LOCK):
                raise UserError(f"{folder} exists and is no store; write the name of a new or empty folder")
        else:
            manifest = _continued(folder, before, manifest, wanted)
    with contextlib.ExitStack() as stack:
        if processes.first():
            folder.make_folder()
            if (lock := folder.lock(LOCK)) is not None:
                try:
                    stack.enter_context(lock.acquire(blocking=False))
                except filelock.Timeout as error:
                    raise UserError(f"another process writes {folder}; wait for it to end", "--out") from error
        writer = _Writer(folder, manifest, wanted.check, is_new=before is None)
        try:
            yield writer
        except OSError as error:
            raise writer.stopped(error) from error
        except UserError:
            # Files must change before the command can be run again, and then they are another text.
            if before is None and not manifest.model and processes.first():
                for name in (store_lib.INDEX, store_lib.MANIFEST):
                    (folder / name).unlink(missing_ok=True)
                for split in store_lib.SPLITS:
                    if (folder / split).exists():
                        (folder / split).rmtree()
            raise


def _continued(
    folder: paths.Path, before: store_lib.Manifest, now: store_lib.Manifest, wanted: Wanted
) -> store_lib.Manifest:
    """The manifest to continue with; raises `UserError` where the folder has another store."""
    # The order of the rows is that of the first command; a later one may ask for fewer of them.
    fewer = wanted.tokens is not None and now.rows["train"] < before.planned_rows["train"]
    same = ("text", "rows", "planned_rows", "shard_rows") if fewer else ("rows", "shard_rows")
    # `held_out` is a part of `text`, and earlier versions did not write it.
    was, wants = (
        each.to_json() | {"source": {name: each.source.get(name) for name in ("model", "text")}}
        for each in (before, now)
    )
    differing = [name for name in was if was[name] != wants[name] and name not in same]
    if not fewer and now.planned_rows != before.planned_rows:
        differing.append("tokens")
    if differing:
        shown = "; ".join(f"{name}: {_short(was.get(name))} there, {_short(wants.get(name))} now" for name in differing)
        raise UserError(f"{folder} has a store with other settings ({shown}); write the name of a new folder")
    if not fewer:
        return before
    shards = -(-now.rows["train"] // before.shard_rows)
    rows = min(shards * before.shard_rows, before.planned_rows["train"])
    return dataclasses.replace(before, rows=before.rows | {"train": rows})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Writer:
    """Writes shards in the background, and says which are whole.

    Attributes:
        manifest: of the store.
        missing: the shards that are still to be written, by all processes.
    """

    def __init__(self, folder: paths.Path, manifest: store_lib.Manifest, check: bool, is_new: bool):
        """Raises `UserError` where there is no room. Nothing was written then."""
        self._folder, self.manifest = folder, manifest
        records = store_lib.whole_shards(folder, manifest)
        if check and processes.first() and (damaged := _damaged(folder, manifest, records)):
            logger.warning(f"{_listed(damaged)} are damaged and are written again")
            for split, number in damaged:
                store_lib.record_path(folder, split, number).unlink()
        processes.wait("the shards of the store")
        records = store_lib.whole_shards(folder, manifest) if check else records
        every = [(split, number) for split in store_lib.SPLITS for number in range(manifest.shards(split))]
        self.missing = [(split, number) for split, number in every if number not in records[split]]
        rows = sum(len(self.part(shard)) for shard in self.missing)
        self._check_room(rows * manifest.row_bytes, len(every))
        if processes.first():
            if is_new or self.missing or store_lib.read_manifest(folder) != manifest:
                index = folder / store_lib.INDEX
                if index.exists():
                    index.unlink()
                writing.write_text(folder / store_lib.MANIFEST, json.dumps(manifest.to_json(), indent=2) + "\n")
            for split in store_lib.SPLITS:
                if manifest.rows[split]:
                    store_lib.Arrays(folder, manifest, split, make=True)
        processes.wait("the arrays of the store")

    def part(self, shard: Shard) -> range:
        """The rows of a shard."""
        return self.manifest.part(*shard)

    def _check_room(self, needed: int, number: int) -> None:
        """Say how large the store will be; raises `UserError` where the disk has less room."""
        if not self.missing or not processes.first():
            return
        whole = number - len(self.missing)
        before = f", of which {whole:,} are there" if whole else ""
        free = None if self._folder.local is None else _free(self._folder)
        logger.info(
            f"{self._folder}: {_described(self.manifest)}; {number:,} shards{before}; "
            f"{_size(needed)} to write{'' if free is None else f', {_size(free)} free'}"
        )
        if free is not None and needed > free:
            fits = int(free * 0.95) // self.manifest.row_bytes * self.manifest.stride
            raise UserError(
                f"{self._folder} needs {_size(needed)}, and the disk has {_size(free)} free; write another folder, or "
                f"at most --tokens={fits}",
                "--out",
            )

    def write(self, values: Iterator[tuple[Shard, dict[str, np.ndarray]]]) -> None:
        """Write shards as they come; raises `OSError` where that fails."""
        arrays: dict[str, store_lib.Arrays] = {}
        mine = -(-len(self.missing) // jax.process_count())
        hidden = None if processes.first() else True  # None: where there is no terminal
        with ThreadPoolExecutor(1) as pool, tqdm.tqdm(total=mine, unit="shard", disable=hidden) as bar:
            waiting: Future[None] | None = None

            def put(shard: Shard, of_shard: dict[str, np.ndarray]) -> None:
                split, number = shard
                if split not in arrays:
                    arrays[split] = store_lib.Arrays(self._folder, self.manifest, split)
                record = arrays[split].write(number, of_shard)
                path = store_lib.record_path(self._folder, split, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                writing.write_text(path, json.dumps(record))

            for shard, of_shard in values:
                if waiting is not None:
                    waiting.result()
                waiting = pool.submit(put, shard, of_shard)
                bar.update()
            if waiting is not None:
                waiting.result()

    def finish(self) -> str:
        """Write the index, which says that the store is whole; returns a sentence about the store."""
        processes.wait("the last shard of the store")
        folder, manifest = self._folder, self.manifest
        if processes.first() and not (folder / store_lib.INDEX).exists():
            records = store_lib.whole_shards(folder, manifest)
            shards = {
                split: [records[split][number] for number in range(manifest.shards(split))]
                for split in store_lib.SPLITS
            }
            writing.write_text(folder / store_lib.INDEX, json.dumps({"shards": shards}) + "\n")
        processes.wait("the index of the store")
        return f"{folder} is whole: {_described(manifest)}"

    def stopped(self, error: OSError) -> TrainingError:
        """The error of a store that cannot be written to its end."""
        whole = sum(map(len, store_lib.whole_shards(self._folder, self.manifest).values()))
        return TrainingError(
            f"{self._folder} cannot be written ({error}); {whole:,} shards are whole and stay. Make room, and the same "
            "command continues; with fewer --tokens it ends with what is there"
        )


def _forward(
    source: sources.LanguageModel, params: Any, writer: _Writer, texts: Mapping[str, Any]
) -> Iterator[tuple[Shard, dict[str, np.ndarray]]]:
    """The shards that this process writes, and their values.

    Processes work in lanes: each lane has its own shards, and its rows are a part of every batch. Processes that hold
    copies of the same rows are one lane, and the first of them writes.
    """
    mesh, manifest, R = source.mesh, writer.manifest, source.rows
    local = mesh_lib.local_rows(mesh, R)
    firsts = multihost_utils.process_allgather(np.array([local[0], len(local)])).reshape(-1, 2)
    lanes = sorted({int(first) for first, _ in firsts})
    if len({int(count) for _, count in firsts}) > 1 or len(lanes) * len(local) != R:
        raise UserError("splits the batch unevenly over processes; write 1", "mesh.latent")
    lane = lanes.index(int(local[0]))
    writes = int(np.flatnonzero(firsts[:, 0] == local[0])[0]) == jax.process_index()
    dtype = jnp.dtype(manifest.dtype)

    @jax.jit
    def forward(params: Any, batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
        activations, mask = source(params, batch)
        stored = {site: x.astype(dtype) for site, x in activations.items()}
        lost = {site: (jnp.isfinite(x) & ~jnp.isfinite(stored[site])).sum() for site, x in activations.items()}
        everywhere = mesh_lib.sharding(mesh, "data")
        return (*jax.lax.with_sharding_constraint((stored, mask), everywhere), lost)

    for turn in range(0, len(writer.missing), len(lanes)):
        shards = writer.missing[turn : turn + len(lanes)]
        mine = shards[lane] if lane < len(shards) else None
        longest = max(len(writer.part(shard)) for shard in shards)
        part = range(0) if mine is None else writer.part(mine)
        text = texts[mine[0]] if mine else texts[shards[0][0]]
        values = {name: np.empty((len(part), *row), jnp.dtype(kind)) for name, (row, kind) in manifest.arrays.items()}
        pending: deque[tuple[int, Any]] = deque()  # one call runs while the results of another are fetched
        for start in range(0, longest, len(local)):
            numbers = [part[min(at, len(part) - 1)] if part else 0 for at in range(start, start + len(local))]
            tokens = np.stack([text[number] for number in numbers])
            if start < len(part):
                values["tokens"][start : start + len(local)] = source.tokens(tokens)[: len(part) - start]
            pending.append((start, forward(params, source.place(tokens))))
            if len(pending) > 1:
                _fetch(mesh, manifest, values, *pending.popleft())
        while pending:
            _fetch(mesh, manifest, values, *pending.popleft())
        if mine is not None and writes:
            yield mine, values


def _fetch(
    mesh: jax.sharding.Mesh, manifest: store_lib.Manifest, values: Mapping[str, np.ndarray], start: int, results: Any
) -> None:
    """Put this process's rows of a call into its shard, from row `start` of the shard on."""
    stored, mask, lost = results
    for site, count in jax.device_get(lost).items():
        if count:
            too_large = f"is {manifest.dtype}, which cannot hold {count} values at {site}"
            raise UserError(f"{too_large}; write bfloat16 or float32", "--dtype")
    for name, x in (stored | {"mask": mask}).items():
        local = mesh_lib.local_values(mesh, x)
        rows = values[name][start : start + len(local)]
        rows[:] = local[: len(rows)]


def _damaged(
    folder: paths.Path, manifest: store_lib.Manifest, records: Mapping[str, Mapping[int, Mapping[str, str]]]
) -> list[Shard]:
    """The shards whose values are not those of their records."""
    damaged = []
    for split in store_lib.SPLITS:
        arrays = store_lib.Arrays(folder, manifest, split) if records[split] else None
        for number, record in sorted(records[split].items()):
            assert arrays is not None
            try:
                batch = arrays.read(manifest.part(split, number))
            except TrainingError:
                damaged.append((split, number))
                continue
            beside = {"mask": batch.mask} | ({} if batch.tokens is None else {"tokens": batch.tokens})
            if {name: store_lib.digest(value) for name, value in (batch.activations | beside).items()} != record:
                damaged.append((split, number))
    return damaged


def _listed(shards: Sequence[Shard]) -> str:
    return ", ".join(f"shard {number} of {split}" for split, number in shards)


def _described(manifest: store_lib.Manifest) -> str:
    count = manifest.rows["train"] * manifest.context_length
    names = ", ".join(f"{site} ({D})" for site, D in manifest.widths.items())
    held_out = manifest.rows["test"] * manifest.context_length
    return f"{count:,} tokens, {held_out:,} held out, at {names} in {manifest.dtype}"


def _free(folder: paths.Path) -> int:
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
