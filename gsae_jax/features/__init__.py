"""What is known of every feature of an SAE: collected in one pass over text, and read from a file."""

from gsae_jax.features.ratings import Rating
from gsae_jax.features.reading import FOLDER, Alike, Context, Effect, Feature, Features, load

__all__ = ["FOLDER", "Alike", "Context", "Effect", "Feature", "Features", "Rating", "load"]
