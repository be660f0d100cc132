"""The paper's Pythia-2.8B experiment, one site per run: `--config configs/pythia_2_8b.py:mlp4` and so on.

131,072 features need several accelerators: `--config.mesh.latent=8` splits them over eight.
"""

from configs import paper

LAYERS = (4, 12, 16, 20, 28)


def get_config(which="resid16"):
    config = paper.recipe("EleutherAI/pythia-2.8b", context_length=2048, steps=400_000)
    kind, site = paper.choose(which, LAYERS)
    if kind == "resid":  # narrower and less sparse, as in the paper, where many features died
        paper.compare(config, site, 2560, width=2**15, l1=(1e-5, 1.5e-5, 2e-5), baseline_learning_rate=1e-3)
    else:
        paper.compare(config, site, 2560, width=2**17, baseline_learning_rate=1e-3)
    return config
