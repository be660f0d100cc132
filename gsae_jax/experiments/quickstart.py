"""Gated against baseline SAEs at equal compute (the baseline is 1.5x as wide), on the embedded model's MLP output."""

from ml_collections import ConfigDict

from gsae_jax.experiments import experiment_config, stack_config


def get_config() -> ConfigDict:
    """About five minutes of training on two CPU cores."""
    config = experiment_config()
    site = "blocks.0.hook_mlp_out"
    config.stacks.gated = stack_config("gated", site, 1024, l1_coefficients=(4e-3, 1e-2, 2e-2), learning_rates=(3e-3,))
    config.stacks.baseline = stack_config(
        "relu", site, 1536, l1_coefficients=(3e-3, 6e-3, 1.2e-2), learning_rates=(3e-3,)
    )
    config.train.steps = 1400
    config.train.batch_size = 1024
    config.train.warmup_steps = 200
    config.train.decay_fraction = 1.0
    config.activations.buffer_size = 64 * 1024
    config.evaluation.tokens = 2**16
    return config
