"""What helps a gated SAE at one site of TinyStories-656K: the paper's recipe with one change each (docs/recipe.md).

    python -m gsae_jax.train --config configs/search.py --workdir runs/search \
        --config.lm.path=MODEL_DIRECTORY --config.data.path=TEXT_FOLDER
"""

from configs import reproduction, tinystories
from gsae_jax import stack_config

SITE = "blocks.1.hook_resid_post"
L1 = (4e-3, 1e-2)  # on both sides of a loss recovered of 0.95
KS = (20, 45)
# Each is compared with the first of its kind: with the paper's recipe, and with gates that BatchTopK opens.
CHANGES = {
    "gated": {
        "paper": {},
        "initial_l0": {"initial_l0": 64},
        "auxk": {"auxk_coefficient": 1 / 32},
        "b1": {"b1": 0.9},
        "b2": {"b2": 0.99},
        "b1_b2": {"b1": 0.9, "b2": 0.99},
        "clip_norm": {"clip_norm": 1.0},
        "warmup": {"coefficient_warmup_fraction": 0.2},
        "tanh": {"penalty": "tanh"},
        "log": {"penalty": "log"},
        "aligned": {"aligned": True},
        "kl": {"kl_fraction": 0.1},
    },
    "gated_batch_topk": {
        "batch_topk": {},
        "batch_topk_b1": {"b1": 0.0},
        "batch_topk_b2": {"b2": 0.99},
        "batch_topk_no_auxk": {"auxk_coefficient": 0.0},
        "batch_topk_auxk": {"auxk_coefficient": 1 / 8},
        "batch_topk_initial_k": {"initial_k": 64, "coefficient_warmup_fraction": 0.2},
        "batch_topk_kl": {"kl_fraction": 0.1},
    },
}


def get_config():
    config = tinystories.get_config()
    config.activations.center = False  # as in configs/reproduction.py
    config.evaluation.tokens = 2**17
    config.train.dead_after = 100  # so that AuxK acts in a short run
    config.stacks = {}
    width = reproduction.WIDTHS["tinystories"][0]
    numbers = {"learning_rates": (1.2e-2, 2.4e-2), "seeds": (0, 1, 2), "grid": True}
    for name, change in CHANGES["gated"].items():
        # Penalties that saturate leave more features active at the same λ.
        l1_coefficients = tuple(1.5 * l1 for l1 in L1) if name in ("tanh", "log") else L1
        options = {"initial_l0": 0} | numbers | change
        config.stacks[name] = stack_config("gated", SITE, width, l1_coefficients, **options)
    for name, change in CHANGES["gated_batch_topk"].items():
        for k in KS:
            config.stacks[f"{name}_{k}"] = stack_config("gated_batch_topk", SITE, width, k=k, **numbers, **change)
    return config
