"""SAELens 6: a folder of `cfg.json` and `sae_weights.safetensors` (sae_lens/saes/sae.py of 6.54)."""

import os
import re
from pathlib import Path
from typing import Any

import safetensors.numpy

from gsae_jax import rendering
from gsae_jax.errors import UserError
from gsae_jax.formats import files, foreign, records
from gsae_jax.saes import contract, parameters, trained
from gsae_jax.storage import reading, writing

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # whose format this is
ARCHITECTURES = {"gated": "gated", "relu": "standard", "jumprelu": "jumprelu"}  # ours -> theirs
# Theirs, by our names.
TENSORS = {
    "gated": {"W_gate": "W_enc", "b_gate": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"},
    "relu": {"W_enc": "W_enc", "b_enc": "b_enc"},
    "jumprelu": {"W_enc": "W_enc", "b_enc": "b_enc", "threshold": "threshold"},
}
KINDS: dict[str, tuple[Any, ...]] = {
    "architecture": tuple(ARCHITECTURES.values()),
    "d_in": (int,),
    "d_sae": (int,),
    "dtype": tuple(files.FLOATS.values()),
    "device": (str,),
    "apply_b_dec_to_input": (bool,),
    "normalize_activations": ("none",),
    "reshape_activations": ("none", "hook_z"),
    "metadata": (dict,),
}
# Fields that only SAELens before 6 writes.
EARLIER: dict[str, tuple[Any, ...]] = {
    "activation_fn_str": ("relu",),
    "sae_lens_version": (str,),
    "sae_lens_training_version": (str,),
    "hook_point": (str,),
    "hook_point_layer": (int,),
    "hook_layer": (int,),
}
METADATA = records.METADATA | {
    "sae_lens_version": (str,),
    "hook_name": (str, None, ...),
    "hook_head_index": (None, ...),  # an SAE of one head's activations
}


def write(sae: trained.SAE, path: str | os.PathLike[str]) -> None:
    """Write a new folder; raises `UserError` for an SAE or a path that cannot be used."""
    params = records.held(sae, {name: _tensors(name) for name in ARCHITECTURES})
    names = _tensors(sae.architecture)
    site = {"hook_name": sae.site} if sae.site else {}
    metadata = {"sae_lens_version": VERSION} | sae.metadata | site | {records.KEY: records.record(sae)}
    with writing.new_folder(path) as folder:
        safetensors.numpy.save_file({theirs: params[ours] for ours, theirs in names.items()}, folder / WEIGHTS)
        config = {
            "architecture": ARCHITECTURES[sae.architecture],
            "d_in": sae.config.d_in,
            "d_sae": sae.config.width,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": _centres(sae.architecture),
            "normalize_activations": "none",
            # TransformerLens keeps heads apart there.
            "reshape_activations": "hook_z" if sae.sites[0].endswith("hook_z") else "none",
            "metadata": metadata,
        }
        files.write_json(folder / CONFIG, config)
        card = rendering.render(
            "saelens_card.md",
            name=sae.name,
            architecture=ARCHITECTURES[sae.architecture],
            width=sae.config.width,
            site=sae.site,
            model=metadata.get("model_name"),
        )
        (folder / "README.md").write_text(card, "utf-8")


def recognises(path: Path) -> bool:
    """Whether a path is such a folder."""
    return (path / CONFIG).is_file() and not foreign.is_sparsify(path)


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
    faults = files.misfits(config, KINDS)
    faults += [f"{name} is not a field of an SAE for inference" for name in sorted(set(config) - set(KINDS))]
    metadata = dict(config["metadata"]) if isinstance(config.get("metadata"), dict) else {}
    if "metadata" in config and not faults:
        faults += files.misfits(metadata, METADATA, "metadata.")
    files.refuse(path / CONFIG, faults)
    (architecture,) = (ours for ours, theirs in ARCHITECTURES.items() if theirs == config["architecture"])
    record, site = metadata.pop(records.KEY, None), metadata.pop("hook_name", None)
    files.refuse(path / CONFIG, records.misfits(record, architecture, f"metadata.{records.KEY}."))

    names = _tensors(architecture)
    shapes = records.shapes(architecture, names, config["d_in"], config["d_sae"])
    wanted = {theirs: shapes[ours] for ours, theirs in names.items()}
    contents = files.safetensors_contents(path / WEIGHTS)
    tensors = files.read_tensors(path / WEIGHTS, contents, wanted, (config["dtype"],))
    params = {ours: tensors[theirs] for ours, theirs in names.items()}
    if config["apply_b_dec_to_input"] != _centres(architecture):
        params = records.recentered(architecture, params)
    return records.build(path, architecture, params, site, record, metadata)


def _is_earlier(config: dict[str, Any]) -> bool:
    """Whether SAELens before 6 wrote it, which had no `metadata`: its fields were among the others."""
    metadata = config.get("metadata")
    if not isinstance(metadata, dict):
        return "metadata" not in config and not config.keys().isdisjoint((*METADATA, *EARLIER))
    return bool(re.match(r"[0-5](\.|$)", str(metadata.get("sae_lens_version"))))


def _centres(architecture: str) -> bool:
    """Whether b_dec is subtracted from inputs."""
    return parameters.input_bias(contract.module_of(architecture)) is not None


def _tensors(architecture: str) -> dict[str, str]:
    return TENSORS[architecture] | {"W_dec": "W_dec", "b_dec": "b_dec"}
