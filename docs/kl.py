"""The figure and table of docs/guides/kl.md, from the report of a finished run of configs/kl.py.

python docs/kl.py --run runs/kl --write docs/guides/kl.md
"""

import argparse
import json
import re
from pathlib import Path

from matplotlib.figure import Figure

from gsae_jax.evaluation import plots

COLUMNS = {"l0": ("L0", ".1f"), "kl": ("KL", ".3f"), "loss_recovered": ("Loss recovered", ".3f"), "fvu": ("FVU", ".3f")}


def pairs(run):
    """(without, with): the records of each SAE and of its partner."""
    records = {r["name"]: r for r in json.loads((run / "report" / "report.json").read_text())["saes"]}
    partners = {name: re.sub(r"_(\d+)$", r"_kl_\1", name) for name in records}
    return [(records[name], records[partner]) for name, partner in partners.items() if partner in records]


def draw(pairs_of):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (field, title) in zip(
        figure.subplots(1, 2), (("kl", "KL, nats per token"), ("loss_recovered", "loss recovered")), strict=True
    ):
        for color, stack in zip(plots.COLOURS, ("baseline", "gated"), strict=False):
            for which, style, label in ((0, "x--", stack), (1, "o-", f"{stack}, with KL")):
                mine = sorted(
                    (pair[which] for pair in pairs_of if pair[0]["name"].startswith(stack)), key=lambda r: r["l0"]
                )
                axis.plot([r["l0"] for r in mine], [r[field] for r in mine], style, color=color, label=label)
        axis.set(xlabel="L0", ylabel=title)
        axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def table(pairs_of):
    titles = [f"{title}{after}" for after in ("", ", with KL") for title, _ in COLUMNS.values()]
    lines = [f"| SAE | λ | {' | '.join(titles)} |", "| :-- " + "| --: " * (1 + len(titles)) + "|"]
    for pair in pairs_of:
        cells = [format(r[field], form) for r in pair for field, (_, form) in COLUMNS.items()]
        sae = pair[0]["name"].partition("_")[0], f"{pair[0]['l1_coefficient']:g}"
        lines.append(f"| {' | '.join([*sae, *cells])} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--write", type=Path, required=True)
    args = parser.parse_args()
    pairs_of = pairs(args.run)
    draw(pairs_of).savefig(Path(__file__).with_suffix(".png"), dpi=120)
    text, lines = args.write.read_text(), table(pairs_of)
    args.write.write_text(re.sub(r"(<!-- table -->\n).*(\n<!-- end -->)", rf"\1\n{lines}\n\2", text, flags=re.S))


if __name__ == "__main__":
    main()
