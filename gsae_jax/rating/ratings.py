"""What a rater that runs by itself says of a feature."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from gsae_jax.features import Features


@dataclasses.dataclass(frozen=True)
class Rating:
    """How interpretable a feature is.

    Attributes:
        score: 0 to 1: balanced accuracy of what the explanation predicts. 0.5 is chance.
        low: lower end of the score's 95% interval.
        high: its upper end.
        explanation: in words.
        details: other numbers, as JSON holds them.
    """

    score: float
    low: float
    high: float
    explanation: str
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
