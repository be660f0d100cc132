"""The tables and figure of docs/recipe.md, from runs of configs/best.py, configs/reproduction.py and configs/search.py.

    python docs/recipe.py --runs runs --write docs/recipe.md

`--runs` holds `best/SITE` and `reproduction/SITE`, `best/SITE_14000` and so on of longer training, and the same in
`best/tinystories` and `reproduction/tinystories`; and `search`. Without it, tables are made of `docs/results`.
"""

import itertools
import re
from collections import defaultdict

import numpy as np
import reproduction
import results

from gsae_jax.evaluation import frontiers

LEVELS = reproduction.LEVELS
STEPS = {1400: "", 14000: "_14000"}  # of the paper's recipe, and the end of a run's name
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


def geometric_mean(l0s):
    return np.exp(np.log(l0s).mean())


def gain_rows(sites):
    for (site, steps), (paper, recipe) in sites.items():
        for level in LEVELS:
            sides = [best(records, level) for records in (paper, recipe)]
            if any(sides):
                shown = [f"{geometric_mean(side[1]):.1f} (rate {side[0]:g})" if side else "–" for side in sides]
                ratio = frontiers.ratio_over_seeds(sides[1][1] / sides[0][1]).text(".2f") if all(sides) else "–"
                yield site, f"{steps:,}, {round(reproduction.SHARE * steps):,}", level, *shown, ratio


def health_rows(sites):
    for (site, steps), (_, recipe) in sites.items():
        for stack in dict.fromkeys(frontiers.identity(r)[1] for r in sorted(recipe, key=lambda r: r["l0"])):
            mine = [r for r in recipe if frontiers.identity(r)[1] == stack]
            l0, gamma, alive = ([r[field] for r in mine] for field in ("l0", "gamma", "alive"))
            yield (
                site,
                f"{round(reproduction.SHARE * steps):,}",
                f"{np.mean(l0):.1f}",
                f"{min(gamma):.3f} to {max(gamma):.3f}",
                f"{min(alive):.1%}",
            )


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


def draw(sites):
    """Loss recovered against L0, a panel for each site and number of steps."""
    figure, axes = results.panels(
        [
            f"{site.replace('`', '')}, {steps:,} and {round(reproduction.SHARE * steps):,} steps"
            for site, steps in sites
        ],
        "loss recovered",
    )
    for axis, both in zip(axes, sites.values(), strict=True):
        for number, (records, label) in enumerate(zip(both, ("paper's recipe", "recipe of 2026"), strict=True)):
            rates = [side[0] for level in LEVELS if (side := best(records, level))]
            rate = max(sorted(set(rates)), key=rates.count)
            for seed in range(3):
                line = [r for r in records if (r["learning_rate"], r["seed"]) == (rate, seed)]
                line = sorted(line, key=lambda r: r["l0"])
                shown = f"{label}, rate {rate:g}" if seed == 0 else None
                axis.plot(*reproduction.points(line), "o-", color=f"C{number}", markersize=3, linewidth=1, label=shown)
        axis.legend(fontsize=7)
    return figure


def main():
    arguments = results.arguments(__doc__)
    sites = {}
    for steps, (model, of_model) in itertools.product(STEPS, reproduction.MODELS.items()):
        for site in of_model:
            runs = (reproduction.path(model, site, kind) + STEPS[steps] for kind in ("reproduction", "best"))
            paper, recipe = (results.load(run, arguments.runs) for run in runs)
            if paper and recipe:
                gated = [record for record in paper["saes"] if frontiers.identity(record)[1] == "gated"]
                sites[f"`{site}`" + ", TinyStories" * bool(model), steps] = gated, recipe["saes"]
    draw(sites).savefig(arguments.write.with_suffix(".png"), dpi=110)
    columns = ["Site", "Steps, paper and 2026", "Loss recovered", "L0, paper", "L0, 2026", "Ratio [95%]"]
    tables = {"gain": results.table(columns, gain_rows(sites))}
    tables["health"] = results.table(["Site", "Steps", "L0", "γ", "Fewest alive"], health_rows(sites))
    if search := results.load("search", arguments.runs):
        columns = ["Change", f"L0 at {SEARCHED}", "Rate", "Ratio [95%]", "Fewest alive"]
        tables["search"] = results.table(columns, search_rows(search["saes"]))
    results.write(arguments.write, tables)


if __name__ == "__main__":
    main()
