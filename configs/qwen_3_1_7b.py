"""Qwen3-1.7B: the residual stream in the middle of the model."""

from configs import paper


def get_config():
    config = paper.recipe("Qwen/Qwen3-1.7B", context_length=1024, steps=100_000, decay_fraction=0.2, center=True)
    config.data.prepend_bos = False  # its tokenizer has no BOS
    config.activations.max_norm_multiple = 10.0  # drop tokens of massive norm: the first token of every row
    paper.compare(config, "blocks.13.hook_resid_post", d_in=2048, width=2**15)
    return config
