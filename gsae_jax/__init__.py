"""Gated Sparse Autoencoders on language-model activations, in JAX.

lm = gsae_jax.load_lm()                       # the embedded model, or a Hugging Face checkpoint directory
saes = gsae_jax.load("runs/quickstart")       # the SAEs of a run, by name
experiment = gsae_jax.experiment("quickstart", train={"steps": 700})
saes = gsae_jax.fit(experiment, "runs/mine")  # trains them there
"""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # only its tokenizers are used; PyTorch is not missed

from gsae_jax import processes as processes  # its handler shows the messages of all modules
from gsae_jax.experiments import experiment, experiment_config, stack_config
from gsae_jax.fitting import fit
from gsae_jax.lms.loading import LM, load_lm
from gsae_jax.sae_loading import load
from gsae_jax.saes.trained import SAE

__all__ = ["LM", "SAE", "experiment", "experiment_config", "fit", "load", "load_lm", "stack_config"]
