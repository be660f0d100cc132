"""The report of a run: `report.json`, `frontier.csv`, `report.md`, the figures, and all in one page, `report.html`."""

import base64
import csv
import fcntl
import html
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath

from gsae_jax import mesh as mesh_lib
from gsae_jax.buckets import is_bucket
from gsae_jax.config import ConfigError
from gsae_jax.evaluation import frontiers, measure, metrics, plots
from gsae_jax.lms import sites
from gsae_jax.saes import contract, parameters, trained

SCRATCH = ".gsae_jax-report-"  # how the names of folders begin in which a report is written
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
    "ce_mean": "ce_mean",
    "loss_recovered_from_mean": "loss_recovered_from_mean",
    "kl": "kl",
    "fvu": "fvu",
    "cosine": "cosine",
    "l1": "l1",
    "gate_only": "gate_only",
    "dense": "dense",
    "gamma_all": "gamma_all",
    "fvu_all": "fvu_all",
    "extreme": "extreme",
    "target_l0": "target_l0",
    "seed": "seed",
    "variant": "variant",
    "ito": "ito",
    "name": "name",
}
HOOKS = {"mlp": "hook_mlp_out", "attn": "attn.hook_z", "resid": "hook_resid_post"}  # of the paper's sites
Sections = Sequence[tuple[str, str, str]]  # heading, figure, text
WITH_INTERVAL = ("l0", "loss_recovered", "gamma")
LARGE_MEAN = 0.5  # a mean with a larger share of E||x||^2 hides shrinkage
MISSED = 0.1  # a target is missed where L0 differs from it by more than this fraction


def gates(saes: dict[str, trained.SAE]) -> dict[str, dict[str, np.ndarray]]:
    """`contract.feature_facts` of each SAE that has any, by name: `r_mag` [F] and `threshold` [F] of gated ones.

    Every process calls it, as features lie over all devices.
    """
    facts = {name: contract.feature_facts(sae.functions, sae.params, sae.config) for name, sae in saes.items()}
    return mesh_lib.fetch({name: of_sae for name, of_sae in facts.items() if of_sae})


def rows(
    model: str,
    saes: dict[str, trained.SAE],
    sums: dict[str, metrics.Sums],
    targets: Mapping[str, float] = MappingProxyType({}),
    ito: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """One record per measured SAE: what it is, and what it measured.

    `variant` is its architecture and the options that are not the default; `ito` the number of features where they
    were chosen by gradient pursuit (one of `ito`), else 0; `target_l0` of `targets`, by SAE, or None; `not_finite` the
    names of parameters with numbers that are not finite. Every process calls it, as features may lie over all devices.
    """
    records = []
    not_finite = {name: parameters.not_finite(sae.functions, sae.params) for name, sae in saes.items()}
    for (whose, sae), k in itertools.product(saes.items(), (0, *ito)):
        name = measure.name_of(whose, k)
        records.append(
            {
                "name": name,
                "run": sae.run,
                "stack": sae.stack or sae.name,
                "index": sae.index,
                "model": model,
                "architecture": sae.architecture,
                "variant": contract.variant(sae.architecture, sae.config),
                "ito": k,
                "site": sae.targets[0],
                "layer": sites.layer_of(sae.targets[0]),
                "width": sae.config.width,
                "l1_coefficient": sae.l1_coefficient,
                "learning_rate": sae.learning_rate,
                "seed": sae.seed,
                "target_l0": None if k else targets.get(whose),
                "not_finite": not_finite[whose],
                **metrics.combine(sums[name]),
            }
        )
    return records


def write(
    folder: epath.Path,
    step: int | None,
    records: list[dict[str, Any]],
    sums: dict[str, metrics.Sums],
    training: list[dict[str, Any]],
    gates_of: dict[str, dict[str, np.ndarray]],
    published: Sequence[dict[str, Any]] = (),
) -> None:
    """Write the report; an earlier one is replaced when the new one is whole.

    Args:
        step: which the SAEs were measured at.
        records: of `rows`.
        sums: of `measure.measure`.
        training: the lines of metrics, where there are any.
        gates_of: of `gates`.
        published: points to draw beside ours.
    """
    bucket = is_bucket(folder)
    if not bucket:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for scratch in Path(folder.parent).glob(f"{SCRATCH}*"):
            if (abandoned := _hold(scratch)) is not None:  # by a process that was killed
                shutil.rmtree(scratch)
                os.close(abandoned)
    scratch = Path(tempfile.mkdtemp(dir=None if bucket else folder.parent, prefix=SCRATCH))
    held = _hold(scratch)
    try:
        scratch.chmod(0o755)
        ratios = frontiers.ratios(records, sums)
        (scratch / "report.json").write_text(_json(step, notes(records), saes=records, l0_ratios=ratios))
        with open(scratch / "frontier.csv", "w", newline="") as file:
            table = csv.writer(file)
            intervals = [f"{name}_{end}" for name in WITH_INTERVAL for end in ("low", "high")]
            table.writerow([*COLUMNS, *intervals])
            for record in records:
                ends = [end for name in WITH_INTERVAL for end in record["intervals"].get(name, ("", ""))]
                table.writerow([*(record[field] for field in COLUMNS.values()), *ends])
        encoders = [record for record in records if not record["ito"]]
        densities = {name: sums[name]["fired"] / sums[name]["tokens"].sum() for name in (r["name"] for r in encoders)}
        figures = {
            "frontier.png": plots.frontier(records, published),
            "gamma.png": plots.gamma(encoders, published),
            "densities.png": plots.densities(encoders, densities),
        }
        if training:
            figures["training.png"] = plots.training(training)
        if gates_of:
            figures["gates.png"] = plots.gates(encoders, gates_of)
        for name, figure in figures.items():
            figure.savefig(scratch / name, dpi=120)
        sections = [section for section in SECTIONS if f"{section[1]}.png" in figures]
        (scratch / "report.md").write_text(_markdown(records, ratios, sections))
        (scratch / "report.html").write_text(_html(records, ratios, sections, scratch))
        if bucket:
            # report.json, which says that a run is finished, comes last.
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == "report.json"):
                epath.Path(path).copy(folder / path.name, overwrite=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A descriptor that holds a folder until it is closed or its process ends; None where another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def read_published(path: str) -> list[dict[str, Any]]:
    """Points to draw beside ours, from a CSV file with model, architecture, site, layer, l0, loss_recovered, gamma.

    A site is a hook name, as in `frontier.csv`, or the paper's mlp, attn or resid.

    Raises:
        ConfigError: no such file, or without these columns.
    """
    needed = {"model", "architecture", "site", "layer", "l0", "loss_recovered", "gamma"}
    try:
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError("--published", f"{path} cannot be read ({error}); write a CSV file in UTF-8") from error
    if missing := needed - set(found[0] if found else ()):
        raise ConfigError("--published", f"{path} has no column {', '.join(sorted(missing))}; write one with a header")
    try:
        numbers = ("l0", "loss_recovered", "gamma")
        return [
            row
            | {name: float(row[name]) for name in numbers}
            | {"site": f"blocks.{row['layer']}.{HOOKS[row['site']]}" if row["site"] in HOOKS else row["site"]}
            for row in found
        ]
    except (TypeError, ValueError) as error:
        raise ConfigError("--published", f"{path} has a cell that is no number: {error}") from error


def notes(records: list[dict[str, Any]]) -> list[str]:
    """A sentence for each thing that is wrong with the records of `rows` or of a report; readers need them first."""
    encoders = [record for record in records if not record["ito"]]
    sentences = []
    for site in sorted({record["site"] for record in encoders}):
        here = [record for record in encoders if record["site"] == site]
        r = here[0]
        # An SAE that diverged has no loss recovered either, and says nothing about the site.
        measured = [record for record in here if math.isfinite(record["ce_sae"])]
        if measured and not any(math.isfinite(record["loss_recovered"]) for record in measured):
            sentences.append(
                f"At {site} loss recovered has no meaning and is left blank: activations of zero do not certainly "
                f"raise the language model's loss (CE zero {r['ce_zero']:.3f}, CE clean {r['ce_clean']:.3f} nats). "
                "Check that the language model was trained on text of this kind, and that rows are longer than 2 "
                "tokens."
            )
        if r.get("mean_share", 0) > LARGE_MEAN:
            gammas = [f"{record['name']} {_number(record['gamma_centered'], '.3f')}" for record in here]
            shown = ", ".join(gammas if len(gammas) <= 4 else [*gammas[:3], f"{len(gammas) - 3} more"])
            sentences.append(
                f"At {site} the mean is {r['mean_share']:.1%} of E‖x‖², which hides shrinkage from γ. Without the "
                f"mean, γ is: {shown}. report.json has it as gamma_centered."
            )
        if r.get("extreme"):
            sentences.append(
                f"At {site} {r['extreme']:,} of {r['tokens']:,} tokens have a norm above {metrics.EXTREME} times the "
                f"median. FVU and γ leave them out; with them FVU is {_number(r['fvu_all'], '.3f')} for {r['name']}. "
                "report.json has both, as fvu_all and gamma_all."
            )
    blank = ("l0", "l1", "ce_sae", "kl", "cosine")
    diverged = [r for r in encoders if not all(math.isfinite(r[name]) for name in blank if name in r)]
    sound = [r for r in encoders if r not in diverged]
    for members, text in (
        (diverged, "reconstructions that are not finite: training diverged. Metrics without a value are left blank"),
        (
            [r for r in sound if r["fvu"] > 1],
            "an FVU above 1, which is worse than the mean activation as the reconstruction. Training diverged, or this "
            "is another site or language model than that of training",
        ),
        ([r for r in sound if r["l0"] == 0], "an L0 of 0: no feature fires. Lower the l1 coefficient or learning rate"),
    ):
        if members:
            sentences.append(f"{_names(members)} {'has' if len(members) == 1 else 'have'} {text}.")
    sentences += [
        f"{r['name']} has numbers that are not finite in {', '.join(r['not_finite'])}: training diverged. It cannot be "
        "exported."
        for r in sound
        if r.get("not_finite")
    ]
    sentences += [
        f"{r['name']} has an L0 of {r['l0']:.4g}, but its target was {r['target_l0']:g}."
        for r in sound
        if _has_target(r) and abs(r["l0"] - r["target_l0"]) > MISSED * r["target_l0"]
    ]
    return sentences


def _names(records: list[dict[str, Any]]) -> str:
    names = [record["name"] for record in records]
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def _has_target(record: dict[str, Any]) -> bool:
    # Reports have null where there is no target, and reports of earlier versions lack the field.
    return record.get("target_l0") is not None and math.isfinite(record["target_l0"])


def table(records: list[dict[str, Any]]) -> str:
    """The paper's table (Tables 1-8) in Markdown."""
    header, rows = _table(records)
    return _in_markdown(header, [[f"`{site}`", *cells] for site, *cells in rows])


def _table(records: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header, and cells of each row."""
    header = [
        "Site",
        "SAE",
        "Width",
        "λ",
        "Learning rate",
        "L0",
        *(["Target L0"] if any(_has_target(record) for record in records) else []),
        "Loss recovered",
        "γ",
        "CE clean",
        "CE SAE",
        "CE zero",
    ]
    header += ["CE mean", "KL", "FVU", "Alive"]
    rows = []

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["site"], r["ito"] > 0, r["architecture"], r["width"], math.isnan(r["l0"]), -r["l0"]

    for r in sorted(records, key=place):
        target = f"{r['target_l0']:g}" if _has_target(r) else ""
        trained_by = [f"{r['l1_coefficient']:.3g}", f"{r['learning_rate']:g}"]
        if r["ito"] or math.isnan(r["learning_rate"]):
            trained_by = ["", ""]
        rows.append(
            [
                r["site"],
                r["name"],
                str(r["width"]),
                *trained_by,
                _with_interval(r, "l0", ".1f"),
                *([target] if "Target L0" in header else []),
                *(_with_interval(r, name, ".3f") for name in ("loss_recovered", "gamma")),
                *(_number(r[name], ".3f") for name in ("ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl", "fvu")),
                f"{r['alive']:.1%}",
            ]
        )
    return header, rows


def _with_interval(record: dict[str, Any], name: str, form: str) -> str:
    """`50.0 ±0.4`: half the width of the interval."""
    low_high = record["intervals"].get(name) if math.isfinite(record[name]) else None
    return _number(record[name], form) + (f" ±{(low_high[1] - low_high[0]) / 2:{form}}" if low_high else "")


def _number(value: float, form: str) -> str:
    """The number, or a dash where it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def _ratio_table(ratios: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["Site", "Loss recovered", "SAEs", "Baselines", "L0", "Baselines' L0", "Ratio", "95% interval", "Seeds"]
    return header, [
        [
            r["site"],
            f"{r['level']:g}",
            _told(r["stack"], r["learning_rate"], r["variant"], f"{r['width']:,} features"),
            _told(r["baseline"], r["baseline_learning_rate"]),
            f"{r['l0']:.1f}",
            f"{r['baseline_l0']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['low']:.2f} to {r['high']:.2f}" if math.isfinite(r["low"]) else "unknown",
            " and ".join(map(str, r["seeds"])),
        ]
        for r in ratios
    ]


def _told(stack: str, learning_rate: float, *facts: str) -> str:
    """`gated (gated, 64 features, rate 0.001)`; the rate only where it is known."""
    facts += () if math.isnan(learning_rate) else (f"rate {learning_rate:g}",)
    return f"{stack} ({', '.join(facts)})" if facts else stack


def _in_markdown(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[html.escape(cell, quote=False).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *escaped])


def _json(step: int | None, notes: list[str], **report: list[dict[str, Any]]) -> str:
    """Strict JSON: a metric that is not a number is null."""
    whole: dict[str, Any] = {"step": step, "notes": notes} | {
        part: [
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in r.items()
            }
            for r in records
        ]
        for part, records in report.items()
    }
    return json.dumps(whole, indent=2, allow_nan=False) + "\n"


ABOUT = (
    "L0: mean active features per token. Loss recovered: 1 - (CE SAE - CE clean) / (CE zero - CE clean), with "
    "cross-entropies (CE) in nats per token; zero and mean: activations replaced by zeros, by their mean. γ: "
    "E‖x̂‖² / E[x̂·x]; 1 is unbiased, below 1 is shrinkage. KL: of the clean predictions to those with reconstructions. "
    "FVU: fraction of variance unexplained. Alive: features that fired at least once. ±: half of a 95% bootstrap "
    "interval over rows of text. –: the metric has no meaning here. FVU and γ leave out tokens whose norm is above "
    f"{metrics.EXTREME} times the site's median."
)
ITO = "Names ending in ito: the dictionary with so many features chosen by gradient pursuit, without its encoder."
RATIOS = (
    "The L0 that each needs to recover as much loss (log L0 interpolated along the frontier, each side at its best "
    "learning rate, geometric means over seeds), with a 95% bootstrap interval over rows of text. A level "
    "is left out where a side does not reach it, or a learning rate ends short of it and is better where it ends."
)
SECTIONS = (
    (
        "Loss recovered against sparsity",
        "frontier",
        "Up and to the left is better: more of the language model's loss kept with fewer active features.",
    ),
    (
        "Reconstruction bias",
        "gamma",
        "The L1 penalty of a baseline SAE shrinks its reconstructions (γ < 1); a gated SAE penalises only its gate.",
    ),
    (
        "How often features fire",
        "densities",
        "Each curve counts the features of one SAE by the fraction of tokens they fire on. Dead features stand at the "
        "left edge.",
    ),
    (
        "Gates and magnitudes",
        "gates",
        "A gated SAE's magnitude encoder is exp(r_mag) times its gate's, and a feature is its pre-activation where "
        "that exceeds θ (the JumpReLU form, Appendix E). At θ = 0 the gate does nothing that a ReLU would not.",
    ),
    ("Training", "training", "Loss, L0 and γ of every SAE over training."),
)
FILES = ("report.json", "report.md", "report.html", "frontier.csv", *(f"{figure}.png" for _, figure, _ in SECTIONS))
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 72rem; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
img { max-width: 100%; height: auto; }
"""


def _title(records: list[dict[str, Any]]) -> tuple[str, str]:
    tokens = int(np.max([record["tokens"] for record in records]))
    title = f"Sparse autoencoders of {records[0]['model']}"
    return title, f"Measured on {tokens:,} held-out tokens (special tokens left out)."


def about(records: list[dict[str, Any]]) -> str:
    """What the columns of `table` mean."""
    return f"{ABOUT} {ITO}" if any(record["ito"] for record in records) else ABOUT


def in_markdown(records: list[dict[str, Any]]) -> str:
    """The table, what is wrong with its SAEs, and what its columns mean."""
    listed = "\n".join(f"- {html.escape(note, quote=False)}" for note in notes(records))
    return "\n\n".join(part for part in (table(records), listed, about(records)) if part)


def _markdown(records: list[dict[str, Any]], ratios: list[dict[str, Any]], sections: Sections) -> str:
    title, measured = _title(records)
    lines = [f"# {html.escape(title, quote=False)}", "", measured, "", in_markdown(records), ""]
    if ratios:
        lines += ["## L0 at equal loss recovered", "", _in_markdown(*_ratio_table(ratios)), "", RATIOS, ""]
    for heading, figure, text in sections:
        lines += [f"## {heading}", f"![{figure}]({figure}.png)", "", text, ""]
    return "\n".join(lines)


def _html(records: list[dict[str, Any]], ratios: list[dict[str, Any]], sections: Sections, folder: Path) -> str:
    """One page that needs no other file."""
    title, measured = _title(records)

    def in_html(header: list[str], rows: list[list[str]]) -> str:
        lines = [("th", header), *(("td", cells) for cells in rows)]
        cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
        return f'<div class="wide"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'

    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{measured}</p>", in_html(*_table(records))]
    if listed := "".join(f"<li>{html.escape(note)}</li>" for note in notes(records)):
        parts.append(f"<ul>{listed}</ul>")
    parts.append(f"<p>{html.escape(about(records))}</p>")
    if ratios:
        parts += ["<h2>L0 at equal loss recovered</h2>", in_html(*_ratio_table(ratios)), f"<p>{RATIOS}</p>"]
    for heading, figure, text in sections:
        image = base64.b64encode((folder / f"{figure}.png").read_bytes()).decode()
        parts += [f"<h2>{heading}</h2>", f"<p>{html.escape(text)}</p>"]
        parts.append(f'<img alt="{heading}" src="data:image/png;base64,{image}">')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = "\n".join(parts)
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'
