"""The numbers of finished runs that the docs' tables and figures are made of, and how these come into a page.

`docs/results` has the report of each run without what the tables do not need. A script with `--runs DIRECTORY` first
takes the reports of the runs in this directory over. Then it writes its page from `docs/results` alone.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from gsae_jax.evaluation import frontiers

FOLDER = Path(__file__).parent / "results"
# Of each SAE.
FIELDS = (
    *("name", "stack", "index", "architecture", "variant", "frontier", "site", "width", "l1_coefficient"),
    *("learning_rate", "seed", "target_l0", "ito"),
)
METRICS = ("l0", "loss_recovered", "gamma", "kl", "fvu", "alive")


def arguments(description: str) -> argparse.Namespace:
    """`--runs` and `--write` of a script. `description`: its docstring."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of finished runs; without it, only docs/results is read")
    parser.add_argument("--write", type=Path, required=True, help="page whose marked tables are replaced")
    return parser.parse_args()


def load(name: str, runs: Path | None, report: str = "report") -> dict[str, Any] | None:
    """The report of a run, `saes`, `l0_ratios` and `measured`; None where there is none. NaN is what is not a number.

    Args:
        name: of the run, its path in `runs`.
        runs: folder of finished runs. If it has the run, `docs/results` takes its report over first.
        report: pattern of the name of the report's folder.
    """
    for found in sorted((runs / name).glob(f"{report}/report.json"))[:1] if runs is not None else ():
        content = json.loads(found.read_text("utf-8"))
        saes = [
            {field: record[field] for field in (*FIELDS, *METRICS) if field in record} for record in content["saes"]
        ]
        save(name, {"saes": saes, "l0_ratios": content["l0_ratios"], "measured": [content["measured"]]})
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text("utf-8"))
    for record in content["saes"]:
        record |= {field: math.nan for field in METRICS if record.get(field, 0) is None}
    return content


def save(name: str, lists: Mapping[str, Sequence[Any]]) -> None:
    """Writes `docs/results/NAME.json`, with a line for each element of each list."""
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(
        f'"{key}": [\n' + ",\n".join(json.dumps(short(value), ensure_ascii=False) for value in each) + "\n]"
        for key, each in lists.items()
    )
    path.write_text(f"{{\n{text}\n}}\n", "utf-8")


def short(value: Any) -> Any:
    """Floats of six digits."""
    if isinstance(value, dict):
        return {key: short(each) for key, each in value.items()}
    if isinstance(value, list):
        return [short(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def panels(titles: Sequence[str], label: str) -> tuple[Figure, list[Axes]]:
    """A figure of one or two columns with a panel for each title, in which `label` is drawn against L0."""
    columns = min(2, len(titles))
    rows = math.ceil(len(titles) / 2)
    figure = Figure(figsize=(4 * columns + 1, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, title in zip(axes, titles, strict=False):
        axis.set(xscale="log", xlabel="L0", ylabel=label)
        axis.set_title(title, fontsize=9)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
        axis.grid(alpha=0.25)
    for axis in axes[len(titles) :]:
        axis.remove()
    return figure, list(axes[: len(titles)])


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]], text: Iterable[str] = ()) -> str:
    """A table in Markdown. Columns of numbers are on the right; the first one and those named in `text` are not."""
    header = [*map(str, header)]
    lines = [header, [":--" if not n or cell in text else "--:" for n, cell in enumerate(header)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def share(value: frontiers.OverSeeds) -> frontiers.OverSeeds:
    """The mean of a share over seeds, with its interval cut at 0 and 1."""
    return value._replace(low=max(value.low, 0.0), high=min(value.high, 1.0))


def numbered(name: str, pattern: str, runs: Path | None) -> dict[int, str]:
    """Runs whose names continue `name` by a pattern, by the number that is its only group; 0 where there is none."""
    folder, _, start = name.rpartition("/")
    paths = [path for root in (FOLDER, runs) if root is not None for path in (root / folder).glob("*")]
    matches = (re.fullmatch(re.escape(start) + pattern, path.name.removesuffix(".json")) for path in paths)
    return dict(sorted((int(match[1] or 0), f"{folder}/{match[0]}") for match in matches if match))


def write(page: Path, tables: Mapping[str, str]) -> None:
    """Each table replaces what is between `<!-- NAME -->` and `<!-- end -->`. All others stay.

    Tables for which the page has no place are printed.
    """
    content = page.read_text("utf-8")
    for name, lines in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(content):
            print(f"{page} has no place for this table (<!-- {name} --> ... <!-- end -->):\n\n{lines}\n")
            continue
        content = pattern.sub(lambda match, lines=lines: f"{match[1]}\n{lines}\n\n{match[2]}", content)
    page.write_text(content, "utf-8")
