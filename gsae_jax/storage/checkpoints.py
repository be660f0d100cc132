"""The checkpoints of a run. The only file that knows orbax.

A checkpoint has four parts: the SAEs' parameters (which `gsae_jax.load` reads alone), the rest of the training state,
the position in the data, and facts about the run; and a manifest, the size and the hash of every file, with which they
are compared before they are read. It appears whole or not at all.
"""

import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from gsae_jax.storage import paths, reading
from gsae_jax.storage.facts import Facts

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"  # in the run directory
MANIFEST = "manifest.json"
SEALS = ("_CHECKPOINT_METADATA", "commit_success.txt")  # of a checkpoint; orbax writes them after the manifest


class SavedCheckpoints:
    """The checkpoints that lie in a run directory.

    Attributes:
        path: of the run directory.
        field: what an error calls it.
    """

    def __init__(self, path: paths.Path, field: str):
        self.path, self.field = path, field
        self._folder = path / FOLDER

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(ocp.utils.checkpoint_steps(self._folder), default=None) if self._folder.is_dir() else None

    def sound_step(self, parts: tuple[str, ...] = ("",), step: int | None = None) -> int | None:
        """The newest checkpoint whose files are as they were written; warns of every newer one.

        Args:
            parts: look at the files of these parts only.
            step: look at this checkpoint only.

        Raises:
            UserError: there are checkpoints, and none is sound; or not the one that is asked for.
        """
        steps = sorted(self._steps(), reverse=True)
        if step is not None:
            if step not in steps:
                raise UserError(f"{step} has no checkpoint in {self.path}; write one of {steps[::-1]}", "step")
            steps = [step]
        if parts != ("",) and steps and not any((self._folder / str(step) / MANIFEST).exists() for step in steps):
            logger.warning(f"the checkpoints in {self.path} are of an earlier version, which wrote no hashes")
            return steps[0]
        problems = []
        for step in steps:
            problem = _problem(self._folder / str(step), parts)
            if problem is None:
                return step
            problems.append(f"checkpoint {step}: {problem}")
            logger.warning(f"{problems[-1]}; looking for an earlier one")
        if problems:
            raise UserError(
                f"no checkpoint in {self.path} is whole ({'; '.join(problems)}); put these files back, or write "
                "another directory",
                self.field,
            )
        return None

    def set_aside(self, newer_than: int | None) -> None:
        """Move checkpoints that were passed over to `damaged/`, and older ones that orbax would stumble over."""
        for step in self._steps():
            if newer_than is not None and (step > newer_than or _problem(self._folder / str(step), ("metrics",))):
                folder, number = self.path / "damaged", 0
                while (folder / f"{step}-{number}").exists():
                    number += 1
                (self._folder / str(step)).move_folder(folder / f"{step}-{number}")

    def _steps(self) -> list[int]:
        names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        return [int(name) for name in names if re.fullmatch("0|[1-9][0-9]{,17}", name)]

    def params(self, step: int, like: Any) -> Any:
        """The SAEs' parameters of a checkpoint, on the shardings of the given `ShapeDtypeStruct` tree."""
        with ocp.StandardCheckpointer() as checkpointer, _readable(self.path, step, self.field):
            return checkpointer.restore(self._item(step, "params"), like)

    def facts(self, step: int) -> Facts:
        """What a checkpoint says of its run; raises `UserError` where they are not as they were written."""
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer, _readable(self.path, step, self.field):
            tree = checkpointer.restore(self._item(step, "facts"), args=ocp.args.JsonRestore())
        try:
            return Facts.from_json(tree)
        except ValueError as error:
            why = f"the facts of checkpoint {step} in {self.path} are not as they were written ({error})"
            raise UserError(f"{why}; restore the original file", self.field) from error

    def _item(self, step: int, name: str) -> paths.Path:
        return (self._folder / str(step) / name).absolute()


class Checkpoints:
    """The checkpoints of a run directory, written in the background."""

    def __init__(self, saved: SavedCheckpoints, config: config_lib.Checkpoint):
        """`saved`: those of the run; `config`: which to keep."""
        self._folder, self._config, self._saving = (saved.path / FOLDER).absolute(), config, 0
        self._field = saved.field
        self._saved: dict[str, Any] = {}  # what is being saved: trees of `ShapeDtypeStruct`s, and what JSON holds
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policy, config = ocp.checkpoint_managers, self._config
        keep = [policy.LatestN(n=config.keep)]
        if config.keep_every:
            keep.append(policy.EveryNSteps(interval_steps=config.keep_every, exact_interval=False))
        if config.keep_best:
            lowest = {"n": 1, "reverse": True, "keep_checkpoints_without_metrics": False}
            keep.append(policy.BestN(get_metric_fn=_score, **lowest))
        # Called when all files are written, before the checkpoint takes its name and older ones are deleted.
        written = ocp.options.AsyncOptions(post_finalization_callback=self._finish)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy(keep),
            best_fn=_score if config.keep_best else None,  # without it orbax would not save what `score` is
            async_options=written,
        )
        # Compression takes the cores that train for a second, and noise does not get smaller.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ("params", "state")}
        handlers |= {name: ocp.JsonCheckpointHandler() for name in ("data", "facts")}
        manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        # It asks with the number of updates, where the trainer counts calls; JAX would then expect the end far ahead.
        manager.reached_preemption = lambda step: False
        return manager

    def save(self, step: int, params: Any, state: Any, data: dict[str, Any], facts: Facts, score: float | None) -> None:
        """Save in the background; arrays are copied before this returns. The lowest `score` is the best.

        A save that fails, as on a full disk, is a warning; so is one that cannot be read back. The checkpoints before
        it stay.
        """
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data),
            facts=ocp.args.JsonSave(facts.to_json()),
        )
        self.wait()  # before the name changes that the manifest's place is found by
        self._saving = step
        arrays = {"params": params, "state": state}
        self._saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays) | {
            "data": data,
            "facts": facts.to_json(),
        }
        self._try(self._manager.save, step, args=items, metrics=None if score is None else {"score": score})

    def _finish(self) -> None:
        """Reads the checkpoint back, and writes its manifest."""
        # The name of a local checkpoint in the making has a suffix.
        (folder,) = [path for path in self._folder.iterdir() if path.name.partition(".")[0] == str(self._saving)]
        self._read_back(folder)
        _write_manifest(folder)

    def _read_back(self, folder: epath.Path) -> None:
        """Opens every array by its name, as restoring does, and reads the rest; raises what keeps one from being read.

        Of the arrays it reads shapes and types only. Their contents are covered by the hashes of the files.
        """
        for name in ("params", "state"):
            stored = ocp.PyTreeCheckpointHandler().metadata(folder / name).tree
            stored, saved = (
                {".".join(path): (leaf.shape, leaf.dtype) for path, leaf in ocp.tree.to_flat_dict(tree).items()}
                for tree in (stored, self._saved[name])
            )
            if stored != saved:
                raise OSError(
                    f"{', '.join(sorted(dict(stored.items() ^ saved.items())))} of {name} cannot be read back"
                )
        for name in ("data", "facts"):
            stored = ocp.JsonCheckpointHandler().restore(folder / name, args=ocp.args.JsonRestore())
            if json.dumps(stored, sort_keys=True) != json.dumps(self._saved[name], sort_keys=True):
                raise OSError(f"{name} cannot be read back")

    def restore(self, step: int, params: Any, state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(params, state, data) of a step, on the shardings of the given `ShapeDtypeStruct` trees."""
        items = ocp.args.Composite(
            params=_restore_args(params), state=_restore_args(state), data=ocp.args.JsonRestore()
        )
        with _readable(self._folder, step, self._field):
            restored = self._manager.restore(step, args=items)
        return restored.params, restored.state, restored.data

    def wait(self) -> None:
        """Wait for what is being written."""
        self._try(self._manager.wait_until_finished)

    def _try(self, what: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            what(*args, **kwargs)
        except Exception as error:
            if jax.process_count() > 1:  # the others wait for this one's part
                raise
            reason = " ".join(str(error).split()).partition(" [tensorstore_spec")[0]
            logger.warning(f"checkpoint {self._saving} could not be saved ({reason}); training goes on without it")
            with contextlib.suppress(Exception):
                self._manager.close()
            # Room for the next one; threads of the failed save may still be writing there for a moment.
            for path in self._folder.glob(f"{self._saving}.*"):
                for _ in range(100):
                    with contextlib.suppress(OSError):
                        path.rmtree(missing_ok=True)
                        break
                    time.sleep(0.05)
            with contextlib.suppress(Exception):  # else the next save fails too
                self._manager = self._open()

    def close(self) -> None:
        """Wait for what is being written, and let go."""
        self.wait()
        self._manager.close()


def _problem(folder: paths.Path, parts: tuple[str, ...] = ("",)) -> str | None:
    """What is wrong with the files of a checkpoint, or of these parts of it, in a few words."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = reading.load_json(folder / MANIFEST)
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if manifest.get("digest") != _digest(json.dumps(manifest["files"], sort_keys=True).encode()):
        return f"{MANIFEST} was changed"
    for name in SEALS:
        if not (folder / name).exists() or not (folder / name).size():
            return f"{name} is missing or empty"
    for name, (size, digest) in files.items():
        file = folder / name
        if ".." in PurePosixPath(name).parts or not file.is_relative_to(folder):
            return f"{MANIFEST} names {name}"
        if not name.startswith(parts):
            continue
        if not file.is_file():
            return f"{name} is missing"
        if file.size() != size:
            return f"{name} has {file.size()} bytes, not {size}"
        if _file_digest(file) != digest:
            return f"{name} was changed"
    return None


def _write_manifest(folder: paths.Path) -> None:
    """Write down the size and the hash of every file of a checkpoint that orbax has written, but for its seals."""
    files = {
        str(file.relative_to(folder)): (file.size(), _file_digest(file))
        for file in paths.files_below(folder)
        if str(file.relative_to(folder)) not in SEALS
    }
    digest = _digest(json.dumps(files, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps({"files": files, "digest": digest}))


@contextlib.contextmanager
def _readable(where: epath.Path, step: int, field: str) -> Iterator[None]:
    """Names the checkpoint that orbax cannot read, for which it and tensorstore have errors of many kinds."""
    try:
        yield
    except Exception as error:
        # They append all that they know of the array.
        why = f"checkpoint {step} in {where} cannot be read ({paths.error_line(error)[:300]})"
        raise UserError(f"{why}; put its files back, or write another directory", field) from error


def single_device(tree: Any) -> Any:
    """`ShapeDtypeStruct`s of a tree on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def _restore_args(like: Any) -> ocp.args.PyTreeRestore:
    """Onto the shardings of a tree of `ShapeDtypeStruct`s."""
    return ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
