"""What a run directory holds: `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `report/`.

The only file that knows orbax. A checkpoint has four parts: the SAEs' parameters (which `gsae_jax.load` reads alone),
the rest of the training state, the position in the data, and facts about the run.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorboardX

from gsae_jax import config as config_lib
from gsae_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A run directory; nothing is created before `create`."""

    path: Path

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

    def _item(self, step: int, name: str) -> Path:
        return (self.path / "checkpoints" / str(step) / name).absolute()

    def _is_empty(self) -> bool:
        return self.path.is_dir() and not any(self.path.iterdir())

    def config(self) -> dict[str, Any]:
        """The JSON config of the run.

        Raises:
            ConfigError: the directory holds no run.
        """
        try:
            return json.loads((self.path / "config.json").read_text())
        except FileNotFoundError as error:
            raise ConfigError(
                "--workdir", f"{self.path} holds no run (no config.json); write the --workdir of a training run"
            ) from error
        except ValueError as error:
            raise ConfigError("--workdir", f"{self.path / 'config.json'} is not JSON: {error}") from error

    def check(self, config: dict[str, Any]) -> None:
        """Raises `ConfigError` if a run of `config` cannot live here: another run, other files, or not writable.

        A run without a checkpoint has nothing to lose, so another config may take its place.
        """
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
        elif self.path.exists() and not (self.path / "config.json").exists() and not self._is_empty():
            raise ConfigError("--workdir", f"{self.path} exists and is not a run; write a new or an empty directory")
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError("--workdir", f"{parent} is not writable; write a directory that is")

    def create(self, config: dict[str, Any]) -> None:
        """Make the directory and write its config; a run with a checkpoint keeps its own, which `check` found equal."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.latest_step() is None:
            write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")


class Checkpoints:
    """The checkpoints of a run directory, written in the background."""

    def __init__(self, workdir: Workdir, keep: int):
        """`keep`: how many to keep."""
        folder = (workdir.path / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

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
    """`metrics.jsonl` and TensorBoard; a resumed run continues both at its step."""

    def __init__(self, workdir: Workdir, step: int):
        self._path = workdir.path / "metrics.jsonl"
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write_text(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir.path / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line: the step and its values, lists for stacks."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            for index, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                self._board.add_scalar(name if index is None else f"{name}/{index}", number, step)

    def close(self) -> None:
        """Flush both."""
        self._file.close()
        self._board.close()


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    path = workdir.path / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text)
    os.replace(scratch, path)


def single_device(tree: Any) -> Any:
    """`ShapeDtypeStruct`s of a tree on this process's first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)
