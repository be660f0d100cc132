"""Train a small language model and its tokenizer from text: how the embedded model was made.

python -m gsae_jax.pretrain --config configs/pretrain_stdlib.py --out DIR
"""

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tokenizers
import tqdm
import transformers
from absl import flags

from gsae_jax import cli, plugins
from gsae_jax import config as config_lib
from gsae_jax.config import ConfigError
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms import gelu, loading
from gsae_jax.lms.loss import cross_entropy

CONFIG = cli.define_config()
OUT = flags.DEFINE_string("out", None, "Directory for the checkpoint; it must not exist.", required=True)


def train_tokenizer(config: config_lib.Data, vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of the corpus' training split; `<|endoftext|>` is both its BOS and its EOS."""
    corpus = plugins.load("data.corpora", config.corpus, having="open_corpus", field="data.corpus")
    builder, feature = corpus.open_corpus(config)
    builder.download_and_prepare()
    source = builder.as_data_source(split=config.train_split)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((source[i][feature].decode() for i in range(len(source))), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def pretrain(config: config_lib.Pretrain, out: Path) -> float:
    """Train and write the checkpoint; returns the held-out cross-entropy in nats per token."""
    tokenizer = train_tokenizer(config.data, config.vocab_size)
    module: Any = gelu.Model(gelu.Config(d_vocab=len(tokenizer), n_ctx=config.data.context_length, **config.model))
    train_rows = rows_lib.open_rows(config.data, "train", tokenizer, limit=2**40)
    test_rows = rows_lib.open_rows(config.data, "test", tokenizer, limit=config.test_tokens)
    stream = rows_lib.batches(train_rows, config.batch_size, config.seed)
    steps = math.ceil(config.epochs * len(train_rows) / config.batch_size)

    def loss(params, tokens_BxT):
        x = module.apply({"params": params}, tokens_BxT, method="hidden")
        return cross_entropy(module, params, x, tokens_BxT).mean()

    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, b2=config.b2, weight_decay=config.weight_decay, mask=partial(jax.tree.map, lambda p: p.ndim > 1)
        ),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens_BxT):
        value, grads = jax.value_and_grad(loss)(params, tokens_BxT)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = module.init(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    state, evaluate = optimiser.init(params), jax.jit(loss)

    def held_out() -> float:
        return float(np.mean([evaluate(params, tokens) for tokens in rows_lib.in_order(test_rows, 16, len(test_rows))]))

    curve, started = [], time.time()
    for number in tqdm.trange(1, steps + 1, desc="pretrain", mininterval=10):
        params, state, value = step(params, state, next(stream))
        if number % 50 == 0 or number == steps:
            curve.append((number, float(value), held_out() if number % 500 == 0 or number == steps else math.nan))
            tqdm.tqdm.write(f"step {number}: train {curve[-1][1]:.3f}, held-out {curve[-1][2]:.3f} nats/token")
    loading.save(out, "gelu", module, params, tokenizer)
    (out / "training.json").write_text(
        json.dumps(
            {
                "config": config_lib.to_dict(config),
                "steps": steps,
                "train_tokens": len(train_rows) * config.data.context_length,
                "test_tokens": len(test_rows) * config.data.context_length,
                "test_cross_entropy": curve[-1][2],
                "seconds": round(time.time() - started),
                "curve": [
                    [number, round(train, 4), None if math.isnan(test) else round(test, 4)]
                    for number, train, test in curve
                ],
            }
        )
    )
    _plot(curve, out / "loss.png")
    return curve[-1][2]


def _plot(curve: list[tuple[int, float, float]], file: Path) -> None:
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps, train, test = np.array(curve).T
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, train, lw=1, label="training batch")
    axes.plot(steps[~np.isnan(test)], test[~np.isnan(test)], "o-", label="held out")
    axes.set(xlabel="step", ylabel="cross-entropy, nats/token")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """The command."""
    config = config_lib.from_dict(config_lib.Pretrain, CONFIG.value)
    out = Path(OUT.value)
    if out.exists():
        raise ConfigError("--out", f"{out} exists already; write a new directory")
    print(f"held-out cross-entropy {pretrain(config, out):.3f} nats/token; checkpoint in {out}")


if __name__ == "__main__":
    cli.run(main)
