"""Gated SAEs on activations of another program: `--config configs/stored.py:SITE --config.data.source=store:PATH`.

`python -m gsae_jax.store --from FILES` makes the store (docs/guides/store.md). SITE is one of its sites.
"""

from gsae_jax import experiment_config, stack_config


def get_config(site="activations"):
    config = experiment_config()
    config.data.source, config.lm.path = "store:stores/activations", "none"
    config.stacks.gated = stack_config("gated", site, 1024, (4e-3, 1e-2, 2e-2), learning_rates=(1e-3,))
    config.activations.buffer_size = 2**18
    return config
