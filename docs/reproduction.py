"""The figures and tables of docs/reproduction.md, from the reports of finished runs.

    python docs/reproduction.py --runs runs --write docs/reproduction.md

`--runs` holds a directory for each site, such as `hook_mlp_out`, and one for what rescale and shift makes of its
baselines, `hook_mlp_out_rescaled` (configs/reproduction.py), and `quickstart`, measured with `--ito 5,10,20,40`.
"""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gsae_jax.evaluation import frontiers, plots

LEVELS = {"hook_mlp_out": (0.85, 0.9), "hook_resid_post": (0.85, 0.9), "hook_z": (0.95,)}  # of loss recovered
ABLATION_RATE = 1.2e-2
COLOURS = dict(zip(("baseline", "gated", "rescaled", "unfrozen", "no_r_mag", "untied"), plots.COLOURS, strict=True))
ABLATIONS = {"unfrozen": "unfrozen decoder", "no_r_mag": "no r_mag", "untied": "untied"}
LABELS = ABLATIONS | {"rescaled": "baseline + rescale & shift"}


def read(path, report="report"):
    """The records of a run's report, each with its stack's name, and its ratios."""
    report = json.loads((path / report / "report.json").read_text())
    for record in report["saes"]:
        record["stack"] = frontiers.identity(record)[1]
    return report["saes"], report["l0_ratios"]


def select(records, stack, rate, seed=None):
    """A stack's SAEs of one learning rate (and seed), by L0."""
    runs = [r for r in records if (r["stack"], r["learning_rate"]) == (stack, rate) and not r["ito"]]
    return sorted((r for r in runs if seed in (None, r["seed"])), key=lambda r: r["l0"])


def values(records, *fields):
    return [np.array([record[field] for record in records]) for field in fields]


def table(header, rows):
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def best_rate(ratios, stack):
    """The learning rate that most comparisons of a stack found best."""
    field = "learning_rate" if stack == "gated" else "baseline_learning_rate"
    rates = [r[field] for r in ratios if r["stack"] == "gated"]
    return max(sorted(set(rates)), key=rates.count)


def l0_at(records, level):
    l0 = math.exp(frontiers.log_l0_at(level, *values(records, "loss_recovered", "l0")))
    return f"{l0:.1f}" if math.isfinite(l0) else "not in range"


def recovered_at(lines, l0):
    """Loss recovered along frontiers at an L0, the mean over them."""
    recovered = [
        np.interp(math.log(l0), np.log(x), y, left=np.nan, right=np.nan)
        for x, y in (values(line, "l0", "loss_recovered") for line in lines)
    ]
    return f"{np.mean(recovered):.3f}" if np.isfinite(recovered).all() else "not in range"


def draw(runs):
    """Frontiers (figure 8 and 9 of the paper) above, gamma below, a column for each site."""
    figure = Figure(figsize=(5 * len(runs), 7.6), layout="constrained")
    columns = figure.subplots(2, len(runs), squeeze=False).T
    for column, (site, (records, ratios, rescaled)) in zip(columns, runs.items(), strict=True):
        groups = [(stack, records, best_rate(ratios, stack), "-") for stack in ("baseline", "gated")]
        groups += [("rescaled", rescaled, best_rate(ratios, "baseline"), "-")]
        groups += [(stack, records, ABLATION_RATE, "--") for stack in ("gated", *ABLATIONS)]
        for stack, among, rate, line_style in groups:
            for seed in sorted({r["seed"] for r in select(among, stack, rate)}):
                line = select(among, stack, rate, seed)
                label = f"{LABELS.get(stack, stack)}, rate {rate:g}" if seed == 0 else None
                style = dict(
                    color=COLOURS[stack], marker="o", markersize=3, linewidth=1, linestyle=line_style, label=label
                )
                for axis, field in zip(column, ("loss_recovered", "gamma"), strict=True):
                    axis.plot(*values(line, "l0", field), **style)
        column[0].set_title(site)
        column[1].axhline(1, color="0.5", linewidth=0.8)
        for axis, label in zip(column, ("loss recovered", "relative reconstruction bias γ"), strict=True):
            axis.set(xscale="log", xlabel="L0", ylabel=label)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.25)
            axis.legend(fontsize=6)
    return figure


def draw_pursuit(records):
    """Figures 10 and 11: dictionaries with features chosen by gradient pursuit, beside their encoders."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for stack in ("baseline", "gated"):
        encoders = sorted((r for r in records if r["stack"] == stack and not r["ito"]), key=lambda r: r["l0"])
        axis.plot(*values(encoders, "l0", "loss_recovered"), "o-", color=COLOURS[stack], label=f"{stack}, encoder")
        for number, encoder in enumerate(encoders):
            line = sorted(
                (r for r in records if r["name"].startswith(f"{encoder['name']}_ito_")), key=lambda r: r["l0"]
            )
            style = dict(color=COLOURS[stack], linestyle="--", marker=".", linewidth=0.8, alpha=0.4 + 0.3 * number)
            label = f"{stack}, by pursuit on the dictionary of L0 {encoder['l0']:.0f}"
            axis.plot(*values(line, "l0", "loss_recovered"), **style, label=label)
    axis.set(xscale="log", xlabel="L0", ylabel="loss recovered")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def ratio_rows(runs):
    for site, (_, ratios, _) in runs.items():
        for r in (r for r in ratios if r["stack"] == "gated"):
            interval = f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if r["low"] else f"{r['ratio']:.2f}"
            sides = [f"{r[side + 'l0']:.1f} (rate {r[side + 'learning_rate']:g})" for side in ("", "baseline_")]
            yield site, r["level"], *sides, interval, " and ".join(map(str, r["seeds"]))


def gamma_rows(runs):
    for site, (records, ratios, _) in runs.items():
        for stack in ("gated", "baseline"):
            line = select(records, stack, best_rate(ratios, stack))
            for l1 in sorted({r["l1_coefficient"] for r in line}):
                l0, recovered, gamma = values(
                    [r for r in line if r["l1_coefficient"] == l1], "l0", "loss_recovered", "gamma"
                )
                span = f"{gamma.min():.3f} to {gamma.max():.3f}"
                yield site, f"{stack}, λ = {l1:g}", f"{l0.mean():.1f}", f"{recovered.mean():.3f}", span


def rate_rows(runs):
    for site, (records, _, _) in runs.items():
        for stack in ("gated", "baseline"):
            rates = sorted({r["learning_rate"] for r in records if r["stack"] == stack})
            for level in LEVELS[site]:
                yield (
                    site,
                    f"{stack}, {level}",
                    *(l0_at(select(records, stack, rate, 0), level) for rate in rates),
                )


def ablation_rows(runs):
    for site, (records, _, _) in runs.items():
        for stack in ("gated", *ABLATIONS):
            line = select(records, stack, ABLATION_RATE, 0)
            gamma = values(line, "gamma")[0]
            l0s = [l0_at(line, level) for level in (0.85, 0.9, 0.95)]
            yield site, LABELS.get(stack, stack), *l0s, f"{gamma.min():.3f} to {gamma.max():.3f}"


def rescaled_rows(runs):
    for site, (records, ratios, rescaled) in runs.items():
        rate = best_rate(ratios, "baseline")
        best = select(records, "gated", best_rate(ratios, "gated"))
        gated = [[r for r in best if r["seed"] == seed] for seed in {r["seed"] for r in best}]
        before, after = select(records, "baseline", rate), select(rescaled, "rescaled", rate)
        for l1 in sorted({r["l1_coefficient"] for r in after}):
            sides = [[r for r in side if r["l1_coefficient"] == l1] for side in (before, after)]
            l0, recovered, gamma = zip(*(values(side, "l0", "loss_recovered", "gamma") for side in sides), strict=True)
            arrows = [" → ".join(f"{value.mean():.3f}" for value in pair) for pair in (recovered, gamma)]
            yield (
                site,
                f"{l1:g}",
                " → ".join(f"{value.mean():.1f}" for value in l0),
                *arrows,
                recovered_at(gated, l0[1].mean()),
            )


def pursuit_rows(records):
    for encoder in (r for r in records if not r["ito"]):
        line = sorted((r for r in records if r["name"].startswith(f"{encoder['name']}_ito_")), key=lambda r: r["ito"])
        cells = (f"{r['loss_recovered']:.3f}" for r in line)
        yield f"{encoder['name']}", f"{encoder['l0']:.1f}", f"{encoder['loss_recovered']:.3f}", *cells


def study_rows(studies):
    rows = []
    for path in studies:
        contents = json.loads((path / "analysis" / "analysis.json").read_text())
        l0 = {sae["side"]: sae["l0"] for sae in contents["study"]["saes"]}
        for each in contents["analyses"]:
            difference, p = each["difference"], each["tests"][0]["p"]
            ends = [difference["low"], difference["high"]]
            interval = "" if None in ends else f" [{', '.join(f'{end:+.3f}' for end in ends)}]"
            sides = [f"{l0[side]:.1f}" for side in each["sides"]]
            means = [f"{mean:.3f}" for mean in each["means"]]
            both = f"{difference['mean']:+.3f}{interval}"
            rows.append([*sides, f"{difference['pairs']:,}", *means, both, "–" if p is None else f"{p:.1g}"])
    return sorted(rows, key=lambda row: float(row[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of runs; tables of runs that are not there stay"
    )
    parser.add_argument("--write", type=Path, required=True, help="file whose marked tables are replaced")
    arguments = parser.parse_args()
    sites = [site for site in LEVELS if (arguments.runs / site / "report").exists()]
    rescaled = {site: arguments.runs / f"{site}_rescaled" for site in sites}
    runs = {
        site: (*read(arguments.runs / site), read(path)[0] if (path / "report").exists() else [])
        for site, path in rescaled.items()
    }
    tables = {}
    if runs:
        draw(runs).savefig(arguments.write.with_name("reproduction.png"), dpi=110)
        rates = sorted({r["learning_rate"] for r in next(iter(runs.values()))[0]})
        tables |= {
            "ratios": table(
                ["Site", "Loss recovered", "Gated L0", "Baseline L0", "Ratio [95%]", "Seeds"], ratio_rows(runs)
            ),
            "gamma": table(["Site", "SAEs", "L0", "Loss recovered", "γ"], gamma_rows(runs)),
            "rates": table(["Site", "SAEs, loss recovered", *(f"{rate:g}" for rate in rates)], rate_rows(runs)),
            "ablations": table(["Site", "Variant", "L0 at 0.85", "at 0.9", "at 0.95", "γ"], ablation_rows(runs)),
            "rescaled": table(["Site", "λ", "L0", "Loss recovered", "γ", "Gated SAEs of this L0"], rescaled_rows(runs)),
        }
    if pursuit := sorted((arguments.runs / "quickstart").glob("report*-ito_*")):
        quickstart, _ = read(arguments.runs / "quickstart", pursuit[-1].name)
        draw_pursuit(quickstart).savefig(arguments.write.with_name("pursuit.png"), dpi=110)
        ks = sorted({r["ito"] for r in quickstart} - {0})
        columns = ["Dictionary", "L0", "Loss recovered", *(f"{k} by pursuit" for k in ks)]
        tables["pursuit"] = table(columns, pursuit_rows(quickstart))
    if studies := [path.parent for path in sorted(arguments.runs.glob("study_*/analysis"))]:
        columns = ["Gated L0", "Baseline L0", "Pairs", "Gated score", "Baseline score", "Difference [90%]", "p"]
        tables["studies"] = table(columns, study_rows(studies))
    if not tables:
        raise SystemExit(f"{arguments.runs} has no run with a report")
    text = arguments.write.read_text("utf-8")
    for name, rows in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{arguments.write} has no place for the table {name!r}: <!-- {name} --> ... <!-- end -->")
        text = pattern.sub(lambda match, rows=rows: f"{match[1]}\n{rows}\n\n{match[2]}", text)
    arguments.write.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
