"""Shared by the experiments on published models: the paper's recipe (D.1) and its comparison (4.1)."""

from gsae_jax import experiment_config, stack_config
from gsae_jax.errors import UserError, known_names

HOOKS = {"mlp": "hook_mlp_out", "attn": "attn.hook_z", "resid": "hook_resid_post"}


def recipe(lm, context_length, steps, large=True, decay_fraction=0.0, center=False):
    """Text, sizes and schedule; `large`: use bfloat16; `center`: subtract means, unlike the paper."""
    config = experiment_config()  # batches of 4,096, a buffer of 2**20, a linear warm-up
    config.lm.path = lm
    config.activations.center = center
    if large:
        config.lm.dtype = config.train.compute_dtype = "bfloat16"
    config.data.corpus, config.data.name, config.data.test_split = "tfds", "c4/en", "validation"
    config.data.context_length = context_length
    config.activations.rows_per_forward = 2**14 // context_length  # four batches
    config.train.steps, config.train.decay_fraction = steps, decay_fraction
    config.checkpoint.every = 10_000  # a state is many gigabytes
    config.evaluation.tokens = 2**20
    config.evaluation.rows_per_forward = config.activations.rows_per_forward
    return config


def choose(which, layers):
    """The kind and the site of a name such as "resid16"."""
    sites = {f"{kind}{layer}": (kind, f"blocks.{layer}.{hook}") for kind, hook in HOOKS.items() for layer in layers}
    if which not in sites:
        raise UserError(f"has no site {which!r}; {known_names(which, sites)}", "--config")
    return sites[which]


def compare(config, site, d_in, width, l1=(2e-5, 4e-5, 8e-5), baseline_learning_rate=7.5e-4, prefix=""):
    """Add gated SAEs and baselines 1.5x as wide. `l1`: the paper's values for baselines, with L0 about 100, 40, 15."""
    # The paper divides the baselines' squared error by d_in E|x|^2. In our inputs, y = x sqrt(d_in / E|x|^2), its loss
    # is proportional to |y - y_hat|^2 / d_in + l1 sqrt(d_in E|x|^2) |f|_1. In the paper, the same l1 gives about the
    # same L0 at nearly all sites of both models. This is possible only if x is normalised, so we assume E|x|^2 = 1. The
    # paper's l1 for gated SAEs depends on an E|x|^2 that the paper does not state. In the quickstart, a gated SAE has
    # the same L0 as a baseline at about 1.3 times the baseline's l1.
    ours = [value * d_in**0.5 for value in l1]
    # Negative biases beside a mean would leave features off on every token, so inputs with a mean get zero biases.
    start = {} if config.activations.center else {"initial_l0": 0}
    gated, baseline = [_rounded(1.3 * value) for value in ours], [_rounded(value) for value in ours]
    rates = (baseline_learning_rate,)
    config.stacks[f"{prefix}gated"] = stack_config("gated", site, width, gated, **start)
    config.stacks[f"{prefix}baseline"] = stack_config(
        "relu", site, width * 3 // 2, baseline, learning_rates=rates, **start
    )


def _rounded(value):
    return float(f"{value:.2g}")
