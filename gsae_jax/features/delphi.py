"""EleutherAI's delphi: its cache of activations, of the sample of rows (delphi/latents/cache.py, `save_splits`).

A folder `latents/SITE/` with `config.json`, and `FIRST_LAST.safetensors` with the locations [A, 3] (row, position,
feature) and the activations [A] of everything that is active, and the tokens [rows, T].
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from gsae_jax.features.reading import Features


def write(features: Features, folder: Path) -> None:
    """Write the cache of one SAE to a folder that exists."""
    about = features.about["collection"]
    tokens, active = features.sample()
    length = tokens.shape[1]
    place = folder / "latents" / about["targets"][-1]
    place.mkdir(parents=True)
    columns = [(token, np.full(len(token), feature), values) for feature, (token, values) in active.items()]
    nothing = np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32)
    token, feature, activation = (np.concatenate(each) for each in zip(nothing, *columns, strict=True))
    order = np.lexsort((feature, token))  # that of the text
    tensors = {
        "locations": np.stack([token // length, token % length, feature], 1)[order].astype(np.uint32),
        "activations": activation[order],
        "tokens": tokens.astype(np.int64),
    }
    safetensors.numpy.save_file(tensors, place / f"0_{len(features) - 1}.safetensors")
    config = {
        "dataset_repo": about["text"],
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 32,
        "ctx_len": length,
        "n_tokens": int(tokens.size),
        "n_splits": 1,
        "model_name": about["model"],
    }
    (place / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
