"""The sums over tokens, and the paper's metrics that are computed from them (sections 2.3, 4.2, D.2)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Sums over the tokens of each row [R]; `fired` [F] is over all rows. Means of means are never taken. `document` [R] is
# the number of the document in which each row begins, and is absent where that is not known.
Sums = dict[str, Any]
NOT_SUMS = ("fired", "document")  # of rows

# Metrics that come with an interval, as functions of totals over rows.
RATIOS = {
    "l0": lambda t: t["l0"] / t["tokens"],
    "loss_recovered": lambda t: 1 - (t["ce_sae"] - t["ce_clean"]) / (t["ce_zero"] - t["ce_clean"]),
    "loss_recovered_from_mean": lambda t: 1 - (t["ce_sae"] - t["ce_clean"]) / (t["ce_mean"] - t["ce_clean"]),
    "gamma": lambda t: t["x_hat_sq"] / t["x_hat_dot_x"],
    "gamma_all": lambda t: t["x_hat_sq_all"] / t["x_hat_dot_x_all"],
    "gamma_centered": lambda t: t["c_hat_sq"] / t["c_hat_dot_c"],
    "mean_share": lambda t: 1 - t["variance"] / t["x_sq"],
    "kl": lambda t: t["kl"] / t["predictions"],
    "fvu": lambda t: t["squared_error"] / t["variance"],
    "fvu_all": lambda t: t["squared_error_all"] / t["variance_all"],
    "cosine": lambda t: t["cosine"] / t["tokens"],
    "l1": lambda t: t["l1"] / t["tokens"],
    "gate_only": lambda t: t["gate_only"] / t["tokens"],
}
# The cross-entropy that each ratio compares with. Where it is not above the clean one, the ratio has no meaning.
AGAINST = {"loss_recovered": "ce_zero", "loss_recovered_from_mean": "ce_mean"}
OF_MODEL = (*AGAINST, "kl")  # ratios that need the language model
EXTREME = 10  # multiple of the site's median norm above which a few tokens would make up nearly all of E||x||^2
DENSE = 0.1  # a feature that fires on more than this fraction of tokens
DRAWS, LEVEL = 1000, 0.95  # of the bootstrap
PARTS = 10  # of the draws, multiplied one after another, as the counts become eight times as large there
FEWEST_DOCUMENTS = 10  # of which the bootstrap draws documents; with fewer it draws rows


def feature_statistics(f_BxF: jax.Array, gate_BxF: jax.Array) -> dict[str, jax.Array]:
    """What `RATIOS` need of the features of each token [B]: `l0`, `l1` and `gate_only`.

    Args:
        f_BxF: feature activations.
        gate_BxF: whether each feature's gate is open (for a baseline: whether it fires).
    """
    broken_B = jnp.isnan(f_BxF).any(-1)  # a NaN feature is neither active nor inactive, so none are counted
    fires = fired(f_BxF)

    def number(of_BxF: jax.Array) -> jax.Array:
        return jnp.where(broken_B, jnp.nan, of_BxF.sum(-1).astype(jnp.float32))

    return {"l0": number(fires), "l1": jnp.abs(f_BxF).sum(-1), "gate_only": number(gate_BxF & ~fires)}


def fired(f: jax.Array) -> jax.Array:
    """Which feature activations are of active features."""
    return (f != 0) & ~jnp.isnan(f)


def reconstruction_sums(
    x_RxTxD: jax.Array,
    x_hat_RxTxD: jax.Array,
    features: dict[str, jax.Array],
    mean_D: jax.Array,
    typical_mean_D: jax.Array,
    valid_RxT: jax.Array,
    typical_RxT: jax.Array,
) -> Sums:
    """Over valid tokens: per row [R] what `RATIOS` need of the reconstruction.

    Args:
        features: `feature_statistics` [R, T].
        mean_D: the site's mean over valid tokens, about which `variance_all` is taken.
        typical_mean_D: the mean over typical tokens, about which the other variance is taken.
        typical_RxT: which tokens are valid and of no extreme norm. Squares are summed over these, and in sums whose
            names end in `_all` over all valid tokens.
    """
    x, x_hat = x_RxTxD.astype(jnp.float32), x_hat_RxTxD.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(x_hat, axis=-1)
    dot = (x_hat * x).sum(-1)
    squares = {
        "squared_error": jnp.square(x - x_hat).sum(-1),
        "x_hat_sq": jnp.square(x_hat).sum(-1),
        "x_hat_dot_x": dot,
    }
    per_token = (
        features
        | {
            "tokens": jnp.ones(valid_RxT.shape, jnp.float32),
            "cosine": jnp.where(norms == 0, 0, dot / jnp.where(norms == 0, 1, norms)),
            "variance_all": jnp.square(x - mean_D[None, None]).sum(-1),
        }
        | {f"{name}_all": value for name, value in squares.items()}
    )
    c, c_hat = x - typical_mean_D[None, None], x_hat - typical_mean_D[None, None]
    per_typical = squares | {
        "typical": jnp.ones(valid_RxT.shape, jnp.float32),
        "variance": jnp.square(c).sum(-1),
        "x_sq": jnp.square(x).sum(-1),
        "c_hat_sq": jnp.square(c_hat).sum(-1),
        "c_hat_dot_c": (c_hat * c).sum(-1),
    }
    return {
        name: jnp.where(where_RxT, value, 0).sum(1)
        for where_RxT, values in ((valid_RxT, per_token), (typical_RxT, per_typical))
        for name, value in values.items()
    }


def add(total: Sums, batch: Sums) -> Sums:
    """Accumulate a batch on the host, in float64: rows one after the other, `fired` summed."""
    for name, value in batch.items():
        value = np.asarray(value, np.float64)
        before = total.get(name, np.zeros(0) if name != "fired" else 0.0)
        total[name] = before + value if name == "fired" else np.concatenate([before, value])
    return total


def combine(sums: Sums) -> dict[str, Any]:
    """The metrics of one SAE. A metric is NaN if it has no meaning for the reconstructions or the text.

    Cross-entropies and what is computed from them are NaN where there was no language model.

    Returns:
        l0: mean active features per token.
        loss_recovered: 1 - (ce_sae - ce_clean) / (ce_zero - ce_clean); loss_recovered_from_mean: with ce_mean. NaN
            if the 95% interval of the denominator (its value, if there is one row) is not above 0.
        ce_clean, ce_sae, ce_zero, ce_mean: nats per token with the activations kept, reconstructed, zeroed, or
            replaced by their mean.
        gamma: relative reconstruction bias, E||x_hat||^2 / E[x_hat . x]; below 1 is shrinkage.
        gamma_centered: the same for x and x_hat minus the site's mean; a large mean hides shrinkage from gamma.
        mean_share: ||mean||^2 / E||x||^2.
        kl: divergence from the clean predictions to those with reconstructions, nats per token.
        fvu: fraction of the activations' variance that is not explained.
        gamma_all, fvu_all: over all tokens; gamma and fvu leave out tokens of extreme norm.
        cosine: mean cosine of activation and reconstruction.
        l1: mean sum of the features' absolute values, in the language model's units.
        gate_only: mean features per token whose gate is open and whose magnitude is 0.
        alive, dense: fractions of features that fired on at least one token, on more than a tenth of them.
        tokens, extreme: numbers of measured activations, and of those with an extreme norm (`EXTREME`).
        intervals: {name: [low, high]} of the metrics from l0 to gate_only, except the cross-entropies: 95% percentile
            bootstrap over documents, or over rows (`drawn`). There are none for fewer than two rows.
    """
    names = [name for name in sums if name not in NOT_SUMS]
    rows = np.stack([sums[name] for name in names])
    with np.errstate(over="ignore", invalid="ignore"):  # of an SAE that has diverged
        totals = dict(zip(names, rows.sum(1), strict=True))
    n, fired = totals["tokens"], sums["fired"]
    ratios: dict[str, Any] = _ratios(totals)
    predictions = totals.get("predictions", math.nan)  # absent where there is no language model
    ratios |= {f"ce_{kind}": totals.get(f"ce_{kind}", 0) / predictions for kind in ("clean", "sae", "zero", "mean")}
    ratios |= {"alive": (fired > 0).mean(), "dense": (fired > DENSE * n).mean()}
    ratios = {name: float(value) for name, value in ratios.items()}
    ratios |= {"tokens": int(n), "extreme": int(n - totals["typical"])}
    intervals = _intervals(sums)
    for name, other in AGAINST.items():
        if other not in sums or not _is_certainly_above_0(sums[other] - sums["ce_clean"], sums.get("document")):
            ratios[name] = math.nan
            intervals.pop(name, None)
    return ratios | {"intervals": intervals}


@functools.lru_cache(maxsize=1)
def draws(units: int) -> np.ndarray:
    """The count of each unit in each resampled set [draws, units]. The sets are paired: all SAEs have the same."""
    rng, chances = np.random.default_rng(0), np.full(units, 1 / units)
    counts = np.empty((DRAWS, units), np.uint8)  # no unit is drawn 256 times
    for draw in range(DRAWS):
        counts[draw] = rng.multinomial(units, chances)
    return counts


def drawn(sums_R: np.ndarray, document_R: np.ndarray | None = None) -> np.ndarray:
    """The totals of sums over rows [R, ...] in each resampled set [draws, ...].

    Rows of one document are alike. So whole documents are drawn, where it is known of each row in which it begins, and
    there are at least `FEWEST_DOCUMENTS`. Otherwise rows are drawn.
    """
    if document_R is not None:
        numbers, of_row_R = np.unique(document_R, return_inverse=True)
        if len(numbers) >= FEWEST_DOCUMENTS:
            of_documents = np.zeros((len(numbers), *sums_R.shape[1:]))
            np.add.at(of_documents, of_row_R, sums_R)
            sums_R = of_documents
    counts = draws(len(sums_R))
    return np.concatenate([part @ sums_R for part in np.array_split(counts, PARTS)])


def resampled(sums: Sums) -> dict[str, np.ndarray]:
    """The metrics [draws] on resampled documents or rows (`drawn`)."""
    with np.errstate(over="ignore", invalid="ignore"):  # of an SAE that has diverged
        of_rows = {name: rows for name, rows in sums.items() if name not in NOT_SUMS}
        totals = drawn(np.stack([*of_rows.values()], axis=1, dtype=np.float64), sums.get("document"))
        return _ratios(dict(zip(of_rows, totals.T, strict=True)))


def interval(values: np.ndarray) -> list[float]:
    """[low, high] of a metric on resampled sets; NaN if any is."""
    tail = 50 * (1 - LEVEL)
    return [float(value) for value in np.percentile(values, [tail, 100 - tail])]


def _is_certainly_above_0(rows: np.ndarray, document: np.ndarray | None) -> bool:
    """Whether the interval of a total over rows [R] lies above 0; with one row, whether the total does."""
    if len(rows) < 2 or not np.isfinite(rows).all():
        return bool(rows.sum() > 0)
    return bool(rows.sum() > 0) and interval(drawn(rows, document))[0] > 0


def _intervals(sums: Sums) -> dict[str, list[float]]:
    if len(sums["tokens"]) < 2:
        return {}
    return {name: interval(values) for name, values in resampled(sums).items() if np.isfinite(values).all()}


def _ratios(totals: dict[str, Any]) -> dict[str, Any]:
    with np.errstate(divide="ignore", invalid="ignore"):
        known = {name: ratio for name, ratio in RATIOS.items() if "predictions" in totals or name not in OF_MODEL}
        ratios = {name: np.asarray(known[name](totals) if name in known else math.nan) for name in RATIOS}
    return {name: np.where(np.isfinite(value), value, math.nan) for name, value in ratios.items()}
