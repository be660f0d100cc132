"""Looking at collected features: the pages of a run, or of a folder of files, on a server or as files."""

import dataclasses
import functools
import json
import logging
import threading
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gsae_jax import collecting, errors, sae_loading
from gsae_jax import features as features_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.lms.checkpoints import Checkpoint, open_others
from gsae_jax.storage import paths, reading, run_directory, writing
from gsae_jax.viewer import export as export_lib
from gsae_jax.viewer import server
from gsae_jax.viewer.library import Library
from gsae_jax.viewer.live import Live
from gsae_jax.viewer.pages import Pages
from gsae_jax.web import server as web

logger = logging.getLogger(__name__)

AGAIN = "run `python -m gsae_jax.collect` with --overwrite"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to look at.

    Attributes:
        workdir: the directory of a run; "" for a folder of files alone.
        features: the folder of the files; by default `features` in the run's directory.
        model: path of the run's language model, if it has moved.
    """

    workdir: str = ""
    features: str = ""
    model: str = ""


def pages(wanted: Wanted, is_static: bool = False) -> tuple[Pages, Callable[[], Live] | None]:
    """The pages, and what loads the language model and the SAEs of the run when they are first needed.

    Args:
        wanted: what to look at.
        is_static: the pages become files, so that nothing is computed.

    Raises:
        UserError: there is no such run, or it has no collected features.
    """
    folder = _folder(wanted)
    where = "--features" if wanted.features else "--workdir"
    with errors.about(where, path=where):
        library = Library(features_lib.load(folder), _report(wanted.workdir))
    model = next(iter(library)).about.get("model", "a language model")
    if not wanted.workdir or is_static:
        return Pages(library, f"Features of {model}"), None
    lock = threading.Lock()

    @functools.cache
    def load() -> Live:
        return _load(wanted, library)

    def live() -> Live:
        with lock:  # threads of a server may ask at once
            return load()

    return Pages(library, f"Features of {model}", can_compute=True), live


def _folder(wanted: Wanted) -> Path:
    """Where the files are."""
    if not wanted.features and not wanted.workdir:
        raise UserError("is missing; give --workdir for a run, or --features for a folder of files", "--workdir")
    folder = collecting.folder_of(wanted.workdir, wanted.features, "--features")
    if wanted.workdir and not run_directory.Workdir(wanted.workdir).holds_run():
        raise UserError(f"{wanted.workdir} holds no run; write the directory of one", "--workdir")
    if wanted.features:
        return folder
    if not folder.is_dir():
        why = f"{wanted.workdir} has no collected features"
        raise UserError(f"{why}; run `python -m gsae_jax.collect --workdir {wanted.workdir}` first", "--workdir")
    return folder


def _report(workdir: str) -> Mapping[str, Any] | None:
    """The run's report; None if there is none that can be read."""
    if not workdir:
        return None
    path = run_directory.Workdir(workdir).report / "report.json"
    try:
        return reading.load_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"{path} cannot be read ({error}); the pages do without")
        return None


def _load(wanted: Wanted, library: Library) -> Live:
    """The language model and the SAEs of the run, checked to be those that the features were collected from."""
    workdir = run_directory.Workdir(wanted.workdir)
    run = workdir.experiment()
    lm_config = run.lm
    if wanted.model:
        lm_config = dataclasses.replace(lm_config, path=wanted.model, revision="")
    loaded: dict[int | None, dict[str, Any]] = {}
    saes, models = {}, set()
    for entry in library:
        step = entry.about.get("step")
        if step not in loaded:
            try:
                loaded[step] = sae_loading.load(wanted.workdir, step=step)
            except UserError as error:
                why = f"{entry.name} was collected at step {step}, which cannot be read ({error})"
                raise UserError(f"{why}; {AGAIN}", "--features") from error
        sae = loaded[step].get(entry.name)
        if sae is None or collecting.about_sae(sae)["parameters"] != entry.about["parameters"]:
            raise UserError(f"{entry.name} was not collected from {wanted.workdir}; {AGAIN}", "--features")
        saes[entry.key] = sae
        models.add(json.dumps(entry.about["language_model"], sort_keys=True))
    where = "--model" if wanted.model else "lm.path"
    with errors.about(where, path=where, revision="lm.revision"):
        ours = json.dumps(Checkpoint.open(lm_config.path, lm_config.revision).fingerprint(), sort_keys=True)
        if models != {ours}:
            raise UserError(f"{lm_config.path} is not the language model that the features were collected with", where)
        lm = loading.load_lm(lm_config.path, revision=lm_config.revision, dtype=lm_config.dtype)
    used = {name for sae in saes.values() for name in sae.models} - {""}
    others = loading.load_others({name: run.lms[name] for name in sorted(used)}, lm)
    for name, opened in open_others({name: run.lms[name] for name in others}).items():
        theirs = [entry.about["other_language_models"].get(name) for entry in library if name in saes[entry.key].models]
        if any(fingerprint != opened.fingerprint() for fingerprint in theirs):
            why = "is not the language model that the features were collected with"
            raise UserError(f"{run.lms[name].path} {why}", f"lms.{name}.path")
    return Live(lm, saes, others, run.data.prepend_bos)


def serve(wanted: Wanted, host: str, port: int, open_browser: bool = False) -> None:
    """Serve the pages until the process is interrupted.

    Raises:
        UserError: there is nothing to look at, or the address cannot be used.
    """
    web.check_port(port)
    shown, live = pages(wanted)
    token = "" if web.is_loopback(host) else web.new_token()
    listening = web.listening(server.application(shown, live, host, token), host, port)
    address = web.address(host, listening.effective_port) + (f"?token={token}" if token else "")
    logger.info(f"features: {address} (Ctrl-C ends it)")
    if open_browser:
        webbrowser.open(address)
    listening.run()


def export(wanted: Wanted, out: str) -> Path:
    """Write the pages as files into a new folder.

    Raises:
        UserError: there is nothing to look at, or the folder exists.
    """
    with errors.about("--export"):
        writing.check_new(paths.require_local(out), or_empty=True)
        shown, _ = pages(wanted, is_static=True)
        with writing.new_folder(out, or_empty=True) as scratch:
            export_lib.write(shown, scratch)
    return Path(paths.require_local(out))
