"""SAELens 6: a folder of `cfg.json` and `sae_weights.safetensors` (sae_lens/saes/sae.py of 6.54)."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from gsae_jax import rendering
from gsae_jax.errors import UserError
from gsae_jax.formats import files, records, sparsify
from gsae_jax.saes import contract, parameters, trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # whose format this is
# Ours -> theirs, without a skip. As in SAELens, what batches select is a JumpReLU SAE afterwards.
ARCHITECTURES = {
    "gated": "gated",
    "relu": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",
    "matryoshka": "jumprelu",
    "relu_transcoder": "transcoder",
    "jumprelu_transcoder": "jumprelu_transcoder",
    "batch_topk_transcoder": "jumprelu_transcoder",
}
# Of other architectures, those with the same function that are written.
FORMS = {"relu_april": "relu", "gated_batch_topk": "gated", "gated_transcoder": "jumprelu_transcoder"}
WITH_SKIP = {"transcoder": "skip_transcoder", "jumprelu_transcoder": "jumprelu_skip_transcoder"}
# Theirs, by our names.
TENSORS = {
    "gated": {"W_gate": "W_enc", "b_gate": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"},
    "standard": {"W_enc": "W_enc", "b_enc": "b_enc"},
    "topk": {"W_enc": "W_enc", "b_enc": "b_enc"},
    "jumprelu": {"W_enc": "W_enc", "b_enc": "b_enc", "threshold": "threshold"},
    "transcoder": {"W_enc": "W_enc", "b_enc": "b_enc"},
    "jumprelu_transcoder": {"W_enc": "W_enc", "b_enc": "b_enc", "threshold": "threshold"},
}
KINDS: dict[str, tuple[Any, ...]] = {
    "architecture": (*TENSORS, *WITH_SKIP.values()),
    "d_in": (int,),
    "d_sae": (int,),
    "dtype": tuple(files.FLOATS.values()),
    "device": (str,),
    "apply_b_dec_to_input": (bool,),
    "normalize_activations": ("none",),
    "reshape_activations": ("none", "hook_z"),
    "metadata": (dict,),
}
# More fields, of some kinds. Inputs of transcoders are not centred.
TOPK: dict[str, tuple[Any, ...]] = {"k": (int,), "rescale_acts_by_decoder_norm": (bool,)}
TRANSCODER: dict[str, tuple[Any, ...]] = {"d_out": (int,), "apply_b_dec_to_input": (False,)}
# Fields that only SAELens before 6 writes.
EARLIER: dict[str, tuple[Any, ...]] = {
    "activation_fn_str": ("relu", "topk"),
    "sae_lens_version": (str,),
    "sae_lens_training_version": (str,),
    "hook_point": (str,),
    "hook_point_layer": (int,),
    "hook_layer": (int,),
}
METADATA = records.METADATA | {
    "sae_lens_version": (str,),
    "hook_name": (str, None, ...),
    "hook_name_out": (str, None, ...),
    "hook_head_index_out": (None, ...),
    "hook_head_index": (None, ...),  # an SAE of one head's activations
}


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    if form := FORMS.get(sae.architecture):
        sae = records.converted(sae, form)
    params = records.held(sae, {name: _tensors(name) for name in ARCHITECTURES}, ("b_in", "W_skip"))
    params = records.without_center(sae.architecture, params)
    architecture, names = _theirs(sae), _tensors(sae.architecture, "W_skip" in params)
    sites = {"hook_name": sae.site} if sae.site else {}
    sites |= {"hook_name_out": sae.target} if sae.target else {}
    record = records.record(sae)
    if sae.architecture != _ours(architecture)[0]:
        record["architecture"] = sae.architecture
    metadata = {"sae_lens_version": VERSION} | sae.metadata | sites | {records.KEY: record}
    is_transcoder = contract.writes_others(sae.functions)
    with writing.new_folder(path) as folder:
        tensors = {theirs: np.ascontiguousarray(_turned(theirs, params[ours])) for ours, theirs in names.items()}
        safetensors.numpy.save_file(tensors, folder / WEIGHTS)
        config = {
            "architecture": architecture,
            "d_in": sae.config.d_in,
            "d_sae": sae.config.width,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": _centres(sae.architecture),
            "normalize_activations": "none",
            # TransformerLens keeps heads apart there. SAELens' transcoders take them as they are.
            "reshape_activations": "hook_z" if sae.sites[0].endswith("hook_z") and not is_transcoder else "none",
            "metadata": metadata,
        }
        if sae.architecture == "topk":
            config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
        if is_transcoder:
            config["d_out"] = sae.config.d_out
        files.write_json(folder / CONFIG, config)
        card = rendering.render(
            "saelens_card.md",
            name=sae.name,
            architecture=architecture,
            width=sae.config.width,
            site=sae.site,
            target=sae.target,
            is_transcoder=is_transcoder,
            model=metadata.get("model_name"),
        )
        (folder / "README.md").write_text(card, "utf-8")


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONFIG).is_file() and not sparsify.recognises(path)


def read(path: Path) -> trained.SAE:
    """The SAE of such a folder.

    Raises:
        UserError: everything that does not fit, or that we do not have.
    """
    config = reading.read_json(path / CONFIG, strict=True)
    files.check_supported(path / CONFIG, config, KINDS | EARLIER, ("architecture", "activation_fn_str"))
    if _is_earlier(config):
        raise UserError(
            "is of SAELens before 6, whose files differ; load it in SAELens 6 with SAE.load_from_disk, and save it "
            "again with its save_model",
            str(path / CONFIG),
        )
    files.check_supported(path / CONFIG, config, KINDS, ("normalize_activations", "reshape_activations"))
    has_skip = config.get("architecture") in tuple(WITH_SKIP.values())
    is_transcoder = has_skip or config.get("architecture") in tuple(WITH_SKIP)
    kinds = KINDS | (TOPK if config.get("architecture") == "topk" else {}) | (TRANSCODER if is_transcoder else {})
    faults = files.misfits(config, kinds)
    faults += [f"{name} is not a field of an SAE for inference" for name in sorted(set(config) - set(kinds))]
    metadata = dict(config["metadata"]) if isinstance(config.get("metadata"), dict) else {}
    if "metadata" in config and not faults:
        faults += files.misfits(metadata, METADATA, "metadata.")
    files.refuse(path / CONFIG, faults)
    record, site = metadata.pop(records.KEY, None), metadata.pop("hook_name", None)
    target = metadata.pop("hook_name_out", None) if is_transcoder else None
    architecture = records.architecture(record, _ours(config["architecture"]))
    F, options = config["d_sae"], {name: config[name] for name in ("k",) if name in config}
    faults += [f"k is {k}, not from 1 to d_sae ({F})" for k in options.values() if not 1 <= k <= F]
    options |= {"skip": has_skip} if is_transcoder else {}
    faults += records.misfits(record, architecture, f"metadata.{records.KEY}.", F, options)
    files.refuse(path / CONFIG, faults)

    names = _tensors(architecture, has_skip)
    shapes = records.shapes(architecture, names, config["d_in"], config["d_sae"], config.get("d_out"))
    wanted = {theirs: shapes[ours][:: -1 if theirs == "W_skip" else 1] for ours, theirs in names.items()}
    contents = files.safetensors_contents(path / WEIGHTS)
    tensors = files.read_tensors(path / WEIGHTS, contents, wanted, (config["dtype"],))
    params = {ours: _turned(theirs, tensors[theirs]) for ours, theirs in names.items()}
    if is_transcoder:
        params = records.with_center(architecture, params, config["d_in"])
    elif config["apply_b_dec_to_input"] != _centres(architecture):
        params = records.recentered(architecture, params)
    if config.get("rescale_acts_by_decoder_norm"):
        params = records.of_unit_rows(params)
    return records.build(path, architecture, params, records.Told(site or "", metadata, record, target or ""), options)


def _is_earlier(config: dict[str, Any]) -> bool:
    """Whether SAELens before 6 wrote it, which had no `metadata`: its fields were among the others."""
    metadata = config.get("metadata")
    if not isinstance(metadata, dict):
        return "metadata" not in config and not config.keys().isdisjoint((*METADATA, *EARLIER))
    return bool(re.match(r"[0-5](\.|$)", str(metadata.get("sae_lens_version"))))


def _ours(architecture: str) -> list[str]:
    """Our architectures that are this one of theirs; the first is what a file of theirs is read as."""
    return [ours for ours, theirs in ARCHITECTURES.items() if architecture in (theirs, WITH_SKIP.get(theirs))]


def _theirs(sae: trained.SAE) -> str:
    """The name of theirs for the architecture of an SAE."""
    theirs = ARCHITECTURES[sae.architecture]
    return WITH_SKIP[theirs] if "W_skip" in sae.params else theirs


def _centres(architecture: str) -> bool:
    """Whether b_dec is subtracted from inputs."""
    return parameters.named(contract.module_of(architecture), contract.Role.CENTER) is not None


def _tensors(architecture: str, has_skip: bool = False) -> dict[str, str]:
    names = TENSORS[ARCHITECTURES[architecture]] | {"W_dec": "W_dec", "b_dec": "b_dec"}
    return names | ({"W_skip": "W_skip"} if has_skip else {})


def _turned(theirs: str, value: np.ndarray) -> np.ndarray:
    """A tensor of ours as theirs, or of theirs as ours: they write outputs first in W_skip."""
    return value.T if theirs == "W_skip" else value
