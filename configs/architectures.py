"""Every architecture at one site, at equal compute, with L0 between about 20 and 100. One run trains all of them.

    python -m gsae_jax.train --config configs/architectures.py:rates --workdir runs/architectures_rates
    python -m gsae_jax.train --config configs/architectures.py --workdir runs/architectures

The first command trains at several learning rates with one seed. The second takes the best rate of each kind (`RATES`)
and three seeds. With `:tinystories` or `:tinystories,rates` the model is that of configs/tinystories.py.
"""

from configs import quickstart, tinystories
from gsae_jax import stack_config
from gsae_jax.errors import UserError
from gsae_jax.saes import products

WIDTH = 1024  # of gated SAEs; the others have the width of equal compute
L0 = (20, 50, 100)  # of the kinds that have a k
TOPK = ("topk", "batch_topk", "matryoshka")
# The architecture and options of each kind, and its values of λ. They are fixed, as an L0 that is reached at a high
# learning rate does not stay when the rate falls.
GATED = (3e-3, 8e-3, 1.8e-2)
KINDS = {
    "gated": ("gated", {}, GATED),
    "gated_tanh": ("gated", {"penalty": "tanh"}, GATED),
    "gated_aligned": ("gated", {"aligned": True}, GATED),
    "signed_gated": ("signed_gated", {}, GATED),
    "relu": ("relu", {}, (1.5e-3, 4e-3, 1e-2)),
    "relu_april": ("relu_april", {}, (2e-3, 5e-3, 1.2e-2)),
    "jumprelu": ("jumprelu", {}, (4e-4, 1e-3, 3e-3)),
    **{name: (name, {}, ()) for name in TOPK},
}
# `signed_gated` fails at 6e-3 and above, and TopK kinds are better at 1.2e-2 than at any lower rate.
SWEPT = dict.fromkeys(KINDS, (6e-3, 1.2e-2, 2.4e-2)) | dict.fromkeys(TOPK, (1.2e-2, 2.4e-2, 4.8e-2))
SWEPT["signed_gated"] = (1.5e-3, 3e-3, 6e-3)
# The best of `SWEPT` on the embedded model (docs/architectures.md).
RATES = dict.fromkeys(KINDS, 6e-3) | dict.fromkeys(("relu", "relu_april", "topk", "batch_topk"), 1.2e-2)
RATES |= {"signed_gated": 3e-3, "matryoshka": 2.4e-2}


def width(kind):
    """Of equal compute. Each feature of a sign-aware SAE counts as two, as their paper compares them."""
    architecture, options, _ = KINDS[kind]
    return WIDTH // 2 if kind == "signed_gated" else products.equal_width(architecture, WIDTH, **options)


def get_config(which=""):
    words = set(filter(None, which.split(",")))
    if unknown := words - {"tinystories", "rates"}:
        raise UserError(f"has {', '.join(sorted(unknown))}; write tinystories, rates or both after the colon")
    config = tinystories.get_config() if "tinystories" in words else quickstart.get_config()
    site = config.stacks.gated.site
    config.stacks = {}
    for kind, (architecture, options, l1_coefficients) in KINDS.items():
        if "rates" in words:
            numbers = {"learning_rates": SWEPT[kind], "seeds": (0,)}
        else:
            numbers = {"learning_rates": (RATES[kind],), "seeds": (0, 1, 2)}
        common = {"grid": True, **numbers, **options}
        if kind in TOPK:
            for k in L0[1:2] if "rates" in words else L0:
                config.stacks[f"{kind}_{k}"] = stack_config(architecture, site, width(kind), k=k, **common)
        else:
            config.stacks[kind] = stack_config(architecture, site, width(kind), l1_coefficients, **common)
    return config
