"""What a run becomes on the Hugging Face hub: a folder for each format, the report, and a model card made of it."""

import math
from pathlib import Path
from typing import Any

from gsae_jax import config as config_lib
from gsae_jax import export, plugins, runs
from gsae_jax import workdir as workdir_lib
from gsae_jax.config import ConfigError
from gsae_jax.evaluation import report
from gsae_jax.exchange import files
from gsae_jax.saes import contract, trained


def write(workdir: str, repo: str, formats: list[str], out: Path) -> None:
    """Write the new folder `out`: `FORMAT/SAE/...`, `report/...` and README.md.

    The SAEs are those of the checkpoint that the report is about.

    Raises:
        ConfigError: a run without a report or that checkpoint, an unknown format, or one that cannot hold one of them.
    """
    place = workdir_lib.Workdir(workdir)
    if not formats or len(set(formats)) < len(formats):
        raise ConfigError("--format", f"is {','.join(formats)!r}; write different formats such as saelens")
    for format in formats:
        plugins.load("exchange", format, having="write", field="--format")
    records = _records(place)
    saes = runs.load(workdir, step=workdir_lib.reported_step(place), field="--workdir")
    with files.new_folder(out) as folder:
        for format in formats:  # without SAEs that have diverged
            written = export.write(saes, format, folder / format)
            saes = {name: sae for name, sae in saes.items() if name in written}
        (folder / "report").mkdir()
        for file in (place.report / name for name in report.FILES):
            if file.exists():
                (folder / "report" / file.name).write_bytes(file.read_bytes())
        (folder / "README.md").write_text(_card(repo, formats, saes, records), "utf-8")


def _records(place: workdir_lib.Workdir) -> list[dict[str, Any]]:
    found = place.report / "report.json"
    if not found.exists():
        place.config()  # says so where it is no run at all
        raise ConfigError("--workdir", f"{place.path} has no report; finish its training, or run gsae_jax.evaluate")
    try:
        numbers = config_lib.parse_json(found.read_text())["saes"]
        # A metric that is not a number is null there.
        records = [{name: math.nan if value is None else value for name, value in record.items()} for record in numbers]
        for record in records:
            if not record["ce_zero"] > record["ce_clean"]:  # earlier versions wrote a number here
                record["loss_recovered"] = math.nan
        report.in_markdown(records)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{found} cannot be read ({type(error).__name__}: {error})"
        raise ConfigError("--workdir", f"{why}; run gsae_jax.evaluate, which writes it again") from error
    return records


def _card(repo: str, formats: list[str], saes: dict[str, trained.SAE], records: list[dict[str, Any]]) -> str:
    shown = next((sae for sae in saes.values() if sae.architecture != contract.BASELINE), next(iter(saes.values())))
    told = shown.metadata
    sites = ", ".join(f"`{site}`" for site in sorted({site for sae in saes.values() for site in sae.sites}))
    architectures = ", ".join(sorted({sae.architecture for sae in saes.values()}))
    for_saelens = next((format for format in ("saelens", "jumprelu") if format in formats), "")
    base_model = f"base_model: {told['model_name']}\n" if told["model_name"].count("/") == 1 else ""
    return f"""---
library_name: {"saelens" if for_saelens else "gsae_jax"}
tags: [sparse-autoencoder, {architectures}]
{base_model}---

# Sparse autoencoders of {told["model_name"]}

{len(saes)} SAEs ({architectures}) of the activations at {sites}, trained by gsae_jax on {told["dataset_path"]} in rows
of {told["context_size"]} tokens. They take activations as the language model has them. The whole report is
[here](report/report.md).

{report.in_markdown(records)}

![Loss recovered against L0](report/frontier.png)

## Use them

In gsae_jax:

```python
import gsae_jax
from huggingface_hub import snapshot_download

saes = gsae_jax.load(snapshot_download("{repo}") + "/{formats[0]}")
features = saes["{shown.name}"].encode(activations)
```

In SAELens:

```python
from sae_lens import SAE

{_in_saelens(repo, for_saelens, shown.name)}
features = sae.encode(activations)
```

In dictionary_learning:

```python
from dictionary_learning.utils import load_dictionary

{_in_dictionary_learning(repo, formats, shown.name)}
ae, config = load_dictionary(folder, device="cpu")
features = ae.encode(activations)
```
"""


def _in_saelens(repo: str, format: str, name: str) -> str:
    if format:
        return f'sae = SAE.from_pretrained(release="{repo}", sae_id="{format}/{name}")'
    return f'{_converted(name, "saelens")}\nsae = SAE.load_from_disk("{name}")'


def _in_dictionary_learning(repo: str, formats: list[str], name: str) -> str:
    if "dictionary_learning" in formats:
        load = f'folder = snapshot_download("{repo}") + "/dictionary_learning/{name}"'
        return f"from huggingface_hub import snapshot_download\n\n{load}"
    return f'{_converted(name, "dictionary_learning")}\nfolder = "{name}"'


def _converted(name: str, format: str) -> str:
    return f'saes["{name}"].save("{name}", "{format}")  # as gsae_jax has loaded it above'
