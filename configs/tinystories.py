"""Gated and baseline SAEs on the last residual stream of a small Llama model that was trained on TinyStories.

python -m gsae_jax.train --config configs/tinystories.py --workdir runs/tinystories \
    --config.lm.path=MODEL_DIRECTORY --config.data.path=TEXT_FOLDER
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    for stack, width in ((config.stacks.gated, 1024), (config.stacks.baseline, 1536)):
        stack.site, stack.width = "blocks.1.hook_resid_post", width
    config.lm.path = "raincandy-u/TinyStories-656K"  # or a directory
    config.data.corpus, config.data.separator = "text", "<|endoftext|>"
    return config
