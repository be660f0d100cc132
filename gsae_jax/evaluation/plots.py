"""The report's figures. A stack has one colour and one marker in all of them."""

from collections import defaultdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLOURS = ("#d9730d", "#0b6e99", "#448361", "#9065b0", "#c14c8a", "#787774")
MARKERS = "os^DvP*X"


def frontier(records: list[dict[str, Any]]) -> Figure:
    """Loss recovered against L0, per site."""
    return _against_l0(records, "loss_recovered", "loss recovered")[0]


def gamma(records: list[dict[str, Any]]) -> Figure:
    """Relative reconstruction bias against L0, per site."""
    figure, panels = _against_l0(records, "gamma", "relative reconstruction bias γ")
    for axis in panels.values():
        axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
    return figure


def densities(records: list[dict[str, Any]], fractions: dict[str, np.ndarray]) -> Figure:
    """Histograms of how often features fire, one per SAE; dead features are counted in the left-most bin."""
    figure, panels = _panels(records)
    lowest = min(np.log10(fraction[fraction > 0].min(initial=1e-3)) for fraction in fractions.values()) - 0.5
    bins = np.linspace(lowest, 0, 41)
    for index, members in enumerate(_stacks(records).values()):
        for record in members:
            counts, _ = np.histogram(np.log10(np.maximum(fractions[record["name"]], 10**lowest)), bins)
            panels[record["site"]].stairs(
                counts,
                bins,
                label=f"{record['name']}, L0 {record['l0']:.0f}",
                color=COLOURS[index % len(COLOURS)],
                alpha=_shade(int(record["name"].rpartition("_")[2]), len(members)),
                linewidth=1.4,
            )
    for axis in panels.values():
        axis.set(xlabel="log10 of the fraction of tokens a feature fires on", ylabel="features")
        axis.legend(fontsize=7)
    return figure


def training(lines: list[dict[str, Any]]) -> Figure:
    """Loss, L0 and gamma of every SAE over training."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    steps = [line["step"] for line in lines]
    for axis, field in zip(figure.subplots(1, 3), ("loss", "l0", "gamma"), strict=True):
        stacks = sorted(name.rpartition("/")[0] for name in (lines[0] if lines else {}) if name.endswith(f"/{field}"))
        for index, stack in enumerate(stacks):
            values = np.array([line[f"{stack}/{field}"] for line in lines])
            for member, column in enumerate(values.T):
                alpha = _shade(member, values.shape[1])
                axis.plot(steps, column, color=COLOURS[index % len(COLOURS)], alpha=alpha, lw=1.2)
            axis.plot([], [], color=COLOURS[index % len(COLOURS)], label=stack)
        axis.set(xlabel="step", ylabel=field, yscale="linear" if field == "gamma" else "log")
        _plain_numbers(axis.yaxis)
        axis.grid(alpha=0.25)
        if stacks:
            axis.legend(fontsize=8)
    return figure


def _panels(records: list[dict[str, Any]]) -> tuple[Figure, dict[str, Axes]]:
    """One panel per site, side by side."""
    found = sorted({record["site"] for record in records})
    figure = Figure(figsize=(1.4 + 5 * len(found), 4), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, site in zip(axes, found, strict=True):
        axis.set_title(site, fontsize=10)
        axis.grid(alpha=0.25)
    return figure, dict(zip(found, axes, strict=True))


def _stacks(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by stack (their names without the index), by ascending L0."""
    stacks = defaultdict(list)
    for record in sorted(records, key=lambda record: record["l0"]):
        stacks[record["name"].rpartition("_")[0]].append(record)
    return dict(sorted(stacks.items()))


def _shade(index: int, count: int) -> float:
    """The opacity of one SAE of a stack."""
    return 0.35 + 0.65 * (index + 1) / count


def _plain_numbers(axis: Axis) -> None:
    """20 rather than 2 x 10^1 on a logarithmic axis."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if axis.get_scale() == "log":
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else ""))


def _against_l0(records: list[dict[str, Any]], field: str, label: str) -> tuple[Figure, dict[str, Axes]]:
    figure, panels = _panels(records)
    for index, (name, members) in enumerate(_stacks(records).items()):
        first = members[0]
        panels[first["site"]].plot(
            [record["l0"] for record in members],
            [record[field] for record in members],
            label=f"{name} ({first['architecture']}, {first['width']:,} features)",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
        )
    for axis in panels.values():
        axis.set(xscale="log", xlabel="L0 (active features per token)", ylabel=label)
        _plain_numbers(axis.xaxis)
        axis.legend(fontsize=8)
    return figure, panels
