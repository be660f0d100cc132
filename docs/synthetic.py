"""The figure and table of docs/synthetic.md: SAEs of every architecture on activations of known dictionaries.

    python docs/synthetic.py --directory runs/synthetic --write docs/synthetic.md

What was trained in `--directory` before is measured again, and not trained.
"""

import argparse
import math
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gsae_jax import synthesis

sys.path.insert(1, str(Path(__file__).parents[1]))  # configs/ is no package that is installed
from configs import synthetic as config

SEEDS = (0, 1, 2)  # each of a dictionary, of its activations, and of the first parameters of the SAEs
COLUMNS = {
    "recovered": ("Recovered", ".3f"),
    "cosine": ("Cosine", ".3f"),
    "feature_cosine": ("Cosine of features", ".3f"),
    "f1": ("F1", ".3f"),
    "gamma": ("γ", ".3f"),
    "absorption": ("Absorption", ".3f"),
    "dead": ("Dead", ".3f"),
    "l0": ("L0", ".2f"),
    "fvu": ("FVU", ".3f"),
}
PANELS = ("recovered", "f1", "gamma", "absorption")


def values(records, kind, measure):
    """Of each seed; NaN where the measure has no meaning."""
    return [math.nan if r[measure] is None else r[measure] for r in records if r["stack"] == kind]


def table(records):
    """The means over seeds."""
    lines = [["Architecture", *(title for title, _ in COLUMNS.values())], [":--", *["--:"] * len(COLUMNS)]]
    for kind in config.KINDS:
        means = [format(np.mean(values(records, kind, name)), form) for name, (_, form) in COLUMNS.items()]
        lines.append([f"`{kind}`", *means])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(records):
    """A panel for each measure, a row for each kind, a dot for each seed."""
    figure = Figure(figsize=(11, 0.32 * len(config.KINDS) + 1), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for row, kind in enumerate(config.KINDS):
            of_kind = values(records, kind, measure)
            axis.plot(of_kind, [row] * len(of_kind), "o", color="C0", alpha=0.5)
        axis.set(title=COLUMNS[measure][0], yticks=range(len(config.KINDS)), yticklabels=config.KINDS)
        axis.grid(alpha=0.25)
    axis.invert_yaxis()  # of all panels
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--write", type=Path, required=True)
    arguments = parser.parse_args()
    records = []
    for seed in SEEDS:
        stacks = config.stacks(seeds=(seed,))
        records += synthesis.study(stacks, config.SETTINGS, arguments.directory / f"{seed}", config.STEPS, seed)
    text = arguments.write.read_text("utf-8")
    text = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", rf"\g<1>\n{table(records)}\n\n\g<2>", text, flags=re.DOTALL)
    arguments.write.write_text(text, "utf-8")
    draw(records).savefig(arguments.write.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
