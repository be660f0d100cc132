"""The paper's Gemma-7B experiment, one site per run: `--config configs/gemma_7b.py:attn13` and so on.

131,072 features need several accelerators: `--config.mesh.latent=8` splits them over eight.
"""

from configs import paper

LAYERS = (6, 13, 20, 27)


def get_config(which="resid20"):
    config = paper.recipe("google/gemma-7b", context_length=1024, steps=300_000)
    kind, site = paper.choose(which, LAYERS)
    paper.compare(config, site, d_in=4096 if kind == "attn" else 3072, width=2**17)  # 16 heads of 256
    return config
