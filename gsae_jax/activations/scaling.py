"""A site's mean and scale: how activations in the language model's units become the SAEs' inputs.

SAEs are trained on (x - mean) * scale, whose mean square over coordinates is 1: E||inputs||^2 = D. The mean and the
scale are measured once, before training, and folded into the weights of a loaded SAE (`saes.parameters.fold`). Without
`activations.center` the mean is taken for zero, as in the paper.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations import masking

# Values of `max_norm_multiple` that `warning` may suggest: multiples of the median norm.
MULTIPLES = (2, 3, 5, 10, 30, 100)
# A mean square above this multiple of the median square comes from a few tokens. For normal activations the two are
# about equal.
HEAVY_TAILED = 4.0
LARGE_MEAN = 0.5  # share of E||x||^2 from which a mean that is not subtracted is warned of


@dataclasses.dataclass(frozen=True)
class Site:
    """What was measured of a site's activations, in the language model's units.

    Attributes:
        mean_square: E||x - mean||^2.
        median_norm: the median of ||x||.
        mean: [D] in float32; None where inputs are not centred.
    """

    mean_square: float
    median_norm: float
    mean: np.ndarray | None = None


def standard(widths: dict[str, int]) -> dict[str, Site]:
    """Sites of mean 0 and square 1, for where nothing is measured."""
    return {site: Site(1.0, 1.0, np.zeros(D, np.float32)) for site, D in widths.items()}


def inputs(x: jax.Array, scale: jax.Array, mean_D: jax.Array | None) -> jax.Array:
    """SAE inputs [..., D] in float32 of activations [..., D]."""
    x = x.astype(jnp.float32)
    if mean_D is not None:
        x = x - jnp.expand_dims(mean_D, range(x.ndim - 1))
    return x * scale


def outputs(x: jax.Array, scale: jax.Array, mean_D: jax.Array | None) -> jax.Array:
    """Activations [..., D] in float32 of reconstructions [..., D] of SAE inputs: the inverse of `inputs`."""
    x = x / scale
    return x if mean_D is None else x + jnp.expand_dims(mean_D, range(x.ndim - 1))


def all_inputs(
    activations: Mapping[str, jax.Array], scales: Mapping[str, jax.Array], means: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """`inputs` of every site; inputs of a site without a mean are not centred."""
    return {site: inputs(x, scales[site], means.get(site)) for site, x in activations.items()}


def norm_limit(max_norm_multiple: float, median_norm: Any) -> Any:
    """The norm above which tokens are dropped; there is none for an infinite multiple, also of a median of 0."""
    return max_norm_multiple * median_norm if math.isfinite(max_norm_multiple) else math.inf


def statistics(x: jax.Array, valid: jax.Array, max_norm_multiple: float) -> dict[str, jax.Array]:
    """The statistics of a batch that `combine` needs.

    Args:
        x: [R, T, D], in the language model's units.
        valid: [R, T], which tokens count.
        max_norm_multiple: tokens whose norm is above this multiple of the batch's median do not count either.

    Returns:
        `count`, `mean` [D], `median_norm`; `variance` and `median_square`, the mean and the median of the square of a
        token's distance to the mean. For each of `MULTIPLES`, `above` is the number of counted tokens whose norm is
        above it, and `square_below` the sum of the squares of the others.
    """
    x = x.astype(jnp.float32)
    norm = jnp.where(valid, masking.norms(x), jnp.nan)
    median_norm = jnp.nanmedian(norm)
    kept = norm <= norm_limit(max_norm_multiple, median_norm)
    count = kept.sum()
    mean_D = jnp.where(kept[..., None], x, 0).sum((0, 1)) / count
    square = jnp.where(kept, jnp.square(x - mean_D[None, None]).sum(-1), 0)
    below = [norm <= multiple * median_norm for multiple in MULTIPLES]
    return {
        "count": count,
        "mean": mean_D,
        "median_norm": median_norm,
        "variance": square.sum() / count,
        "median_square": jnp.nanmedian(jnp.where(kept, square, jnp.nan)),
        "above": jnp.stack([(kept & ~b).sum() for b in below]),
        "square_below": jnp.stack([jnp.where(b, square, 0).sum() for b in below]),
    }


def combine(batches: list[dict[str, Any]], center: bool) -> tuple[Site, list[str]]:
    """The measured site, from the `statistics` of batches, and warnings.

    Sums are in float64. The variance about the common mean is the variance about the batches' means, plus the square of
    these means about the common one: no large mean is subtracted from a large square.
    """
    whole = {name: np.stack([np.asarray(batch[name], np.float64) for batch in batches]) for name in batches[0]}
    weight = whole["count"] / max(whole["count"].sum(), 1)
    used = weight > 0  # a batch may have no valid token
    weight, whole = weight[used], {name: value[used] for name, value in whole.items()}
    if not weight.size:
        return Site(math.nan, math.nan), []
    mean_D, median_norm = weight @ whole["mean"], float(weight @ whole["median_norm"])
    variance = float(weight @ (whole["variance"] + np.square(whole["mean"] - mean_D).sum(-1)))
    mean_square = variance + float(np.square(mean_D).sum())
    warnings = [heavy_tail(whole, float(weight @ whole["median_square"]), variance)]
    if center:
        return Site(variance, median_norm, mean_D.astype(np.float32)), [text for text in warnings if text]
    if mean_square > 0 and (share := 1 - variance / mean_square) > LARGE_MEAN:
        warnings.append(
            f"the mean is {share:.1%} of E||x||^2, so it dominates the scale, and the sparsity penalty is too strong "
            "for the rest of the activation; activations.center=True subtracts the mean"
        )
    return Site(mean_square, median_norm), [text for text in warnings if text]


def heavy_tail(whole: dict[str, np.ndarray], median_square: float, variance: float) -> str:
    """Says that a few tokens decide a site's scale, and what `max_norm_multiple` would change; "" if none do."""
    if not variance > HEAVY_TAILED * median_square > 0:
        return ""
    count, above = whole["count"].sum(), whole["above"].sum(0)
    square_below = whole["square_below"].sum(0) / np.maximum(count - above, 1)
    helps = [index for index, square in enumerate(square_below) if square <= HEAVY_TAILED * median_square]
    advice = "no value of activations.max_norm_multiple separates these tokens from the others"
    if helps:
        chosen = max(helps)
        advice = (
            f"activations.max_norm_multiple={MULTIPLES[chosen]} would drop {above[chosen] / count:.2g} of all tokens "
            f"and lower that ratio to {square_below[chosen] / median_square:.1f}"
        )
    return (
        f"the variance of its activations is {variance / median_square:,.1f} times the median squared distance to "
        f"their mean, so a few tokens of extreme norm dominate the scale and the loss; {advice}"
    )
