"""Cases that only `-m variants` runs."""

import pytest


def variants(*values):
    """Values of one argument of `pytest.mark.parametrize`."""
    return [pytest.param(value, marks=pytest.mark.variants) for value in values]
