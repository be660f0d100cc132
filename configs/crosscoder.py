"""Crosscoders of three residual streams of the embedded model: gated, ReLU and BatchTopK.

python -m gsae_jax.train --config configs/crosscoder.py --workdir runs/crosscoder
"""

from configs import quickstart
from gsae_jax import stack_config


def get_config():
    config = quickstart.get_config()
    streams = {
        "site": ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_post"),
        "width": 1024,
        "learning_rates": (3e-3,),
    }
    config.stacks = {
        "gated": stack_config("gated_crosscoder", l1_coefficients=(4e-3, 1e-2, 2e-2), **streams),
        "relu": stack_config("relu_crosscoder", l1_coefficients=(3e-3, 6e-3, 1.2e-2), **streams),
    }
    for k in (10, 30, 100):
        config.stacks[f"batch_topk_{k}"] = stack_config("batch_topk_crosscoder", k=k, **streams)
    return config
