"""The figure and table of docs/guides/kl.md, from the report of a finished run of configs/kl.py.

python docs/kl.py --runs runs --write docs/guides/kl.md
"""

import re

import results
from matplotlib.figure import Figure

from gsae_jax.evaluation import plots

COLUMNS = {"l0": ("L0", ".1f"), "kl": ("KL", ".3f"), "loss_recovered": ("Loss recovered", ".3f"), "fvu": ("FVU", ".3f")}


def pairs(report):
    """(without, with): the records of each SAE and of its partner."""
    records = {r["name"]: r for r in report["saes"]}
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
    rows = [
        [
            pair[0]["name"].partition("_")[0],
            f"{pair[0]['l1_coefficient']:g}",
            *(format(r[field], form) for r in pair for field, (_, form) in COLUMNS.items()),
        ]
        for pair in pairs_of
    ]
    return results.table(["SAE", "λ", *titles], rows)


def main():
    arguments = results.arguments(__doc__)
    pairs_of = pairs(results.load("kl", arguments.runs))
    draw(pairs_of).savefig(arguments.write.parent.with_name("kl.png"), dpi=120)
    results.write(arguments.write, {"table": table(pairs_of)})


if __name__ == "__main__":
    main()
