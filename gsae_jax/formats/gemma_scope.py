"""Gemma Scope: `params.npz` of a JumpReLU SAE whose inputs are not centred, which says nothing else of it.

A transcoder has the same tensors, and nothing says that it is one: its user does. What we know besides goes into a file
beside it.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.formats import files, jumprelu, records
from gsae_jax.saes import trained
from gsae_jax.storage import writing

WEIGHTS = "params.npz"
SAE, TRANSCODER = jumprelu.FORMS
TENSORS = ("W_dec", "W_enc", "b_dec", "b_enc", "threshold")


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    sae = jumprelu.form(sae)
    params: dict[str, Any] = records.held(sae, dict.fromkeys(jumprelu.FORMS, TENSORS))
    with writing.new_folder(path) as folder:
        np.savez(folder / WEIGHTS, **{name: params[name] for name in TENSORS})
        records.write_beside(sae, folder, sae.architecture if sae.architecture == TRANSCODER else None)


def recognises(path: Path) -> bool:
    """Whether a path is such a folder, or such a file."""
    return path.is_file() if path.suffix == ".npz" else (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder or file; a transcoder if the file beside it says so.

    Raises:
        UserError: everything that does not fit.
    """
    return _read(path, jumprelu.FORMS)


def read_transcoder(path: Path) -> trained.SAE:
    """The same, which is a transcoder if there is no file beside it.

    Raises:
        UserError: everything that does not fit.
    """
    return _read(path, (TRANSCODER, SAE) if not (_weights(path).parent / records.FILE).exists() else jumprelu.FORMS)


def _read(path: Path, candidates: Sequence[str]) -> trained.SAE:
    weights = _weights(path)
    architecture, told = records.read_beside(weights.parent, candidates)
    contents = files.npz_contents(weights)
    shape = {name: contents[0].get(name, ((0,), ""))[0] for name in TENSORS}
    # The sizes are those of the biases, and the width of a transcoder's inputs is that of its encoder.
    D, F = (math.prod(shape[name]) for name in ("b_dec", "b_enc"))
    D_in = shape["W_enc"][0] if shape["W_enc"] and architecture == TRANSCODER else D
    if architecture == SAE and told.record is None and len({D, *shape["W_enc"], F}) > 2:
        like_one = {"W_enc": (shape["W_enc"][0], F), "W_dec": (F, D), "threshold": (F,)}
        if all(shape[name] == sizes for name, sizes in like_one.items()):
            sizes = f"from width {shape['W_enc'][0]} to width {D}"
            raise UserError(
                f"is missing, and {path} is a transcoder {sizes}; write the site that it predicts", "target"
            )
    params = files.read_tensors(weights, contents, records.shapes(architecture, TENSORS, D_in, F, D))
    return records.build(path, architecture, params, told)


def _weights(path: Path) -> Path:
    return path if path.suffix == ".npz" else path / WEIGHTS
