"""Gated against baseline SAEs at equal compute (the baseline is 1.5x as wide), on the embedded model's MLP output."""

from configs import base


def get_config():
    config = base.get_config()
    site = "blocks.0.hook_mlp_out"
    config.stacks.gated = base.stack("gated", site, 1024, l1_coefficients=(4e-3, 1e-2, 2e-2), learning_rates=(3e-3,))
    config.stacks.baseline = base.stack(
        "relu", site, 1536, l1_coefficients=(3e-3, 6e-3, 1.2e-2), learning_rates=(3e-3,)
    )
    config.train.steps = 1400
    config.train.batch_size = 1024
    config.train.warmup_steps = 200
    config.train.decay_fraction = 1.0
    config.activations.buffer_size = 64 * 1024
    config.evaluation.tokens = 2**16
    return config
