"""Gated and baseline SAEs at two sites, trained on a model whose MLP output has a large mean: docs/centring.md."""

from configs import quickstart
from gsae_jax import stack_config

SITES = {"mlp_out": "blocks.0.hook_mlp_out", "resid_post": "blocks.0.hook_resid_post"}


def get_config():
    config = quickstart.get_config()
    config.stacks = {}
    for name, site in SITES.items():
        start = {"learning_rates": (3e-3,), "initial_l0": 0}  # zero biases suit inputs that are not centred
        config.stacks[f"gated_{name}"] = stack_config("gated", site, 512, (1e-2,), **start)
        config.stacks[f"baseline_{name}"] = stack_config("relu", site, 512, (6e-3,), **start)
    config.train.steps = 1000
    return config
