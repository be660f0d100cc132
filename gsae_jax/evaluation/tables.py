"""The tables of a report: their columns, and the text of each cell."""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gsae_jax.evaluation import frontiers

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
WITH_INTERVAL = ("l0", "loss_recovered", "gamma")
FRACTIONS = ("held_out", "too_short_for_a_row")  # facts of `provenance` that are shown in per cent, as the log does


class Table(NamedTuple):
    """Text that is not escaped for any format."""

    columns: list[str]
    rows: list[list[str]]


class Site(NamedTuple):
    """What was measured at one site; text that is not escaped for any format."""

    name: str
    losses: str
    table: Table


def measured(records: list[dict[str, Any]]) -> list[Site]:
    """The paper's tables (Tables 1-8), one for each site: a row for each SAE, by architecture and width.

    The SAEs of a stack have the order of its settings, so that a grid reads as it was written. Cross-entropies that
    all SAEs of a site share stand above its table.
    """
    stacks = list(dict.fromkeys(frontiers.identity(r)[:2] for r in records))

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        run, stack, index = frontiers.identity(r)
        return (
            r["site"],
            r["ito"] > 0,
            r["architecture"],
            r["width"],
            stacks.index((run, stack)),
            int(index) if f"{index}".isdecimal() else 0,
        )

    by_site = itertools.groupby(sorted(records, key=place), key=lambda r: r["site"])
    return [_site(name, list(members)) for name, members in by_site]


def _site(name: str, records: list[dict[str, Any]]) -> Site:
    kinds = ("clean", "zero", "mean")
    losses = {kind: {number(r[f"ce_{kind}"], ".3f") for r in records} for kind in kinds}
    shared = [kind for kind in kinds if len(losses[kind]) == 1 and losses[kind] != {number(math.nan, "")}]
    own = [kind for kind in kinds if len(losses[kind]) > 1]  # SAEs of other norm limits replace other tokens
    with_target = any(has_target(r) for r in records)
    columns = ["SAE", "L0", *(["Target L0"] if with_target else []), "Loss recovered", "γ", "CE SAE"]
    columns += [*(f"CE {kind}" for kind in own), "KL", "FVU", "Alive", "Dense", "Gate only"]
    columns += ["Width", "λ", "Learning rate"]
    rows = []
    for r in records:
        target = f"{r['target_l0']:g}" if has_target(r) else ""
        trained_by = [number(r["l1_coefficient"], ".3g"), f"{r['learning_rate']:g}"]
        if r["ito"] or math.isnan(r["learning_rate"]):
            trained_by = ["", ""]
        rows.append(
            [
                r["name"].removesuffix(f"@{name}"),
                _with_interval(r, "l0", ".1f"),
                *([target] if with_target else []),
                *(_with_interval(r, field, ".3f") for field in ("loss_recovered", "gamma")),
                *(number(r[field], ".3f") for field in ("ce_sae", *(f"ce_{kind}" for kind in own), "kl", "fvu")),
                f"{r['alive']:.1%}",
                number(r.get("dense", math.nan), ".1%"),  # reports of early versions lack these two
                number(r.get("gate_only", math.nan), ".1f"),
                str(r["width"]),
                *trained_by,
            ]
        )
    above = ", ".join(f"CE {kind} {next(iter(losses[kind]))}" for kind in shared)
    return Site(name, f"{above} nats per token" if above else "", Table(columns, rows))


def facts(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each fact of `provenance`, a column for each of the things that the facts are of."""
    names = list(dict.fromkeys(name for of_one in columns.values() for name in of_one))
    rows = [
        [
            name[:1].upper() + name[1:].replace("_", " "),
            *(fact(of_one.get(name), name in FRACTIONS) for of_one in columns.values()),
        ]
        for name in names
    ]
    return Table(["", *columns], rows)


def fact(value: Any, is_fraction: bool = False) -> str:
    """The text of a value of `provenance`, in per cent if it is a fraction."""
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "–"
    if is_fraction:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def ratios(records: list[dict[str, Any]]) -> Table:
    """A row for each record of `frontiers.ratios`."""
    columns = ["Site", "Loss recovered", "SAEs", "Compared with", "L0", "Their L0", "Ratio", "95% interval", "Seeds"]
    rows = [
        [
            r["site"],
            f"{r['level']:g}",
            _described(r["stack"], r["learning_rate"], r["variant"], f"{r['width']:,} features"),
            _described(r["baseline"], r["baseline_learning_rate"]),
            *(why or f"{r[field]:.1f}" for field, why in zip(("l0", "baseline_l0"), r["unknown"], strict=True)),
            number(r["ratio"], ".2f"),
            f"{r['low']:.2f} to {r['high']:.2f}"
            if math.isfinite(r["low"])
            else "–"
            if any(r["unknown"])
            else "unknown",
            " and ".join(map(str, r["seeds"])) or "–",
        ]
        for r in records
    ]
    return Table(columns, rows)


def models(records: Sequence[dict[str, Any]]) -> Table:
    """A row for each record of `report.differences`."""
    columns = [
        "SAE",
        "First model",
        "Second model",
        "Only first",
        "Shared",
        "Only second",
        "Between",
        "Alive",
        "Cosine",
    ]
    counts = ("only_first", "shared", "only_second", "between", "alive")
    rows = [
        [r["name"], r["first"], r["second"], *(f"{r[name]:,}" for name in counts), number(r["cosine"], ".3f")]
        for r in records
    ]
    return Table(columns, rows)


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    """`frontier.csv`, with the two ends of intervals after `COLUMNS`."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        intervals = [f"{name}_{end}" for name in WITH_INTERVAL for end in ("low", "high")]
        table.writerow([*COLUMNS, *intervals])
        for record in records:
            ends = [end for name in WITH_INTERVAL for end in record["intervals"].get(name, ("", ""))]
            table.writerow([*(record[field] for field in COLUMNS.values()), *ends])


def number(value: float, form: str) -> str:
    """The number, or a dash where it is not finite."""
    return f"{value:{form}}" if math.isfinite(value) else "–"


def has_target(record: dict[str, Any]) -> bool:
    """Whether an SAE was trained for an L0."""
    # Reports have null where there is no target, and reports of earlier versions lack the field.
    return record.get("target_l0") is not None and math.isfinite(record["target_l0"])


def _with_interval(record: dict[str, Any], name: str, form: str) -> str:
    """`50.0 ±0.4`: half the width of the interval."""
    low_high = record["intervals"].get(name) if math.isfinite(record[name]) else None
    return number(record[name], form) + (f" ±{(low_high[1] - low_high[0]) / 2:{form}}" if low_high else "")


def _described(stack: str, learning_rate: float, *facts: str) -> str:
    """`gated (gated, 64 features, rate 0.001)`; the rate only where it is known."""
    facts += () if math.isnan(learning_rate) else (f"rate {learning_rate:g}",)
    return f"{stack} ({', '.join(facts)})" if facts else stack
