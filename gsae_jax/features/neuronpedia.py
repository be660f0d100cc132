"""Neuronpedia: `batch-N.json` files of dashboards, as SAEDashboard writes them and its exporter reads them.

sae_dashboard/neuronpedia/neuronpedia_dashboard.py has the fields. Correlations with neurons and histograms of logits
are not collected; their lists are empty.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gsae_jax.features.reading import Context, Feature, Features

PER_FILE = 256  # features
BEFORE, AFTER = 96, 31  # tokens of a context around its own
NOT_COLLECTED = (
    *(f"neuron_alignment_{what}" for what in ("indices", "values", "l1")),
    *(f"correlated_{of}_{what}" for of in ("neurons", "features") for what in ("indices", "pearson", "l1")),
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)


def write(features: Features, folder: Path) -> None:
    """Write the files of one SAE to a folder that exists."""
    about = features.about["collection"]
    layer = about["targets"][-1].split(".")[1]
    for start in range(0, len(features), PER_FILE):
        each = [_dashboard(features, features[n]) for n in range(start, min(start + PER_FILE, len(features)))]
        batch = {"model_id": about["model"], "layer": int(layer), "sae_set": about["stack"] or about["sae"]}
        batch |= {"sae_id_suffix": about["sae"], "features": each}
        text = json.dumps(batch, ensure_ascii=False, allow_nan=False)
        (folder / f"batch-{start // PER_FILE}.json").write_text(text, "utf-8")


def _dashboard(features: Features, feature: Feature) -> dict[str, Any]:
    """One feature."""
    about = features.about["collection"]
    promoted = [each for each in feature.effects["direct"] if each.effect > 0]
    suppressed = [each for each in feature.effects["direct"] if each.effect < 0]
    middles = _middles(features.bins)
    (filled,) = np.nonzero(feature.histogram)
    shown = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0)
    dashboard: dict[str, Any] = {
        "feature_index": feature.number,
        "neg_str": [each.text for each in suppressed],
        "neg_values": [each.effect for each in suppressed],
        "pos_str": [each.text for each in promoted],
        "pos_values": [each.effect for each in promoted],
        "frac_nonzero": feature.numbers["density"],
        "freq_hist_data_bar_values": middles[shown].tolist(),
        "freq_hist_data_bar_heights": feature.histogram[shown].tolist(),
        "n_prompts_total": about["rows"],
        "n_tokens_in_prompt": about["context_length"],
        "dataset": about["text"],
        "activations": [_activation(feature, context) for context in feature.contexts],
    }
    return dashboard | {name: [] for name in NOT_COLLECTED}


def _middles(bins: np.ndarray) -> np.ndarray:
    """A value inside of each bin."""
    upper = np.append(bins[1:], bins[-1] * 1.25)
    return (bins + upper) / 2


def _activation(feature: Feature, context: Context) -> dict[str, Any]:
    """One context. A strongest one has the bin_min -1. Others are from bins of a tenth of the feature's activations."""
    start = max(0, context.position - BEFORE)
    some = slice(start, context.position + AFTER + 1)
    if context.quantile is None:
        low, high, contains = -1.0, feature.numbers["strongest"], -1.0
    else:
        same = [abs(other.activation) for other in feature.contexts if other.quantile == context.quantile]
        low, high, contains = min(same), max(same), 0.1
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": contains,
        "tokens": list(context.tokens[some]),
        "values": [float(value) for value in context.activations[some]],
        "qualifying_token_index": context.position - start,
    }
