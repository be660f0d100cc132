"""Folders of known kinds that hold no SAE which can be read; an error says which kind it is."""

from pathlib import Path

from gsae_jax.errors import UserError

SPARSIFY = "sae.safetensors"  # its weights, beside a cfg.json as in SAELens, whose weights have another name
LANGUAGE_MODEL = ("model.safetensors", "model.safetensors.index.json", "tokenizer.json")


def is_sparsify(path: Path) -> bool:
    """Whether a path is a folder of EleutherAI's sparsify (sparsify/sparse_coder.py of 1.3)."""
    return (path / SPARSIFY).is_file()


def check(path: Path) -> None:
    """Raises `UserError` for a folder of sparsify or of a language model."""
    if is_sparsify(path):
        raise UserError(
            "is of EleutherAI's sparsify, whose architecture (top-k) is not supported; write another SAE", str(path)
        )
    if (path / "config.json").is_file() and any((path / name).is_file() for name in LANGUAGE_MODEL):
        raise UserError("holds a language model and no SAE; write the folder of an SAE", str(path))
