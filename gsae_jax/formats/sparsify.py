"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` of a TopK SAE (sparsify/sparse_coder.py of 1.3.3).

Inputs are centred by b_dec, as ours are. What we know besides goes into a file beside them.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gsae_jax.errors import UserError
from gsae_jax.formats import files, records
from gsae_jax.saes import trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
TENSORS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}  # ours -> theirs
KINDS: dict[str, tuple[Any, ...]] = {
    "d_in": (int,),
    "k": (int,),
    "num_latents": (int, ...),
    "expansion_factor": (int, ...),
    # What an earlier version does not write is as here.
    "activation": ("topk", ...),
    "transcode": (False, ...),
    "skip_connection": (False, ...),
    "embed_skip": (False, ...),
    "gram_lookup": (False, ...),
    "signed": (False, ...),
    # These say nothing of the function.
    "normalize_decoder": (bool, ...),
    "multi_topk": (bool, ...),
    "lookup_max_order": (int, ...),
    "gram_table_hash": (str, None, ...),
}
CONFIG_OF_RUN = "config.json"  # in the folder above
RUN = {"model": ("model_name", str), "ctx_len": ("context_size", int), "dataset": ("dataset_path", str)}
SWITCHES = ("activation", "transcode", "skip_connection", "embed_skip", "gram_lookup", "signed")


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    params = records.held(sae, {"topk": TENSORS})
    config = {
        "activation": "topk",
        "d_in": sae.config.d_in,
        "k": sae.config.k,
        "num_latents": sae.config.width,
        "expansion_factor": max(1, sae.config.width // sae.config.d_in),
        "multi_topk": False,
        "normalize_decoder": True,
        "skip_connection": False,
        "transcode": False,
    }
    tensors = {theirs: np.ascontiguousarray(_turned(theirs, params[ours])) for ours, theirs in TENSORS.items()}
    with writing.new_folder(path) as folder:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        files.write_json(folder / CONFIG, config)
        records.write_beside(sae, folder)


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder.

    Raises:
        UserError: everything that does not fit, or that we do not have.
    """
    config = reading.read_json(path / CONFIG, strict=True)
    files.check_supported(path / CONFIG, config, KINDS, SWITCHES)
    faults = files.misfits(config, KINDS)
    faults += [f"{name} is not known" for name in sorted(set(config) - set(KINDS))]
    files.refuse(path / CONFIG, faults)
    D, k = config["d_in"], config["k"]
    F = config.get("num_latents") or D * config.get("expansion_factor", 32)
    files.refuse(path / CONFIG, [] if 1 <= k <= F else [f"k is {k}, not from 1 to the number of features ({F})"])
    site, metadata, record = records.read_beside(path, "topk", F, {"k": k})
    if record is None:  # a folder is called by the module that it reads
        site = path.name if re.match(r"layers\.\d+(\.|$)", path.name) else None
        metadata = _run(path) | {"sparsify": config}

    shapes = records.shapes("topk", TENSORS, D, F)
    wanted = {theirs: shapes[ours][:: -1 if ours == "W_enc" else 1] for ours, theirs in TENSORS.items()}
    tensors = files.read_tensors(path / WEIGHTS, files.safetensors_contents(path / WEIGHTS), wanted)
    params: dict[str, Any] = {ours: _turned(theirs, tensors[theirs]) for ours, theirs in TENSORS.items()}
    return records.build(path, "topk", params, site, record, metadata, {"k": k})


def _run(path: Path) -> dict[str, Any]:
    """What the folder above says of the run that the SAE is from."""
    tree: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # it may be anything
        tree = reading.read_json(path.absolute().parent / CONFIG_OF_RUN)
    known = {theirs: kinds for theirs, kinds in RUN.items() if not files.misfits(tree, {theirs: kinds[1:]})}
    return {ours: tree[theirs] for theirs, (ours, *_) in known.items() if "sae" in tree}


def _turned(theirs: str, value: np.ndarray) -> np.ndarray:
    """A tensor of ours as theirs, or of theirs as ours: the encoder is a layer of torch, and so transposed."""
    return value.T if theirs == "encoder.weight" else value
