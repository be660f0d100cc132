"""Collect what is known of every feature of SAEs on held-out text: where it is active, and what it does.

python -m gsae_jax.collect --workdir runs/quickstart [--sae gated_1] [--tokens 1000000]
python -m gsae_jax.collect --sae FOLDER --out OUT [--model DIR]
"""

import logging

from absl import flags

from gsae_jax import cli, collecting
from gsae_jax.errors import UserError

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    if not WORKDIR.value and not SAE.value:
        raise UserError("is missing; give --workdir for a run, or --sae and --out for SAEs from elsewhere", "--workdir")
    elsewhere = (("--site", SITE, WORKDIR.value), ("--target", TARGET, WORKDIR.value))
    for name, flag, other in (*elsewhere, ("--step", STEP, not WORKDIR.value)):
        if flag.present and other:
            raise UserError(f"does not go with --{'workdir' if WORKDIR.value else 'sae'}; leave it out", name)
    config = None if CONFIG.value is None else cli.stated(CONFIG)
    site = (SITE.value, TARGET.value)
    wanted = collecting.Wanted(
        WORKDIR.value, SAE.value, OUT.value, TOKENS.value, STEP.value, MODEL.value, site, OVERWRITE.value
    )
    logger.info(f"features: {collecting.collect(wanted, config)}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a training run, local or gs://bucket/folder.")
    SAE = cli.define_list(
        "sae",
        [],
        "With --workdir: the name of one of its SAEs; default: all. Without: a run, RUN:STACK, or a folder of SAEs in "
        "any known format.",
    )
    OUT = flags.DEFINE_string("out", "", "Folder for the files; default: `features` in the run's directory.")
    TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens; default: 1,048,576, or as many as there are.")
    STEP = flags.DEFINE_integer("step", None, "With --workdir: the checkpoint's step; default: the newest.")
    MODEL = flags.DEFINE_string(
        "model", "", "Checkpoint directory or hub name of the language model, if the run's has moved or none is named."
    )
    SITE = flags.DEFINE_string("site", "", "With --sae alone: the site that the SAEs read, if their files name none.")
    TARGET = flags.DEFINE_string("target", "", "With --sae alone: the site that transcoders predict; --site is theirs.")
    OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace files that were collected with other settings.")
    CONFIG = cli.define_config()  # its language model and its text
    cli.run(main)
