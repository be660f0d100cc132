"""What a run directory holds: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `report/`.

It is a local directory or a folder of a bucket, gs://bucket/folder, where files are put whole and never appended to.
The only file that knows orbax. A checkpoint has four parts: the SAEs' parameters (which `gsae_jax.load` reads alone),
the rest of the training state, the position in the data, and facts about the run.
"""

import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import filelock
import jax
import orbax.checkpoint as ocp
import tensorboardX
from etils import epath

from gsae_jax import buckets
from gsae_jax import config as config_lib
from gsae_jax.buckets import is_bucket
from gsae_jax.config import ConfigError

LOCK = ".lock"  # held by the process that trains here; the kernel lets go of it when that process ends, however it does
PROBE = ".probe-"  # how the names of files begin that only try whether a bucket can be written


class Workdir:
    """A run directory; nothing is created before `create`."""

    def __init__(self, path: epath.PathLike):
        """`path`: local, or gs://bucket/folder.

        Raises:
            ConfigError: a URL of another kind, or gs:// without the packages for it.
        """
        buckets.check("--workdir", path)
        self.path = epath.Path(path)
        self._lock = filelock.FileLock(self.path / LOCK) if not is_bucket(self.path) else None

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.path / "report"

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint."""
        folder = self.path / "checkpoints"
        return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.exists() else None

    def params(self, step: int, like: Any) -> Any:
        """The SAEs' parameters of a checkpoint, on the shardings of the given `ShapeDtypeStruct` tree."""
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self._item(step, "params"), like)

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint says about its run."""
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self._item(step, "facts"), args=ocp.args.JsonRestore())

    def _item(self, step: int, name: str) -> epath.Path:
        return _absolute(self.path / "checkpoints" / str(step) / name)

    def _is_empty(self) -> bool:
        if not is_bucket(self.path):
            return not self.path.exists() or (
                self.path.is_dir() and all(entry.name == LOCK for entry in self.path.iterdir())
            )
        try:
            names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(PROBE)}
        except FileNotFoundError:
            return True
        # A folder that someone made lists itself, and so does a file.
        return not names or (names == {self.path.name} and self.path.is_dir())

    def config(self) -> dict[str, Any]:
        """The JSON config of the run.

        Raises:
            ConfigError: the directory holds no run, or cannot be read.
        """
        try:
            return json.loads((self.path / "config.json").read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                "--workdir", f"{self.path} holds no run (no config.json); write the --workdir of a training run"
            ) from error
        except ValueError as error:
            raise ConfigError("--workdir", f"{self.path / 'config.json'} is not JSON: {error}") from error
        except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
            if not is_bucket(self.path):
                raise
            raise ConfigError(
                "--workdir",
                f"{self.path} cannot be read ({buckets.line(error)}); log in to an account that may read it",
            ) from error

    def check(self, config: dict[str, Any]) -> None:
        """Raises `ConfigError` if a run of `config` cannot live here: another run, other files, or not writable.

        A run without a checkpoint has nothing to lose, so another config may take its place.
        """
        self.check_writable()
        if self.latest_step() is not None:
            # Through the dataclass, which fills in the fields that an earlier version did not have.
            recorded = config_lib.to_dict(config_lib.from_dict(config_lib.Experiment, self.config()))
            differing = config_lib.differences(recorded, config)
            if differing:
                raise ConfigError(
                    "--workdir",
                    f"{self.path} holds a run of another config; write another directory, or undo (there != here): "
                    f"{'; '.join(differing)}",
                )
        elif not (self.path / "config.json").exists() and not self._is_empty():
            raise ConfigError("--workdir", f"{self.path} exists and is not a run; write a new or an empty directory")

    def hold(self) -> None:
        """Keep other processes from training here until `release`; a bucket has no locks.

        Raises:
            ConfigError: another process trains here.
        """
        if self._lock is None or self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ConfigError(
                "--workdir", f"another process is training in {self.path}; wait for its end, or write another directory"
            ) from error

    def release(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            self._lock.release()

    def check_writable(self) -> None:
        """Raises `ConfigError` if nothing can be written here."""
        if not is_bucket(self.path):
            parent = next(folder for folder in (self.path, *_absolute(self.path).parents) if folder.is_dir())
            if not os.access(parent, os.W_OK | os.X_OK):
                raise ConfigError("--workdir", f"{parent} is not writable; write a directory that is")
            return
        probe = self.path / f"{PROBE}{uuid.uuid4().hex}"
        try:
            probe.write_text("")
            probe.unlink()
        except Exception as error:  # as in `config`
            raise ConfigError(
                "--workdir",
                f"{self.path} cannot be written ({buckets.line(error)}); write a bucket that exists, and log in to "
                "an account that may read, write, list and delete in it",
            ) from error

    def create(self, config: dict[str, Any]) -> None:
        """Make the directory and write its config; a run with a checkpoint keeps its own, which `check` found equal."""
        if not is_bucket(self.path):  # which has no directories
            self.path.mkdir(parents=True, exist_ok=True)
            self.hold()
        if self.latest_step() is None:
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")


class Checkpoints:
    """The checkpoints of a run directory, written in the background."""

    def __init__(self, workdir: Workdir, keep: int):
        """`keep`: how many to keep."""
        folder = _absolute(workdir.path / "checkpoints")
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))
        # It asks with the number of updates, where the trainer counts calls; JAX would then expect the end far ahead.
        self._manager.reached_preemption = lambda step: False

    def save(self, step: int, params: Any, state: Any, data: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save in the background; arrays are copied before this returns."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            facts=ocp.args.JsonSave(facts),
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, params: Any, state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """(params, state, data) of a step, on the shardings of the given `ShapeDtypeStruct` trees."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), state=ocp.args.StandardRestore(state), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return restored.params, restored.state, restored.data

    def wait(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written, and let go."""
        self.wait()
        self._manager.close()


class Metrics:
    """`metrics.jsonl` and TensorBoard; a resumed run continues both at its step.

    Those of a bucket grow on the local disk, and `sync` puts them there.
    """

    def __init__(self, workdir: Workdir, step: int):
        path = workdir.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self._bucket, self._scratch, folder = None, None, workdir.path
        if is_bucket(workdir.path):
            self._bucket, self._scratch = workdir.path, tempfile.TemporaryDirectory(prefix="gsae_jax-")
            folder = epath.Path(self._scratch.name)
        if kept != lines or self._bucket:
            write_text(folder / "metrics.jsonl", "".join(kept))
        self._folder, self._file = folder, (folder / "metrics.jsonl").open("a")
        self._board = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line: the step and its values, lists for stacks."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            for index, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                self._board.add_scalar(name if index is None else f"{name}/{index}", number, step)

    def sync(self) -> None:
        """Put what was written into the bucket; a local directory has it already."""
        if self._bucket:
            self._board.flush()
            for file in [self._folder / "metrics.jsonl", *(self._folder / "tensorboard").iterdir()]:
                file.copy(self._bucket / file.relative_to(self._folder), overwrite=True)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()
        self.sync()
        if self._scratch:
            self._scratch.cleanup()


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    path = workdir.path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_text(path: epath.Path, text: str) -> None:
    """Write a file whole or not at all."""
    if is_bucket(path):  # which has no other way
        path.write_text(text)
        return
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text)
    os.replace(scratch, path)


def single_device(tree: Any) -> Any:
    """`ShapeDtypeStruct`s of a tree on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def _absolute(path: epath.Path) -> epath.Path:
    """As orbax wants local paths; epath's own `absolute` takes gs:// for one."""
    return path if is_bucket(path) else epath.Path(Path(path).absolute())
