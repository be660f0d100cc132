"""Gated SAEs by the recipe of docs/recipe.md at one site, to be compared with a run of configs/reproduction.py there.

    python -m gsae_jax.train --config configs/best.py:blocks.0.hook_mlp_out --workdir runs/best/blocks.0.hook_mlp_out

The words after the site (`tinystories`, a number of steps, `lower`) have the same meaning as in
configs/reproduction.py, with one difference: here the rate 2.4e-2 has three seeds for any number of steps. An update
with the KL divergence costs 2.4 to 6.5 times as much as the paper's at these sites (`python -m gsae_jax.plan`). So only
0.6 times as many steps are trained here. No site then needs more operations than with the paper's recipe, except for
AuxK where features are dead.

The word `others`, as in `blocks.0.hook_mlp_out,others`, is for SAEs of other architectures in place of gated ones. They
train for as many steps, have widths of equal compute, and their training ends with the KL divergence too.
"""

from configs import architectures, quickstart, tinystories
from configs.reproduction import LOWER, RATES, WIDTHS, parts
from gsae_jax import stack_config
from gsae_jax.errors import UserError
from gsae_jax.saes import products

STEPS = 0.6  # of those of configs/reproduction.py
# Active features, chosen for a loss recovered from 0.8 to 0.95.
KS = {
    "embedded": {
        "blocks.0.hook_mlp_out": (4, 10, 24, 60),
        "blocks.0.hook_resid_post": (3, 8, 16, 40),
        "blocks.0.attn.hook_z": (1, 3, 6, 14),
        "blocks.0.mlp.hook_post": (3, 10, 24, 60),
    },
    "tinystories": {
        "blocks.0.attn.hook_z": (1, 3, 7, 16),
        "blocks.0.hook_mlp_out": (1, 2, 4, 10),
        "blocks.0.hook_resid_post": (1, 2, 4, 10),
        "blocks.1.attn.hook_z": (1, 3, 7, 16),
        "blocks.1.hook_mlp_out": (4, 8, 16, 36),
        "blocks.1.hook_resid_post": (3, 7, 16, 36),
    },
}
OTHERS = ("batch_topk", "matryoshka", "jumprelu")
JUMPRELU_L1 = (1e-3, 3e-3, 1e-2, 3e-2)


def others(site, width, ks):
    """Stacks of other architectures at their best rates, with three seeds."""
    for architecture in OTHERS:
        settings = {
            "width": products.equal_width(architecture, width, of="gated"),
            "learning_rates": (architectures.RATES[architecture],),
            "seeds": (0, 1, 2),
            "grid": True,
            "kl_fraction": 0.1,
        }
        if architecture == "jumprelu":
            yield architecture, stack_config(architecture, site, l1_coefficients=JUMPRELU_L1, **settings)
        else:
            for k in ks:
                yield f"{architecture}_{k}", stack_config(architecture, site, k=k, **settings)


def get_config(which="blocks.0.hook_mlp_out"):
    site, model, steps, words, _ = parts(which, KS, ("lower", "others"))
    if "others" in words and (steps or "lower" in words):
        raise UserError(
            f"has `others` with a number of steps or `lower`: {which}. Leave them out, or leave `others` out"
        )
    config = (quickstart if model == "embedded" else tinystories).get_config()
    config.evaluation.tokens = 2**17  # as in configs/reproduction.py
    config.train.steps = round(STEPS * (steps or config.train.steps))
    config.train.dead_after = max(100, config.train.steps // 10)
    config.stacks = {}
    if "others" in words:
        config.stacks = dict(others(site, WIDTHS[model][0], KS[model][site]))
        return config
    learning_rates, seeds = zip(*(LOWER if "lower" in words else RATES), strict=True)
    for k in KS[model][site]:
        settings = {"k": k, "learning_rates": learning_rates, "seeds": seeds, "recipe": "2026"}
        config.stacks[f"best_{k}"] = stack_config("gated", site, WIDTHS[model][0], **settings)
    return config
