"""Kinds of SAEs compared over seeds: the numbers and the tables of `python -m gsae_jax.compare`.

A kind is the SAEs of one recipe, which differ in sparsity and seed. Kinds are compared by seed, as SAEs of one seed
read the same activations in the same order.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gsae_jax.evaluation import frontiers, probing, tables
from gsae_jax.evaluation.tables import Table

BEYOND = 1.05  # an SAE whose L0 differs by no more than this factor counts as of an L0


class Metric(NamedTuple):
    """What is compared.

    Attributes:
        title: of a column.
        form: of a number.
    """

    title: str
    form: str


METRICS = {
    "l0": Metric("L0", ".1f"),
    "loss_recovered": Metric("Loss recovered", ".3f"),
    "kl": Metric("KL", ".4f"),
    "fvu": Metric("FVU", ".3f"),
    "score": Metric("Score", ".3f"),
    "probe_1": Metric("Probe of 1", ".3f"),
    "probe_5": Metric("Probe of 5", ".3f"),
}
# Of a known dictionary (`evaluation.synthetic.Recovery`).
RECOVERY = {
    "l0": Metric("L0", ".2f"),
    "recovered": Metric("Recovered", ".3f"),
    "f1": Metric("F1", ".3f"),
    "cosine": Metric("Cosine", ".3f"),
    "gamma": Metric("γ", ".3f"),
    "absorption": Metric("Absorption", ".3f"),
    "dead": Metric("Dead", ".3f"),
    "fvu": Metric("FVU", ".3f"),
}
# By kind and seed: the SAEs, by ascending L0.
Kinds = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def kinds(records: Sequence[Mapping[str, Any]], site: str) -> Kinds:
    """The kinds at a site, in the order of the records. SAEs that have diverged are left out."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        if record["site"] == site and math.isfinite(record["l0"]):
            found.setdefault(record["kind"], {}).setdefault(record["replicate"], []).append(record)
    return {
        kind: {seed: sorted(members, key=lambda record: record["l0"]) for seed, members in of_kind.items()}
        for kind, of_kind in found.items()
    }


def known(of_site: Kinds) -> list[str]:
    """The names of the metrics that some SAE has."""
    every = [record for seeds in of_site.values() for members in seeds.values() for record in members]
    return [name for name in METRICS if any(math.isfinite(record[name]) for record in every)]


def measured(of_site: Kinds) -> list[dict[str, Any]]:
    """For each kind and sparsity: its metrics over seeds. SAEs of one sparsity have the same λ, k or target."""
    rows = []
    for kind, seeds in of_site.items():
        by_sparsity: dict[str, list[Mapping[str, Any]]] = {}
        for members in seeds.values():
            for record in members:
                by_sparsity.setdefault(record["sparsity"], []).append(record)
        for sparsity, members in by_sparsity.items():
            values = {name: frontiers.over_seeds([record[name] for record in members]) for name in METRICS}
            rows.append(
                {"kind": kind, "sparsity": sparsity, "width": members[0]["width"], "seeds": len(members), **values}
            )
    order = list(of_site)
    return sorted(rows, key=lambda row: (order.index(row["kind"]), row["l0"].middle))


def l0_ratios(of_site: Kinds, reference: str) -> list[dict[str, Any]]:
    """For each other kind and loss recovered: its L0 divided by the reference's, over the seeds that both have."""
    rows = []
    for kind in (kind for kind in of_site if kind != reference):
        for level in frontiers.LEVELS:
            pairs = _by_seed(of_site, kind, reference, partial(_l0, level=level))
            if pairs:
                ratio = frontiers.ratio_over_seeds([ours / theirs for ours, theirs in pairs])
                rows.append({"kind": kind, "level": level, "seeds": len(pairs), "ratio": ratio})
    return rows


def at_equal_l0(of_site: Kinds, reference: str, l0s: Sequence[float]) -> list[dict[str, Any]]:
    """For each L0 and kind: its metrics there over seeds, and their differences from the reference's by seed.

    Metrics are interpolated along log L0. Kinds with a seed whose frontier does not reach an L0 are left out there.
    """
    rows = []
    for l0 in l0s:
        for kind, seeds in of_site.items():
            values, differences = {}, {}
            for name in (name for name in METRICS if name != "l0"):
                at = partial(frontiers.at_l0, field=name, l0=l0, beyond=BEYOND)
                values[name] = frontiers.over_seeds([at(records) for records in seeds.values()])
                pairs = _by_seed(of_site, kind, reference, at)
                differences[name] = frontiers.over_seeds([ours - theirs for ours, theirs in pairs] or [math.nan])
            if any(math.isfinite(value.middle) for value in values.values()):
                shared = len(seeds.keys() & of_site[reference].keys())
                row = {"l0": l0, "kind": kind, "seeds": len(seeds), "shared": shared}
                rows.append(row | {"values": values, "differences": differences})
    return rows


def _by_seed(
    of_site: Kinds, kind: str, reference: str, number: Callable[[Sequence[Mapping[str, Any]]], float]
) -> list[tuple[float, float]]:
    """A number of the frontiers of (a kind, the reference), for each seed that both have."""
    ours, theirs = of_site[kind], of_site[reference]
    return [(number(ours[seed]), number(theirs[seed])) for seed in ours if seed in theirs]


def _l0(records: Sequence[Mapping[str, Any]], level: float) -> float:
    known = [record for record in records if math.isfinite(record["loss_recovered"])]
    return frontiers.l0_at(known, level) if known else math.nan


def _shown(value: frontiers.OverSeeds, form: str, sign: str = "") -> str:
    """`0.512 ±0.058`, with half of the interval."""
    half = f" ±{value.high - value.middle:{form}}" if math.isfinite(value.high) else ""
    return tables.number(value.middle, sign + form) + half


def _ratio(value: frontiers.OverSeeds) -> str:
    """`0.62 (0.57 to 0.68)`, with the interval."""
    interval = f" ({value.low:.2f} to {value.high:.2f})" if math.isfinite(value.high) else ""
    return tables.number(value.middle, ".2f") + interval


def measured_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    """A row for each of `measured`, with the metrics of these names."""
    columns = ["Kind", "Width", "Seeds", *(METRICS[name].title for name in names)]
    lines = [
        [
            *(str(row[name]) for name in ("kind", "width", "seeds")),
            *(_shown(row[name], METRICS[name].form) for name in names),
        ]
        for row in rows
    ]
    return Table(columns, lines)


def ratios_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each kind of `l0_ratios`."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    seeds = {row["kind"]: str(row["seeds"]) for row in rows}
    of = {(row["kind"], row["level"]): _ratio(row["ratio"]) for row in rows}
    lines = [[kind, seeds[kind], *(of[kind, level] for level in frontiers.LEVELS)] for kind in kinds]
    return Table(["Kind", "Seeds", *(f"at {level:g}" for level in frontiers.LEVELS)], lines)


def equal_l0_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], reference: str) -> Table:
    """A row for each of `at_equal_l0`: a metric, and in parentheses its difference from the reference.

    Metrics are over all seeds of a kind, and differences over those that the reference has too.
    """
    names = [name for name in names if name != "l0"]

    def cell(row: Mapping[str, Any], name: str) -> str:
        value, difference, form = row["values"][name], row["differences"][name], METRICS[name].form
        if not math.isfinite(difference.middle) or row["kind"] == reference:
            return _shown(value, form)
        return f"{tables.number(value.middle, form)} ({_shown(difference, form, '+')})"

    def seeds(row: Mapping[str, Any]) -> str:
        return f"{row['seeds']}" + f" ({row['shared']} shared)" * (row["shared"] < row["seeds"])

    columns = ["L0", "Kind", "Seeds", *(METRICS[name].title for name in names)]
    lines = [[f"{row['l0']:g}", row["kind"], seeds(row), *(cell(row, name) for name in names)] for row in rows]
    return Table(columns, lines)


def labels_table(of_site: Kinds, l0: float, dense: Mapping[str, float]) -> Table:
    """For each kind and kind of labels: the mean scores of probes of 1 / 5 features at an L0, over seeds.

    `dense`: by the kind of labels, the mean score of dense probes, which the last row has.
    """

    def cell(seeds: Mapping[str, Sequence[Mapping[str, Any]]], label: str) -> str:
        fields = [f"probe_{k}_{label}" for k in probing.KS]
        values = [[frontiers.at_l0(records, field, l0, BEYOND) for records in seeds.values()] for field in fields]
        return " / ".join(tables.number(frontiers.over_seeds(each).middle, ".3f") for each in values)

    lines = [[kind, *(cell(seeds, label) for label in dense)] for kind, seeds in of_site.items()]
    whole = ["all activations", *(f"{score:.3f}" for score in dense.values())]
    return Table(["Kind", *dense], [*lines, whole])


def recovery_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """For each kind: what its SAEs recover of a known dictionary, over seeds. `records`: of `synthesis.study`."""
    lines = []
    for kind in dict.fromkeys(record["kind"] for record in records):
        members = [record for record in records if record["kind"] == kind]
        columns = [[math.nan if r[name] is None else r[name] for r in members] for name in RECOVERY]
        values = [frontiers.over_seeds(column) for column in columns]
        shown = [_shown(value, metric.form) for value, metric in zip(values, RECOVERY.values(), strict=True)]
        lines.append([kind, str(len(members)), *shown])
    return Table(["Kind", "Seeds", *(metric.title for metric in RECOVERY.values())], lines)
