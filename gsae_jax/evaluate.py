"""Measure SAEs on held-out text and write their report: those of a run, or any that gsae_jax.load reads.

python -m gsae_jax.evaluate --workdir runs/quickstart [--tokens 1000000] [--ito 5,10,20,40] [--model DIR]
python -m gsae_jax.evaluate --sae PATH [--sae PATH] --out OUT [--model DIR] [--site blocks.0.hook_mlp_out]
"""

import logging

from absl import flags

from gsae_jax import cli
from gsae_jax.errors import UserError
from gsae_jax.measuring import evaluate, evaluate_saes
from gsae_jax.storage import run_directory

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    if TOKENS.value is not None and TOKENS.value < 1:
        raise UserError(f"is {TOKENS.value}; write 1 or more", "--tokens")
    if not all(number.isdigit() and int(number) for number in ITO.value) or len({*ITO.value}) < len(ITO.value):
        raise UserError(f"is {','.join(ITO.value)!r}; write different numbers of features such as 5,10,20,40", "--ito")
    if (WORKDIR.value is None) == (not SAE.value):
        raise UserError("or --sae: write one of them, a run or SAEs from elsewhere", "--workdir")
    tokens, ito = TOKENS.value, [int(number) for number in ITO.value]
    config = None if CONFIG.value is None else cli.given(CONFIG)
    if SAE.value:
        if OUT.value is None:
            raise UserError("is missing; write the name of a new folder for the report", "--out")
        if STEP.value is not None:
            raise UserError("goes with --workdir; SAEs from elsewhere have no steps", "--step")
        folder = OUT.value
        table = evaluate_saes(SAE.value, folder, config, MODEL.value, SITE.value, tokens, ito, PUBLISHED.value)
    else:
        for name, flag in (("--out", OUT), ("--site", SITE)):
            if flag.value:
                raise UserError("goes with --sae; a run is measured at its own sites, in its own folder", name)
        folder = str(run_directory.Workdir(WORKDIR.value).report)
        table = evaluate(WORKDIR.value, tokens, ito, PUBLISHED.value, STEP.value, MODEL.value, config)
    logger.info(f"{table}\n\nreport: {folder}/report.md")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run, local or gs://bucket/folder.")
    TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens; the config's evaluation.tokens by default.")
    ITO = flags.DEFINE_list(
        "ito", [], "Also measure the dictionaries by gradient pursuit: 5,10,20,40 features a token."
    )
    STEP = flags.DEFINE_integer("step", None, "With --workdir: which checkpoint; by default the newest that is whole.")
    PUBLISHED = flags.DEFINE_string("published", "", "A CSV file of points to draw beside ours.")
    SAE = flags.DEFINE_multi_string("sae", [], "Folder of an SAE in any known format; may be repeated.")
    OUT = flags.DEFINE_string("out", None, "With --sae: a new folder for the report.")
    MODEL = flags.DEFINE_string(
        "model",
        "",
        "Checkpoint directory or hub name of the language model. With --sae: the one to measure on (default: the "
        "embedded one). With --workdir: the run's own, if it has moved.",
    )
    SITE = flags.DEFINE_string("site", "", "With --sae: the site that the SAEs read, whatever their files say.")
    CONFIG = cli.define_config()  # its language model, its text and how much of it; with --workdir, the run's own
    cli.run(main, several=True)
