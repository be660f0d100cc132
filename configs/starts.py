"""The quickstart, with SAEs that start with 64 active features on a token beside ones that start with half of all.

python -m gsae_jax.train --config configs/starts.py --workdir runs/starts
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    for name in ("gated", "baseline"):
        config.stacks[f"{name}_from_half"] = config.stacks[name].copy_and_resolve_references()
        config.stacks[f"{name}_from_half"].options.initial_l0 = 0
    return config
