"""Gemma Scope: `params.npz` of a JumpReLU SAE whose inputs are not centred, which says nothing else of it.

What we know besides goes into a file beside it.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax.formats import files, jumprelu, records
from gsae_jax.saes import trained
from gsae_jax.storage import writing

WEIGHTS = "params.npz"
TENSORS = ("W_dec", "W_enc", "b_dec", "b_enc", "threshold")


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    sae = jumprelu.form(sae)
    with writing.new_folder(path) as folder:
        params: dict[str, Any] = records.held(sae, {"jumprelu": TENSORS})
        np.savez(folder / WEIGHTS, **{name: params[name] for name in TENSORS})
        records.write_beside(sae, folder)


def recognises(path: Path) -> bool:
    """Whether a path is such a folder, or such a file."""
    return path.is_file() if path.suffix == ".npz" else (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder or file.

    Raises:
        UserError: everything that does not fit.
    """
    weights = path if path.suffix == ".npz" else path / WEIGHTS
    site, metadata, record = records.read_beside(weights.parent, "jumprelu")
    contents = files.npz_contents(weights)
    # The sizes are those of the biases.
    D, F = (math.prod(contents[0].get(name, ((0,), ""))[0]) for name in ("b_dec", "b_enc"))
    params = files.read_tensors(weights, contents, records.shapes("jumprelu", TENSORS, D, F))
    return records.build(path, "jumprelu", params, site, record, metadata)
