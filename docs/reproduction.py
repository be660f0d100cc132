"""The figures and tables of docs/reproduction.md, from the reports of finished runs of configs/reproduction.py.

    python docs/reproduction.py --runs runs --write docs/reproduction.md

`--runs` holds `reproduction/SITE` of each site; `SITE_ablations`, `SITE_rescaled`, `SITE_STEPS`, `SITE_lower`,
`SITE_STEPS_lower` and `SITE_wWIDTH` beside it, where there are any; the same in `reproduction/tinystories`, `best` and
`best/tinystories`; `pursuit/SITE`, measured with `--ito 5,10,20,40`; `tinystories`; and `study_*` with their analyses.
Without it, tables are made of `docs/results`. Tables of a model stay as they are until three of its sites are there.
"""

import itertools
import json
import math

import numpy as np
import results

from gsae_jax.evaluation import frontiers, plots

MODELS = {
    "": [f"blocks.0.{hook}" for hook in ("hook_mlp_out", "hook_resid_post", "attn.hook_z", "mlp.hook_post")],
    "tinystories": [
        f"blocks.{layer}.{hook}" for layer in (0, 1) for hook in ("attn.hook_z", "hook_mlp_out", "hook_resid_post")
    ],
}
USUAL = 1400  # steps, of runs whose names have no number
SHARE = 0.6  # of the steps are trained by configs/best.py, so that both recipes need as many operations
LEVELS = (0.8, 0.85, 0.9, 0.95)  # of loss recovered
ABLATIONS = {
    "no_r_mag": "no r_mag",
    "untied": "untied",
    "unfrozen": "unfrozen decoder",
    "untied_unfrozen": "untied, unfrozen",
}
# From a baseline to a gated SAE: the first two steps in both orders, with the stack at the end of each, and the others.
FIRST = {"width": ("baseline_narrow", "rescaled_narrow"), "magnitudes": ("rescaled", "rescaled_narrow")}
LATER = {"selection": "untied_unfrozen", "tied encoder": "unfrozen", "frozen decoder": "gated"}
COLOURS = dict(zip(("baseline", "gated", "rescaled", *ABLATIONS), plots.COLOURS, strict=False))


def read(name, runs):
    """A run's records, each with its stack's name, and its ratios; None where there is no run."""
    report = results.load(name, runs)
    if report is None:
        return None
    for record in report["saes"]:
        record["stack"] = frontiers.identity(record)[1]
    return report["saes"], report["l0_ratios"]


def select(records, stack, rate=None, seed=None):
    """A stack's SAEs (of one learning rate and seed), by L0."""
    chosen = [r for r in records if r["stack"] == stack and rate in (None, r["learning_rate"]) and not r["ito"]]
    return sorted((r for r in chosen if seed in (None, r["seed"])), key=lambda r: r["l0"])


def numbers_of(records, field):
    """The learning rates or seeds of records."""
    return sorted({record[field] for record in records})


def best_rate(ratios, stack):
    """The learning rate that most comparisons of a stack found best; None if there are no comparisons."""
    field = "learning_rate" if stack == "gated" else "baseline_learning_rate"
    rates = [r[field] for r in ratios if r["stack"] == "gated" and r[field]]
    return max(sorted(set(rates)), key=rates.count, default=None)


def l0s_at(records, stack, level, rate=None):
    """The L0 of each seed's frontier at a loss recovered."""
    chosen = select(records, stack, rate)
    return np.array([frontiers.l0_at(select(chosen, stack, seed=seed), level) for seed in numbers_of(chosen, "seed")])


def ratio(ours, theirs):
    """`0.50 [0.45, 0.55]`: a ratio of L0s over seeds, or a dash."""
    return frontiers.ratio_over_seeds(ours / theirs).text(".2f") if len(ours) == len(theirs) > 0 else "–"


def ratio_rows(sites):
    for site, (_, ratios) in sites.items():
        for r in (r for r in ratios if (r["stack"], r["baseline"]) == ("gated", "baseline")):
            interval = f" [{r['low']:.2f}, {r['high']:.2f}]" if r["low"] else ""
            sides = [
                why or f"{r[side + 'l0']:.1f} (rate {r[side + 'learning_rate']:g})"
                for side, why in zip(("", "baseline_"), r["unknown"], strict=True)
            ]
            cells = f"{r['ratio']:.2f}{interval}" if r["ratio"] else "–", " and ".join(map(str, r["seeds"])) or "–"
            yield f"`{site}`", r["level"], *sides, *cells


def without_diverged(records):
    return [record for record in records if record["fvu"] < 1]


def gamma_rows(sites):
    for site, (records, ratios) in sites.items():
        records = without_diverged(records)
        every = [r["gamma"] for r in records if r["stack"] == "gated"]
        line = select(records, "baseline", best_rate(ratios, "baseline"))
        baseline = [
            f"{np.mean([r['gamma'] for r in line if r['l1_coefficient'] == l1]):.3f}"
            for l1 in numbers_of(line, "l1_coefficient")
        ]
        best = [r["gamma"] for r in select(records, "gated", best_rate(ratios, "gated"))]
        yield f"`{site}`", *(f"{min(g):.3f} to {max(g):.3f}" for g in (best, every)), ", ".join(baseline)


def rate_rows(sites, rates):
    for site, (records, _) in sites.items():
        for stack in ("gated", "baseline"):
            for level in LEVELS:
                l0s = [l0s_at(records, stack, level, rate) for rate in rates]
                means = [math.exp(np.log(each).mean()) if len(each) else math.nan for each in l0s]
                if np.isfinite(means).any():
                    yield f"`{site}`", stack, level, *(f"{mean:.1f}" if mean == mean else "–" for mean in means)


def ablation_rows(ablations):
    for site, records in ablations.items():
        for stack, label in ABLATIONS.items():
            at = [ratio(l0s_at(records, stack, level), l0s_at(records, "gated", level)) for level in LEVELS]
            gamma = [r["gamma"] for r in select(records, stack)]
            if set(at) != {"–"}:
                yield f"`{site}`", label, *at, f"{min(gamma):.3f} to {max(gamma):.3f}"


def attribution_rows(ablations, rescaled):
    for site, records in ablations.items():
        records = records + rescaled.get(site, [])
        for level, (first, stacks) in itertools.product(LEVELS, FIRST.items()):
            l0s = [l0s_at(records, stack, level) for stack in ("baseline", *stacks, *LATER.values())]
            steps = [ratio(after, before) for before, after in itertools.pairwise(l0s)]
            if "–" not in steps:
                of_first = [steps[list(FIRST).index(first)], steps[1 - list(FIRST).index(first)]]
                yield f"`{site}`", level, first, *of_first, *steps[2:], ratio(l0s[-1], l0s[0])


def share_rows(ablations, rescaled):
    """How much of the logarithm of all steps' L0 ratio each step is, the first two together."""
    for site, records in ablations.items():
        records = records + rescaled.get(site, [])
        for level in LEVELS:
            stacks = ("baseline", FIRST["width"][-1], *LATER.values())
            means = [np.log(l0).mean() if len(l0 := l0s_at(records, stack, level)) else math.nan for stack in stacks]
            if np.isfinite(means).all():
                steps = np.diff(means) / (means[-1] - means[0])
                yield f"`{site}`", level, *(f"{step:.0%}" for step in steps)


def equal_width_rows(ablations):
    """Gated SAEs against baselines of equal compute and of equal width."""
    for site, records in ablations.items():
        for level in LEVELS:
            gated = l0s_at(records, "gated", level)
            cells = [ratio(gated, l0s_at(records, stack, level)) for stack in ("baseline", "baseline_narrow")]
            if set(cells) != {"–"}:
                yield f"`{site}`", level, *cells


def rescaled_rows(ablations, rescaled):
    for site, after in rescaled.items():
        before, gated = ablations[site], select(ablations[site], "gated")
        for l1 in numbers_of(select(after, "rescaled"), "l1_coefficient"):
            sides = [
                [r for r in select(side, stack) if r["l1_coefficient"] == l1]
                for side, stack in ((before, "baseline"), (after, "rescaled"))
            ]
            l0, recovered, gamma = (
                [np.mean([r[field] for r in side]) for side in sides] for field in ("l0", "loss_recovered", "gamma")
            )
            lines = [select(gated, "gated", seed=seed) for seed in numbers_of(gated, "seed")]
            there = np.mean([frontiers.at_l0(line, "loss_recovered", l0[1]) for line in lines])
            cells = (
                " → ".join(f"{v:{form}}" for v in pair)
                for pair, form in ((l0, ".1f"), (recovered, ".3f"), (gamma, ".3f"))
            )
            yield f"`{site}`", f"{l1:g}", *cells, f"{there:.3f}" if there == there else "–"


def longer_records(runs):
    """By model, site, steps: the records of the paper's SAEs and of the recipe of 2026, where some trained longer."""
    found = {}
    for model, sites in MODELS.items():
        for site, kind in itertools.product(sites, ("reproduction", "best")):
            for end in ("", "_lower"):
                for steps, name in results.numbered(path(model, site, kind), rf"(?:_(\d+))?{end}", runs).items():
                    key = model, site, steps or USUAL
                    found.setdefault(key, []).extend((results.load(name, runs) or {"saes": []})["saes"])
    longer = {(model, site) for model, site, steps in found if steps != USUAL}
    return {key: found[key] for key in sorted(found) if key[:2] in longer}


def longer_rows(found, rates):
    """L0 by learning rate of the runs that trained for several numbers of steps, and the lowest in bold."""
    for (model, site, steps), records in found.items():
        for label, start in {"gated": "gated", "baseline": "baseline", "recipe of 2026": "best"}.items():
            mine = [r for r in records if frontiers.identity(r)[1].startswith(start)]
            for level in LEVELS if mine else ():
                l0s = [mean_l0([r for r in mine if r["learning_rate"] == rate], level) for rate in rates]
                least = min((l0 for l0 in l0s if l0 == l0), default=None)
                cells = (f"**{l0:.1f}**" if l0 == least else f"{l0:.1f}" if l0 == l0 else "–" for l0 in l0s)
                trained = round(SHARE * steps) if start == "best" else steps
                if least is not None:
                    yield f"`{site}`" + ", TinyStories" * bool(model), f"{trained:,}", label, level, *cells


def mean_l0(records, level):
    """The geometric mean over seeds of the L0 at a loss recovered; NaN where there is none."""
    lines = ([r for r in records if r["seed"] == seed] for seed in numbers_of(records, "seed"))
    return math.exp(np.log([frontiers.l0_at(line, level) for line in lines]).mean()) if records else math.nan


def longer_ratio_rows(runs):
    """`ratio_rows` of the runs that trained longer, with their steps in the second cell."""
    for model, sites in MODELS.items():
        for site in sites:
            for steps, name in results.numbered(path(model, site), r"_(\d+)", runs).items():
                if report := read(name, runs):
                    for cells in ratio_rows({site: report}):
                        yield cells[0] + ", TinyStories" * bool(model), f"{steps:,}", *cells[1:]


def width_rows(runs):
    """`ratio_rows` of the sites that have runs with several widths, with the gated SAEs' width in the second cell."""
    for model, sites in MODELS.items():
        for site in sites:
            names = results.numbered(path(model, site), r"(?:_w(\d+))?", runs).values()
            reports = [report for name in names if (report := read(name, runs))]
            for report in reports if len(reports) > 1 else ():
                width = select(report[0], "gated")[0]["width"]
                for cells in ratio_rows({site: report}):
                    yield cells[0] + ", TinyStories" * bool(model), f"{width:,}", *cells[1:]


def pursuit_rows(sites):
    for site, records in sites.items():
        for encoder in (r for r in records if not r["ito"]):
            line = by_pursuit(records, encoder)
            cells = (f"{r['loss_recovered']:.3f}" for r in line)
            yield f"`{site}`", encoder["name"], f"{encoder['l0']:.1f}", f"{encoder['loss_recovered']:.3f}", *cells


def by_pursuit(records, encoder):
    """The records of an encoder's dictionary with features that pursuit chose, by their number."""
    return sorted((r for r in records if r["name"].startswith(f"{encoder['name']}_ito_")), key=lambda r: r["ito"])


def target_rows(records):
    for target in numbers_of(records, "target_l0"):
        pair = (r for stack in ("gated", "baseline") for r in select(records, stack) if r["target_l0"] == target)
        cells = ((f"{r['l0']:.1f}", f"{r['loss_recovered']:.3f}", f"{r['gamma']:.3f}") for r in pair)
        yield f"{target:g}", *itertools.chain(*cells)


def load_studies(runs):
    """What the table needs of each study's analysis. `docs/results` first takes over those in `runs`."""
    for path in sorted(runs.glob("study_*/analysis/analysis.json")) if runs is not None else ():
        contents = json.loads(path.read_text("utf-8"))
        saes = [{key: sae[key] for key in ("side", "sae", "l0")} for sae in contents["study"]["saes"]]
        keys = ("sides", "means", "difference")
        analyses = [{key: each[key] for key in keys} | {"p": each["tests"][0]["p"]} for each in contents["analyses"]]
        results.save(f"studies/{path.parts[-3]}", {"saes": saes, "analyses": analyses})
    return [json.loads(path.read_text("utf-8")) for path in sorted(results.FOLDER.glob("studies/*.json"))]


def study_rows(studies):
    rows = []
    for contents in studies:
        l0 = {sae["side"]: sae["l0"] for sae in contents["saes"]}
        for each in contents["analyses"]:
            difference, p = each["difference"], each["p"]
            ends = [difference["low"], difference["high"]]
            interval = "" if None in ends else f" [{', '.join(f'{end:+.3f}' for end in ends)}]"
            sides = [f"{l0[side]:.1f}" for side in each["sides"]]
            means = [f"{mean:.3f}" for mean in each["means"]]
            both = f"{difference['mean']:+.3f}{interval}"
            rows.append(
                [
                    *sides,
                    f"{difference['pairs']:,}",
                    *means,
                    both,
                    "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.1g}",
                ]
            )
    return sorted(rows, key=lambda row: (float(row[0]), float(row[1])))


def draw(sites, field, label):
    """A metric against L0, a panel for each site: both architectures at their best rates, a line for each seed."""
    figure, axes = results.panels(list(sites), label)
    for axis, (records, ratios) in zip(axes, sites.values(), strict=True):
        for stack in ("baseline", "gated"):
            rate = best_rate(ratios, stack)
            for seed in numbers_of(select(records, stack, rate), "seed"):
                line = without_diverged(select(records, stack, rate, seed))
                style = dict(color=COLOURS[stack], marker="o", markersize=3, linewidth=1)
                values = [[r[each] for r in line] for each in ("l0", field)]
                axis.plot(*values, **style, label=f"{stack}, rate {rate:g}" if rate and seed == 0 else None)
        axis.legend(fontsize=7)
    return figure


def draw_pursuit(sites):
    """Figures 10 and 11: dictionaries with features chosen by gradient pursuit, beside their encoders."""
    figure, axes = results.panels(list(sites), "loss recovered")
    for axis, records in zip(axes, sites.values(), strict=True):
        for stack in ("baseline", "gated"):
            encoders = select(records, stack)
            axis.plot(*points(encoders), "o-", color=COLOURS[stack], label=f"{stack}, encoder")
            for number, encoder in enumerate(encoders):
                style = dict(color=COLOURS[stack], linestyle="--", marker=".", linewidth=0.8, alpha=0.4 + 0.3 * number)
                label = f"{stack}, by pursuit" if number == len(encoders) - 1 else None
                axis.plot(*points(by_pursuit(records, encoder)), **style, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def points(records):
    return [[record[field] for record in records] for field in ("l0", "loss_recovered")]


def path(model, site, kind="reproduction"):
    """The name of a run."""
    return "/".join(filter(None, (kind, model, site)))


def tables_of(model, page, runs):
    """All tables of a model, as soon as there are runs of three of its sites; also draws its figures."""
    found = {
        kind: {s: read(path(model, s) + kind, runs) for s in MODELS[model]} for kind in ("", "_ablations", "_rescaled")
    }
    sites = {site: report for site, report in found[""].items() if report}
    ablations, rescaled = ({s: r[0] for s, r in found[kind].items() if r} for kind in ("_ablations", "_rescaled"))
    if len(sites) < 3:
        return {}
    suffix = f"_{model}" * bool(model)
    for field, label, name in (("loss_recovered", "loss recovered", ""), ("gamma", "γ", "_gamma")):
        draw(sites, field, label).savefig(page.with_name(f"reproduction{suffix}{name}.png"), dpi=110)
    rates = numbers_of([record for records, _ in sites.values() for record in records], "learning_rate")
    at = [f"at {level}" for level in LEVELS]
    l0 = ["Site", "Loss recovered", "Gated L0", "Baseline L0", "Ratio [95%]", "Seeds"]
    gamma = ["Site", "Gated, best rate", "Gated, all rates", "Baseline, by λ"]
    of_rates = ["Site", "SAEs", "Loss recovered", *(f"{rate:g}" for rate in rates)]
    tables = {
        "ratios": results.table(l0, ratio_rows(sites)),
        "gamma": results.table(gamma, gamma_rows(sites)),
        "rates": results.table(of_rates, rate_rows(sites, rates), ("SAEs",)),
        "ablations": results.table(["Site", "Variant", *at, "γ"], ablation_rows(ablations), ("Variant",)),
        "attribution": results.table(
            ["Site", "Loss recovered", "First step", *FIRST, *LATER, "All"],
            attribution_rows(ablations, rescaled),
            ("First step",),
        ),
        "shares": results.table(
            ["Site", "Loss recovered", " and ".join(FIRST), *LATER], share_rows(ablations, rescaled)
        ),
        "equal_width": results.table(
            ["Site", "Loss recovered", "Gated / baseline of 1,536", "Gated / baseline of 1,024"],
            equal_width_rows(ablations),
        ),
        "rescaled": results.table(
            ["Site", "λ", "L0", "Loss recovered", "γ", "Gated SAEs of this L0"], rescaled_rows(ablations, rescaled)
        ),
    }
    return {name + suffix: each for name, each in tables.items() if each.count("\n") > 1}


def main():
    arguments = results.arguments(__doc__)
    runs, page = arguments.runs, arguments.write
    tables = tables_of("", page, runs) | tables_of("tinystories", page, runs)
    if longer := longer_records(runs):
        rates = numbers_of([record for records in longer.values() for record in records], "learning_rate")
        columns = ["Site", "Steps", "SAEs", "Loss recovered", *(f"{rate:g}" for rate in rates)]
        tables["longer_rates"] = results.table(columns, longer_rows(longer, rates), ("SAEs",))
    for name, column, rows in (("longer", "Steps", longer_ratio_rows(runs)), ("widths", "Width", width_rows(runs))):
        if rows := list(rows):
            columns = ["Site", column, "Loss recovered", "Gated L0", "Baseline L0", "Ratio [95%]", "Seeds"]
            tables[name] = results.table(columns, rows)
    pursuits = {site: results.load(f"pursuit/{site}", runs, "report*-ito_*") for site in MODELS[""]}
    if of_sites := {site: report["saes"] for site, report in pursuits.items() if report}:
        draw_pursuit(of_sites).savefig(page.with_name("pursuit.png"), dpi=110)
        chosen = [k for k in numbers_of(next(iter(of_sites.values())), "ito") if k]
        columns = ["Site", "Dictionary", "L0", "Loss recovered", *(f"{k} by pursuit" for k in chosen)]
        tables["pursuit"] = results.table(columns, pursuit_rows(of_sites), ("Dictionary",))
    if report := read("tinystories", runs):
        columns = ["Target L0", "Gated L0", "Loss recovered", "γ", "Baseline L0", "Loss recovered", "γ"]
        tables["target_l0"] = results.table(columns, target_rows(report[0]))
    if studies := load_studies(runs):
        columns = [
            "Gated L0",
            "Baseline L0",
            "Pairs",
            "Gated score",
            "Baseline score",
            "Difference [90%]",
            "p (one-sided)",
        ]
        tables["studies"] = results.table(columns, study_rows(studies))
    results.write(page, tables)


if __name__ == "__main__":
    main()
