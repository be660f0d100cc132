"""What a user sees of training while it goes on: a bar on a terminal, lines in a log file or a notebook."""

import collections
import datetime
import logging
import sys
import time
from typing import Any

import tqdm

from gsae_jax import processes

logger = logging.getLogger(__name__)

COLUMNS = (
    ("L0", "l0", ".1f"),
    ("loss", "loss", ".4f"),
    ("KL", "kl", ".3f"),
    ("γ", "gamma", ".3f"),
    ("dead", "dead", ".0f"),
)
MOST = 4  # SAEs of a stack that are shown one by one; of more, the range
WARM_UP = 2  # calls whose time says nothing about the others': they compile
CALLS = 200  # the last ones, by which the remaining time is estimated


class Progress:
    """L0, loss, KL, gamma and dead features of every stack, tokens/s and the time that remains.

    On a terminal they stand in a bar and in a line for each stack below it. Elsewhere, and where standard output goes
    into a file or a pipe such as `| tee log`, each step that is logged is one line. Only the first process shows
    anything.
    """

    def __init__(self, total: int, step: int, stacks: list[str]):
        self._on_terminal = processes.first() and sys.stdout.isatty() and sys.stderr.isatty()
        self._total, self._calls = total, 0
        # When calls ended, and their steps.
        self._ended: collections.deque[tuple[float, int]] = collections.deque(maxlen=CALLS)
        hidden = {"dynamic_ncols": True, "disable": not self._on_terminal}
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
        self._bar = tqdm.tqdm(total=total, initial=step, mininterval=1.0, bar_format=layout, **hidden)
        self._lines = {
            name: tqdm.tqdm(position=1 + index, bar_format="{desc}", **hidden) for index, name in enumerate(stacks)
        }
        self._tokens_per_second = ""

    def ended(self, step: int) -> None:
        """A call of the train step has ended."""
        self._calls, now = self._calls + 1, time.perf_counter()
        if self.is_warm:
            self._ended.append((now, step))
        self._bar.set_postfix_str(", ".join(filter(None, (self._tokens_per_second, self.left(step)))), refresh=False)
        self._bar.update(step - self._bar.n)

    @property
    def is_warm(self) -> bool:
        """Whether the calls that compile have ended."""
        return self._calls >= WARM_UP

    def left(self, step: int) -> str:
        """The time that remains; "" until it can be estimated."""
        if len(self._ended) < 2:
            return ""
        (began, first), (now, last) = self._ended[0], self._ended[-1]
        seconds = (self._total - step) * (now - began) / (last - first)
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def show(self, step: int, values: dict[str, Any]) -> None:
        """What is logged of a step: values by `{stack}/{statistic}`."""
        self._tokens_per_second = f"{values['tokens_per_second']:,.0f} tokens/s"
        stacks = {name: _shown(name, values) for name in self._lines}
        if self._on_terminal:
            for name, text in stacks.items():
                self._lines[name].set_description_str(f"  {name}: {text}")
            return
        general = [f"step {step:,} of {self._total:,}", self._tokens_per_second, self.left(step)]
        logger.info(" | ".join(filter(None, (*general, *(f"{name}: {text}" for name, text in stacks.items())))))

    def say(self, text: str) -> None:
        """A line above the bar, from the first process."""
        if processes.first():
            tqdm.tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        for line in (self._bar, *self._lines.values()):
            line.close()


def _shown(stack: str, values: dict[str, Any]) -> str:
    """The columns of one stack, `L0 12.1 30.5, loss 0.2013 0.1422`; `12.1 to 80.3` for many SAEs."""
    columns = []
    for title, statistic, form in COLUMNS:
        numbers = values.get(f"{stack}/{statistic}")
        if numbers is None:  # there is no KL before the part of training that has it
            continue
        shown = numbers if len(numbers) <= MOST else [min(numbers), max(numbers)]
        columns.append(f"{title} " + (" " if shown is numbers else " to ").join(f"{number:{form}}" for number in shown))
    return ", ".join(columns)
