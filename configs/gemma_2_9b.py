"""Gemma-2-9B: a gated SAE with a million features on the residual stream after layer 20 of 42.

It needs several hosts: docs/scale.md works out 64 TPU chips.
"""

from configs import paper
from gsae_jax import stack_config


def get_config():
    config = paper.recipe("google/gemma-2-9b", context_length=1024, steps=500_000, decay_fraction=0.2, center=True)
    config.activations.max_norm_multiple = 10.0  # drop the few tokens of massive norm
    config.train.batch_size = 2**14
    config.activations.rows_per_forward = config.evaluation.rows_per_forward = 64
    config.stacks.gated = stack_config("gated", "blocks.20.hook_resid_post", 2**20, (2e-3,))
    config.mesh.latent = 8
    return config
