"""Compare kinds of SAEs of finished runs: frontiers, an automatic interpretability score, sparse probes.

python -m gsae_jax.compare --runs runs/architectures[,runs/others] --out compared [--reference gated]
"""

import logging

from absl import flags

from gsae_jax import cli, comparing
from gsae_jax.errors import UserError

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    for name, flag, what in (("--runs", RUNS, "directories of finished runs"), ("--out", OUT, "a new folder")):
        if not flag.value:
            raise UserError(f"is missing; write {what}", name)
    try:
        l0 = [float(value) for value in L0.value]
    except ValueError as error:
        raise UserError(f"is {','.join(L0.value)!r}; write numbers such as 20,50,100", "--l0") from error
    wanted = comparing.Wanted(
        RUNS.value, REFERENCE.value, l0, FEATURES.value, PROBE_TOKENS.value, LABELS.value, SYNTHETIC_STEPS.value
    )
    logger.info(f"comparison: {comparing.compare(wanted, OUT.value)}/compare.md")


if __name__ == "__main__":
    RUNS = cli.define_list("runs", [], "Directory of a finished run.")
    OUT = flags.DEFINE_string("out", "", "A new folder for the comparison.")
    REFERENCE = flags.DEFINE_string(
        "reference",
        "",
        "The kind that others are compared with, such as gated; default: the gated one with most seeds.",
    )
    L0 = cli.define_list("l0", ["20", "50", "100"], "Values of L0 at which metrics are compared.")
    FEATURES = flags.DEFINE_integer("features", 200, "Features of each SAE that the automatic rater scores; 0: none.")
    PROBE_TOKENS = flags.DEFINE_integer("probe_tokens", 2**16, "Tokens of labelled text for probes; 0: no probes.")
    LABELS = flags.DEFINE_string(
        "labels",
        "",
        "JSON lines of text with labels; default: the held-out text of the runs, if it is Python's library.",
    )
    SYNTHETIC_STEPS = flags.DEFINE_integer(
        "synthetic_steps", 0, "Steps for which each kind is trained on a known dictionary, such as 2000; 0: none."
    )
    cli.run(main)
