"""Measure the SAEs of a run, of several runs or of other libraries on held-out text, and write a report.

python -m gsae_jax.evaluate --workdir runs/quickstart [--tokens 1000000] [--ito 5,10,20,40] [--overwrite]
python -m gsae_jax.evaluate --sae RUN --sae RUN:STACK --sae FOLDER --out OUT [--model DIR] [--text FILES]
"""

import logging

from absl import flags

from gsae_jax import cli
from gsae_jax.config import INT32
from gsae_jax.errors import UserError
from gsae_jax.measuring import Earlier, evaluate, evaluate_saes

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    if TOKENS.value is not None and TOKENS.value < 1:
        raise UserError(f"is {TOKENS.value}; write 1 or more", "--tokens")
    ito = [int(number) if number.isdecimal() else 0 for number in ITO.value]
    if not all(0 < number <= INT32 for number in ito) or len({*ito}) < len(ito):
        raise UserError(f"is {','.join(ITO.value)!r}; write different numbers of features such as 5,10,20,40", "--ito")
    if (WORKDIR.value is None) == (not SAE.value):
        raise UserError(
            "is missing; give --workdir for one run, or --sae for several runs or for SAEs of other libraries",
            "--workdir",
        )
    tokens, published = TOKENS.value, PUBLISHED.value
    config = None if CONFIG.value is None else cli.stated(CONFIG)
    if SAE.value:
        if OUT.value is None:
            raise UserError("is missing; write the name of a new folder for the report", "--out")
        for name, given in (("--step", STEP.present), ("--overwrite", OVERWRITE.value)):
            if given:
                raise UserError("works only with --workdir; leave it out", name)
        if TEXT.value:
            if config is not None:
                raise UserError(
                    "was given together with --config, and both name the text; leave one of them out", "--text"
                )
            config = {"data": {"corpus": "text", "path": TEXT.value, "name": ""}}
        site = (SITE.value, TARGET.value)
        report = evaluate_saes(SAE.value, OUT.value, config, MODEL.value, site, tokens, ito, published)
    else:
        for name, flag in (("--out", OUT), ("--site", SITE), ("--target", TARGET), ("--text", TEXT)):
            if flag.value:
                raise UserError("works only with --sae; a run is measured at its own sites and on its own text", name)
        earlier: Earlier = "replace" if OVERWRITE.value else "beside"
        report = evaluate(WORKDIR.value, tokens, ito, published, STEP.value, MODEL.value, config, earlier)
    logger.info(report)


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a training run, local or gs://bucket/folder.")
    TOKENS = flags.DEFINE_integer("tokens", None, "Held-out tokens; the config's evaluation.tokens by default.")
    ITO = cli.define_list(
        "ito", [], "Also measure the dictionaries by gradient pursuit: for example 5,10,20,40 features per token."
    )
    STEP = flags.DEFINE_integer("step", None, "With --workdir: the checkpoint's step; by default the newest.")
    PUBLISHED = flags.DEFINE_string("published", "", "CSV file of published results to draw in the figures.")
    OVERWRITE = flags.DEFINE_bool("overwrite", False, "With --workdir: replace a report made with other settings.")
    SAE = cli.define_list("sae", [], "A run, RUN:STACK, or a folder of SAEs in any known format.")
    OUT = flags.DEFINE_string("out", None, "With --sae: a new folder for the report.")
    MODEL = flags.DEFINE_string(
        "model",
        "",
        "Checkpoint directory or hub name of the language model. With --sae: the model to measure on; default: "
        "the first run's, or the embedded one. With --workdir: the new path of the run's model, if it has moved.",
    )
    TEXT = flags.DEFINE_string(
        "text", "", "With --sae: text files to measure on; default: the first run's text, or Python's library."
    )
    SITE = flags.DEFINE_string("site", "", "With --sae: the site that the SAEs read, also if their files name another.")
    TARGET = flags.DEFINE_string("target", "", "With --sae: the site that transcoders predict; --site is theirs then.")
    CONFIG = cli.define_config()  # its language model, its text and how much of it; with --workdir, the run's own
    cli.run(main, several=True)
