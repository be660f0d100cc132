"""The state that training begins with: measured and filled for a new run, restored for one that continues."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import scaling
from gsae_jax.errors import UserError
from gsae_jax.storage import checkpoints as checkpoints_lib
from gsae_jax.training.step import Program, TrainState

logger = logging.getLogger(__name__)


def start(program: Program, lm_params: Any, stream: Iterator[np.ndarray], most: int | None = None) -> TrainState:
    """The first state: sites measured on the first tokens, in `most` calls at the most, and a full buffer."""
    config = program.config
    calls = -(-config.activations.scale_tokens // (config.rows_per_call * config.data.context_length))
    calls = calls if most is None else min(calls, max(1, most))
    batches = [jax.device_get(program.measure(lm_params, program.source.place(next(stream)))) for _ in range(calls)]
    measured = {}
    for site in config.sites:
        measured[site], warnings = scaling.combine([batch[site] for batch in batches], config.activations.center)
        square = measured[site].mean_square
        if not np.isfinite(square) or square == 0:
            raise UserError(
                f"has mean squared norm {square} on the first tokens; the language model or the text is unusable",
                f"site {site}",
            )
        for warning in warnings:
            logger.warning(f"site {site}: {warning}")
    return filled(program, program.init(measured), lm_params, stream)


def filled(program: Program, state: TrainState, lm_params: Any, stream: Iterator[np.ndarray]) -> TrainState:
    """The state with an empty buffer, filled."""
    batch, slots = next(iter(state.store.values())).shape[:2]
    count = jax.device_put(np.zeros(batch, np.int32), mesh_lib.sharding(program.mesh, "data"))
    call = 0
    while call == 0 or int(count.min()) < slots:
        state, count = program.fill(state, count, lm_params, program.source.place(next(stream)), call)
        call += 1
        if call > 20 * (slots + 10):
            raise UserError(
                "the exchange buffer does not fill: nearly every token is dropped; raise "
                "activations.max_norm_multiple, or choose more of data.roles",
                "activations",
            )
    return state


def saved_parts(state: TrainState, buffer: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint holds of a state: the SAEs' parameters by stack, and the rest, with or without the buffer."""
    params = {name: stack.params for name, stack in state.stacks.items()}
    rest = vars(state) | {"stacks": {name: dataclasses.replace(s, params={}) for name, s in state.stacks.items()}}
    if not buffer:
        rest["store"] = {}
    if not state.means:  # as in checkpoints of earlier versions
        del rest["means"]
    return params, rest


def restore(
    program: Program, checkpoints: checkpoints_lib.Checkpoints, step: int, buffer: bool
) -> tuple[TrainState, dict[str, Any]]:
    """The state of a checkpoint, with or without its buffer, and its position in the text."""
    params, rest, data = checkpoints.restore(step, *saved_parts(program.abstract_state(), buffer))
    state = TrainState(**{"means": {}} | rest)
    for name, stack in state.stacks.items():
        stack.params = params[name]
    return state, data
