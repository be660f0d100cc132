"""Writing SAEs, or their collected features, for other libraries."""

import logging
import os

from gsae_jax import errors, features, plugins, sae_loading
from gsae_jax.errors import UserError, known_names
from gsae_jax.formats import records
from gsae_jax.saes import trained
from gsae_jax.storage import writing

logger = logging.getLogger(__name__)


def export(path: str, format: str, out: str, name: str = "", step: int | None = None) -> list[str]:
    """Write one SAE or all SAEs of a run to a new folder, and return their names. If there is an error, write nothing.

    Raises:
        UserError: the SAE, step or format does not exist, the format cannot store one of the SAEs, `out` exists, or all
            SAEs have diverged. If only some have diverged, they are left out with a warning.
    """
    if format in plugins.known("features", having="write"):
        if step is not None:
            raise UserError("does not go with a format of features; leave it out", "--step")
        return _export_features(path, format, out, name)
    with errors.about("--format"):
        module = plugins.load("formats", format, having="write")
    with errors.about("--workdir", step="--step"):
        saes = sae_loading.load(path, step=step)
    if name:
        if name not in saes:
            raise UserError(f"{name!r} is not in {path}; {known_names(name, saes)}", "--sae")
        with errors.about("--out"):
            module.write(trained.for_export(saes[name]), out)
        return [name]
    with errors.about("--out"):
        return write(saes, format, out)


def _export_features(path: str, format: str, out: str, name: str) -> list[str]:
    """The same for collected features."""
    module = plugins.load("features", format, having="write")
    with errors.about("--workdir", path="--workdir"):
        every = features.load(path)
    if name and name not in every:
        raise UserError(f"{name!r} has no features in {path}; {known_names(name, every)}", "--sae")
    with errors.about("--out"), writing.new_folder(out) as folder:
        for each in [name] if name else every:
            place = folder if name else folder / each
            place.mkdir(parents=True, exist_ok=True)  # a name may have a /
            module.write(every[each], place)
    return [name] if name else list(every)


def write(saes: dict[str, trained.SAE], format: str, out: str | os.PathLike[str]) -> list[str]:
    """Write a new folder with a folder for each SAE, or nothing; returns and raises what `export` does."""
    with errors.about("--format"):
        module = plugins.load("formats", format, having="write")
    failed: dict[str, UserError] = {}
    with writing.new_folder(out) as folder:
        for sae in saes.values():
            try:
                module.write(trained.for_export(sae), folder / sae.name)
            except UserError as error:
                failed[sae.name] = error
        written = [name for name in saes if name not in failed]
        records.raise_for(failed, written)
    for why in failed.values():
        logger.warning(f"{why}. This SAE is not exported")
    return written
