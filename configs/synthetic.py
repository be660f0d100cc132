"""SAEs of every architecture on activations of a known dictionary (docs/synthetic.md). This makes and measures them:

    python docs/synthetic.py --directory runs/synthetic --write docs/synthetic.md

It leaves a store of activations, from which this trains them once more:

    python -m gsae_jax.train --config configs/synthetic.py --workdir runs/synthetic_again
"""

from configs import architectures
from gsae_jax import stack_config, synthesis
from gsae_jax.evaluation import synthetic

SETTINGS = synthetic.Settings()
STEPS = 2000
KINDS = architectures.FAMILIES["saes"]
# Of 3e-3, 1e-2 and 3e-2, those with the best F1 on one dictionary.
RATES = dict.fromkeys(KINDS, 1e-2) | dict.fromkeys(("gated", "gated_aligned", "relu", "relu_april"), 3e-2)
RATES |= {"jumprelu": 3e-3}


def stacks(settings=SETTINGS, seeds=(0,), rates=None):
    """A stack of each kind, with as many active features as there are active atoms.

    All have the same width, and not that of equal compute: a wider dictionary finds more atoms, whatever its kind. Each
    feature of a sign-aware SAE counts as two.

    Args:
        settings: of the dictionary.
        seeds: of the SAEs.
        rates: learning rates; by default the best one of each kind.
    """
    made = {}
    for kind, (architecture, options, l1_coefficients) in KINDS.items():
        width = settings.atoms if kind == "signed_gated" else 2 * settings.atoms
        sparsity = {"k": round(settings.active)}
        if l1_coefficients:  # of which one is where the search for the target begins
            sparsity = {"l1_coefficients": l1_coefficients[1:2], "target_l0": (settings.active,)}
        numbers = {"learning_rates": rates or (RATES[kind],), "seeds": seeds, "grid": True}
        made[kind] = stack_config(architecture, synthesis.SITE, width, **sparsity, **numbers, **options)
    return made


def get_config():
    return synthesis.experiment(stacks(), f"runs/synthetic/0/{synthesis.STORE}", STEPS)
