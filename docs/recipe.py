"""The tables and figure of docs/recipe.md, from runs of configs/best.py and configs/reproduction.py.

    python docs/recipe.py --runs runs --write docs/recipe.md

`--runs` holds `best/SITE` and `reproduction/SITE`, or `best/tinystories/SITE` and so on. Without it, tables are made
of `docs/results`.
"""

import numpy as np
import reproduction
import results

from gsae_jax.evaluation import frontiers

LEVELS = reproduction.LEVELS


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


def rows(sites):
    for site, (paper, recipe) in sites.items():
        for level in LEVELS:
            sides = [best(records, level) for records in (paper, recipe)]
            if not any(sides):
                continue
            shown = [f"{np.exp(np.log(side[1]).mean()):.1f} (rate {side[0]:g})" if side else "–" for side in sides]
            ratio = frontiers.ratio_over_seeds(sides[1][1] / sides[0][1]).text(".2f") if all(sides) else "–"
            yield f"`{site}`", level, *shown, ratio


def health_rows(sites):
    for site, (_, recipe) in sites.items():
        for rate in reproduction.numbers_of(recipe, "learning_rate"):
            mine = [r for r in recipe if r["learning_rate"] == rate]
            gamma, alive = ([r[field] for r in mine] for field in ("gamma", "alive"))
            yield f"`{site}`", f"{rate:g}", f"{min(gamma):.3f} to {max(gamma):.3f}", f"{min(alive):.1%}"


def draw(sites):
    """Loss recovered against L0, a panel for each site."""
    figure, axes = results.panels(list(sites), "loss recovered")
    for axis, both in zip(axes, sites.values(), strict=True):
        for number, (records, label) in enumerate(zip(both, ("paper's recipe", "recipe of 2026"), strict=True)):
            rates = [found[0] for level in LEVELS if (found := best(records, level))]
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
    for model, of_model in reproduction.MODELS.items():
        for site in of_model:
            paper = reproduction.read(reproduction.path(model, site), arguments.runs)
            recipe = results.load(reproduction.path(model, site, "best"), arguments.runs)
            if paper and recipe:
                label = f"{site}, TinyStories" if model else site
                sites[label] = reproduction.select(paper[0], "gated"), recipe["saes"]
    draw(sites).savefig(arguments.write.with_suffix(".png"), dpi=110)
    columns = ["Site", "Loss recovered", "L0, paper", "L0, 2026", "Ratio [95%]"]
    tables = {"gain": results.table(columns, rows(sites))}
    tables["health"] = results.table(["Site", "Rate", "γ", "Fewest alive"], health_rows(sites), ("Rate",))
    results.write(arguments.write, tables)


if __name__ == "__main__":
    main()
