"""The report of a run: `report.json`, `frontier.csv`, `report.md`, the figures, and all in one page, `report.html`."""

import base64
import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from gsae_jax import mesh as mesh_lib
from gsae_jax import plugins, rendering
from gsae_jax.errors import UserError
from gsae_jax.evaluation import frontiers, measure, metrics, plots, tables
from gsae_jax.lms import sites
from gsae_jax.saes import contract, diffing, parameters, trained
from gsae_jax.storage import paths, writing

FIGURES = ("frontier", "gamma", "densities", "gates", "models", "training")
FILES = ("report.json", "report.md", "report.html", "frontier.csv", *(f"{figure}.png" for figure in FIGURES))
HOOKS = {"mlp": "hook_mlp_out", "attn": "attn.hook_z", "resid": "hook_resid_post"}  # of the paper's sites
LARGE_MEAN = 0.5  # a mean with a larger share of E||x||^2 hides shrinkage
SHARE_BINS = 50
MISSED = 0.1  # a target is missed where L0 differs from it by more than this fraction


class About(NamedTuple):
    """How the SAEs of a report were measured and trained, and how they divide their features between models.

    Attributes:
        settings: the fields of `provenance.Settings`, by which reports are told apart.
        measured: of `provenance.of_report`.
        runs: of `provenance.of_run` and `provenance.of_imported`, by the name of the run or folder.
        compared: of `differences`.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    measured: Mapping[str, Any] = MappingProxyType({})
    runs: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    compared: Sequence[dict[str, Any]] = ()


NOTHING = About()  # of SAEs of which nothing else is known


def gates(saes: dict[str, trained.SAE]) -> dict[str, dict[str, np.ndarray]]:
    """`r_mag` [F] and `threshold` [F] of each SAE that has both (`contract.feature_facts`), by name.

    Those of an SAE that writes several sites have its name at the first one, whose units features have.

    Every process calls it, as features lie over all devices.
    """
    facts = {
        measure.written(sae)[0].name(): contract.feature_facts(sae.functions, sae.params, sae.config)
        for sae in saes.values()
    }
    return mesh_lib.fetch({name: of_sae for name, of_sae in facts.items() if {"r_mag", "threshold"} <= of_sae.keys()})


def rows(
    models: str | Mapping[str, str],
    saes: dict[str, trained.SAE],
    sums: dict[str, metrics.Sums],
    targets: Mapping[str, float] = MappingProxyType({}),
    ito: Sequence[int] = (),
    recipes: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """One record per measured SAE and site that it writes: what it is, and what it measured.

    `models`: what the language model is called; of several, by the names after the @ of their sites.

    `variant` is its architecture and the options that are not the default; `frontier` the same without the number of
    active features, where that is an option, and with the settings in `recipes`, by SAE; `ito` the number of features
    where they were chosen by gradient pursuit (one of `ito`), else 0; `target_l0` of `targets`, by SAE, or None;
    `not_finite` the names of parameters with numbers that are not finite. Every process calls it, as features may lie
    over all devices.
    """
    models, records = {"": models} if isinstance(models, str) else models, []
    not_finite = {name: parameters.not_finite(sae.functions, sae.params) for name, sae in saes.items()}
    each = [(whose, one) for whose, sae in saes.items() for one in measure.written(sae)]
    for (whose, one), k in itertools.product(each, (0, *ito)):
        sae, name, site = one.sae, one.name(k), one.place[0]
        frontier = contract.frontier(sae.architecture, sae.config)
        records.append(
            {
                "name": name,
                "run": sae.run,
                "stack": sae.stack or sae.name,
                "index": sae.index,
                "model": models[sites.parts(site)[1]],
                "architecture": plugins.label(sae.architecture),
                "variant": contract.variant(sae.architecture, sae.config),
                "frontier": " ".join(filter(None, (frontier, frontier and recipes.get(whose)))),
                "ito": k,
                "site": site,
                "layer": sites.layer_of(site) if site.startswith("blocks.") else "",
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


def differences(
    saes: dict[str, trained.SAE], sums: dict[str, metrics.Sums], models: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One record for each crosscoder of several language models, and each model beside its first: `compare_models`.

    They count the features that fired on the measured text: `only_first`, `shared` and `only_second` by the thresholds
    of `diffing`, and `between` the others. `shares` are counts in `SHARE_BINS` bins of equal width from 0 to 1, and
    `cosine` is the median of the shared features. Every process calls it, as features lie over all devices.

    `models`: what each language model is called, as for `rows`.
    """
    records = []
    for sae in saes.values():
        alive = sums[measure.written(sae)[0].name()]["fired"] > 0
        first, *others = sorted(sae.models)
        for second in others:
            found = diffing.compare_models(sae, (first, second))
            kinds = {name: getattr(found, name) for name in ("only_first", "shared", "only_second")}
            share, cosine, of_kind = mesh_lib.fetch((found.share, found.cosine, kinds))
            counts = {name: int((kind & alive).sum()) for name, kind in of_kind.items()}
            known = cosine[of_kind["shared"] & alive & np.isfinite(cosine)]
            records.append(
                {
                    "name": sae.name,
                    "first": f"{models[first]} (@{first})" if first else models[first],
                    "second": f"{models[second]} (@{second})",
                    "alive": int(alive.sum()),
                    **counts,
                    "between": int(alive.sum()) - sum(counts.values()),
                    "cosine": float(np.median(known)) if known.size else math.nan,
                    "shares": np.histogram(share[alive & np.isfinite(share)], SHARE_BINS, (0, 1))[0].tolist(),
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
    about: About = NOTHING,
) -> list[str]:
    """Write the report; an earlier one is replaced when the new one is whole. Files that are not of a report stay.

    Args:
        step: which the SAEs were measured at.
        records: of `rows`.
        sums: of `measure.measure`.
        training: the lines of metrics, where there are any.
        gates_of: of `gates`.
        published: points to draw beside ours.
        about: how they were measured and trained.

    Returns:
        What `notes` says.
    """
    # report.json, which says that a run is finished, comes last.
    with writing.whole_folder(folder, last="report.json") as scratch:
        sentences = _write_files(scratch, step, records, sums, training, gates_of, published, about)
        for file in paths.files_below(folder) if folder.is_dir() else ():
            if (name := str(file.relative_to(folder))) not in FILES:
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                epath.Path(file).copy(scratch / name)
        return sentences


def _write_files(
    folder: Path,
    step: int | None,
    records: list[dict[str, Any]],
    sums: dict[str, metrics.Sums],
    training: list[dict[str, Any]],
    gates_of: dict[str, dict[str, np.ndarray]],
    published: Sequence[dict[str, Any]],
    about: About,
) -> list[str]:
    ratios = frontiers.ratios(records, sums)
    sentences = notes(records, about.runs)
    head = {"step": step, "settings": about.settings, "measured": about.measured, "runs": about.runs}
    (folder / "report.json").write_text(
        _json(head | {"notes": sentences}, saes=records, l0_ratios=ratios, models=about.compared)
    )
    tables.write_csv(folder / "frontier.csv", records)
    encoders = [record for record in records if not record["ito"]]
    densities = {name: sums[name]["fired"] / sums[name]["tokens"].sum() for name in (r["name"] for r in encoders)}
    figures = {
        "frontier": plots.frontier(records, published),
        "gamma": plots.gamma(encoders, published),
        "densities": plots.densities(encoders, densities),
    }
    if training:
        figures["training"] = plots.training(training)
    if gates_of:
        figures["gates"] = plots.gates(encoders, gates_of)
    if about.compared:
        figures["models"] = plots.models(about.compared)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    pictures = {name: plots.panels(figure) for name, figure in figures.items()}
    for page, text in pages(records, ratios, pictures, about).items():
        (folder / page).write_text(text, "utf-8")
    return sentences


def read_published(path: str) -> list[dict[str, Any]]:
    """Points to draw beside ours, from a CSV file with model, architecture, site, layer, l0, loss_recovered, gamma.

    A site is a hook name, as in `frontier.csv`, or the paper's mlp, attn or resid.

    Raises:
        UserError: no such file, or without these columns.
    """
    needed = {"model", "architecture", "site", "layer", "l0", "loss_recovered", "gamma"}
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); write a CSV file in UTF-8", "--published") from error
    if missing := needed - set(rows[0] if rows else ()):
        raise UserError(
            f"{path} has no column {', '.join(sorted(missing))}; write a file with a header line", "--published"
        )
    try:
        numbers = ("l0", "loss_recovered", "gamma")
        return [
            row
            | {name: float(row[name]) for name in numbers}
            | {"site": f"blocks.{row['layer']}.{HOOKS[row['site']]}" if row["site"] in HOOKS else row["site"]}
            for row in rows
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a cell that is not a number: {error}", "--published") from error


def notes(
    records: list[dict[str, Any]],
    runs: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[str]:
    """A sentence for each problem. Readers need them first.

    Args:
        records: of `rows` or of a report.
        runs: as in `About`.
    """
    encoders = [record for record in records if not record["ito"]]
    sentences = []
    for site in sorted({record["site"] for record in encoders}):
        here = [record for record in encoders if record["site"] == site]
        r = here[0]
        # An SAE that diverged has no loss recovered either, and says nothing about the site.
        measured = [record for record in here if math.isfinite(record["ce_sae"])]
        if measured and not any(math.isfinite(record["loss_recovered"]) for record in measured):
            sentences.append(
                f"At {site} loss recovered has no meaning and is left blank: activations of zero do not clearly "
                f"raise the language model's loss (CE zero {r['ce_zero']:.3f}, CE clean {r['ce_clean']:.3f} nats). "
                "Check that the language model was trained on text of this kind, and that rows are longer than 2 "
                "tokens."
            )
        if above := [record for record in measured if record["loss_recovered"] > 1]:
            sentences.append(
                f"At {site} loss recovered of {_names(above)} is above 1: the language model predicts the text better "
                "with the reconstructions than with its own activations. It predicts text of this kind badly, or there "
                "are few tokens. Frontiers of loss recovered say little here."
            )
        if _without_model(r):
            sentences.append(
                f"At {site} there was no language model to measure with. Loss recovered and KL are left blank, and the "
                "frontier shows the variance explained, 1 - FVU."
            )
        if r.get("mean_share", 0) > LARGE_MEAN:
            gammas = [f"{record['name']} {tables.number(record['gamma_centered'], '.3f')}" for record in here]
            shown = ", ".join(gammas if len(gammas) <= 4 else [*gammas[:3], f"{len(gammas) - 3} more"])
            sentences.append(
                f"At {site} the mean is {r['mean_share']:.1%} of E‖x‖², which hides shrinkage from γ. Without the "
                f"mean, γ is: {shown}. report.json has it as gamma_centered."
            )
        if r.get("extreme"):
            fvu = tables.number(r["fvu_all"], ".3f")
            sentences.append(
                f"At {site} {r['extreme']:,} of {r['tokens']:,} tokens have a norm above {metrics.EXTREME} times the "
                f"median. FVU and γ leave them out; with them FVU is {fvu} for {r['name']}. "
                "report.json has both, as fvu_all and gamma_all."
            )
    blank = ("l0", "l1", "ce_sae", "kl", "cosine")
    of_model = ("ce_sae", "kl")

    def sound_fields(r: dict[str, Any]) -> list[str]:
        return [name for name in blank if name in r and not (name in of_model and _without_model(r))]

    diverged = [r for r in encoders if not all(math.isfinite(r[name]) for name in sound_fields(r))]
    sound = [r for r in encoders if r not in diverged]
    for members, text in (
        (diverged, "reconstructions that are not finite: training diverged. Metrics without a value are left blank"),
        (
            [r for r in sound if r["fvu"] > 1],
            "an FVU above 1: the mean activation would be a better reconstruction. Training diverged or had too few "
            "steps, or the site or the language model is not that of training",
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
        if tables.has_target(r) and abs(r["l0"] - r["target_l0"]) > MISSED * r["target_l0"]
    ]
    measured_runs = sorted({frontiers.identity(record)[0] for record in encoders})
    return sentences + unequal_training({run: runs[run] for run in measured_runs if run in runs})


def _without_model(record: dict[str, Any]) -> bool:
    """Whether an SAE was measured without a language model."""
    return not math.isfinite(record.get("ce_clean", math.nan))


def unequal_training(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence if these runs have different numbers of steps or activations."""
    # Files of SAEs from elsewhere do not say how long they were trained.
    known = {label: about for label, about in runs.items() if "steps" in about}
    if len({(about["steps"], about["activations_trained_on"]) for about in known.values()}) < 2:
        return []
    each = "; ".join(
        f"{label}: {tables.fact(about['steps'])} steps, {tables.fact(about['activations_trained_on'])} activations"
        for label, about in known.items()
    )
    return [
        f"This report has SAEs of runs with different training ({each}). Differences between these SAEs can come from "
        "the training, not from the architecture. Compare runs of equal training."
    ]


def _names(records: list[dict[str, Any]]) -> str:
    names = [record["name"] for record in records]
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def contents(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of `measured.md`, and of what all pages say at their top, from the records of `rows` or a report."""
    return {
        "model": records[0]["model"],
        "tokens": int(np.max([record["tokens"] for record in records])),
        "tables": tables.measured(records),
        "notes": notes(records),
        "pursued": any(record["ito"] for record in records),
        "extreme": metrics.EXTREME,
        "dense": f"{metrics.DENSE:.0%}",
    }


def table(records: list[dict[str, Any]]) -> str:
    """The tables of all sites (the paper's Tables 1-8) in Markdown."""
    return rendering.render("sites.md", tables=tables.measured(records)).strip("\n")


def pages(
    records: list[dict[str, Any]],
    ratios: list[dict[str, Any]],
    pictures: Mapping[str, Sequence[plots.Panel]],
    about: About = NOTHING,
) -> dict[str, str]:
    """The texts of `report.md` and `report.html`, by name.

    Args:
        records: of `rows`.
        ratios: of `frontiers.ratios`.
        pictures: the panels of each figure, by its name in `FIGURES`.
        about: how they were measured and trained.
    """
    figures = {
        name: [(panel.title, base64.b64encode(panel.svg).decode()) for panel in pictures[name]]
        for name in FIGURES
        if name in pictures
    }
    values = contents(records) | {
        "notes": notes(records, about.runs),
        "ratios": tables.ratios(ratios),
        "models": tables.models(about.compared),
        "figures": figures,
        "measured": tables.facts({"": about.measured}),
        "runs": tables.facts(about.runs),
    }
    return {page: rendering.render(page, **values) for page in ("report.md", "report.html")}


def _json(head: Mapping[str, Any], **records: Sequence[dict[str, Any]]) -> str:
    """Strict JSON: a metric that is not a number is null."""
    return json.dumps(finite({**head, **records}), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """What JSON holds of a tree of dicts, named tuples, sequences and arrays: null for a number that is not finite."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
