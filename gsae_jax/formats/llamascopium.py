"""OpenMOSS' llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.

Of its SAEs and transcoders those with ReLU, JumpReLU or TopK (llamascopium/models/sae.py of 2.0.0b34), and of its
crosscoders those with ReLU (crosscoder.py). Its other activations select features at each site by the norms of their
rows at that site, and a feature of ours is active at all sites or at none.

Inputs are not centred. A norm of activations that its weights were trained for and that is not in them yet is folded
into them. It ignores fields of `config.json` that it does not know, but what we know besides goes into a file beside.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gsae_jax.config import INT32
from gsae_jax.errors import UserError
from gsae_jax.formats import files, jumprelu, records
from gsae_jax.saes import contract, crosscoder, parameters, relu, trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
KINDS: dict[str, tuple[Any, ...]] = {
    "sae_type": ("sae", "crosscoder"),
    "d_model": (int,),
    "expansion_factor": (int, float),
    "use_decoder_bias": (bool,),
    "act_fn": ("relu", "jumprelu", "topk"),
    "norm_activation": ("dataset-wise", "inference"),
    "sparsity_include_decoder_norm": (bool,),
    "hook_point_in": (str,),
    "hook_point_out": (str,),  # of a transcoder, the site that it writes
    "use_glu_encoder": (False,),
    "top_k": (int, ...),
    # These say nothing of the function.
    "use_triton_kernel": (bool, ...),
    "sparsity_threshold_for_triton_spmm_kernel": (int, float, ...),
    "jumprelu_threshold_window": (int, float, ...),
}
THRESHOLD = "activation_function.log_jumprelu_threshold"
OF_SAE = ("hook_point_in", "hook_point_out", "use_glu_encoder")
OF_CROSSCODER: dict[str, tuple[Any, ...]] = {
    "hook_points": (list,),
    "act_fn": ("relu",),
    "use_decoder_bias": (True,),
    "sparsity_include_decoder_norm": (True,),
}
# Ours -> theirs.
TENSORS = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
HELD = {"relu": tuple(TENSORS), "topk": tuple(TENSORS), "jumprelu": (*TENSORS, "threshold")}
HELD |= {f"{name}_transcoder": tensors for name, tensors in HELD.items()}
CROSSCODER = "relu_crosscoder"


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder, of other architectures with the JumpReLU form.

    Raises:
        UserError: an SAE or a path that cannot be used.
    """
    if sae.architecture == CROSSCODER:
        config, tensors = _crosscoder(sae)
    else:
        if sae.architecture not in HELD:
            sae = jumprelu.form(sae)
        config, tensors = _sae(sae)
    D, F = config["d_model"], sae.config.width
    factor = F / D
    while int(D * factor) < F:  # as they compute the width
        factor = math.nextafter(factor, math.inf)
    config |= {"expansion_factor": factor, "use_decoder_bias": True, "norm_activation": "inference"}
    with writing.new_folder(path) as folder:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        files.write_json(folder / CONFIG, config)
        records.write_beside(sae, folder)


def _sae(sae: trained.SAE) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(Fields, tensors) of an SAE or a transcoder."""
    params, D = records.held(sae, HELD, ("b_in",)), sae.config.d_in
    if contract.writes_others(sae.functions):
        params = records.without_center(sae.architecture, params)
        if sae.config.d_out != D:
            sizes = f"is a transcoder from width {D} to width {sae.config.d_out}, and llamascopium's have one width"
            raise UserError(f"{sizes} for both; write the format saelens", sae.name)
        if sae.sites == sae.targets:  # as it is an SAE there then
            raise UserError(
                f"is a transcoder that reads and writes {sae.site!r}; give `dataclasses.replace(sae, site=..., "
                "target=...)` with its two sites",
                sae.name,
            )
    elif parameters.input_bias(sae.functions):
        params = records.decentred(sae.architecture, params)
    tensors = {theirs: np.asarray(params[ours]) for ours, theirs in TENSORS.items()}
    if "threshold" in params:
        thresholds = np.maximum(params["threshold"], np.finfo(np.float32).tiny)
        tensors[THRESHOLD] = np.log(thresholds, dtype=np.float64).astype(np.float32)
    config = {
        "sae_type": "sae",
        "d_model": D,
        "act_fn": sae.architecture.removesuffix("_transcoder"),
        "sparsity_include_decoder_norm": False,
        "hook_point_in": sae.sites[0],
        "hook_point_out": sae.targets[0],
        "use_glu_encoder": False,
    }
    return config | ({"top_k": sae.config.k} if "k" in contract.options(sae.config) else {}), tensors


def _crosscoder(sae: trained.SAE) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The same of a crosscoder: features have one bias, which is that of the first site there."""
    H, widths = len(sae.sites), sae.config.d_in
    if len({*widths}) > 1:
        sizes = ", ".join(f"{site} {width}" for site, width in zip(sae.sites, widths, strict=True))
        raise UserError(f"has sites of different widths ({sizes}), and a crosscoder of llamascopium has one", sae.name)
    of_sites = [f"{name}_{site}" for name in ("W_enc", "W_dec", "b_dec") for site in range(H)]
    params = records.held(sae, {CROSSCODER: [*of_sites, "b_enc"]})
    for site in range(H):
        norms = np.sqrt(np.square(params[f"W_dec_{site}"]).sum(-1))  # in float32, as there
        if zero := int((norms == 0).sum()):
            why = f"has {zero} features whose decoder row at {sae.sites[site]} is zero"
            how = "llamascopium divides by its norm; write a crosscoder without them"
            raise UserError(f"{why}, and {how}", sae.name)
    whole = records.decentred("relu", crosscoder.joined(relu.PARAMETERS, params))
    params = crosscoder.split(relu.PARAMETERS, whole, widths)
    tensors = {
        TENSORS[name]: np.stack([np.asarray(params[f"{name}_{site}"]) for site in range(H)])
        for name in ("W_enc", "W_dec", "b_dec")
    }
    b_enc = np.asarray(params["b_enc"])
    tensors["b_E"] = np.stack([b_enc, *[np.zeros_like(b_enc)] * (H - 1)])
    config = {
        "sae_type": "crosscoder",
        "d_model": widths[0],
        "act_fn": "relu",
        "sparsity_include_decoder_norm": True,
        "hook_points": list(sae.sites),
    }
    return config, tensors


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder.

    Raises:
        UserError: everything that does not fit, or that we do not have.
    """
    config = reading.read_json(path / CONFIG, strict=True)
    kinds = KINDS
    if config.get("sae_type") == "crosscoder":
        kinds = {name: kind for name, kind in KINDS.items() if name not in OF_SAE} | OF_CROSSCODER
    switches = [name for name in ("sae_type", "act_fn", "norm_activation", "use_glu_encoder") if name in kinds]
    files.check_supported(path / CONFIG, config, kinds, switches)
    faults = files.misfits(config, kinds)
    faults += [f"{name} is not known" for name in sorted(set(config) - set(kinds))]
    if not faults and not all(0 < config[name] <= INT32 for name in ("d_model", "expansion_factor")):
        faults.append(f"d_model and expansion_factor are not both above 0 and up to {INT32}")
    files.refuse(path / CONFIG, faults)
    F = int(config["d_model"] * config["expansion_factor"])
    return _read_crosscoder(path, config, F) if "hook_points" in config else _read_sae(path, config, F)


def _read_sae(path: Path, config: dict[str, Any], F: int) -> trained.SAE:
    site, target = config["hook_point_in"], config["hook_point_out"]
    transcodes, D, act_fn = site != target, config["d_model"], config["act_fn"]
    options = {"k": config.get("top_k", 50)} if act_fn == "topk" else {}
    faults = [f"top_k is {k}, not from 1 to the number of features ({F})" for k in options.values() if not 1 <= k <= F]
    files.refuse(path / CONFIG, faults)
    architecture, told = records.read_beside(path, act_fn + "_transcoder" * transcodes, F, options)
    if told.record is None:
        told = records.Told(site, {"llamascopium": config}, None, target if transcodes else "")

    wanted: dict[str, files.Shape] = {"W_E": (D, F), "b_E": (F,), "W_D": (F, D)}
    wanted |= {"b_D": (D,)} if config["use_decoder_bias"] else {}
    wanted |= {THRESHOLD: (F,)} if act_fn == "jumprelu" else {}
    tensors, units = _read_tensors(path, config, wanted, (site, target))
    params: dict[str, Any] = {"W_enc": tensors["W_E"], "b_enc": tensors["b_E"], "W_dec": tensors["W_D"]}
    params["b_dec"] = tensors.get("b_D", np.zeros(D, np.float32))
    if act_fn == "jumprelu":
        threshold = np.exp(tensors[THRESHOLD], dtype=np.float64)
        if config["sparsity_include_decoder_norm"]:
            threshold /= np.maximum(np.linalg.norm(tensors["W_D"].astype(np.float64), axis=-1), 1e-30)
        params["threshold"] = np.minimum(threshold, np.finfo(np.float32).max).astype(np.float32)
    module = contract.module_of(architecture)
    if transcodes:
        params = records.with_center(architecture, params, D)
    params = parameters.fold(module, params, units[:1], units[1:])
    if not transcodes and parameters.input_bias(module):
        params = records.recentered(architecture, params)
    if act_fn == "topk" and config["sparsity_include_decoder_norm"]:
        params = records.of_unit_rows(params)
    return records.build(path, architecture, params, told, options)


def _read_crosscoder(path: Path, config: dict[str, Any], F: int) -> trained.SAE:
    names, D = config["hook_points"], config["d_model"]
    if not names or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        files.refuse(path / CONFIG, ["hook_points is not a list of different names"])
    H = len(names)
    if H > crosscoder.SITES:
        files.refuse(path / CONFIG, [f"hook_points has {H} sites; at most {crosscoder.SITES} are read"])
    _, told = records.read_beside(path, CROSSCODER, F)
    if told.record is None:
        told = records.Told(tuple(names), {"llamascopium": config}, None)
    wanted = {"W_E": (H, D, F), "b_E": (H, F), "W_D": (H, F, D), "b_D": (H, D)}
    tensors, units = _read_tensors(path, config, wanted, names)
    params: dict[str, Any] = {
        f"{ours}_{site}": tensors[TENSORS[ours]][site] for ours in ("W_enc", "W_dec", "b_dec") for site in range(H)
    }
    params["b_enc"] = tensors["b_E"].sum(0, dtype=np.float64).astype(np.float32)
    params = parameters.fold(contract.module_of(CROSSCODER), params, units, units)
    whole = records.recentered("relu", crosscoder.joined(relu.PARAMETERS, params))
    return records.build(path, CROSSCODER, crosscoder.split(relu.PARAMETERS, whole, (D,) * H), told)


def _read_tensors(
    path: Path, config: dict[str, Any], wanted: dict[str, files.Shape], names: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[parameters.Units]]:
    """(Tensors, the units of each site) of a file whose norms of activations, if they are used, are of these sites."""
    about, reader = files.safetensors_contents(path / WEIGHTS)
    norms = {name: f"dataset_average_activation_norm.{name}" for name in names}
    if config["norm_activation"] == "inference":  # they are in the weights then, and their tensors are not set
        for tensor in norms.values():
            about.pop(tensor, None)
        return files.read_tensors(path / WEIGHTS, (about, reader), wanted), [parameters.Units()] * len(names)
    tensors = files.read_tensors(path / WEIGHTS, (about, reader), wanted | dict.fromkeys(norms.values(), ()))
    averages = {tensor: float(tensors[tensor]) for tensor in norms.values()}
    faults = [
        f"the tensor {tensor} is {average}, which is not a possible norm"
        for tensor, average in averages.items()
        if average <= 0
    ]
    files.refuse(path / WEIGHTS, faults)
    scale = math.sqrt(config["d_model"])
    return tensors, [parameters.Units(scale / averages[norms[name]]) for name in names]
