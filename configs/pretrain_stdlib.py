"""The embedded language model: GELU-1L at half its width, trained on the source code of Python's library."""

from gsae_jax.experiments import pretrain_config


def get_config():
    return pretrain_config()
