"""Gated SAEs by the recipe of docs/recipe.md at one site, to be compared with a run of configs/reproduction.py there.

    python -m gsae_jax.train --config configs/best.py:blocks.0.hook_mlp_out --workdir runs/best/blocks.0.hook_mlp_out

The word `tinystories` after the site is for the model of configs/tinystories.py.
"""

from configs import quickstart, tinystories
from configs.reproduction import WIDTHS
from gsae_jax import stack_config
from gsae_jax.errors import UserError

KS = (6, 16, 40, 80)  # active features
RATES = (1.2e-2, 2.4e-2)


def get_config(which="blocks.0.hook_mlp_out"):
    site, *words = which.split(",")
    if unknown := set(words) - {"tinystories"}:
        raise UserError(f"has {', '.join(sorted(unknown))}; write tinystories, or nothing, after the site")
    model = "tinystories" if words else "embedded"
    config = (tinystories if words else quickstart).get_config()
    config.evaluation.tokens = 2**17  # as in configs/reproduction.py
    config.stacks = {}
    for k in KS:
        settings = {"learning_rates": RATES, "seeds": (0, 1, 2), "grid": True}
        config.stacks[f"best_{k}"] = stack_config("gated_batch_topk", site, WIDTHS[model][0], k=k, **settings)
    return config
