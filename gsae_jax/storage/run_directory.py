"""What a run directory holds: `config.json`, `checkpoints/`, `metrics.jsonl`, `report/`, and what loggers write.

It is a local directory or a folder of a bucket, gs://bucket/folder, where files are put whole and never appended to.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import filelock
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors, plugins
from gsae_jax.errors import UserError
from gsae_jax.storage import paths, reading, writing
from gsae_jax.storage.checkpoints import SavedCheckpoints
from gsae_jax.storage.facts import Facts

LOCK = ".lock"  # held by the process that trains here; the kernel lets go of it when that process ends, however it does
# Groups and fields of the config that may change when a run continues. `Workdir.check` says how far train.steps may.
FREE = ("mesh", "checkpoint", "loggers", "evaluation", "train.log_every", "train.steps")
# Fields of the config that say where something lies. What lies there is compared by its fingerprint instead.
LOCATIONS = {"lm": ("path", "revision"), "data": ("path", "data_dir", "source")}


class Workdir(SavedCheckpoints):
    """A run directory and the checkpoints in it; nothing is created before `create`."""

    def __init__(self, path: epath.PathLike, field: str = "--workdir"):
        """`path`: local, or gs://bucket/folder; `field`: what an error calls it, "" where the caller adds it.

        Raises:
            UserError: no path, a URL of another kind, or gs:// without the packages for it.
        """
        with errors.about(field):
            super().__init__(paths.of_user(path), field)
        self._lock = self.path.lock(LOCK)

    @property
    def report(self) -> paths.Path:
        """Where the report goes."""
        return self.path / "report"

    def config(self) -> dict[str, Any]:
        """The JSON config of the run.

        Raises:
            UserError: the directory holds no run, or cannot be read.
        """
        path = self.path / "config.json"
        with errors.about(self.field):
            self.path.check_name()
        try:
            return reading.load_json(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{self.path} holds no run (no config.json); write the directory of a training run", self.field
            ) from error
        except ValueError as error:
            raise UserError(f"{path} is not a JSON object ({error}); restore the original file", self.field) from error
        except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
            raise UserError(path.unreadable(error), self.field) from error

    def holds_run(self) -> bool:
        """Whether the directory is a run's; directories of language models have a `config.json` as well."""
        if not (self.path / "config.json").is_file():
            return False
        try:
            tree = reading.load_json(self.path / "config.json")
        except (OSError, ValueError):  # it may be a run's, and damaged
            return (self.path / "checkpoints").is_dir()
        # Configs of language models, and of other programs that train, have neither.
        return {"lm", "stacks"} <= tree.keys()

    def experiment(self) -> config_lib.Experiment:
        """The config of the run.

        Raises:
            UserError: what `config` refuses, or one that is of another version or was changed.
        """
        recorded = self.config()
        try:
            experiment = config_trees.from_record(config_lib.Experiment, recorded)
            _check_own_parts(recorded)
            return experiment
        except UserError as error:
            if not self.holds_run():
                raise UserError(
                    f"{self.path} holds no run (its config.json is not one of a run); write the directory of a run",
                    self.field,
                ) from error
            raise UserError(
                f"{self.path / 'config.json'} is not a config of this version ({error}); restore the original file",
                self.field,
            ) from error

    def check(self, config: dict[str, Any]) -> None:
        """Raises `UserError` if a run of `config` cannot live here: another run, other files, or not writable.

        A run without a checkpoint and without a report has nothing to lose, so another config may take its place.
        Otherwise the fields in `FREE` may differ, and so may `train.resample_steps` after the newest checkpoint.
        `train.steps` may be as small as the step of that checkpoint.
        """
        self.check_writable()
        latest = self.latest_step()
        if latest is not None:
            steps = config["train"]["steps"]
            if steps < latest:
                raise UserError(
                    f"is {steps}, but the run in {self.path} has been trained for {latest} steps; write {latest} or "
                    "more, or another directory",
                    "train.steps",
                )
            recorded = config_trees.to_dict(self.experiment())
            # Locations may differ here: `check_model`, and the trainer for text, compare what lies there.
            differing = config_trees.differences(_fixed(recorded, latest), _fixed(config, latest))
            if differing:
                past = any(line.startswith("train.resample_steps:") for line in differing)
                kept = f" (only those of train.resample_steps that are after step {latest} may change)" if past else ""
                raise UserError(
                    f"{self.path} holds a run of another config; write another directory, or change these settings "
                    f"back (the run's value != yours): {'; '.join(differing)}{kept}",
                    self.field,
                )
        elif not self.path.is_empty(ignored=LOCK) and not self.holds_run():
            raise UserError(f"{self.path} exists and is not a run; write a new or an empty directory", self.field)
        elif self.report.exists() and config_trees.differences(
            _fixed(config_trees.to_dict(self.experiment()), 0), _fixed(config, 0)
        ):
            why = f"{self.path} holds the report of a run of another config, whose checkpoints are gone"
            raise UserError(f"{why}; write another directory", self.field)

    def check_model(self, facts: Facts, lm: config_lib.LM, fingerprint: dict[str, str], name: str = "") -> None:
        """Raises `UserError` where a language model is not the one that a checkpoint was trained with.

        Args:
            facts: the checkpoint's.
            lm: where the model lies.
            fingerprint: the model's, `lms.checkpoints.Checkpoint.fingerprint`.
            name: the model's in `lms`; "" for `lm`.
        """
        recorded = facts.lms.get(name) if name else facts.lm
        if not recorded:  # of an earlier version: where it lay is all that is known of it
            run = self.experiment()
            theirs = run.lms[name] if name else run.lm
            there, here = ((paths.absolute(each.path), each.revision) for each in (theirs, lm))
            if there != here:
                was, now = (f"{path!r}{revision and f' at {revision}'}" for path, revision in (there, here))
                raise UserError(
                    f"is {now}, but the run in {self.path} was trained with {was}; it is of an earlier version, which "
                    "recorded no fingerprint to compare them by, so put the model back there"
                )
        elif recorded != fingerprint:
            differing = [part for part in fingerprint if recorded.get(part) != fingerprint[part]]
            raise UserError(
                f"{lm.path or 'the embedded model'} is not the language model that the run in {self.path} was trained "
                f"with: they differ in {' and '.join(differing)}; write a directory that holds the same files"
            )

    def set_report_aside(self) -> paths.Path | None:
        """Move the report, if there is one, to `earlier_reports/`; returns where it is then.

        Raises:
            UserError: it cannot be moved.
        """
        step, folder = reported_step(self), self.path / "earlier_reports"
        if step is None:
            return None
        names = (f"step_{step}" + f"_{number}" * (number > 1) for number in itertools.count(1))
        place = next(folder / name for name in names if not (folder / name).exists())
        try:
            self.report.move_folder(place)
        except Exception as error:  # gcsfs, aiohttp and google.auth have errors of their own
            why = f"{self.report} cannot be moved to {place} ({paths.error_line(error)})"
            raise UserError(f"{why}; make sure that files can be written there", self.field) from error
        return place

    def hold(self) -> None:
        """Keep other processes from training here until `release`; a bucket has no locks.

        Raises:
            UserError: another process trains here.
        """
        if self._lock is None or self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(
                f"another process is training in {self.path}; wait for its end, or write another directory", self.field
            ) from error

    def release(self) -> None:
        """Let others train here."""
        if self._lock is not None:
            self._lock.release()

    def check_writable(self) -> None:
        """Raises `UserError` if nothing can be written here."""
        with errors.about(self.field):
            self.path.check_name()
            self.path.check_writable()

    def check_latest(self, latest: int | None) -> None:
        """Raises `UserError` if the newest step is not this one."""
        if self.latest_step() != latest:
            raise UserError("another process has trained here meanwhile; run the command again", self.field)

    def create(self, config: dict[str, Any], latest: int | None) -> None:
        """Make the directory and write the config, with absolute paths.

        The config of a run that continues gets no fields that it did not have. By their absence the next start knows
        which settings did not exist when the run began.

        Args:
            config: of the run.
            latest: the newest step when the config was checked.

        Raises:
            UserError: the disk is full, or another process trains here, or has trained here since.
        """
        try:
            self.path.make_folder()
            self.hold()
            located = _located(config)
            self.check_latest(latest)
            if latest is not None:
                free = {group: config[group] for group in FREE if group in config}
                located = _as_recorded(located, self.config()) | free
            writing.write_text(self.path / "config.json", json.dumps(located, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); write another directory", self.field) from error


def _check_own_parts(recorded: dict[str, Any]) -> None:
    """Raises `UserError` for a part outside of the package that the config names by a relative path.

    Runs record absolute paths. A relative one may lead to code that somebody shipped with the run.
    """
    names = [stack["architecture"] for stack in recorded["stacks"].values()]
    for name in (*names, recorded["data"]["corpus"], *recorded.get("loggers", ())):
        if name != plugins.absolute(name):
            raise UserError(f"it names the file {name!r} by a relative path; write its absolute path there")


def reported_step(workdir: Workdir) -> int | None:
    """The step that the report is about; reports of earlier versions do not say, and were written at the end."""
    path = workdir.report / "report.json"
    try:
        return reading.load_json(path).get("step", workdir.latest_step())
    except (FileNotFoundError, ValueError):
        return None


def _located(config: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON config with absolute paths."""
    groups = {group: dict(config.get(group, {})) for group in LOCATIONS}
    for group, field in (("lm", "path"), ("data", "path"), ("data", "data_dir"), ("data", "source")):
        if field in groups[group]:
            kind, colon, path = (
                groups[group][field].rpartition(":") if field == "source" else ("", "", groups[group][field])
            )
            groups[group][field] = f"{kind}{colon}{paths.absolute(path)}"
    located = {**config, **{group: fields for group, fields in groups.items() if group in config}}
    if "lms" in config:
        others = config["lms"].items()
        located["lms"] = {name: {**fields, "path": paths.absolute(fields["path"])} for name, fields in others}
    return located


def _as_recorded(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that a recorded one has, too."""
    return {
        name: _as_recorded(value, recorded[name]) if isinstance(value, dict) else value
        for name, value in config.items()
        if name in recorded
    }


def _fixed(config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a run must not change when it continues from this step."""
    kept = {group: value for group, value in config.items() if group not in FREE}
    for group, fields in LOCATIONS.items():
        kept[group] = {name: value for name, value in kept[group].items() if name not in fields}
    kept["lms"] = {
        name: {field: value for field, value in fields.items() if field not in LOCATIONS["lm"]}
        for name, fields in kept["lms"].items()
    }
    kept["train"] = {name: value for name, value in kept["train"].items() if f"train.{name}" not in FREE}
    kept["train"]["resample_steps"] = [at for at in kept["train"]["resample_steps"] if at <= step]
    return kept
