"""The tables and figures of docs/architectures.md, from the reports of finished runs of configs/architectures.py.

    python docs/architectures.py --runs runs --write docs/architectures.md

`--runs` holds the runs that `RUNS` names, and `..._rates` of each; without it, tables are made of `docs/results`.
"""

import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import results
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gsae_jax.evaluation import frontiers
from gsae_jax.saes import products

sys.path.insert(1, str(Path(__file__).parents[1]))  # configs/ is no package that is installed
from configs import architectures

# Of each run: its family, its model, the title of its figure, and the values of loss recovered at which L0 is compared.
RUNS = {
    "architectures": ("saes", "embedded", "embedded model", (0.85, 0.9, 0.95)),
    "architectures_tinystories": ("saes", "tinystories", "TinyStories-656K", (0.9, 0.93, 0.95, 0.97)),
    "transcoders_tinystories": (
        "transcoders",
        "tinystories",
        "TinyStories-656K, MLP of layer 1",
        (0.75, 0.8, 0.85),
    ),
    "crosscoders_tinystories": (
        "crosscoders",
        "tinystories",
        "TinyStories-656K, residual stream of layer 1",
        (0.92, 0.95, 0.985),
    ),
}


def read(report):
    """The records of a report, by (site, kind, learning rate, seed), each a frontier by ascending L0."""
    groups = defaultdict(list)
    for record in report["saes"]:
        kind = re.sub(r"_\d+$", "", frontiers.identity(record)[1])
        groups[record["site"], kind, record["learning_rate"], record["seed"]].append(record)
    return {key: sorted(group, key=lambda record: record["l0"]) for key, group in groups.items()}


def named(site, kind, sites):
    """The first cells of a line. Where there are several sites, the first is the site."""
    return [f"`{site}`"] * (len(sites) > 1) + [f"`{kind}`"]


def ratios(family, model, levels, groups):
    """A header and, for each kind and level, its L0 divided by that of the family's first kind of the same seed."""
    sites, seeds = (sorted({key[place] for key in groups}) for place in (0, 3))
    first, *others = architectures.FAMILIES[family]
    yield [*["Site"] * (len(sites) > 1), "Architecture", "Width", *(f"at {level}" for level in levels)]
    for site in sites:
        of = {(kind, seed): group for (at, kind, _, seed), group in groups.items() if at == site}
        for kind in others:
            each = [
                [frontiers.l0_at(of[kind, s], level) / frontiers.l0_at(of[first, s], level) for s in seeds]
                for level in levels
            ]
            cells = (frontiers.ratio_over_seeds(at_level).text(".2f") for at_level in each)
            yield [*named(site, kind, sites), architectures.width(family, kind, model), *cells]


def measured(family, groups):
    """A header and, for each kind and value of λ or k, the means over seeds."""
    sites = sorted({key[0] for key in groups})
    yield [*["Site"] * (len(sites) > 1), "Architecture", "L0", "Loss recovered", "FVU", "Alive"]
    for site in sites:
        for kind in architectures.FAMILIES[family]:
            frontier = [group for (at, other, _, _), group in groups.items() if (at, other) == (site, kind)]
            for members in zip(*frontier, strict=True):
                columns = [[m[field] for m in members] for field in ("l0", "loss_recovered", "fvu", "alive")]
                forms = (".1f", ".3f", ".3f", ".3f")
                *values, alive = (frontiers.over_seeds(each) for each in columns)
                cells = (v.text(form) for v, form in zip((*values, results.share(alive)), forms, strict=True))
                yield [*named(site, kind, sites), *cells]


def best_rates(family, groups):
    """A header and, for each kind, loss recovered at an L0 of 50 by learning rate. The best of a line is bold."""
    sites = sorted({key[0] for key in groups})
    rates = sorted({rate for kind in architectures.FAMILIES[family] for rate in architectures.SWEPT[kind]})
    yield [*["Site"] * (len(sites) > 1), "Architecture", *(f"{rate:g}" for rate in rates)]
    for site in sites:
        for kind in architectures.FAMILIES[family]:
            at = [recovered_at(groups.get((site, kind, rate, 0), []), architectures.L0[1]) for rate in rates]
            if not np.isfinite(at).any():
                continue
            shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in at]
            cells = [f"**{text}**" if value == np.nanmax(at) else text for text, value in zip(shown, at, strict=True)]
            yield [*named(site, kind, sites), *cells]


def recovered_at(records, l0):
    """Loss recovered of one frontier at an L0; of an SAE alone, its own; NaN where it is out of range."""
    known = [record for record in records if record["loss_recovered"] is not None]
    return known[0]["loss_recovered"] if len(known) == 1 else frontiers.at_l0(known, "loss_recovered", l0)


def draw(family, title, groups):
    """Loss recovered against L0: a line for each kind, site and seed."""
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axis, kinds, sites = figure.subplots(), list(architectures.FAMILIES[family]), sorted({key[0] for key in groups})
    for (site, kind, _, seed), records in sorted(groups.items(), key=lambda item: kinds.index(item[0][1])):
        number = kinds.index(kind)
        l0, recovered = ([r[field] for r in records] for field in ("l0", "loss_recovered"))
        axis.plot(
            l0,
            recovered,
            color=f"C{number}" if number < 10 else "black",
            marker="os^vD*Xp<>h"[number],
            linestyle=("-", "--")[sites.index(site)],
            markersize=4,
            linewidth=0.9,
            label=" at ".join([kind] + [site] * (len(sites) > 1)) if seed == 0 else None,
        )
    axis.set(xscale="log", xlabel="L0", ylabel="loss recovered", title=title)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def table(header, *rows):
    return results.table(header, rows, text=("Architecture",))


def main():
    arguments = results.arguments(__doc__)
    costs = [["Architecture", "Products", "Width"]]
    for kind, (architecture, options, _) in architectures.FAMILIES["saes"].items():
        count = products.count(architecture, **options)
        costs.append([f"`{kind}`", f"{count:g}", architectures.width("saes", kind)])
    tables = {"products": table(*costs)}
    for name, (family, model, title, levels) in RUNS.items():
        suffix = f"_{name}".replace("_architectures", "")
        if report := results.load(name, arguments.runs):
            groups = read(report)
            tables[f"ratios{suffix}"] = table(*ratios(family, model, levels, groups))
            tables[f"measured{suffix}"] = table(*measured(family, groups))
            draw(family, title, groups).savefig(arguments.write.with_name(f"{name}.png"), dpi=110)
        if report := results.load(f"{name}_rates", arguments.runs):
            tables[f"rates{suffix}"] = table(*best_rates(family, read(report)))
    results.write(arguments.write, tables)


if __name__ == "__main__":
    main()
