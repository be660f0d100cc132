"""How the SAEs of a report were trained, how they were measured, and where the report of a run is written."""

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax

import gsae_jax
from gsae_jax.config import LM, Experiment, HeldOut
from gsae_jax.saes import trained
from gsae_jax.storage import paths, reading
from gsae_jax.storage.facts import Facts, Text


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a report was made with. Two reports on one run that agree in all of it have the same numbers.

    Attributes:
        step: the checkpoint's; None for SAEs that are not of one run.
        tokens: how many held-out tokens were asked for, in whole batches.
        ito: numbers of features that gradient pursuit chose.
        published: name of the file of points that are drawn beside ours; "" for none.
        text: fingerprint of the rows that were measured.
    """

    step: int | None
    tokens: int
    ito: tuple[int, ...]
    published: str
    text: str

    def differences(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, and their values here, in which a report's recorded settings differ; all if it has none."""
        ours = dataclasses.asdict(self) | {"ito": list(self.ito)}
        differing = {name: value for name, value in ours.items() if name not in recorded or recorded[name] != value}
        if "tokens" in differing or not recorded:
            differing.pop("text", None)  # it is of that many tokens
        if not recorded:  # of an earlier version
            return {name: value for name, value in differing.items() if value not in ("", [], None)}
        return differing


def place(report: paths.Path, settings: Settings) -> paths.Path:
    """The folder for a report of these settings: `report`, unless one of other settings lies there.

    It then goes beside that one, under a name that says what differs: `report-tokens_1000000-ito_5_10`.
    """
    if not (report / "report.json").exists():
        return report
    try:
        recorded = reading.load_json(report / "report.json").get("settings", {})
    except ValueError:  # damaged
        recorded = {}
    differing = settings.differences(recorded if isinstance(recorded, dict) else {})
    if not differing:
        return report
    parts = [f"{name}_{_in_a_name(name, value)}" for name, value in differing.items()]
    return place(report.parent / "-".join([report.name, *parts]), settings)


def _in_a_name(field: str, value: Any) -> str:
    if isinstance(value, list):
        value = "_".join(map(str, value))
    text = re.sub(r"[^\w.]+", "_", str("" if value is None else value))
    return (text[:8] if field == "text" else text[:40]) or "none"


def versions() -> dict[str, str]:
    """Versions of what computes: gsae_jax, jax and Python."""
    return {"gsae_jax": gsae_jax.__version__, "jax": jax.__version__, "python": sys.version.split()[0]}


def of_run(
    config: Experiment,
    facts: Facts,
    step: int,
    models: Mapping[str, str],
    text: str,
) -> dict[str, Any]:
    """How a run's SAEs were trained, in the order in which a report shows it.

    Args:
        config: the run's.
        facts: of the checkpoint.
        step: of the checkpoint.
        models: what the language models are called, by their names in `config.lms`; "" is the name of `config.lm`.
        text: what the text is called.
    """
    train, used = config.train, ("gsae_jax", "jax", "python")
    return {
        **_of_models(models, {"": config.lm, **config.lms}),
        "text": text,
        **({} if facts.text is None else _of_text(facts.text)),
        "row_length": config.data.context_length,
        "steps": step if step == train.steps else f"{step:,} of {train.steps:,}",
        "batch_size": train.batch_size,
        "activations_trained_on": step * train.batch_size,
        "warmup_steps": train.warmup_steps,
        "decay_fraction": train.decay_fraction,
        "resample_steps": list(train.resample_steps),
        "buffer_size": config.activations.buffer_size,
        "centered": config.activations.center,
        "special_tokens_excluded": config.activations.drop_special_tokens,
        "compute_dtype": train.compute_dtype,
        "stack_seeds": sorted({seed for stack in config.stacks.values() for seed in stack.seeds}),
        "devices": facts.machine.get("devices", ""),
        "trained_with": _listed({name: facts.machine[name] for name in used if name in facts.machine}),
    }


def _of_models(models: Mapping[str, str], lms: Mapping[str, LM]) -> dict[str, str]:
    """What each language model is called, and its revision."""
    return {
        f"language_model_{name}" if name else "language_model": model
        + (f" at {lms[name].revision}" if lms[name].revision else "")
        for name, model in models.items()
    }


def _of_text(text: Text) -> dict[str, Any]:
    known: dict[str, Any] = {
        "documents": text.documents,
        "held_out": round(text.held_out, 4),
        "tokens_of_the_text": text.tokens,
        "tokens_read": text.tokens_read,
        "passes_over_the_text": None if text.passes is None else float(f"{text.passes:.3g}"),
    }
    if text.too_short:
        known["too_short_for_a_row"] = round(text.too_short, 4)
    return known | ({"text_is_estimated": True} if text.is_estimate else {})


def of_imported(sae: trained.SAE) -> dict[str, Any]:
    """What the file of an SAE from elsewhere says of its training."""
    names = {"language_model": "model_name", "text": "dataset_path", "row_length": "context_size"}
    known = {name: sae.metadata.get(field) for name, field in names.items()}
    return {name: value for name, value in known.items() if isinstance(value, str | int) and value}


def of_report(
    settings: Settings, models: Mapping[str, str], text: str, held_out: HeldOut, documents: int | None = None
) -> dict[str, Any]:
    """How the SAEs of a report were measured, in the order in which the report shows it.

    `models` and `text`: as of `of_run`. `documents`: in how many a measured row begins, where that is known.
    """
    about: dict[str, Any] = {f"language_model_{name}" if name else "language_model": m for name, m in models.items()}
    about |= {"text": text, "row_length": held_out.data.context_length}
    about |= {} if documents is None else {"documents": documents}
    about |= {"tokens_asked_for": settings.tokens, "special_tokens_excluded": held_out.drop_special_tokens}
    about |= {} if settings.step is None else {"checkpoint": settings.step}
    about |= {"gradient_pursuit": list(settings.ito)} if settings.ito else {}
    about |= {"published_points": settings.published} if settings.published else {}
    return about | {"measured_with": _listed(versions())}


def _listed(used: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in used.items())
