"""Gated SAEs by the recipe of docs/recipe.md at one site, to be compared with a run of configs/reproduction.py there.

    python -m gsae_jax.train --config configs/best.py:blocks.0.hook_mlp_out --workdir runs/best/blocks.0.hook_mlp_out

The word `tinystories` after the site is for the model of configs/tinystories.py.
"""

from configs import quickstart, tinystories
from configs.reproduction import RATES, WIDTHS
from gsae_jax import stack_config
from gsae_jax.errors import UserError

# Active features, chosen for a loss recovered from 0.8 to 0.95.
KS = {
    "embedded": {
        "blocks.0.hook_mlp_out": (4, 12, 32, 80),
        "blocks.0.hook_resid_post": (4, 10, 24, 60),
        "blocks.0.attn.hook_z": (2, 4, 8, 20),
        "blocks.0.mlp.hook_post": (4, 12, 32, 80),
    },
    "tinystories": {
        "blocks.0.attn.hook_z": (2, 5, 10, 24),
        "blocks.0.hook_mlp_out": (1, 2, 4, 10),
        "blocks.0.hook_resid_post": (1, 2, 4, 10),
        "blocks.1.attn.hook_z": (2, 5, 10, 24),
        "blocks.1.hook_mlp_out": (4, 10, 20, 50),
        "blocks.1.hook_resid_post": (4, 10, 20, 40),
    },
}


def get_config(which="blocks.0.hook_mlp_out"):
    site, *words = which.split(",")
    if unknown := set(words) - {"tinystories"}:
        raise UserError(f"has {', '.join(sorted(unknown))}; write tinystories, or nothing, after the site")
    model = "tinystories" if words else "embedded"
    if site not in KS[model]:
        raise UserError(f"has {site!r}; write one of {', '.join(KS[model])} after the colon")
    config = (tinystories if words else quickstart).get_config()
    config.evaluation.tokens = 2**17  # as in configs/reproduction.py
    config.stacks = {}
    learning_rates, seeds = zip(*RATES, strict=True)
    for k in KS[model][site]:
        settings = {"k": k, "learning_rates": learning_rates, "seeds": seeds}
        config.stacks[f"best_{k}"] = stack_config("gated_batch_topk", site, WIDTHS[model][0], **settings)
    return config
