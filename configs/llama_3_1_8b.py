"""Llama-3.1-8B: the residual stream in the middle of the model."""

from configs import paper


def get_config():
    config = paper.recipe(
        "meta-llama/Llama-3.1-8B", context_length=1024, steps=100_000, decay_fraction=0.2, center=True
    )
    config.activations.max_norm_multiple = 10.0  # drop the few tokens of massive norm
    paper.compare(config, "blocks.15.hook_resid_post", d_in=4096, width=2**15)
    return config
