"""SAEs of every architecture on activations of a known dictionary (docs/synthetic.md).

    python docs/synthetic.py --directory runs/synthetic --write docs/synthetic.md

makes the store and trains them. This trains them once more from the same store:

    python -m gsae_jax.train --config configs/synthetic.py --workdir runs/synthetic_again
"""

from configs import architectures
from gsae_jax import stack_config, synthesis
from gsae_jax.evaluation import synthetic

SETTINGS = synthetic.Settings()
WIDTH = 2 * SETTINGS.atoms
STEPS = 3000


def stacks(rates):
    """A stack of each kind, whose features are on as often as atoms.

    All have the same width, and not that of equal compute: what counts is which atoms are found, and a wider dictionary
    finds more of them. Each feature of a sign-aware SAE counts as two.
    """
    made = {}
    for kind, (architecture, options, l1_coefficients) in architectures.FAMILIES["saes"].items():
        width = WIDTH // 2 if kind == "signed_gated" else WIDTH
        sparsity = (
            {"l1_coefficients": (l1_coefficients[1],), "target_l0": (SETTINGS.active,)}
            if l1_coefficients
            else {"k": round(SETTINGS.active)}
        )
        made[kind] = stack_config(
            architecture, synthesis.SITE, width, learning_rates=(rates[kind],), **sparsity, **options
        )
    return made
