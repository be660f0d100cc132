"""PyTorch pickles to safetensors; needs torch. Pickles are read with `weights_only=True`, which runs no code."""

import importlib
import json
from pathlib import Path
from typing import Any

from gsae_jax import errors
from gsae_jax.errors import UserError
from gsae_jax.lms import checkpoints, weights
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.storage import reading, writing

BIN_INDEX = "pytorch_model.bin.index.json"


@errors.about("source")
def convert(source: str, out: Path, tokenizer: str = "", revision: str = "") -> None:
    """Write the directory `out`, whole or not at all.

    Args:
        source: a directory, or a hub name.
        out: where the safetensors, `config.json` and tokenizer go.
        tokenizer: a directory or hub name to take the tokenizer from; by default `source`, or what it names.
        revision: of a hub name.

    Raises:
        UserError: no pickle there, one that holds more than tensors, a model that we lack, or an `out` that exists.
    """
    out = out.expanduser().resolve()
    with errors.about("out"):
        writing.check_new(out, or_empty=True)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        patterns = ("*.json", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin", "model_final.pth")
        folder = checkpoints.fetch(source, revision, *patterns)
    checkpoints.refuse_other_formats(folder)
    settings = checkpoints.read_settings(folder)
    if "model_type" not in settings:  # TransformerLens' own
        settings = {"model_type": "gelu"} | settings
    checkpoints.understand(settings, folder)
    files = _pickles(folder)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise UserError("is a pickle, which only torch can read: pip install 'gsae_jax[torch]'") from error
    with errors.about("out"), writing.new_folder(out, or_empty=True) as made, errors.about("source"):
        (made / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        own = any(folder.glob("tokenizer*")) or any(folder.glob("vocab*"))
        with errors.about("tokenizer"):
            _copy_tokenizer(tokenizer or (folder if own else settings.get("tokenizer_name")), made, folder)
        weight_map: dict[str, str] = {}
        for number, file in enumerate(files, 1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else weights.WEIGHTS
            weight_map |= dict.fromkeys(_convert_file(file, made / name), name)
        if len(files) > 1:
            (made / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
        if faults := checkpoints.Checkpoint.open(made).faults():
            raise UserError(f"{folder} has weights that do not fit its config.json: {'; '.join(faults)}")


def _pickles(folder: Path) -> list[Path]:
    if (folder / BIN_INDEX).exists():
        files = sorted(set(weights.read_index(folder / BIN_INDEX).values()))
        lost = [file for file in files if not (folder / file).is_file()]
        if lost:
            raise UserError(f"{folder / BIN_INDEX} names {', '.join(lost)}, which are not there")
        return [folder / file for file in files]
    for name in ("pytorch_model.bin", "model_final.pth"):
        if (folder / name).exists():
            return [folder / name]
    pickles = sorted(file for file in folder.iterdir() if file.suffix in checkpoints.PICKLES)
    if len(pickles) != 1:
        names = ", ".join(file.name for file in pickles) or "none"
        raise UserError(f"{folder} must have one pickle, or {BIN_INDEX}; it has {names}")
    return pickles


def _convert_file(file: Path, out: Path) -> list[str]:
    """Write the tensors of one pickle; returns their names."""
    import safetensors.torch
    import torch

    try:
        tensors: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own, those of zip files and those of pickles
        reading.check_fetched(file)
        why = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as a pickle of tensors alone: {why}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{file} holds more than a dictionary of tensors; save its state_dict")
    own = {name: value.clone().contiguous() for name, value in tensors.items()}  # tied tensors share memory
    safetensors.torch.save_file(own, out, metadata={"format": "pt"})
    return list(own)


def _copy_tokenizer(source: str | Path | None, out: Path, folder: Path) -> None:
    if not source:
        raise UserError(f"{folder} has no tokenizer; write the directory or hub name of one", "tokenizer")
    if not Path(source).expanduser().is_dir():
        source = checkpoints.fetch(str(source), "", "*.json", "*.model", "*.txt", "*.jinja")
    tokenizer_lib.load(Path(source).expanduser()).save_pretrained(out)
