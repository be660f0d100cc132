"""The tables and figure of docs/recipe.md, from runs of configs/best.py, configs/reproduction.py and configs/search.py.

    python docs/recipe.py --runs runs --write docs/recipe.md

`--runs` holds `best/SITE` and `reproduction/SITE`, `best/SITE_14000` and so on of longer training, `SITE_lower` and
`SITE_14000_lower`, and the same in `best/tinystories` and `reproduction/tinystories`; `decay/best/SITE` and so on of a
shorter decay; `search`; and `compared/SITE`, which `python -m gsae_jax.compare` wrote. Without it, tables are made of
`docs/results`.
"""

import json
import re
from collections import defaultdict

import numpy as np
import reproduction
import results

from gsae_jax.evaluation import comparison, frontiers, plots

LEVELS = reproduction.LEVELS
COLOURS = plots.COLOURS[1], plots.COLOURS[3]  # the paper's gated SAEs as in docs/reproduction.py
COMPARED_AT = "blocks.0.hook_mlp_out"
COMPARED = ("loss_recovered", "kl", "fvu", "score", "probe_1", "probe_5")
SHARES = ("recovered", "f1", "absorption", "dead")  # of a known dictionary
SEARCHED = 0.95  # the loss recovered at which changes are compared


def l0_by_seed(records, level):
    """For each learning rate, the L0 of each seed's frontier at a loss recovered."""
    rates, seeds = (reproduction.numbers_of(records, field) for field in ("learning_rate", "seed"))
    of = {
        (rate, seed): [r for r in records if (r["learning_rate"], r["seed"]) == (rate, seed)]
        for rate in rates
        for seed in seeds
    }
    return {
        rate: np.array([frontiers.l0_at(of[rate, seed], level) for seed in seeds if of[rate, seed]]) for rate in rates
    }


def best(records, level):
    """(learning rate, L0 of each seed) of the rate with the lowest L0, of those with three seeds; None if unknown."""
    known = [(np.log(l0).mean(), rate, l0) for rate, l0 in l0_by_seed(records, level).items() if len(l0) == 3]
    known = [each for each in known if np.isfinite(each[0])]
    return min(known, key=lambda each: each[0])[1:] if known else None


def lower(records, level, side):
    """Whether a rate with fewer seeds has a lower L0 than the rate of `best`, for the first seed."""
    first = {rate: l0[0] for rate, l0 in l0_by_seed(records, level).items()}
    return any(l0 < first[side[0]] for l0 in first.values())


def usual_rate(records):
    """The rate that is best at most levels; None if none is."""
    rates = [side[0] for level in LEVELS if (side := best(records, level))]
    return max(sorted(set(rates)), key=rates.count, default=None)


def geometric_mean(l0s):
    return np.exp(np.log(l0s).mean())


def gain_rows(sites):
    for (site, steps), both in sites.items():
        for level in LEVELS:
            sides = [best(records, level) for records in both]
            if any(sides):
                shown = [
                    f"{geometric_mean(side[1]):.1f} (rate {side[0]:g})" + " †" * lower(records, level, side)
                    if side
                    else "–"
                    for side, records in zip(sides, both, strict=True)
                ]
                ratio = frontiers.ratio_over_seeds(sides[1][1] / sides[0][1]).text(".2f") if all(sides) else "–"
                yield site, steps_of(steps), level, *shown, ratio


def error_rows(sites):
    """Loss recovered and FVU at the L0 of each k, by both recipes at their usual rates: means over seeds."""
    for (site, steps), both in sites.items():
        rates = [usual_rate(records) for records in both]
        paper, recipe = ([r for r in rs if r["learning_rate"] == rate] for rs, rate in zip(both, rates, strict=True))
        for stack in of_stacks(recipe):
            mine = [r for r in recipe if frontiers.identity(r)[1] == stack]
            l0 = np.mean([r["l0"] for r in mine])
            lines = [[r for r in paper if r["seed"] == seed] for seed in reproduction.numbers_of(paper, "seed")]
            cells = []
            for field in ("loss_recovered", "fvu"):
                theirs = np.mean([frontiers.at_l0(line, field, l0) for line in lines]) if lines else np.nan
                cells += [f"{theirs:.3f}" if theirs == theirs else "–", f"{np.mean([r[field] for r in mine]):.3f}"]
            yield site, steps_of(steps), f"{l0:.1f}", *cells


def of_stacks(records):
    """The names of the stacks, by L0."""
    return dict.fromkeys(frontiers.identity(r)[1] for r in sorted(records, key=lambda r: r["l0"]))


def steps_of(steps):
    return f"{steps:,}, {round(reproduction.SHARE * steps):,}"


def health_rows(sites):
    for (site, steps), (_, recipe) in sites.items():
        for stack in of_stacks(recipe):
            mine = [r for r in recipe if frontiers.identity(r)[1] == stack]
            l0, gamma, alive = ([r[field] for r in mine] for field in ("l0", "gamma", "alive"))
            yield (
                site,
                f"{round(reproduction.SHARE * steps):,}",
                f"{np.mean(l0):.1f}",
                f"{min(gamma):.3f} to {max(gamma):.3f}",
                f"{min(alive):.1%}",
            )


def decay_rows(runs):
    """Both recipes where they were also trained with a decay of the learning rate in the last fifth only."""
    for model, of_model in reproduction.MODELS.items():
        for site in of_model:
            for kind, label, start in (("reproduction", "paper", "gated"), ("best", "2026", "best")):
                name = reproduction.path(model, site, kind)
                reports = [results.load(each, runs) for each in (name, f"decay/{name}")]
                if not all(reports):
                    continue
                both = [[r for r in report["saes"] if frontiers.identity(r)[1].startswith(start)] for report in reports]
                for level in LEVELS:
                    sides = [best(records, level) for records in both]
                    shown = (f"{geometric_mean(side[1]):.1f} (rate {side[0]:g})" if side else "–" for side in sides)
                    ratio = frontiers.ratio_over_seeds(sides[1][1] / sides[0][1]).text(".2f") if all(sides) else "–"
                    if any(sides):
                        yield f"`{site}`" + ", TinyStories" * bool(model), label, level, *shown, ratio


def search_rows(records):
    """The changes, each with the first of its kind, that of its name's beginning."""
    changes = defaultdict(list)
    for record in records:
        changes[re.sub(r"_\d+$", "", frontiers.identity(record)[1])].append(record)
    first = {True: "batch_topk", False: "paper"}
    for by_k, name in sorted((name.startswith("batch_topk"), name) for name in changes):
        sides = [best(changes[each], SEARCHED) for each in (name, first[by_k])]
        ratio = frontiers.ratio_over_seeds(sides[0][1] / sides[1][1]).text(".2f") if all(sides) else "–"
        l0, rate = (f"{geometric_mean(sides[0][1]):.1f}", f"{sides[0][0]:g}") if sides[0] else "––"
        alive = min(record["alive"] for record in changes[name])
        yield f"`{name}`", l0, rate, "1" if name == first[by_k] else ratio, f"{alive:.1%}"


def comparison_of(site, runs):
    """What `python -m gsae_jax.compare` found at a site; None where there is none."""
    path = results.FOLDER / "compared" / f"{site}.json"
    if runs is not None and (found := runs / "compared" / site / "compare.json").exists():
        content = json.loads(found.read_text("utf-8"))
        of_site = content["sites"][site]
        kept = {name: of_site[name] for name in ("l0_ratios", "at_equal_l0")} | {"synthetic": content["synthetic"]}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(results.short(kept), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def against_rows(found):
    """The L0 of kinds with three seeds, divided by that of the recipe."""
    rows = [row for row in found["l0_ratios"] if row["seeds"] == 3]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_level = {row["level"]: interval(row["ratio"], ".2f") for row in rows if row["kind"] == kind}
        yield name_of(kind), *(of_level[level] for level in LEVELS)


def compared_rows(found):
    """Kinds with three seeds at equal L0."""
    for row in found["at_equal_l0"]:
        if row["seeds"] == 3:
            values = [row["values"][name] for name in COMPARED]
            forms = [comparison.METRICS[name].form for name in COMPARED]
            cells = (interval(value, form) for value, form in zip(values, forms, strict=True))
            yield f"{row['l0']:g}", name_of(row["kind"]), *cells


def recovered_rows(found):
    """What kinds with three seeds recover of a known dictionary."""
    for kind in dict.fromkeys(record["kind"] for record in found["synthetic"]):
        members = [record for record in found["synthetic"] if record["kind"] == kind]
        if len(members) == 3:
            of = {name: [np.nan if r[name] is None else r[name] for r in members] for name in comparison.RECOVERY}
            values = {name: frontiers.over_seeds(of[name]) for name in comparison.RECOVERY}
            values |= {name: results.share(values[name]) for name in SHARES}
            yield name_of(kind), *(interval(values[name], m.form) for name, m in comparison.RECOVERY.items())


def interval(value, form):
    ends = value.values() if isinstance(value, dict) else value  # a dict in the file of a comparison
    middle, low, high = (np.nan if each is None else each for each in ends)
    return "–" if np.isnan(middle) else f"{middle:{form}} [{low:{form}}, {high:{form}}]"


def name_of(kind):
    """What the page calls a kind."""
    name = re.split(", rate| ", kind)[0]
    return {"gated_batch_topk": "recipe of 2026", "gated": "gated, paper"}.get(name, name)


def draw(sites):
    """Loss recovered against L0, a panel for each site and number of steps."""
    figure, axes = results.panels(
        [f"{site.replace('`', '')}\n{steps_of(steps).replace(', ', ' and ')} steps" for site, steps in sites],
        "loss recovered",
    )
    for axis, both in zip(axes, sites.values(), strict=True):
        for number, (records, label) in enumerate(zip(both, ("paper's recipe", "recipe of 2026"), strict=True)):
            rate = usual_rate(records)
            for seed in reproduction.numbers_of([r for r in records if r["learning_rate"] == rate], "seed"):
                line = [r for r in records if (r["learning_rate"], r["seed"]) == (rate, seed)]
                line = sorted(line, key=lambda r: r["l0"])
                shown = f"{label}, rate {rate:g}" if seed == 0 else None
                axis.plot(
                    *reproduction.points(line), "o-", color=COLOURS[number], markersize=3, linewidth=1, label=shown
                )
        axis.legend(fontsize=7)
    return figure


def with_lower(name, runs):
    """The records of a run and of that with a lower rate."""
    return [
        r for report in (results.load(name + end, runs) for end in ("", "_lower")) if report for r in report["saes"]
    ]


def main():
    arguments = results.arguments(__doc__)
    sites = {}
    for model, of_model in reproduction.MODELS.items():
        for site in of_model:
            kinds = [reproduction.path(model, site, kind) for kind in ("reproduction", "best")]
            for steps, name in results.numbered(kinds[1], r"(?:_(\d+))?", arguments.runs).items():
                end = name.removeprefix(kinds[1])
                paper, recipe = (with_lower(kind + end, arguments.runs) for kind in kinds)
                if paper and recipe:
                    gated = [record for record in paper if frontiers.identity(record)[1] == "gated"]
                    key = f"`{site}`" + ", TinyStories" * bool(model), steps or reproduction.USUAL
                    sites[key] = gated, recipe
    draw(sites).savefig(arguments.write.with_suffix(".png"), dpi=110)
    columns = ["Site", "Steps", "Loss recovered", "L0, paper", "L0, 2026", "Ratio [95%]"]
    tables = {"gain": results.table(columns, gain_rows(sites))}
    error = ["Site", "Steps", "L0", "Loss recovered, paper", "2026", "FVU, paper", "2026"]
    tables["error"] = results.table(error, error_rows(sites))
    tables["health"] = results.table(["Site", "Steps", "L0", "γ", "Fewest alive"], health_rows(sites))
    if search := results.load("search", arguments.runs):
        columns = ["Change", f"L0 at {SEARCHED}", "Rate", "Ratio [95%]", "Fewest alive"]
        tables["search"] = results.table(columns, search_rows(search["saes"]))
    if rows := list(decay_rows(arguments.runs)):
        columns = [
            "Site",
            "Recipe",
            "Loss recovered",
            "L0, decay from the start",
            "L0, in the last fifth",
            "Ratio [95%]",
        ]
        tables["decay"] = results.table(columns, rows, ("Recipe",))
    if found := comparison_of(COMPARED_AT, arguments.runs):
        columns = ["Kind", *(f"at {level}" for level in LEVELS)]
        tables["against"] = results.table(columns, against_rows(found))
        columns = ["L0", "Kind", *(comparison.METRICS[name].title for name in COMPARED)]
        tables["compared"] = results.table(columns, compared_rows(found), ("Kind",))
        columns = ["Kind", *(metric.title for metric in comparison.RECOVERY.values())]
        if rows := list(recovered_rows(found)):
            tables["recovered"] = results.table(columns, rows)
    results.write(arguments.write, tables)


if __name__ == "__main__":
    main()
