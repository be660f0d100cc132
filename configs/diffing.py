"""What a finetune of the embedded model changed: crosscoders of one site of both models, and an SAE on the finetune.

python -m gsae_jax.train --config configs/diffing.py --workdir runs/diffing --config.lms.finetuned.path=MODEL_DIRECTORY
"""

from configs import quickstart
from gsae_jax import stack_config


def get_config():
    config = quickstart.get_config()
    config.lms.finetuned = {"path": "finetuned"}  # a directory or a hub name, as config.lm.path is
    site = "blocks.0.hook_resid_post"
    both = (site, f"{site}@finetuned")
    config.stacks = {
        f"batch_topk_{k}": stack_config("batch_topk_crosscoder", both, 2048, k=k, learning_rates=(3e-3,))
        for k in (30, 60)
    }
    config.stacks.gated = stack_config("gated_crosscoder", both, 2048, (1e-2, 2e-2), learning_rates=(3e-3,))
    config.stacks.finetuned = stack_config("gated", both[1], 1024, (1e-2, 2e-2), learning_rates=(3e-3,))
    return config
