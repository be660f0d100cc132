"""Rate how interpretable features are, without people: by rules about tokens, or by a language model as judge.

python -m gsae_jax.rate --workdir runs/quickstart [--sae gated_1]
python -m gsae_jax.rate --workdir runs/quickstart --judge_url http://127.0.0.1:8080/v1 --judge_model NAME [--yes]
"""

import logging

import numpy as np
from absl import flags

from gsae_jax import cli, scoring
from gsae_jax.rating import association

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def main() -> None:
    """The command."""
    numbers = scoring.numbers(FEATURE.value)
    wanted = scoring.Wanted(WORKDIR.value, FEATURES.value, SAE.value, numbers, OVERWRITE.value)
    for name, ratings in scoring.rate(wanted, association.Association()).items():
        scores = [rating.score for rating in ratings.values()]
        mean = f", mean score {np.mean(scores):.3f}" if scores else ""
        logger.info(f"{name}: {len(scores):,} features are rated{mean}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a training run, local or gs://bucket/folder.")
    FEATURES = flags.DEFINE_string(
        "features", "", "Folder that `collect` wrote; default: `features` in the run's directory."
    )
    SAE = flags.DEFINE_multi_string("sae", [], "Name of an SAE; default: all. May be repeated.")
    FEATURE = flags.DEFINE_list("feature", [], "Numbers of features, such as 3,17; default: all that are active.")
    OVERWRITE = flags.DEFINE_bool("overwrite", False, "Rate again what was rated.")
    cli.run(main)
