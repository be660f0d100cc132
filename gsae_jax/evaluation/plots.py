"""The report's figures. A stack has one colour and one marker in all of them."""

import io
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from gsae_jax.evaluation import frontiers

COLOURS = ("#d9730d", "#0b6e99", "#448361", "#9065b0", "#c14c8a", "#787774")
MARKERS = "os^DvP*X"
PANEL = 4.2  # inches: at the width of a phone, text of 10 points is 11 pixels high and more
LEGEND = 12  # with more SAEs than this in a panel, the legend names stacks


class Panel(NamedTuple):
    """One panel of a figure as a picture of its own, and the title above it."""

    title: str
    svg: bytes


def panels(figure: Figure) -> list[Panel]:
    """The panels of a figure one by one, so that a page can put them side by side or below each other."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # hidden panels would change the layout
    pictures = []
    for axis in figure.axes:
        for other in figure.axes:
            other.set_visible(other is axis)
        # With a fixed salt and no date, the same figure has the same bytes.
        with io.BytesIO() as file, matplotlib.rc_context({"svg.hashsalt": "gsae_jax"}):
            figure.savefig(file, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
            pictures.append(Panel(axis.get_title(), file.getvalue()))
    return pictures


def frontier(records: list[dict[str, Any]], published: Sequence[dict[str, Any]] = ()) -> Figure:
    """Loss recovered against L0, per site; variance explained where there was no language model."""
    field, label = "loss_recovered", "loss recovered"
    if not any(np.isfinite(record.get("ce_clean", 0.0)) for record in records):
        records = [record | {"explained": 1 - record["fvu"]} for record in records]
        field, label, published = "explained", "variance explained (1 - FVU)", ()
    figure, panels = _against_l0(records, field, label, published)
    for axis in panels.values():
        _focus(axis, -0.5, 1.5)
    _on_one_scale(panels.values())
    return figure


def metric(
    records: list[dict[str, Any]], field: str, label: str, across: Mapping[str, float] = MappingProxyType({})
) -> Figure:
    """Any metric against L0, per site; `across`: by site, its value where all activations are used."""
    return _against_l0(records, field, label, (), across)[0]


def gamma(records: list[dict[str, Any]], published: Sequence[dict[str, Any]] = ()) -> Figure:
    """Relative reconstruction bias against L0, per site."""
    figure, panels = _against_l0(records, "gamma", "relative reconstruction bias γ", published)
    for axis in panels.values():
        axis.axhline(1, color="0.4", linewidth=1, linestyle="--")
        _focus(axis, 0, 3)
    _on_one_scale(panels.values())
    return figure


def densities(records: list[dict[str, Any]], fractions: dict[str, np.ndarray]) -> Figure:
    """Histograms of how often features fire, one per SAE; dead features are counted in the left-most bin."""
    lowest = min(np.log10(fraction[fraction > 0].min(initial=1e-3)) for fraction in fractions.values()) - 0.5
    logs = {name: np.log10(np.maximum(fraction, 10**lowest)) for name, fraction in fractions.items()}
    figure, panels = _panels(records)
    for axis in panels.values():
        axis.set_xlabel("log10 of the fraction of tokens on which a feature fires")
    _histograms(panels, records, logs, one_scale=True)
    _legends(figure)
    return figure


def gates(records: list[dict[str, Any]], values: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Histograms over features of r_mag and of the JumpReLU form's threshold, one per gated SAE."""
    figure, above, below = _panels([record for record in records if record["name"] in values], rows=2)
    for panels, field in ((above, "r_mag"), (below, "threshold")):
        _histograms(panels, records, {name: of[field] for name, of in values.items()})
        for axis in panels.values():
            axis.set_xlabel({"r_mag": "r_mag", "threshold": "threshold θ, in the language model's units"}[field])
    _legends(figure, rows=2)
    return figure


def _histograms(
    panels: dict[str, Axes], records: list[dict[str, Any]], values: dict[str, np.ndarray], one_scale: bool = False
) -> None:
    """One outline per SAE in its site's panel; the outermost bins take the thousandth of values beyond them.

    Bins span the values of SAEs at the site, or with `one_scale` at all sites, that have not diverged. The legend
    names those whose values are not finite.
    """
    stacks = frontiers.stacks(records)
    values = {name: value.astype(np.float64) for name, value in values.items()}
    for site, axis in panels.items():
        members_here = [record for record in records if record["site"] == site and record["name"] in values]
        mine = [record["name"] for record in members_here]
        compared = [r for r in records if r["name"] in values] if one_scale else members_here
        sound = [values[record["name"]] for record in compared if record["fvu"] <= 1]
        shown = np.concatenate(sound or [values[record["name"]] for record in compared])
        shown = shown[np.isfinite(shown)]
        low, high = np.quantile(shown, (0.0005, 0.9995)) if shown.size else (0.0, 1.0)
        bins = np.linspace(low, high + 1e-6 * max(1, abs(high)), 41)
        for index, ((_, stack), members) in enumerate(stacks.items()):
            members = [record for record in members if record["name"] in mine]
            order = sorted((record["name"] for record in members), key=lambda name: (len(name), name))
            for number, record in enumerate(members):
                each = len(mine) <= LEGEND
                value = values[record["name"]]
                finite = value[np.isfinite(value)]
                counts, _ = np.histogram(np.clip(finite, bins[0], bins[-1]), bins)
                l0 = f"L0 {record['l0']:.0f}" if finite.size == value.size and np.isfinite(record["l0"]) else "diverged"
                axis.stairs(
                    counts,
                    bins,
                    label=f"{record['name']}, {l0}" if each else stack if number == 0 else None,
                    color=COLOURS[index % len(COLOURS)],
                    alpha=_shade(order.index(record["name"]), len(members)),
                    linewidth=1.4 if each else 0.7,
                )
        axis.set_ylabel("features")


def models(records: Sequence[dict[str, Any]]) -> Figure:
    """Histograms over features of the share of the decoder norm that is of the second model, a panel for each pair."""
    pairs = list(dict.fromkeys((record["first"], record["second"]) for record in records))
    figure = Figure(figsize=(PANEL * len(pairs), 3.8), layout="constrained")
    for axis, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        members = [record for record in records if (record["first"], record["second"]) == pair]
        for index, record in enumerate(members):
            style: dict[str, Any] = dict(color=COLOURS[index % len(COLOURS)], linewidth=1.4)
            edges = np.linspace(0, 1, len(record["shares"]) + 1)
            axis.stairs(record["shares"], edges, label=record["name"] if len(members) <= LEGEND else None, **style)
        axis.set(xlabel="share: 0 the first model, 1 the second", ylabel="features", xlim=(0, 1))
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=0)
        _plain_numbers(axis.yaxis)
        axis.set_title(" and ".join(pair).replace("$", r"\$"), fontsize=10, wrap=True)
        axis.grid(alpha=0.25)
    _legends(figure)
    return figure


def training(lines: list[dict[str, Any]]) -> Figure:
    """Loss, L0 and gamma of every SAE over training."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, field in zip(figure.subplots(1, 3), ("loss", "l0", "gamma"), strict=True):
        # A run that was continued by another version may have lines of two kinds.
        sizes = {name: len(value) for line in lines[:1] for name, value in line.items() if isinstance(value, list)}
        stacks = sorted(name.rpartition("/")[0] for name in sizes if name.endswith(f"/{field}"))
        for index, stack in enumerate(stacks):
            name = f"{stack}/{field}"
            whole = [line for line in lines if isinstance(line.get(name), list) and len(line[name]) == sizes[name]]
            steps, values = [line["step"] for line in whole], np.array([line[name] for line in whole], np.float64)
            for member, column in enumerate(values.T):
                alpha = _shade(member, values.shape[1])
                axis.plot(steps, column, color=COLOURS[index % len(COLOURS)], alpha=alpha, lw=1.2)
            axis.plot([], [], color=COLOURS[index % len(COLOURS)], label=stack)
        axis.set(xlabel="step", ylabel=field, yscale="linear" if field == "gamma" else "log")
        if field == "gamma":
            _focus(axis, 0, 3)
        _plain_numbers(axis.yaxis)
        axis.grid(alpha=0.25)
    _legends(figure)
    return figure


def _panels(records: list[dict[str, Any]], rows: int = 1) -> Any:
    """A figure, and for each of its rows a panel per site, side by side."""
    sites = sorted({record["site"] for record in records})
    figure = Figure(figsize=(PANEL * len(sites), 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, len(sites), squeeze=False)
    for axis, site in zip(grid.flat, sites * rows, strict=True):
        axis.set_title(site, fontsize=10)
        axis.grid(alpha=0.25)
    return figure, *(dict(zip(sites, axes, strict=True)) for axes in grid)


def _legends(figure: Figure, rows: int = 1) -> None:
    """A legend below each panel, which covers no points; the figure, of so many rows of panels, grows accordingly."""
    lines = 0
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        if labels:
            labels = [textwrap.fill(label, 42, subsequent_indent="  ") for label in labels]
            columns = 2 if max(map(len, labels)) <= 18 else 1
            below = axis.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)  # the ticks and their label
            anchor: dict[str, Any] = dict(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below)
            axis.legend(handles, labels, fontsize=10, frameon=False, ncols=columns, **anchor)
            lines = max(lines, -(-sum(1 + label.count("\n") for label in labels) // columns))
    figure.set_figheight(figure.get_figheight() + 0.2 * rows * lines)


def _shade(index: int, count: int) -> float:
    """The opacity of one SAE of a stack."""
    return 0.35 + 0.65 * (index + 1) / count


def _plain_numbers(axis: Axis) -> None:
    """Numbers such as 20, not 2 x 10^1, on a logarithmic axis; there are always some."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    if high < 8 * low:  # powers of ten, and 2, 3 and 5 times these, may all lie outside
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())
    else:
        # Where the axis has few powers of ten, there is room for numbers between them.
        between = "235" if high < 1000 * low else "3" if high < 1e6 * low else ""
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in between else ""))


def _on_one_scale(axes: Iterable[Axes]) -> None:
    """Give all sites the same axes, so that they can be compared. Panels without points do not count."""
    drawn = [axis for axis in axes if any(line.get_marker() != "None" for line in axis.lines)]
    if len(drawn) > 1:
        limits = [(*axis.get_xlim(), *axis.get_ylim()) for axis in drawn]
        left, right, bottom, top = zip(*limits, strict=True)
        for axis in drawn:
            axis.set(xlim=(min(left), max(right)), ylim=(min(bottom), max(top)))
            _plain_numbers(axis.xaxis)


def _focus(axis: Axes, low: float, high: float) -> None:
    """Cut the y axis to the points in [low, high], and write how many of other points there are.

    SAEs that have diverged would make the others' points one line.
    """
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axis.lines] or [np.zeros(0)])
    inside, beyond = values[(values >= low) & (values <= high)], np.sum((values < low) | (values > high))
    if beyond and inside.size:
        margin = 0.05 * (np.ptp(inside) or 1)
        axis.set_ylim(inside.min() - margin, inside.max() + margin)
        axis.text(0.02, 0.02, f"points beyond this axis: {beyond}", transform=axis.transAxes, fontsize=10)


def _against_l0(
    records: list[dict[str, Any]],
    field: str,
    label: str,
    published: Sequence[dict[str, Any]],
    across: Mapping[str, float] = MappingProxyType({}),
) -> tuple[Figure, dict[str, Axes]]:
    """A line for the SAEs of a stack with one learning rate and seed; dashed for what gradient pursuit makes of one."""
    figure, panels = _panels(records)
    colours: dict[tuple[str, str, int | str], str] = {}
    pursued = defaultdict(list)
    stacks = frontiers.stacks([record for record in records if not record["ito"]])
    for index, ((site, name), members) in enumerate(stacks.items()):
        axis, first, colour = panels[site], members[0], COLOURS[index % len(COLOURS)]
        colours |= {frontiers.identity(record): colour for record in members}
        lines = defaultdict(list)
        members = [record for record in members if np.isfinite(record[field]) and 0 < record["l0"] < np.inf]
        for record in members:
            lines[record["learning_rate"], record["seed"]].append(record)
        style: dict[str, Any] = dict(color=colour, marker=MARKERS[index % len(MARKERS)], markersize=5)
        order = sorted(lines, key=lambda by: (by[0], -1 if by[1] is None else by[1]))
        for number, (rate, seed) in enumerate(order):
            rates = {rate for rate, _ in lines}
            title = f"{name} ({frontiers.family(first)}, {first['width']:,} features" + f", rate {rate:g}" * (
                len(rates) > 1
            )
            is_new = len(rates) > 1 and (number == 0 or order[number - 1][0] != rate)
            axis.plot(
                [record["l0"] for record in lines[rate, seed]],
                [record[field] for record in lines[rate, seed]],
                label=f"{title})" if number == 0 or is_new else None,
                linewidth=1.5,
                alpha=_shade(sorted(rates).index(rate), len(rates)),
                **style,
            )
    for record in sorted(records, key=lambda record: record["l0"]):
        if record["ito"]:
            pursued[frontiers.identity(record)].append(record)
    for sae, members in pursued.items():
        style = dict(color=colours[sae], linestyle="--", linewidth=0.8)
        panels[members[0]["site"]].plot([r["l0"] for r in members], [r[field] for r in members], **style)
    series = sorted({(point["model"], point["architecture"]) for point in published})
    for marker, whose in zip("*x+1234" * len(series), series, strict=False):
        for site, axis in panels.items():
            points = [p for p in published if (p["model"], p["architecture"], p["site"]) == (*whose, site)]
            if points:
                x, y = ([point[name] for point in points] for name in ("l0", field))
                axis.plot(x, y, marker, color="0.5", markersize=5, label=" ".join(whose).replace("$", r"\$"))
    for site, axis in panels.items():
        if site in across:
            axis.axhline(across[site], color="0.4", linewidth=1, linestyle="--", label="all activations")
        if not axis.lines:
            text = "there is nothing to draw here:\nthe notes at the top of the report say why"
            axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center")
        if any(record["ito"] for record in records):
            axis.plot([], [], "k--", linewidth=0.8, label="by gradient pursuit")
        axis.set(xscale="log", xlabel="L0 (active features per token)", ylabel=label)
        _plain_numbers(axis.xaxis)
    _legends(figure)
    return figure, panels
