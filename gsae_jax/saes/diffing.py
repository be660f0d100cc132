"""How much each of two language models uses the features of a crosscoder that reads both (Lindsey et al. 2024).

A feature has a decoder row in each model. If only one of the models has what the feature stands for, the row of the
other is nearly zero.

Norms are compared in units in which each site has E||x - mean||^2 = 1, over the tokens that training measured. The
crosscoder was trained on sites that all have the same square by coordinate, so the loss weighs the models equally in
these units. In the models' own units, a model whose activations are longer would have longer rows for every feature.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gsae_jax import errors
from gsae_jax.config import model_of
from gsae_jax.errors import UserError
from gsae_jax.saes import parameters
from gsae_jax.saes.trained import SAE

# The shares below and above which a feature is of one model alone, and between which it is shared, of Minder et al.
# (2504.02922).
EXCLUSIVE, SHARED = (0.1, 0.9), (0.4, 0.6)


class Difference(NamedTuple):
    """Features of a crosscoder in two language models.

    Attributes:
        models: the names of the models; "" is the name of the run's `lm`.
        share: [F], b / (a + b), where a and b are the norms of a feature's decoder rows in the first and in the second
            model. 0: only the first model has the feature; 1: only the second. NaN if both rows are zero.
        cosine: [F], of the two rows. NaN if a row is zero, or the models' sites differ in width.
    """

    models: tuple[str, str]
    share: jax.Array
    cosine: jax.Array

    @property
    def only_first(self) -> jax.Array:
        """Which features [F] are of the first model alone: a share below 0.1."""
        return self.share < EXCLUSIVE[0]

    @property
    def shared(self) -> jax.Array:
        """Which features [F] both models have: a share from 0.4 to 0.6."""
        return (self.share >= SHARED[0]) & (self.share <= SHARED[1])

    @property
    def only_second(self) -> jax.Array:
        """Which features [F] are of the second model alone: a share above 0.9."""
        return self.share > EXCLUSIVE[1]


def compare_models(sae: SAE, models: tuple[str, str] | None = None) -> Difference:
    """Compares the decoder rows of a crosscoder in two language models.

    If a model has several sites, the square of its norm is the mean of those of its sites.

    Args:
        sae: a crosscoder that reads sites of two models, `HOOK` and `HOOK@NAME`.
        models: the names of the two models. By default, those that its sites are of: first "", and then NAME.

    Raises:
        UserError: it has no sites of two models, or of more than two and `models` does not choose.
    """
    errors.check_kind(sae, SAE, "sae", "an SAE")
    known = sorted(sae.models)
    chosen = tuple(known) if models is None else tuple(models)
    if len(known) < 2:
        raise UserError(f"has sites of one language model: {', '.join(sae.targets)}; give a crosscoder of two", "sae")
    if len(chosen) != 2 or len({*chosen}) < 2 or not {*chosen} <= {*known}:
        raise UserError(f"is {models}; write two of {', '.join(map(repr, known))}", "models")
    rows = [_rows(sae, model) for model in chosen]
    a, b = (jnp.sqrt(sum(jnp.square(W_FxD).sum(-1) for W_FxD in each) / len(each)) for each in rows)
    first, second = (jnp.concatenate(each, -1) for each in rows)
    alike = [W_FxD.shape for W_FxD in rows[0]] == [W_FxD.shape for W_FxD in rows[1]]
    products = jnp.linalg.norm(first, axis=-1) * jnp.linalg.norm(second, axis=-1)
    cosine = (first * second).sum(-1) / products if alike else jnp.full(len(first), jnp.nan)
    return Difference((chosen[0], chosen[1]), b / (a + b), cosine)


def _rows(sae: SAE, model: str) -> list[jax.Array]:
    """The decoder rows [F, D] at each site of a model, by hook name, in the units of this file."""
    scales = sae.scale if isinstance(sae.scale, tuple) else (sae.scale,) * len(sae.targets)
    rows = {}
    for number, (site, scale) in enumerate(zip(sae.targets, scales, strict=True)):
        if model_of(site) == model:
            W_FxD = sae.params[parameters.decoder(sae.functions, number)]
            # Files of other libraries do not say the scale. Their rows keep their units.
            rows[site] = W_FxD * ((1 if math.isnan(scale) else scale) / math.sqrt(W_FxD.shape[-1]))
    return [rows[site] for site in sorted(rows)]
