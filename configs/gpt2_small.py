"""GPT-2 small: the residual stream before block 8, which many published SAEs read, and block 7's MLP output."""

from configs import paper


def get_config():
    config = paper.recipe(
        "openai-community/gpt2", context_length=512, steps=100_000, large=False, decay_fraction=0.2, center=True
    )
    config.activations.max_norm_multiple = 10.0  # drop the few tokens of massive norm
    paper.compare(config, "blocks.7.hook_resid_post", d_in=768, width=2**14, prefix="resid_")
    paper.compare(config, "blocks.7.hook_mlp_out", d_in=768, width=2**14, prefix="mlp_")
    return config
