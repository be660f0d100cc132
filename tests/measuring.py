"""What tests that measure SAEs have in common."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import measure, report
from gsae_jax.saes import trained

SITE = "blocks.0.hook_mlp_out"

# What sums have that a test does not look at.
UNUSED = ["predictions", "kl", "squared_error", "variance", "x_hat_sq", "x_hat_dot_x", "cosine", "l1", "gate_only"]
UNUSED += ["squared_error_all", "variance_all", "x_hat_sq_all", "x_hat_dot_x_all", "typical"]
UNUSED += ["x_sq", "c_hat_sq", "c_hat_dot_c"]
UNUSED += ["tokens", "l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean"]


def as_sae(name, module, params, config, site=SITE):
    stack, _, index = name.partition("_")
    made = {"stack": stack, "index": int(index or 0)}
    return trained.SAE(name, module.__name__.rpartition(".")[2], config, site, params, 0.1, 1e-3, 0, 1.0, **made)


def identity(D):
    """A baseline SAE that is the identity: a feature for each direction of each axis."""
    both = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])
    return {"W_enc": both.T, "b_enc": jnp.zeros(2 * D), "W_dec": both, "b_dec": jnp.zeros(D)}


def zero(D):
    return identity(D) | {"b_enc": jnp.full(2 * D, -1e6)}


@functools.cache
def sampled(lm, count, rows, length):
    """Text that the language model has drawn, so that it predicts it better with its activations than without."""
    random = np.random.default_rng(1)
    tokens = np.full((count * rows, length), lm.tokenizer.bos_token_id)
    logits = jax.jit(lambda tokens: lm.module.apply({"params": lm.params}, tokens))
    for position in range(1, length):
        drawn = np.asarray(logits(tokens))[:, position - 1] + random.gumbel(size=(len(tokens), lm.config.d_vocab))
        tokens[:, position] = 1 + drawn[:, 1:].argmax(-1)
    tokens = tokens.reshape(count, rows, length)
    tokens[:, ::3, 7] = lm.tokenizer.eos_token_id
    return tokens


def batches(lm, count=3, rows=16, length=20):
    return sampled(lm, count, rows, length).copy()


def on_mesh(data, latent):
    return mesh_lib.make_mesh(config_lib.Mesh(data, latent))


def reported(folder, lm, saes, tokens, **targets):
    """The report, as JSON and in Markdown, of SAEs of one site."""
    sums = measure.measure(lm, list(saes.values()), tokens, lm.special_tokens)
    records = report.rows("small", saes, sums, targets)
    report.write(folder / "report", None, records, sums, [], report.gates(saes))
    return json.loads((folder / "report" / "report.json").read_text()), (folder / "report" / "report.md").read_text()
