"""The guides' code works, notebooks are committed as they ran; (marked) they run, and the site builds unwarned."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gsae_jax.saes
from configs import base
from gsae_jax import config as config_lib
from gsae_jax import train

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def blocks(guide):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / f"{guide}.md").read_text("utf-8"), re.DOTALL)


def test_the_guides_architecture_trains_beside_the_others(config_dict, tmp_path, monkeypatch):
    source, use = blocks("architecture")
    (tmp_path / "saes").mkdir()
    (tmp_path / "saes" / "tanh.py").write_text(source)
    monkeypatch.setattr(gsae_jax.saes, "__path__", [*gsae_jax.saes.__path__, str(tmp_path / "saes")])
    importlib.invalidate_caches()
    try:
        exec(use, {"base": base, "config": config_dict, "site": "blocks.0.hook_mlp_out"})
        config_dict.mesh.data, config_dict.mesh.latent = 4, 2
        assert train.run(config_lib.from_dict(config_lib.Experiment, config_dict), tmp_path / "run") == 0
        sae = gsae_jax.load(tmp_path / "run")["tanh_1"]
    finally:
        sys.modules.pop("gsae_jax.saes.tanh", None)
    assert (sae.architecture, sae.config.width) == ("tanh", 1536)
    records = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["saes"]
    assert {record["architecture"] for record in records} == {"gated", "relu", "tanh"}


def test_the_guides_experiment_builds(lm_dir):
    (block,) = blocks("model")
    names = {}
    exec(block, names)
    experiment = config_lib.from_dict(config_lib.Experiment, names["get_config"]())
    assert {stack.architecture for stack in experiment.stacks.values()} == {"gated", "relu"}


def test_the_guides_name_commands_and_files_that_exist():
    for guide in GUIDES:
        text = guide.read_text("utf-8")
        for module in re.findall(r"python -m gsae_jax\.(\w+)", text):
            assert (ROOT / "gsae_jax" / f"{module}.py").exists(), (guide.name, module)
        for path in re.findall(r"(?<![\w/])(?:configs|launch|tests|gsae_jax)/[\w/]+\.\w+", text):
            assert (ROOT / path).exists() or path in ("configs/mine.py", "gsae_jax/saes/tanh.py"), (guide.name, path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_as_they_ran_from_top_to_bottom(path):
    assert path.stat().st_size < 400_000
    notebook = json.loads(path.read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert f"/blob/main/notebooks/{path.name})" in "".join(notebook["cells"][0]["source"])  # the badge


@pytest.mark.notebooks
def test_notebooks_run(tmp_path):
    """In a copy, one after another: they share a run."""
    import nbclient
    import nbformat

    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("runs", "build", ".venv", "*_cache"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    for name in ["quickstart", *sorted({path.stem for path in NOTEBOOKS} - {"quickstart"})]:
        path = tmp_path / "copy" / "notebooks" / f"{name}.ipynb"
        client = nbclient.NotebookClient(
            nbformat.read(path, 4), timeout=600, resources={"metadata": {"path": str(path.parent)}}
        )
        client.execute(env=environment | {"PYTHONPATH": str(tmp_path / "copy")})
    assert (tmp_path / "copy" / "runs" / "notebooks" / "report" / "report.json").exists()


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/*/index.html")}
    assert {path.stem for path in [*GUIDES, *NOTEBOOKS]} <= pages
    for page in (tmp_path / "site").rglob("*.html"):  # every picture of the site is there
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text("utf-8")):
            assert source.startswith(("http", "data:")) or (page.parent / source).exists(), (page, source)
