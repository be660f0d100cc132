"""What a run becomes on the Hugging Face hub: a folder for each format, the report, and a model card made of it."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

import gsae_jax
from gsae_jax import errors, exporting, plugins, rendering, sae_loading
from gsae_jax.errors import UserError
from gsae_jax.evaluation import report
from gsae_jax.saes import contract, trained
from gsae_jax.storage import reading, run_directory, writing

CONFIG = "experiment.json"  # the run's config, beside the card
REVISION = "Revision of the language model"


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a run does not know of itself, for the card's metadata; "" leaves a field out.

    Attributes:
        base_model: name of the language model on the hub, user/name; by default the run's, if it is such a name.
        dataset: name of the data set on the hub, user/name.
        license: of the SAEs, as the hub abbreviates licences, such as mit, apache-2.0, cc-by-4.0 or other.
    """

    base_model: str = ""
    dataset: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        for field in ("base_model", "dataset"):
            value = getattr(self, field)
            if value and not is_repository(value):
                raise UserError(f"is {value!r}; write its name on the hub, user/name", field)
        if not re.fullmatch(r"[a-z0-9.-]{0,50}", self.license):
            why = "write it as the hub does, such as mit, apache-2.0, cc-by-4.0 or other"
            raise UserError(f"is {self.license!r}; {why}", "license")


UNLABELLED = Labels()


def is_repository(name: str) -> bool:
    """Whether this can be the name of a repository on the hub, with its user or organisation."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def write(workdir: str, repo: str, formats: list[str], out: Path, labels: Labels = UNLABELLED) -> list[str]:
    """Write the new folder `out`: `FORMAT/SAE/...`, `report/...`, experiment.json and README.md.

    The SAEs are those of the checkpoint that the report is about.

    Returns:
        The fields of `labels` that are missing in the card.

    Raises:
        UserError: a run without a report or that checkpoint, an unknown format, or one that cannot hold one of them.
    """
    place = run_directory.Workdir(workdir)
    if not formats or len(set(formats)) < len(formats):
        raise UserError(f"is {','.join(formats)!r}; write different formats such as saelens", "--format")
    for format in formats:
        with errors.about("--format"):
            plugins.load("formats", format, having="write")
    records = _records(place)
    step = run_directory.reported_step(place)
    with errors.about("--workdir", step="--workdir"):
        saes = sae_loading.load(workdir, step=step)
    with writing.new_folder(out) as folder:
        for format in formats:  # without SAEs that have diverged
            written = exporting.write(saes, format, folder / format)
            saes = {name: sae for name, sae in saes.items() if name in written}
        (folder / "report").mkdir()
        for file in (place.report / name for name in report.FILES):
            if file.exists():
                (folder / "report" / file.name).write_bytes(file.read_bytes())
        (folder / CONFIG).write_text(json.dumps(_shareable(place.config()), indent=2) + "\n", "utf-8")
        training = _training(place, step)
        base_model = labels.base_model or _on_the_hub(next(iter(saes.values())).metadata["model_name"])
        labels = dataclasses.replace(labels, base_model=base_model)
        (folder / "README.md").write_text(card(repo, formats, saes, records, training, labels), "utf-8")
    return [field for field, value in dataclasses.asdict(labels).items() if not value]


def _on_the_hub(model: str) -> str:
    """The name of a run's language model if it is one of the hub."""
    return model if is_repository(model) else ""


def _shareable(tree: Any) -> Any:
    """A recorded config without the folders of this machine: of absolute paths what `without_folders` leaves."""
    if isinstance(tree, dict):
        return {name: _shareable(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_shareable(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    prefix = re.match(r"\w+:(?=[/~](?!/)|\w+://)", tree)  # of store:/a/path
    kind = prefix[0] if prefix else ""
    path = tree.removeprefix(kind)
    return kind + sae_loading.without_folders(path) if path.startswith(("/", "~")) or "://" in path else tree


def _training(place: run_directory.Workdir, step: int | None) -> dict[str, Any]:
    """How a run was trained until a step, by the names in the card."""
    config = place.experiment()
    step = config.train.steps if step is None else step
    facts = place.facts(step)
    machine, whole = facts.machine, step == config.train.steps
    by_document = config.data.pack == "documents"
    return {
        "SAE updates": f"{step:,}" if whole else f"{step:,} of {config.train.steps:,}",
        "Activations trained on": f"{step * config.train.batch_size:,}",
        # Of an earlier checkpoint it is not known.
        "Tokens read": f"{facts.text.tokens_read:,}" if facts.text is not None and whole else "",
        "Rows of text": "each is the first part of one document" if by_document else "cut from one stream of documents",
        "Devices": machine.get("devices", ""),
        "Versions of training": ", ".join(f"{name} {machine[name]}" for name in ("jax", "python") if name in machine),
        "Version of this export": f"gsae_jax {gsae_jax.__version__}",
        REVISION: config.lm.revision,
        **{f"{REVISION} {name}": lm.revision for name, lm in config.lms.items()},
    }


def _records(place: run_directory.Workdir) -> list[dict[str, Any]]:
    path = place.report / "report.json"
    if not path.exists():
        place.config()  # says so where it is no run at all
        raise UserError(f"{place.path} has no report; finish its training, or run gsae_jax.evaluate", "--workdir")
    try:
        numbers = reading.load_json(path)["saes"]
        # A metric that is not a number is null there.
        records = [{name: math.nan if value is None else value for name, value in record.items()} for record in numbers]
        for record in records:
            if not record["ce_zero"] > record["ce_clean"]:  # earlier versions wrote a number here
                record["loss_recovered"] = math.nan
        report.contents(records)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{path} cannot be read ({type(error).__name__}: {error})"
        raise UserError(f"{why}; run gsae_jax.evaluate, which writes it again", "--workdir") from error
    return records


def card(
    repo: str,
    formats: list[str],
    saes: dict[str, trained.SAE],
    records: list[dict[str, Any]],
    training: dict[str, str],
    labels: Labels,
) -> str:
    """The page of a repository on the hub.

    Args:
        repo: its name.
        formats: the folders in it.
        saes: those that are in each folder, by name.
        records: of the run's report.
        training: how they were trained, by name; "" is left out.
        labels: for the metadata.
    """
    example = next(
        (sae for sae in saes.values() if sae.architecture not in contract.BASELINES), next(iter(saes.values()))
    )
    model, model_in_config = example.metadata["model_name"], example.models[-1]
    embedded = model == sae_loading.EMBEDDED
    return rendering.render(
        "model_card.md",
        **report.contents(records)
        | {
            "repo": repo,
            "formats": formats,
            "for_saelens": next((format for format in ("saelens", "jumprelu") if format in formats), ""),
            "count": len(saes),
            "name": example.name,
            "site": trained.for_export(example).sites[0],
            "lm": "" if embedded else labels.base_model or model,
            # A revision is known of the run's own name on the hub, and not of another that stands in a label.
            "lm_revision": training.get(f"{REVISION} {model_in_config}".strip(), "")
            if labels.base_model == model
            else "",
            "architectures": sorted({plugins.label(sae.architecture) for sae in saes.values()}),
            "sites": sorted({site for sae in saes.values() for site in (*sae.sites, *sae.targets)}),
            "model": model,
            "labels": labels,
            "dataset": example.metadata["dataset_path"],
            "training": {name: value for name, value in training.items() if value},
            "config": CONFIG,
            "context_length": example.metadata["context_size"],
        },
    )
