"""The paper's comparison on the embedded model: gated SAEs, baselines 1.5x as wide, and ablations, three seeds.

Every architecture is trained at several learning rates; the report compares each at its best.

    python -m gsae_jax.train --config configs/reproduction.py:blocks.0.attn.hook_z --workdir runs/attn

Rescale and shift (section 5.2) starts from the baselines of such a run: `--config
configs/reproduction.py:blocks.0.attn.hook_z,runs/attn --workdir runs/attn_rescaled`.
"""

import itertools

from configs import base, quickstart

L1 = {"gated": (4e-3, 1e-2, 2e-2), "relu": (3e-3, 6e-3, 1.2e-2)}
RATES = {"gated": (1e-3, 3e-3), "relu": (1e-3, 3e-3, 6e-3)}
SEEDS = (0, 1, 2)
ABLATIONS = {
    "unfrozen": {"freeze_aux_decoder": False},
    "no_r_mag": {"use_r_mag": False},
    "untied": {"tie_encoder": False},
}


def stack(architecture, site, width, rates=None, **options):
    """SAEs of all combinations of seeds, learning rates and l1 coefficients."""
    rates = rates or RATES[architecture]
    seeds, rates, l1 = zip(*itertools.product(SEEDS, rates, L1[architecture]), strict=True)
    return base.stack(architecture, site, width, l1, rates, seeds, **options)


def get_config(which="blocks.0.hook_mlp_out"):
    site, _, run = which.partition(",")
    config = quickstart.get_config()
    config.stacks = {}
    if run:
        rescaled = stack("gated", site, 1536, RATES["relu"], only_magnitude=True, start_from=f"{run}:baseline")
        rescaled.l1_coefficients = stack("relu", site, 1536).l1_coefficients  # of what it starts from
        config.stacks.rescaled = rescaled
        return config
    config.stacks.gated = stack("gated", site, 1024)
    config.stacks.baseline = stack("relu", site, 1536)
    for name, options in ABLATIONS.items():
        config.stacks[name] = stack("gated", site, 1024, rates=(3e-3,), **options)
    return config
