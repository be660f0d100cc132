"""Gemma-2-2B: the residual stream after layer 12 of 26, and the output of this layer's MLP."""

from configs import paper


def get_config():
    config = paper.recipe("google/gemma-2-2b", context_length=1024, steps=100_000, decay_fraction=0.2, center=True)
    config.activations.max_norm_multiple = 10.0  # drop the few tokens of massive norm
    paper.compare(config, "blocks.12.hook_resid_post", d_in=2304, width=2**15, prefix="resid_")
    paper.compare(config, "blocks.12.hook_mlp_out", d_in=2304, width=2**15, prefix="mlp_")
    return config
