"""Every architecture at one site, at equal compute, with L0 of about 20, 50 and 100. One run trains all of them.

    python -m gsae_jax.train --config configs/architectures.py:rates --workdir runs/architectures_rates
    python -m gsae_jax.train --config configs/architectures.py --workdir runs/architectures

The first command trains at four learning rates with one seed. The second takes the best rate of each architecture
(`RATES`) and three seeds. With `:tinystories` or `:tinystories,rates` the model is that of configs/tinystories.py.
"""

from configs import quickstart, tinystories
from gsae_jax import stack_config
from gsae_jax.errors import UserError
from gsae_jax.saes import products

WIDTH = 1024  # of gated SAEs; the others have the width of equal compute
L0 = (20, 50, 100)
# First guesses of λ for these. `target_l0` moves them.
L1 = {
    "gated": (1.4e-2, 7e-3, 4e-3),
    "signed_gated": (1.4e-2, 7e-3, 4e-3),
    "relu": (1e-2, 5e-3, 3e-3),
    "relu_april": (1e-2, 5e-3, 3e-3),
    "jumprelu": (3e-3, 1.5e-3, 7e-4),
}
TOPK = ("topk", "batch_topk", "matryoshka")
SWEPT = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
RATES = dict.fromkeys((*L1, *TOPK), 6e-3)


def width(architecture):
    """Of equal compute. Each feature of a sign-aware SAE counts as two, as their paper compares them."""
    return WIDTH // 2 if architecture == "signed_gated" else products.equal_width(architecture, WIDTH)


def get_config(which=""):
    words = set(filter(None, which.split(",")))
    if unknown := words - {"tinystories", "rates"}:
        raise UserError(f"has {', '.join(sorted(unknown))}; write tinystories, rates or both after the colon")
    config = tinystories.get_config() if "tinystories" in words else quickstart.get_config()
    site = config.stacks.gated.site
    config.stacks = {}
    for architecture, rate in RATES.items():
        numbers = {"learning_rates": (rate,), "seeds": (0, 1, 2)}
        if "rates" in words:
            numbers = {"learning_rates": SWEPT, "seeds": (0,)}
        if architecture in TOPK:
            for k in L0:
                stack = stack_config(architecture, site, width(architecture), grid=True, k=k, **numbers)
                config.stacks[f"{architecture}_{k}"] = stack
        else:
            l1_coefficients = L1[architecture]
            config.stacks[architecture] = stack_config(
                architecture, site, width(architecture), l1_coefficients, target_l0=L0, grid=True, **numbers
            )
    return config
