"""The paper's GELU-1L experiment: the MLP's neurons. The hub has this model as a pickle only; convert it once with
`python -m gsae_jax.convert_lm NeelNanda/GELU_1L512W_C4_Code models/gelu_1l`.
"""

from configs import paper


def get_config():
    config = paper.recipe("models/gelu_1l", context_length=128, steps=300_000, large=False)
    config.train.compute_dtype = "bfloat16"  # the SAEs are large, the model is not
    # 2**17 is the width of "most" of the paper's SAEs; --config.stacks.gated.width=16384 is enough for a first look.
    paper.compare(config, "blocks.0.mlp.hook_post", d_in=2048, width=2**17, baseline_learning_rate=3e-4)
    return config
