"""The paper's blinded study: people rate features of two kinds of SAEs, and do not know which is which.

python -m gsae_jax.study new --runs runs/quickstart --first gated --second baseline --pairs 20 --raters 3 --out STUDY
python -m gsae_jax.study serve STUDY
python -m gsae_jax.study analyse STUDY
"""

import logging
from collections.abc import Callable

from absl import flags

from gsae_jax import cli, studying
from gsae_jax.errors import UserError, known_names

logger = logging.getLogger("gsae_jax")  # __name__ is __main__ in a command


def new() -> None:
    """Make a study."""
    for name in ("runs", "first", "second", "pairs", "out"):
        if not flags.FLAGS[name].value:
            raise UserError("is missing; --help shows how the command is written", f"--{name}")
    pairs = studying.count(PAIRS.value)
    wanted = studying.Wanted(RUNS.value, FIRST.value, SECOND.value, pairs, RATERS.value, SEED.value, SHARED.value)
    out = studying.new(wanted, OUT.value)
    logger.info(f"study: {out}; `python -m gsae_jax.study serve {out}` shows it to raters")


def serve(study: str) -> None:
    """Show a study to its raters."""
    studying.serve(study, HOST.value, PORT.value)


def analyse(study: str) -> None:
    """Print and write what the ratings of a study say."""
    for each in studying.analyse(study, OUT.value):
        print(f"{each.rater}\n{each.summary}\n")
    logger.info(f"report: {OUT.value or f'{study}/analysis'}/report.html")


# By name: the function, whether it takes the folder of a study, and its flags.
ACTIONS: dict[str, tuple[Callable[..., None], bool, tuple[str, ...]]] = {
    "new": (new, False, ("runs", "first", "second", "pairs", "raters", "shared", "seed", "out")),
    "serve": (serve, True, ("host", "port")),
    "analyse": (analyse, True, ("out",)),
}


def main(action: str, study: str = "") -> None:
    """The command."""
    if action not in ACTIONS:
        raise UserError(f"is {action!r}; {known_names(action, ACTIONS)}", "ACTION")
    act, takes_study, own = ACTIONS[action]
    if takes_study and not study:
        raise UserError(f"is missing; write `study {action} STUDY`, with the folder that `study new` made", "STUDY")
    if study and not takes_study:
        raise UserError(f"is {study!r}, and {action} takes none; write --out for the new folder", "STUDY")
    for name in {name for _, _, names in ACTIONS.values() for name in names} - {*own}:
        if flags.FLAGS[name].present:
            raise UserError(f"does not go with {action}; leave it out", f"--{name}")
    act(*[study] * takes_study)


if __name__ == "__main__":
    RUNS = cli.define_list("runs", [], "new: a run with collected features.")
    FIRST = flags.DEFINE_string("first", "", "new: the side that should be better: a stack, an SAE, or RUN:NAME.")
    SECOND = flags.DEFINE_string("second", "", "new: the other side.")
    PAIRS = flags.DEFINE_string("pairs", "", "new: pairs of features from each model and site for each rater, or all.")
    RATERS = flags.DEFINE_integer("raters", 1, "new: how many people rate; 0: only programs.")
    SHARED = flags.DEFINE_bool("shared", False, "new: all people rate the same pairs; else each has their own.")
    SEED = flags.DEFINE_integer("seed", 0, "new: of the draw of features.")
    OUT = flags.DEFINE_string(
        "out", "", "new: a new folder. analyse: a folder for the report; default: STUDY/analysis."
    )
    HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: address to listen on.")
    PORT = flags.DEFINE_integer("port", 8000, "serve: port to listen on; 0: any that is free.")
    cli.run(main, "ACTION", "[STUDY]")
