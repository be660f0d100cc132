"""A bar for the preparation of text."""

import sys
from typing import Any

import tqdm

from gsae_jax import processes

DELAY = 3  # seconds that a preparation takes at the least if a bar is shown


def bar(what: str, total: int | None, unit: str) -> Any:
    """A tqdm bar on the terminal of the first process, removed at its end; a log file gets none."""
    shown = processes.first() and sys.stderr.isatty()
    options: dict[str, Any] = {"unit_scale": True, "dynamic_ncols": True, "leave": False, "delay": DELAY}
    return tqdm.tqdm(total=total, desc=what, unit=unit, disable=not shown, **options)
