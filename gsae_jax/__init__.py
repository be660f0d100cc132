"""Gated Sparse Autoencoders on language-model activations, in JAX.

lm = gsae_jax.load_lm()                       # the embedded model, or a Hugging Face checkpoint directory
saes = gsae_jax.load("runs/quickstart")       # the SAEs of a run, by name
experiment = gsae_jax.experiment("quickstart", train={"steps": 700})
saes = gsae_jax.fit(experiment, "runs/mine")  # trains them there
tokens = gsae_jax.held_out("runs/mine")       # its held-out text
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # only its tokenizers are used; PyTorch is not missed

from gsae_jax import features, taps
from gsae_jax import processes as processes  # its handler shows the messages of all modules
from gsae_jax.evaluation.in_memory import measure
from gsae_jax.experiments import experiment, experiment_config, stack_config
from gsae_jax.fitting import fit
from gsae_jax.lms.loading import LM, load_lm
from gsae_jax.sae_loading import held_out, load
from gsae_jax.saes.diffing import compare_models
from gsae_jax.saes.trained import SAE

__version__ = "0.1.0"  # setup.py reads it here
__all__ = [
    "LM",
    "SAE",
    "compare_models",
    "experiment",
    "experiment_config",
    "features",
    "fit",
    "held_out",
    "load",
    "load_lm",
    "measure",
    "stack_config",
    "taps",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names; the modules are there, but not among them."""
    return [*__all__, "__version__"]
