"""What a rater that runs by itself is."""

from typing import Protocol

from gsae_jax.features import Features
from gsae_jax.features.ratings import Rating

__all__ = ["Rater", "Rating"]


class Rater(Protocol):
    """Rates features one by one, always in the same way.

    Attributes:
        name: of the rater, with whatever its ratings depend on.
    """

    name: str

    def rate(self, features: Features, number: int) -> Rating | None:
        """The rating of a feature; None if too little is known of it.

        Raises:
            TrainingError: it cannot be rated now, and the next attempt may succeed.
        """
        ...
