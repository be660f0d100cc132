"""What is known of every feature of an SAE: collected in one pass over text, and read from a file."""

from gsae_jax.features.reading import Alike, Context, Effect, Feature, Features, load

__all__ = ["Alike", "Context", "Effect", "Feature", "Features", "load"]
