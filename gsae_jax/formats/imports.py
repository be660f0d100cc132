"""Finding out which format a path is in."""

import logging
from pathlib import Path

from gsae_jax import plugins
from gsae_jax.errors import UserError
from gsae_jax.saes import trained
from gsae_jax.storage import run_directory

logger = logging.getLogger(__name__)

LANGUAGE_MODEL = ("model.safetensors", "model.safetensors.index.json", "tokenizer.json")


def read(path: Path, transcoders: bool = False) -> dict[str, trained.SAE]:
    """The SAE of a path in a known format, or those of a folder of such folders, by name; none where it is neither.

    Warns of folders beside them that are no SAE, one that was copied in part for example.

    Args:
        path: of a folder or a file.
        transcoders: read files that do not say what they are of as those of transcoders. A format with such files has
            the function `read_transcoder`.

    Raises:
        UserError: a file that does not fit its format, a folder of a language model, or two SAEs of one name.
    """
    formats = plugins.known("formats", having="recognises").values()
    folders = path.is_dir() and not run_directory.Workdir(path, field="").holds_run()
    # Hidden ones are a program's own: .git, or what is left of an export that was killed.
    inside = sorted(folder for folder in path.glob("[!.]*") if folder.is_dir()) if folders else []
    saes: dict[str, trained.SAE] = {}
    others = []
    _check(path)
    for folder in [path] if any(format.recognises(path) for format in formats) else inside:
        _check(folder)
        format = next((format for format in formats if format.recognises(folder)), None)
        if format is None:
            others.append(folder.name)
            continue
        read_one = getattr(format, "read_transcoder", format.read) if transcoders else format.read
        sae = read_one(folder)
        if sae.name in saes:
            raise UserError(f"has the second SAE called {sae.name!r}; load them one by one", str(folder))
        saes[sae.name] = sae
    if saes and others:
        logger.warning(
            f"{path} also has entries that are not SAEs in a known format; they are left out: {', '.join(others)}"
        )
    return saes


def _check(path: Path) -> None:
    """Raises `UserError` for a folder of a language model."""
    if (path / "config.json").is_file() and any((path / name).is_file() for name in LANGUAGE_MODEL):
        raise UserError("holds a language model and no SAE; write the folder of an SAE", str(path))
