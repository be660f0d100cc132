"""Collecting the features of SAEs, those of a run or from elsewhere, on held-out text."""

import dataclasses
import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import safetensors
import tqdm

from gsae_jax import config as config_lib
from gsae_jax import errors, features, processes, sae_loading, sae_sources
from gsae_jax.data import rows
from gsae_jax.errors import TrainingError, UserError, known_names
from gsae_jax.evaluation import provenance
from gsae_jax.features import collection as collection_lib
from gsae_jax.features import tables
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint, open_others
from gsae_jax.saes import contract, trained
from gsae_jax.storage import paths, run_directory

logger = logging.getLogger(__name__)

TOKENS = 2**20  # by default, or as many as the held-out text has


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to collect.

    Attributes:
        workdir: the directory of a run, local or gs://bucket/folder; "" for SAEs from elsewhere.
        saes: names of SAEs of the run, by default all; or paths as `sae_sources.of_names` takes them.
        out: the folder for the files; by default `features` in the run's directory.
        tokens: of held-out text; by default TOKENS.
        step: of the run's checkpoint; by default the newest undamaged one.
        model: path of the language model, if it is not the run's, or has moved.
        site: that SAEs from elsewhere read; a pair (site, target) for transcoders, as `sae_sources.of_names` takes it.
        overwrite: replace files that were collected with other settings.
    """

    workdir: str = ""
    saes: Sequence[str] = ()
    out: str = ""
    tokens: int | None = None
    step: int | None = None
    model: str = ""
    site: str | tuple[str, str] = ""
    overwrite: bool = False


def collect(wanted: Wanted, config: Mapping[str, Any] | None = None) -> Path:
    """Collect what `docs/features.md` lists of every feature, into one file for each SAE.

    A collection that was interrupted is continued. Files of the same settings stay as they are.

    Args:
        wanted: what to collect.
        config: fields of an experiment's `lm` and `data`, as in `sae_sources`.

    Returns:
        The folder of the files.

    Raises:
        UserError: there is no such run or SAE, it does not fit the language model, there is too little text, or the
            folder has files of other settings.
        TrainingError: the files cannot be written.
    """
    if jax.process_count() > 1:
        raise UserError("is above 1; collect features in one process, on one machine", "--num_processes")
    if wanted.tokens is not None and not 1 <= wanted.tokens < 2**31:
        raise UserError(f"is {wanted.tokens}; write a number from 1 to {2**31 - 1:,}", "--tokens")
    folder = folder_of(wanted.workdir, wanted.out, "--out")
    chosen = _chosen(wanted, config)
    settings = chosen.settings
    where = "--model" if wanted.model else "lm.path"
    with errors.about(where, path=where, revision="lm.revision"):
        lm = loading.load_lm(settings.lm.path, revision=settings.lm.revision, dtype=settings.lm.dtype, mesh=chosen.mesh)
    only = wanted.saes if wanted.workdir and wanted.saes else list(chosen.saes)
    saes = {name: chosen.saes[name] for name in chosen.saes if name in only}
    used = sorted({name for sae in saes.values() for name in sae.models} - {""})
    others = loading.load_others({name: settings.lms[name] for name in used}, lm, chosen.mesh)
    for name, each in {"": lm, **others}.items():
        loading.check_context(each.module, settings.data.context_length, name)
    T = settings.data.context_length
    count = (wanted.tokens or TOKENS) // T
    if not count:
        raise UserError(f"is {wanted.tokens}, less than one row of {T} tokens; write more", "--tokens")
    limit = count * (T - settings.data.prepend_bos)
    text = rows.open_rows(settings.data, "test", lm.tokenizer, limit, lm.config.d_vocab)
    if not len(text):
        raise UserError(f"the held-out text has no row of {T} tokens{text.why_few or '; add text'}", "data")
    if wanted.tokens and len(text) < count:
        logger.warning(f"the held-out text gives {len(text) * T:,} tokens of the {wanted.tokens:,} asked for")
    special_tokens = loading.special_tokens_of(lm, others) if settings.drop_special_tokens else ()
    shared = {
        "language_model": Checkpoint.open(settings.lm.path, settings.lm.revision).fingerprint(),
        "model": sae_loading.names(settings.lm, settings.data)["model_name"],
        "text": chosen.text or sae_loading.names(settings.lm, settings.data)["dataset_path"],
        "text_fingerprint": text.fingerprint,
        "rows": len(text),
        "context_length": T,
        "special_tokens_excluded": bool(special_tokens),
        "step": chosen.step,
    }
    about = {name: about_sae(sae) | shared | _of_others(sae, settings) for name, sae in saes.items()}
    collection = collection_lib.Collection(
        lm, chosen.mesh, saes, chosen.saes, text, special_tokens, about, provenance.versions(), others
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error}); write another folder", "--out") from error
    lock = filelock.FileLock(folder / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(f"{folder} is in use by another collection; wait for it to end", "--out") from error
    with held:
        _check(folder, about, wanted.overwrite)
        number = "1 SAE" if len(about) == 1 else f"{len(about)} SAEs"
        logger.info(f"collecting the features of {number} on {len(text) * T:,} held-out tokens")
        try:
            with _Bar() as bar:
                collection_lib.collect(collection, folder, bar.update)
        except (OSError, sqlite3.Error, safetensors.SafetensorError) as error:
            why = f"the features cannot be written to {folder} ({error})"
            raise TrainingError(f"{why}; make room, and run the command again, which continues") from error
    return folder


def folder_of(workdir: str, given: str, field: str) -> Path:
    """The folder of the files: the one that is `given` in a field, or that in a run's directory.

    Raises:
        UserError: there is neither, or it is not on this machine.
    """
    if given:
        with errors.about(field):
            return Path(paths.require_local(given))
    if not workdir:
        raise UserError("is missing; write the name of a folder for the features", field)
    run = paths.local_of_user(workdir)
    if run is None:
        raise UserError(f"is missing, and {workdir} is not on this machine; write a local folder", field)
    return run / features.FOLDER


def _chosen(wanted: Wanted, config: Mapping[str, Any] | None) -> sae_sources.Chosen:
    """The SAEs of the run, or those that are asked for."""
    if not wanted.workdir:
        return sae_sources.of_names(wanted.saes, config, wanted.model, wanted.site)
    if not run_directory.Workdir(wanted.workdir).holds_run():
        raise UserError(f"{wanted.workdir} holds no run; write the directory of one", "--workdir")
    chosen = sae_sources.of_run(wanted.workdir, wanted.step, wanted.model, config)
    for name in wanted.saes:
        if name not in chosen.saes:
            raise UserError(f"{name!r} is not an SAE of this run; {known_names(name, list(chosen.saes))}", "--sae")
    return chosen


def about_sae(sae: trained.SAE) -> dict[str, Any]:
    """What an SAE is."""
    digest = hashlib.sha256()
    for name in sorted(sae.params):
        digest.update(name.encode() + np.ascontiguousarray(sae.params[name]).tobytes())
    # In 32 bits, as in files of earlier versions, so that these stay files of the same SAE.
    l1_coefficient = None if np.isnan(sae.l1_coefficient) else float(np.float32(sae.l1_coefficient))
    return {
        "sae": sae.name,
        "run": sae.run,
        "stack": sae.stack,
        "index": sae.index,
        "architecture": sae.architecture,
        "options": json.loads(json.dumps(contract.options(sae.config))),  # as the file gives them back
        "l1_coefficient": l1_coefficient,
        "width": sae.config.width,
        "sites": list(sae.sites),
        "targets": list(sae.targets),
        "parameters": digest.hexdigest(),
    }


def _of_others(sae: trained.SAE, settings: config_lib.HeldOut) -> dict[str, Any]:
    """Facts of the language models other than the first of which an SAE has sites."""
    lms = {name: settings.lms[name] for name in sae.models if name}
    facts: dict[str, Any] = {}
    if lms:
        facts["other_language_models"] = {name: each.fingerprint() for name, each in open_others(lms).items()}
    if "" not in sae.models:
        facts["model"] = sae_loading.names(lms[sae.models[0]], settings.data)["model_name"]
    return facts


def _check(folder: Path, about: Mapping[str, Mapping[str, Any]], overwrite: bool) -> None:
    """Raises `UserError` for files of other settings, unless they may be replaced."""
    if overwrite:
        return
    for name, ours in about.items():
        path = collection_lib.place(folder, name)
        theirs = tables.known(path)
        if theirs is not None and theirs != ours:
            differing = ", ".join(field for field in ours if theirs.get(field) != ours[field])
            raise UserError(
                f"{path} was collected with other settings ({differing}); write --out with a new folder, or "
                "--overwrite",
                "--out",
            )


class _Bar:
    """A bar for each stage, on a terminal."""

    def __enter__(self) -> "_Bar":
        self._stage, self._bar = "", tqdm.tqdm(disable=True)
        return self

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that so many steps of a stage are done."""
        if stage != self._stage:
            self._bar.close()
            unit = "feature" if stage == "effects" else "row"
            hidden = None if processes.first() else True  # None: where there is no terminal
            self._stage, self._bar = stage, tqdm.tqdm(total=total, desc=stage, unit=unit, disable=hidden)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        self._bar.close()
