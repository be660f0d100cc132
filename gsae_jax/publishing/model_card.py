"""What a run becomes on the Hugging Face hub: a folder for each format, the report, and a model card made of it."""

import math
from pathlib import Path
from typing import Any

from gsae_jax import errors, export, plugins, rendering, sae_loading
from gsae_jax.errors import UserError
from gsae_jax.evaluation import report
from gsae_jax.saes import contract, trained
from gsae_jax.storage import reading, run_directory, writing


def write(workdir: str, repo: str, formats: list[str], out: Path) -> None:
    """Write the new folder `out`: `FORMAT/SAE/...`, `report/...` and README.md.

    The SAEs are those of the checkpoint that the report is about.

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
    with errors.about("--workdir", step="--workdir"):
        saes = sae_loading.load(workdir, step=run_directory.reported_step(place))
    with writing.new_folder(out) as folder:
        for format in formats:  # without SAEs that have diverged
            written = export.write(saes, format, folder / format)
            saes = {name: sae for name, sae in saes.items() if name in written}
        (folder / "report").mkdir()
        for file in (place.report / name for name in report.FILES):
            if file.exists():
                (folder / "report" / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text(card(repo, formats, saes, records), "utf-8")


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


def card(repo: str, formats: list[str], saes: dict[str, trained.SAE], records: list[dict[str, Any]]) -> str:
    """The page of a repository on the hub.

    Args:
        repo: its name.
        formats: the folders in it.
        saes: those that are in each folder, by name.
        records: of the run's report.
    """
    example = next((sae for sae in saes.values() if sae.architecture != contract.BASELINE), next(iter(saes.values())))
    model = example.metadata["model_name"]
    return rendering.render(
        "model_card.md",
        **report.contents(records)
        | {
            "repo": repo,
            "formats": formats,
            "for_saelens": next((format for format in ("saelens", "jumprelu") if format in formats), ""),
            "count": len(saes),
            "name": example.name,
            "architectures": sorted({sae.architecture for sae in saes.values()}),
            "sites": sorted({site for sae in saes.values() for site in sae.sites}),
            "model": model,
            "base_model": model if model.count("/") == 1 else "",  # a name on the hub
            "dataset": example.metadata["dataset_path"],
            "context_length": example.metadata["context_size"],
        },
    )
