"""The quickstart. It is part of the package: `--config quickstart` is the same experiment."""

from gsae_jax.experiments.quickstart import get_config

__all__ = ["get_config"]
