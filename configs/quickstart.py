"""The quickstart, which the package carries: `--config quickstart` is the same experiment."""

from gsae_jax.experiments.quickstart import get_config

__all__ = ["get_config"]
