"""OpenMOSS' llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.

Of its SAEs those with ReLU, JumpReLU or TopK (llamascopium/models/sae.py of 2.0.0b34). Inputs are not centred. A norm
of activations that its weights were trained for and that is not in them yet is folded into them. It ignores fields of
`config.json` that it does not know, but what we know besides goes into a file beside it.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gsae_jax.config import INT32
from gsae_jax.formats import files, jumprelu, records
from gsae_jax.saes import contract, parameters, trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
KINDS: dict[str, tuple[Any, ...]] = {
    "sae_type": ("sae",),
    "d_model": (int,),
    "expansion_factor": (int, float),
    "use_decoder_bias": (bool,),
    "act_fn": ("relu", "jumprelu", "topk"),
    "norm_activation": ("dataset-wise", "inference"),
    "sparsity_include_decoder_norm": (bool,),
    "hook_point_in": (str,),
    "hook_point_out": (str,),
    "use_glu_encoder": (False,),
    "top_k": (int, ...),
    # These say nothing of the function.
    "use_triton_kernel": (bool, ...),
    "sparsity_threshold_for_triton_spmm_kernel": (int, float, ...),
    "jumprelu_threshold_window": (int, float, ...),
}
THRESHOLD = "activation_function.log_jumprelu_threshold"
# Ours -> theirs.
TENSORS = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
HELD = {"relu": tuple(TENSORS), "topk": tuple(TENSORS), "jumprelu": (*TENSORS, "threshold")}


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder, of other architectures with the JumpReLU form.

    Raises:
        UserError: an SAE or a path that cannot be used.
    """
    if sae.architecture not in HELD:
        sae = jumprelu.form(sae)
    params, D, F = records.held(sae, HELD), sae.config.d_in, sae.config.width
    if parameters.input_bias(sae.functions):
        params = records.decentred(sae.architecture, params)
    tensors = {theirs: np.asarray(params[ours]) for ours, theirs in TENSORS.items()}
    if sae.architecture == "jumprelu":
        thresholds = np.maximum(params["threshold"], np.finfo(np.float32).tiny)
        tensors[THRESHOLD] = np.log(thresholds, dtype=np.float64).astype(np.float32)
    factor = F / D
    while int(D * factor) < F:  # as they compute the width
        factor = math.nextafter(factor, math.inf)
    config = {
        "sae_type": "sae",
        "d_model": D,
        "expansion_factor": factor,
        "use_decoder_bias": True,
        "act_fn": sae.architecture,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "hook_point_in": sae.site,
        "hook_point_out": sae.site,
        "use_glu_encoder": False,
    }
    if sae.architecture == "topk":
        config["top_k"] = sae.config.k
    with writing.new_folder(path) as folder:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        files.write_json(folder / CONFIG, config)
        records.write_beside(sae, folder)


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder.

    Raises:
        UserError: everything that does not fit, or that we do not have.
    """
    config = reading.read_json(path / CONFIG, strict=True)
    files.check_supported(path / CONFIG, config, KINDS, ("sae_type", "act_fn", "norm_activation", "use_glu_encoder"))
    faults = files.misfits(config, KINDS)
    faults += [f"{name} is not known" for name in sorted(set(config) - set(KINDS))]
    if not faults and config["hook_point_in"] != config["hook_point_out"]:
        faults.append("hook_point_in and hook_point_out differ: it is a transcoder")
    if not faults and not all(0 < config[name] <= INT32 for name in ("d_model", "expansion_factor")):
        faults.append(f"d_model and expansion_factor are not both above 0 and up to {INT32}")
    files.refuse(path / CONFIG, faults)
    architecture, site = config["act_fn"], config["hook_point_in"]
    D, F = config["d_model"], int(config["d_model"] * config["expansion_factor"])
    options = {"k": config.get("top_k", 50)} if architecture == "topk" else {}
    faults = [f"top_k is {k}, not from 1 to the number of features ({F})" for k in options.values() if not 1 <= k <= F]
    files.refuse(path / CONFIG, faults)
    ours, metadata, record = records.read_beside(path, architecture, F, options)
    if record is None:
        metadata = {"llamascopium": config}

    wanted: dict[str, files.Shape] = {"W_E": (D, F), "b_E": (F,), "W_D": (F, D)}
    wanted |= {"b_D": (D,)} if config["use_decoder_bias"] else {}
    wanted |= {THRESHOLD: (F,)} if architecture == "jumprelu" else {}
    about, reader = files.safetensors_contents(path / WEIGHTS)
    norm = f"dataset_average_activation_norm.{site}"
    if config["norm_activation"] == "inference":  # it is in the weights then, and its tensor is not set
        about.pop(norm, None)
    else:
        wanted[norm] = ()
    tensors = files.read_tensors(path / WEIGHTS, (about, reader), wanted)
    average = float(tensors[norm]) if norm in wanted else math.sqrt(D)
    if average <= 0:
        files.refuse(path / WEIGHTS, [f"the tensor {norm} is {average}, which is not a possible norm"])
    params: dict[str, Any] = {"W_enc": tensors["W_E"], "b_enc": tensors["b_E"], "W_dec": tensors["W_D"]}
    params["b_dec"] = tensors.get("b_D", np.zeros(D, np.float32))
    if architecture == "jumprelu":
        threshold = np.exp(tensors[THRESHOLD], dtype=np.float64)
        if config["sparsity_include_decoder_norm"]:
            threshold /= np.maximum(np.linalg.norm(tensors["W_D"].astype(np.float64), axis=-1), 1e-30)
        params["threshold"] = np.minimum(threshold, np.finfo(np.float32).max).astype(np.float32)
    module, units = contract.module_of(architecture), [parameters.Units(math.sqrt(D) / average)]
    params = parameters.fold(module, params, units, units)
    if parameters.input_bias(module):
        params = records.recentered(architecture, params)
    if architecture == "topk" and config["sparsity_include_decoder_norm"]:
        params = records.of_unit_rows(params)
    return records.build(path, architecture, params, site if record is None else ours, record, metadata, options)
