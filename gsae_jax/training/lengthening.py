"""What it means for a run that continues with another `train.steps`."""

from collections.abc import Sequence

import jax.numpy as jnp

from gsae_jax.config import Experiment
from gsae_jax.training import optimiser


def consequences(config: Experiment, steps_before: int, step: int, parts: Sequence[int]) -> list[str]:
    """Sentences for the user: what differs from a run that had `train.steps` from the start.

    Args:
        config: of the run as it continues.
        steps_before: `train.steps` until now.
        step: at which the run continues.
        parts: rows of text that the run reads in one pass: with `train.steps` as it was each time, and as it is now.
    """
    train, sentences = config.train, []
    if train.decay_fraction:
        before, now = (
            float(optimiser.schedule(train, config.resampled_at, steps)(jnp.int32(step)))
            for steps in (steps_before, train.steps)
        )
        if abs(before - now) > 1e-3:
            sentences.append(
                f"the learning rate was at {before:.0%} of its value and continues at {now:.0%} (train.decay_fraction="
                f"{train.decay_fraction:g} of {train.steps:,} steps). The SAEs will differ from those of a run "
                f"that had {train.steps:,} steps from the start"
            )
            if now > before:
                sentences.append("the loss will rise before it falls again")
    if targets := [name for name, stack in config.stacks.items() if stack.target_l0]:
        was, end = (optimiser.end_of_gain(steps) for steps in (steps_before, train.steps))
        what = f"the l1 coefficients of {', '.join(targets)}"
        if step < end:
            sentences.append(f"training adjusts {what} to reach target_l0 until step {end:,} (until {was:,} before)")
        else:
            sentences.append(f"{what} do not change any more: training adjusts them in its first two thirds only")
    for name, stack in config.stacks.items():
        fraction = stack.coefficient_warmup_fraction or 0.0
        warmups = [optimiser.coefficient_warmup(steps, fraction) for steps in (steps_before, train.steps)]
        ready, here = (float(warmup(jnp.int32(step))) if warmup else 1.0 for warmup in warmups)
        if abs(ready - here) > 1e-3:
            sentences.append(
                f"the warm-up of {name}'s sparsity was at {ready:.0%} and continues at {here:.0%} "
                f"(coefficient_warmup_fraction={fraction:g} of {train.steps:,} steps): its L0 changes again"
            )
        was, start = (config.kl_start(name, steps) for steps in (steps_before, train.steps))
        if stack.kl_fraction and was != start and max(was, start) >= step:
            since = max(start, step)
            sentences.append(f"the loss of {name} has the KL divergence from step {since:,} on ({was:,} before)")
            if was < step < start:
                sentences.append(f"it does not have it between the steps {step:,} and {start:,}")
    if (rows := parts[-1]) > (earlier := max(parts[:-1])):
        sentences.append(
            f"the run reads {rows - earlier:,} more rows of text, after the {earlier:,} rows that it has read until now"
        )
    return sentences


def late(config: Experiment, steps_before: int, step: int) -> list[str]:
    """The stacks whose loss has the KL divergence from this step on, as fewer steps have moved its beginning before it.

    `steps_before` and `step`: as for `consequences`.
    """
    return [name for name in config.stacks if config.kl_start(name) < step <= config.kl_start(name, steps_before)]
