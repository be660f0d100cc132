"""The embedded language model: GELU-1L's shape at half its width, on the Python standard library's source."""

from gsae_jax.experiments import pretrain_config


def get_config():
    return pretrain_config()
