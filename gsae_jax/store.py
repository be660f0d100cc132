"""Write activations to a store, from which any number of runs are trained.

python -m gsae_jax.store --config quickstart --out stores/quickstart
python -m gsae_jax.store --from activations/ --sites encoder.layer.6 --out stores/vision
"""

import logging

from absl import flags

from gsae_jax import cli, storing
from gsae_jax.activations import imports
from gsae_jax.activations.store import SHARD_BYTES
from gsae_jax.errors import UserError

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    wanted = storing.Wanted(
        OUT.value, SITES.value, TOKENS.value, DTYPE.value, CHECK.value, SHARD_MEGABYTES.value * 2**20
    )
    of_files = {"--context_length": CONTEXT_LENGTH, "--held_out": HELD_OUT, "--special_tokens": SPECIAL_TOKENS}
    of_files |= {"--seed": SEED, "--model_name": MODEL_NAME}
    if CONFIG.value is not None and FROM.value:
        raise UserError("was given together with --config; leave one of them out", "--from")
    for name, flag in () if FROM.value else of_files.items():
        if flag.present:
            raise UserError("works only with --from; leave it out", name)
    if FROM.value:
        if not all(number.isdecimal() for number in SPECIAL_TOKENS.value):
            raise UserError(f"is {','.join(SPECIAL_TOKENS.value)!r}; write ids such as 0,1", "--special_tokens")
        special = tuple(map(int, SPECIAL_TOKENS.value))
        length, held_out, seed = CONTEXT_LENGTH.value, HELD_OUT.value, SEED.value
        settings = imports.Settings(SITES.value, length, held_out, seed, special, MODEL_NAME.value)
        logger.info(storing.of_files(FROM.value, wanted, settings))
    elif CONFIG.value is not None:
        logger.info(storing.of_model(cli.given(CONFIG), wanted))
    elif CHECK.value:
        for flag in (SITES, TOKENS, DTYPE, SHARD_MEGABYTES):
            if flag.present:
                raise UserError(
                    "does not go with --check alone; write --config or --from, or leave it out", f"--{flag.name}"
                )
        logger.info(storing.check(wanted))
    else:
        raise UserError("is missing; write an experiment, or --from with files of activations", "--config")


if __name__ == "__main__":
    OUT = flags.DEFINE_string("out", None, "Path of the store, local or gs://bucket/folder.", required=True)
    SITES = cli.define_list("sites", [], "Sites of the language model; default: those of the config's stacks.")
    TOKENS = flags.DEFINE_integer("tokens", None, "Tokens to train on; default: as many as a run of the config reads.")
    DTYPE = flags.DEFINE_string("dtype", "", "float32, bfloat16 or float16; default: that of the language model.")
    CHECK = flags.DEFINE_bool("check", False, "Compare every shard with its hash, and write damaged ones again.")
    SHARD_MEGABYTES = flags.DEFINE_integer(
        "shard_megabytes", SHARD_BYTES // 2**20, "Size of a file of the widest site.", lower_bound=1
    )
    FROM = cli.define_list(
        "from", [], "Files of activations in place of --config: .npy, .npz, .safetensors, .parquet, .arrow, or folders."
    )
    CONTEXT_LENGTH = flags.DEFINE_integer("context_length", 128, "With --from: tokens in a row of the store.")
    HELD_OUT = flags.DEFINE_float("held_out", 0.05, "With --from: fraction of the rows to measure on.")
    SEED = flags.DEFINE_integer("seed", 0, "With --from: seed of the order of the rows.")
    SPECIAL_TOKENS = cli.define_list("special_tokens", [], "With --from: ids of tokens that SAEs never see.")
    MODEL_NAME = flags.DEFINE_string("model_name", "", "With --from: name of the model, for metadata of SAEs.")
    CONFIG = cli.define_config()
    cli.run(main, several=True)
