"""The paper's GELU-1L experiment: the MLP's neurons. The hub has this model only as a pickle. Convert it once with
`python -m gsae_jax.convert_lm NeelNanda/GELU_1L512W_C4_Code models/gelu_1l`.
"""

from configs import paper


def get_config():
    config = paper.recipe("models/gelu_1l", context_length=128, steps=300_000, large=False)
    config.train.compute_dtype = "bfloat16"  # the SAEs are large, but the model is small
    # "Most" of the paper's SAEs have width 2**17. For a first try, --config.stacks.gated.width=16384 is enough.
    paper.compare(config, "blocks.0.mlp.hook_post", d_in=2048, width=2**17, baseline_learning_rate=3e-4)
    return config
