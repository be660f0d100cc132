"""Transcoders of the embedded model's MLP: gated (with and without a skip), ReLU and BatchTopK.

python -m gsae_jax.train --config configs/transcoders.py --workdir runs/transcoders
"""

from configs import quickstart
from gsae_jax import stack_config


def get_config():
    config = quickstart.get_config()
    mlp = {"site": "blocks.0.ln2.hook_normalized", "target": "blocks.0.hook_mlp_out", "learning_rates": (3e-3,)}
    gated = {"width": 1024, "l1_coefficients": (4e-3, 1e-2, 2e-2), **mlp}
    config.stacks = {
        "gated": stack_config("gated_transcoder", **gated),
        "gated_skip": stack_config("gated_transcoder", skip=True, **gated),
        "relu": stack_config("relu_transcoder", width=1536, l1_coefficients=(3e-3, 6e-3, 1.2e-2), **mlp),
    }
    for k in (10, 30, 100):
        config.stacks[f"batch_topk_{k}"] = stack_config("batch_topk_transcoder", width=1024, k=k, **mlp)
    return config
