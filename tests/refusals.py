"""How tests ask for an error of the user: by its field and the facts in it, whatever its words."""

import contextlib
from collections.abc import Iterator

import pytest

from gsae_jax.errors import UserError


@contextlib.contextmanager
def refused(field: str, *facts: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """What is done inside raises a `UserError` about `field`, and each fact stands in its problem."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.field == field, caught.value
    for fact in facts:
        assert fact in caught.value.problem, (fact, caught.value)
