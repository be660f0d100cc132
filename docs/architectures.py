"""The tables and figures of docs/architectures.md, from the reports of finished runs of configs/architectures.py.

    python docs/architectures.py --runs runs --write docs/architectures.md

`--runs` holds `architectures` and `architectures_tinystories`, and `..._rates` of each. What is absent stays as it is.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from configs import architectures
from gsae_jax.evaluation import frontiers
from gsae_jax.saes import products

LEVELS = (0.85, 0.9, 0.95)  # of loss recovered
MODELS = {"": "embedded model", "_tinystories": "TinyStories-656K"}
STYLES = {name: (f"C{number}", "os^vD*Xp<>"[number]) for number, name in enumerate(architectures.KINDS)}


def read(path):
    """The records of a run, by (architecture, learning rate, seed), each a frontier by ascending L0."""
    groups = defaultdict(list)
    for record in json.loads((path / "report" / "report.json").read_text())["saes"]:
        name = re.sub(r"_\d+$", "", frontiers.identity(record)[1])
        groups[name, record["learning_rate"], record["seed"]].append(record)
    return {key: sorted(group, key=lambda record: record["l0"]) for key, group in groups.items()}


def l0_at(records, level):
    """L0 of one frontier at a loss recovered; NaN where it is out of range."""
    recovered, l0 = (np.array([record[field] for record in records]) for field in ("loss_recovered", "l0"))
    return math.exp(frontiers.log_l0_at(level, recovered, l0))


def mean_and_interval(values, form=".2f"):
    """ "1.23 [1.15, 1.31]": the mean over seeds and its 95% t interval; "-" where one of them is not a number."""
    values = np.asarray(values)
    if not np.isfinite(values).all():
        return "–"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan
    return f"{values.mean():{form}} [{values.mean() - half:{form}}, {values.mean() + half:{form}}]"


def ratio_and_interval(ratios):
    """The geometric mean over seeds of ratios paired by seed, and its 95% t interval."""
    logs = np.log(ratios)
    if not np.isfinite(logs).all():
        return "–"
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs) if len(logs) > 1 else math.nan
    low, middle, high = np.exp(logs.mean() + np.array([-half, 0, half]))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table(header, rows):
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ratios(groups):
    """For each architecture and level: the L0 that it needs, divided by that of gated SAEs of the same seed."""
    seeds = sorted({seed for _, _, seed in groups})
    of = {name: {seed: group for (other, _, seed), group in groups.items() if other == name} for name in STYLES}
    for name in of:
        if name != "gated" and of[name]:
            each = [[l0_at(of[name][s], level) / l0_at(of["gated"][s], level) for s in seeds] for level in LEVELS]
            yield [f"`{name}`", architectures.width(name), *map(ratio_and_interval, each)]


def measured(groups):
    """For each architecture and target of L0, the means over seeds."""
    for name in STYLES:
        frontier = [group for (other, _, _), group in groups.items() if other == name]
        for members in zip(*frontier, strict=True):
            columns = [[m[field] for m in members] for field in ("l0", "loss_recovered", "fvu", "alive")]
            forms = (".1f", ".3f", ".3f", ".3f")
            yield [f"`{name}`", *(mean_and_interval(*pair) for pair in zip(columns, forms, strict=True))]


def best_rates(groups):
    """A header and, for each kind, loss recovered at an L0 of 50 by learning rate. The best of a line is bold."""
    rates = sorted({rate for swept in architectures.SWEPT.values() for rate in swept})
    yield ["Architecture", *(f"{rate:g}" for rate in rates)]
    for name in STYLES:
        at = [recovered_at(groups.get((name, rate, 0), []), math.log(architectures.L0[1])) for rate in rates]
        shown = ["–" if math.isnan(value) else f"{value:.3f}" for value in at]
        yield [
            f"`{name}`",
            *(f"**{text}**" if value == np.nanmax(at) else text for text, value in zip(shown, at, strict=True)),
        ]


def recovered_at(records, log_l0):
    """Loss recovered of one frontier at a log L0; of an SAE alone, its own; NaN where it is out of range."""
    points = [(math.log(r["l0"]), r["loss_recovered"]) for r in records if r["loss_recovered"] is not None]
    if len(points) == 1:
        return points[0][1]
    return float(np.interp(log_l0, *zip(*points, strict=True), left=math.nan, right=math.nan)) if points else math.nan


def draw(models):
    """Loss recovered against L0: a line for each architecture and seed, a panel for each model."""
    figure = Figure(figsize=(6.4 * len(models), 5), layout="constrained")
    for axis, (title, groups) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for (name, _, seed), records in sorted(groups.items(), key=lambda item: list(STYLES).index(item[0][0])):
            colour, marker = STYLES[name]
            l0, recovered = ([r[field] for r in records] for field in ("l0", "loss_recovered"))
            label = name if seed == 0 else None
            axis.plot(l0, recovered, color=colour, marker=marker, markersize=4, linewidth=0.9, label=label)
        axis.set(xscale="log", xlabel="L0", ylabel="loss recovered", title=title)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--write", type=Path, required=True)
    arguments = parser.parse_args()
    counts = {name: products.count(kind, **options) for name, (kind, options, _) in architectures.KINDS.items()}
    costs = [[f"`{name}`", f"{count:g}", architectures.width(name)] for name, count in counts.items()]
    tables = {"products": table(["Architecture", "Products", "Width"], costs)}
    models = {}
    for suffix, title in MODELS.items():
        run = arguments.runs / f"architectures{suffix}"
        if (run / "report").exists():
            models[title] = groups = read(run)
            header = ["Architecture", "Width", *(f"at {level}" for level in LEVELS)]
            tables[f"ratios{suffix}"] = table(header, ratios(groups))
            header = ["Architecture", "L0", "Loss recovered", "FVU", "Alive"]
            tables[f"measured{suffix}"] = table(header, measured(groups))
        if (sweep := arguments.runs / f"architectures{suffix}_rates").exists():
            header, *lines = best_rates(read(sweep))
            tables[f"rates{suffix}"] = table(header, lines)
    text = arguments.write.read_text("utf-8")
    for name, content in tables.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>\n{content}\n\n\g<2>", text, flags=re.DOTALL)
    arguments.write.write_text(text, "utf-8")
    if models:
        draw(models).savefig(arguments.write.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
