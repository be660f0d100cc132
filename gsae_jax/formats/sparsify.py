"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors` of a TopK SAE or transcoder.

From sparsify/sparse_coder.py of 1.3.3. Inputs of an SAE are centred by b_dec, as ours are, and those of a transcoder
are not. What we know besides goes into a file beside them.
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
from gsae_jax.lms import sites
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
    "transcode": (bool, ...),
    "skip_connection": (bool, ...),  # of a transcoder
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
SWITCHES = ("activation", "embed_skip", "gram_lookup", "signed")


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    params = records.held(sae, {"topk": TENSORS, "topk_transcoder": TENSORS}, ("b_in", "W_skip"))
    params = records.without_center(sae.architecture, params)
    if (D_out := getattr(sae.config, "d_out", sae.config.d_in)) != sae.config.d_in:
        sizes = f"is a transcoder from width {sae.config.d_in} to width {D_out}, and sparsify's have one width for both"
        raise UserError(f"{sizes}; write the format saelens", sae.name)
    names = TENSORS | ({"W_skip": "W_skip"} if "W_skip" in params else {})
    config = {
        "activation": "topk",
        "d_in": sae.config.d_in,
        "k": sae.config.k,
        "num_latents": sae.config.width,
        "expansion_factor": max(1, sae.config.width // sae.config.d_in),
        "multi_topk": False,
        "normalize_decoder": True,
        "skip_connection": "W_skip" in params,
        "transcode": sae.architecture == "topk_transcoder",
    }
    tensors = {theirs: np.ascontiguousarray(_turned(theirs, params[ours])) for ours, theirs in names.items()}
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
    transcodes, has_skip = (config.get(name, False) for name in ("transcode", "skip_connection"))
    faults = [] if 1 <= k <= F else [f"k is {k}, not from 1 to the number of features ({F})"]
    if has_skip and not transcodes:
        faults.append("skip_connection is true, but transcode is not, and only transcoders with a skip are supported")
    files.refuse(path / CONFIG, faults)
    architecture = "topk_transcoder" if transcodes else "topk"
    options = {"k": k} | ({"skip": has_skip} if transcodes else {})
    _, told = records.read_beside(path, architecture, F, options)
    if told.record is None:  # a folder is called by the module that it is of; a transcoder writes that module's output
        module = path.name if re.match(r"layers\.\d+(\.|$)", path.name) else ""
        metadata = _run(path) | {"sparsify": config}
        mlp = re.fullmatch(r"layers\.(\d+)\.mlp", module)
        reads = f"blocks.{mlp[1]}.{sites.MLP_INPUT}" if mlp else ""
        told = records.Told(reads, metadata, None, module) if transcodes else records.Told(module, metadata, None)

    names = TENSORS | ({"W_skip": "W_skip"} if has_skip else {})
    shapes = records.shapes(architecture, names, D, F)
    wanted = {theirs: shapes[ours][:: -1 if ours == "W_enc" else 1] for ours, theirs in names.items()}
    tensors = files.read_tensors(path / WEIGHTS, files.safetensors_contents(path / WEIGHTS), wanted)
    params: dict[str, Any] = {ours: _turned(theirs, tensors[theirs]) for ours, theirs in names.items()}
    if transcodes:
        params = records.with_center(architecture, params, D)
    return records.build(path, architecture, params, told, options)


def _run(path: Path) -> dict[str, Any]:
    """What the folder above says of the run that the SAE is from."""
    tree: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # it may be anything
        tree = reading.read_json(path.absolute().parent / CONFIG_OF_RUN)
    known = {theirs: kinds for theirs, kinds in RUN.items() if not files.misfits(tree, {theirs: kinds[1:]})}
    return {ours: tree[theirs] for theirs, (ours, *_) in known.items() if "sae" in tree}


def _turned(theirs: str, value: np.ndarray) -> np.ndarray:
    """A tensor of ours as theirs, or of theirs as ours: outputs come first in the encoder and in the skip of theirs."""
    return value.T if theirs in ("encoder.weight", "W_skip") else value
