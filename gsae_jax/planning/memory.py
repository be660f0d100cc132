"""Rules for the bytes that an accelerator's compiler needs on a device beside the arguments."""

import collections
from typing import Any

import jax
import jax.numpy as jnp

from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation.measure import AT_ONCE
from gsae_jax.lms import attention
from gsae_jax.lms.loss import logits_per_chunk
from gsae_jax.lms.sites import layer_of, parts
from gsae_jax.planning import collectives
from gsae_jax.saes.inference import floats_at_once
from gsae_jax.training.step import Program, TrainState

KEPT = 6  # float32 arrays [tokens, features] that one SAE's loss keeps for its gradient, and that measuring makes
LOGITS = 4  # float32 arrays [tokens, vocabulary] that losses of next tokens make


def training(program: Program, state: TrainState, lm_params: Any) -> int:
    """Beside the arguments of the train step.

    The SAEs' update holds every SAE's parameters as it uses them, gathered along `data` in the type of its products,
    one SAE's gradients in float32, every device's own part of all gradients, and what one SAE's loss keeps. The
    language model's forward pass holds two blocks' parameters, gathered, and a few arrays of activations. Beside either
    are the fresh activations, twice. In six cases of 4 to 512 TPUs it was 0.87 to 1.9 times what libtpu takes, which
    gathers as many SAEs ahead as it sees fit; no GPU was compared. XLA for CPUs takes over twice as much.

    If a part of training has the KL divergence, the estimate is of a step of this part.
    """
    config, shape = program.config, program.mesh.shape
    data, latent, T = shape["data"], shape["latent"], config.data.context_length
    compute = jnp.dtype(config.train.compute_dtype).itemsize
    sizes = _sizes(state)
    one = max(size / len(stack.config) for size, stack in zip(sizes, program.stacks, strict=True)) / latent
    kept = max(KEPT * 4 * config.train.batch_size / data * stack.sae.width / latent for stack in program.stacks)
    saes = sum(sizes) / latent * compute + 4 * one + 4 * sum(sizes) / latent / data + kept
    forward = _forward(program, lm_params, config.activations.rows_per_forward / data)
    each = (D * _item(program, parts(site)[1]) for site, D in program.widths.items())
    fresh = 2 * config.rows_per_call / data * T * sum(each)
    wholes = {name: model.whole.config for name, model in program.models.items() if model.whole is not None}
    if not wholes:
        return round(fresh + max(saes, forward))
    streams = sum(_item(program, name) * lm.d_model for name, lm in wholes.items())
    fresh += 4 * config.rows_per_call / data * T * streams
    kl_gradients = 4 * sum(sizes) / latent / data
    return round(fresh + kl_gradients + max(saes, forward, _end_to_end(program, state, lm_params)))


def measuring(program: Program, state: TrainState, lm_params: Any, platform: str) -> dict[str, int]:
    """All bytes on each device while SAEs are measured (`evaluation.measure`), by part and in total.

    The activations of a batch stay, and so do those that wait in their place for their losses, with their last
    residual streams. Beside these is either one SAE with the features of the tokens that are encoded at once, or a
    forward pass with the logits of as many tokens as their losses take at once. Gradient pursuit is not counted.

    Args:
        program: of the run.
        state: its arrays, abstract.
        lm_params: of the whole language model; abstract.
        platform: "cpu", "gpu" or "tpu".
    """
    config, shape, latent = program.config, program.mesh.shape, program.mesh.shape["latent"]
    lms = [model.module.config for model in program.models.values()]
    item, d_vocab = max(_item(program, name) for name in program.models), max(lm.d_vocab for lm in lms)
    rows = -(-config.evaluation.rows_per_forward // shape["data"])
    tokens = rows * config.data.context_length
    stream = item * tokens * max(*(lm.d_model for lm in lms), *program.widths.values())
    # Of a site: as it is, zero and at its mean, and the stream before it. Waiting ones are there twice, as a list and
    # as one array.
    kept = stream * (len(lms) + 4 * len(program.widths) + 3 * AT_ONCE)
    sizes = _sizes(state)
    one = max(size / len(stack.config) for size, stack in zip(sizes, program.stacks, strict=True)) / latent
    # One token of each row at least, and no more tokens than there are.
    F = max(stack.sae.width for stack in program.stacks) / latent
    features = min(tokens * F, max(floats_at_once(platform), rows * F))
    logits = min(tokens * d_vocab, max(logits_per_chunk(platform), rows * d_vocab))
    encoding = 4 * one + 4 * KEPT * features
    losses = _forward(program, lm_params, rows) + 4 * LOGITS * logits
    sizes_of = {
        "language model": mesh_lib.device_bytes(lm_params),
        "SAEs": mesh_lib.device_bytes([stack.params for stack in state.stacks.values()]),
        "temporaries": round(kept + max(encoding, losses)),
    }
    return sizes_of | {"total": sum(sizes_of.values())}


def _sizes(state: TrainState) -> list[int]:
    """How many numbers the parameters of each stack have."""
    return [sum(x.size for x in jax.tree.leaves(stack.params)) for stack in state.stacks.values()]


def _end_to_end(program: Program, state: TrainState, lm_params: Any) -> float:
    """Of the KL divergence of one SAE, and its gradient."""
    config, shape = program.config, program.mesh.shape
    data, latent, T = shape["data"], shape["latent"], config.data.context_length
    rows = config.rows_per_call / config.updates_per_call / config.forwards_per_call / data
    saes, blocks, losses = [], [], []
    for stack, size in zip(program.stacks, _sizes(state), strict=True):
        if stack.config.kl_fraction:
            name = parts(stack.config.targets[0])[1]
            lm = program.models[name].whole.config
            scores = 2 * 4 * rows * lm.n_heads / latent * T * T
            block = scores + _active(program, name, rows)
            blocks.append((lm.n_layers - layer_of(stack.config.targets[0])) * block)
            one = size / len(stack.config) / latent
            saes.append(2 * 4 * one + KEPT * 4 * rows * T * stack.sae.width / latent)
            of_chunk = max(logits_per_chunk(mesh_lib.platform(program.mesh)), rows * lm.d_vocab)
            losses.append(4 * LOGITS * min(rows * T * lm.d_vocab, of_chunk))
    return max(saes) + max(blocks) + _forward(program, lm_params, rows) + max(losses)


def _forward(program: Program, lm_params: Any, rows: float) -> float:
    """Of a forward pass of so many rows on a device; of several language models, of the largest."""
    config, shape = program.config, program.mesh.shape
    latent, T = shape["latent"], config.data.context_length
    largest = 0.0
    for name, model in program.models.items():
        blocks: collections.Counter[str] = collections.Counter()
        for path, _, _, size in collectives.gathered(program.lm_params(lm_params, name), shape):
            blocks[path.partition("/")[0]] += size
        scores = 2 * 4 * rows * model.module.config.n_heads / latent * min(T, attention.QUERIES) * T
        largest = max(largest, 2 * max(blocks.values()) + scores + _active(program, name, rows))
    return largest


def _active(program: Program, name: str, rows: float) -> float:
    """The activations of one block of a language model."""
    lm, T, item = program.models[name].module.config, program.config.data.context_length, _item(program, name)
    # Each expert that a token uses has a copy of what the MLP reads, and an output.
    uses = [layer.experts.experts_per_token if layer.experts else 0 for layer in lm.layers]
    widths = [layer.d_mlp or lm.d_mlp for layer in lm.dense.layers]
    neurons = 3 * item * max(widths) / program.mesh.shape["latent"]
    return rows * T * ((4 * 4 + (2 * item + 4) * max(uses)) * lm.d_model + neurons)


def _item(program: Program, name: str) -> int:
    """Bytes of a number of a language model."""
    return jnp.dtype(program.dtype_of(name)).itemsize
