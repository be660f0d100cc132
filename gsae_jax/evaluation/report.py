"""The report of a run: `report.json`, `frontier.csv`, `report.md` and the figures."""

import csv
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gsae_jax.buckets import is_bucket
from gsae_jax.evaluation import metrics, plots
from gsae_jax.lms import sites
from gsae_jax.saes import trained

# frontier.csv: the columns of the paper's tables first, then ours.
COLUMNS = {
    "model": "model",
    "architecture": "architecture",
    "site": "site",
    "layer": "layer",
    "sparsity": "l1_coefficient",
    "learning_rate": "learning_rate",
    "l0": "l0",
    "loss_recovered": "loss_recovered",
    "width": "width",
    "alive": "alive",
    "gamma": "gamma",
    "ce_clean": "ce_clean",
    "ce_sae": "ce_sae",
    "ce_zero": "ce_zero",
    "fvu": "fvu",
    "seed": "seed",
    "name": "name",
}


def rows(model: str, saes: dict[str, trained.SAE], sums: dict[str, metrics.Sums]) -> list[dict[str, Any]]:
    """One record per SAE: what it is, and what it measured."""
    return [
        {
            "name": name,
            "model": model,
            "architecture": sae.architecture,
            "site": sae.site,
            "layer": sites.layer_of(sae.site),
            "width": sae.config.width,
            "l1_coefficient": sae.l1_coefficient,
            "learning_rate": sae.learning_rate,
            "seed": sae.seed,
            **metrics.combine(sums[name]),
        }
        for name, sae in saes.items()
    ]


def write(
    folder: epath.Path, records: list[dict[str, Any]], sums: dict[str, metrics.Sums], training: list[dict[str, Any]]
) -> None:
    """Write the report; an earlier one is replaced when the new one is whole."""
    bucket = is_bucket(folder)
    if not bucket:
        folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=None if bucket else folder.parent, prefix=".report-"))
    try:
        scratch.chmod(0o755)
        (scratch / "report.json").write_text(_json({"saes": records}))
        with open(scratch / "frontier.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows([record[field] for field in COLUMNS.values()] for record in records)
        densities = {
            record["name"]: sums[record["name"]]["fired"] / sums[record["name"]]["tokens"] for record in records
        }
        figures = {
            "frontier.png": plots.frontier(records),
            "gamma.png": plots.gamma(records),
            "densities.png": plots.densities(records, densities),
            "training.png": plots.training(training),
        }
        for name, figure in figures.items():
            figure.savefig(scratch / name, dpi=120)
        (scratch / "report.md").write_text(_markdown(records))
        if bucket:
            # report.json, which says that a run is finished, comes last.
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == "report.json"):
                epath.Path(path).copy(folder / path.name, overwrite=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(records: list[dict[str, Any]]) -> str:
    """The paper's table (Tables 1-8) in Markdown."""
    header = [
        "Site",
        "SAE",
        "Width",
        "λ",
        "Learning rate",
        "L0",
        "Loss recovered",
        "CE clean",
        "CE SAE",
        "CE zero",
        "γ",
        "FVU",
        "Alive",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for r in sorted(records, key=lambda r: (r["site"], r["architecture"], r["width"], -r["l0"])):
        cells = [
            f"`{r['site']}`",
            r["name"],
            str(r["width"]),
            f"{r['l1_coefficient']:g}",
            f"{r['learning_rate']:g}",
            f"{r['l0']:.1f}",
        ]
        cells += [
            f"{r['loss_recovered']:.3f}",
            *(f"{r[name]:.3f}" for name in ("ce_clean", "ce_sae", "ce_zero", "gamma", "fvu")),
        ]
        lines.append("| " + " | ".join([*cells, f"{r['alive']:.1%}"]) + " |")
    return "\n".join(lines)


def _json(report: dict[str, list[dict[str, Any]]]) -> str:
    """Strict JSON: a metric that is not a number is null."""
    saes = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in sae.items()}
        for sae in report["saes"]
    ]
    return json.dumps({"saes": saes}, indent=2, allow_nan=False) + "\n"


def _markdown(records: list[dict[str, Any]]) -> str:
    tokens = int(np.max([record["tokens"] for record in records]))
    return f"""# Sparse autoencoders of {records[0]["model"]}

Measured on {tokens:,} held-out tokens (special tokens left out).

{table(records)}

L0: mean active features per token. Loss recovered: 1 - (CE SAE - CE clean) / (CE zero - CE clean), with
cross-entropies (CE) in nats per token. γ: E‖x̂‖² / E[x̂·x]; 1 is unbiased, below 1 is shrinkage. FVU: fraction of
variance unexplained. Alive: features that fired at least once.

## Loss recovered against sparsity
![frontier](frontier.png)

Up and to the left is better: more of the language model's loss kept with fewer active features.

## Reconstruction bias
![gamma](gamma.png)

The L1 penalty of a baseline SAE shrinks its reconstructions (γ < 1); a gated SAE penalises only its gate.

## How often features fire
![densities](densities.png)

Each curve counts the features of one SAE by the fraction of tokens they fire on. Dead features stand at the left edge.

## Training
![training](training.png)
"""
