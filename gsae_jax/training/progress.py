"""What a user sees of training while it goes on."""

import sys
from typing import Any

import tqdm

from gsae_jax import processes


class Progress:
    """A bar with tokens/s and the time that remains; on a terminal, a line for each stack below it."""

    def __init__(self, total: int, step: int, stacks: list[str]):
        every: Any = {"dynamic_ncols": True, "disable": not processes.first()}
        self.bar = tqdm.tqdm(total=total, initial=step, unit="step", mininterval=1.0, **every)
        below: Any = {"bar_format": "{desc}"} | every | ({} if sys.stderr.isatty() else {"disable": True})
        self._lines = {name: tqdm.tqdm(position=1 + index, **below) for index, name in enumerate(stacks)}

    def show(self, values: dict[str, Any]) -> None:
        """Put L0, loss and gamma of every SAE on the lines, from what is logged: values by `{stack}/{statistic}`."""
        for name, line in self._lines.items():
            columns = (("L0", "l0", ".1f"), ("loss", "loss", ".3f"), ("γ", "gamma", ".3f"))
            texts = (
                f"{title} {' '.join(f'{value:{form}}' for value in values[f'{name}/{statistic}'])}"
                for title, statistic, form in columns
            )
            line.set_description_str(f"  {name}: {' | '.join(texts)}")
        self.bar.set_postfix_str(f"{values['tokens_per_second']:,.0f} tokens/s", refresh=False)

    def say(self, text: str) -> None:
        """A line above the bar, from the first process."""
        if processes.first():
            self.bar.write(text, file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        for line in (self.bar, *self._lines.values()):
            line.close()
