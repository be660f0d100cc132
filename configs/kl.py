"""The quickstart's SAEs, and the same with the KL divergence in the last part of training: docs/guides/kl.md.

python -m gsae_jax.train --config configs/kl.py --workdir runs/kl
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    for name in ("gated", "baseline"):
        config.stacks[f"{name}_kl"] = config.stacks[name].copy_and_resolve_references()
        config.stacks[f"{name}_kl"].kl_fraction = 0.25
    config.train.decay_fraction = 0.25  # for both, so that the rate is still high when that part begins
    return config
