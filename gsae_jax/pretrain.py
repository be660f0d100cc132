"""Train a small language model and its tokenizer from text.

This command made the embedded model:

python -m gsae_jax.pretrain --config configs/pretrain_stdlib.py
"""

from absl import flags

from gsae_jax import cli, config_trees, errors, pretraining
from gsae_jax import config as config_lib
from gsae_jax.storage import paths, writing


def main() -> None:
    """The command."""
    config = config_trees.from_dict(config_lib.Pretrain, cli.given(CONFIG))
    with errors.about("--out"):
        out = paths.require_local(OUT.value)
        writing.check_new(out)
    with errors.about("", out="--out"):
        loss = pretraining.pretrain(config, out)
    print(f"held-out cross-entropy {loss:.3f} nats/token; checkpoint in {out}")


if __name__ == "__main__":
    CONFIG = cli.define_config(cls=config_lib.Pretrain)
    OUT = flags.DEFINE_string("out", "runs/language_model", "New checkpoint directory.")
    cli.run(main)
