"""The figure and table of docs/synthetic.md: SAEs of every architecture on activations of known dictionaries.

    python docs/synthetic.py --directory runs/synthetic --write docs/synthetic.md

Studies that are in `--directory` already are measured again, and not trained.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from configs import synthetic as config
from gsae_jax import synthesis

SEEDS = (0, 1, 2)  # each of a dictionary, its activations, and the first parameters of SAEs
COLUMNS = {
    "recovered": ("Recovered", ".3f"),
    "cosine": ("Cosine", ".3f"),
    "feature_cosine": ("Cosine of features", ".3f"),
    "f1": ("F1", ".3f"),
    "gamma": ("γ", ".3f"),
    "absorption": ("Absorption", ".3f"),
    "dead": ("Dead", ".3f"),
    "l0": ("L0", ".2f"),
    "fvu": ("FVU", ".4f"),
}
PANELS = ("cosine", "f1", "gamma", "absorption")


def values(records, kind, measure):
    """Of each seed; NaN where the measure has no meaning."""
    found = [record[measure] for record in records if record["stack"] == kind]
    return [float("nan") if value is None else value for value in found]


def table(records, kinds):
    titles = [title for title, _ in COLUMNS.values()]
    lines = [f"| Architecture | {' | '.join(titles)} |", f"| :-- {'| --: ' * len(titles)}|"]
    for kind in kinds:
        cells = [format(np.mean(values(records, kind, name)), form) for name, (_, form) in COLUMNS.items()]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records, kinds):
    figure = Figure(figsize=(11, 0.32 * len(kinds) + 1.2), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS, strict=True):
        for place, kind in enumerate(kinds):
            of_kind = values(records, kind, measure)
            axis.plot(of_kind, [place] * len(of_kind), "o", color="C0", alpha=0.6, markersize=6)
        axis.set(title=COLUMNS[measure][0], yticks=range(len(kinds)), yticklabels=kinds)
        axis.grid(alpha=0.25)
    axis.invert_yaxis()  # the axes share it
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
    text, lines = arguments.write.read_text("utf-8"), table(records, stacks)
    text = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", rf"\g<1>\n{lines}\n\n\g<2>", text, flags=re.DOTALL)
    arguments.write.write_text(text, "utf-8")
    draw(records, list(stacks)).savefig(arguments.write.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
