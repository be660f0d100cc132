"""Training a small language model and its tokenizer from text: how the embedded model was made."""

import json
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tqdm
import transformers
from matplotlib.figure import Figure

from gsae_jax import config as config_lib
from gsae_jax import config_trees, errors
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import checkpoints, gelu
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.lms.transformer import Model

logger = logging.getLogger(__name__)

TEST_ROWS = 16  # rows of held-out text in one batch


def pretrain(config: config_lib.Pretrain, out: Path) -> float:
    """Train and write a checkpoint directory; returns its held-out cross-entropy in nats per token.

    Raises:
        UserError: text that is too short.
    """
    rows_lib.check_new(config.data)
    tokenizer = train_tokenizer(config)
    module: Any = Model(
        gelu.config({**vars(config.model), "d_vocab": len(tokenizer), "n_ctx": config.data.context_length})
    )
    train_rows = rows_lib.open_rows(config.data, "train", tokenizer, limit=2**40)
    test_rows = rows_lib.open_rows(config.data, "test", tokenizer, limit=config.test_tokens)
    rows_lib.check_apart(train_rows, test_rows)
    if len(test_rows) < TEST_ROWS:
        raise UserError(f"give {len(test_rows)} rows of held-out text; {TEST_ROWS} are needed", "test_tokens")
    stream = rows_lib.batches(train_rows, config.batch_size, config.seed)
    steps = math.ceil(config.epochs * len(train_rows) / config.batch_size)

    def loss(params: Any, tokens_BxT: jax.Array) -> jax.Array:
        x: Any = module.apply({"params": params}, tokens_BxT, method="hidden")
        return cross_entropy(module, params, x, tokens_BxT).mean()

    optimiser = make_optimiser(config, steps)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens_BxT: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss)(params, tokens_BxT)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(loss)

    def held_out(params: Any) -> float:
        return float(np.mean([evaluate(params, rows) for rows in rows_lib.in_order(test_rows, TEST_ROWS)]))

    params: Any = module.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    state, started = optimiser.init(params), time.time()
    curve: list[tuple[int, float, float | None]] = []  # step, loss of its batch, held-out loss
    bar = tqdm.trange(1, steps + 1, desc="pretrain", mininterval=5, disable=None)  # no bar without a terminal
    for number in bar:
        params, state, value = step(params, state, next(stream))
        if number % 50 == 0:
            test = held_out(params) if number % 500 == 0 else None
            curve.append((number, round(float(value), 4), test and round(test, 4)))
            shown = f"loss {value:.3f}" + (f", held out {test:.3f} nats/token" if test else "")
            bar.set_postfix_str(shown)
            if bar.disable and test:
                logger.info(f"step {number:,} of {steps:,} | {shown}")
    with errors.about("out"):
        checkpoints.save(out, module.config, params, tokenizer)
    final = held_out(checkpoints.Checkpoint.open(out).params(module, "float32"))  # of what was written: bfloat16
    curve.append((steps, round(float(value), 4), round(final, 4)))
    facts = {
        "config": config_trees.to_dict(config),
        "steps": steps,
        "train_tokens": len(train_rows) * config.data.context_length,
        "test_tokens": len(test_rows) * config.data.context_length,
        "test_cross_entropy": final,
        "minutes": round((time.time() - started) / 60, 1),
        "curve": curve,
    }
    (out / "training.json").write_text(json.dumps(facts) + "\n")
    _plot(curve).savefig(out / "loss.png", dpi=120)
    return final


def train_tokenizer(config: config_lib.Pretrain) -> Any:
    """A byte-level BPE tokenizer of the corpus' training split; `<|endoftext|>` is both its BOS and its EOS."""
    source, feature = rows_lib.open_texts(config.data, "train")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((source[i][feature].decode() for i in range(len(source))), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def make_optimiser(config: config_lib.Pretrain, steps: int) -> optax.GradientTransformation:
    """AdamW under warm-up and cosine decay; biases and gains are not decayed."""
    warmup = min(config.warmup_steps, steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)
    matrices = partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=config.b2, weight_decay=config.weight_decay, mask=matrices),
    )


def _plot(curve: list[tuple[int, float, float | None]]) -> Figure:
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _, _ in curve], [train for _, train, _ in curve], lw=1, label="training batch")
    tested = [(step, test) for step, _, test in curve if test is not None]
    axes.plot(*zip(*tested, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats/token")
    axes.legend()
    return figure
