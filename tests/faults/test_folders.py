"""Runs, models and texts under odd names and in other places work; folders of other libraries work or are refused.

python -m pytest -n 0 -m faults tests/faults/test_folders.py
"""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_loading
from gsae_jax.data import rows
from gsae_jax.errors import UserError
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.storage import paths as storage_paths
from gsae_jax.storage import run_directory
from gsae_jax.training import loop, preparation
from tests import sae_files
from tests.conftest import tiny
from tests.faults import mutants
from tests.faults.trials import FEW, MANY, try_mutants

REAL = Path(__file__).parents[3] / "shared" / "real" / "saelens_jumprelu"
NAMES = (
    "a b",
    " a ",
    "-a",
    "--workdir=a",
    ".a",
    "a.",
    "...",
    "~",
    "~root",
    "$HOME",
    "a'b",
    'a"b',
    "a;b&c|d",
    "100%",
    "%2F",
    "a#b",
    "a:b",
    "a=b,c",
    "{a}",
    "{0}",
    "(1)",
    "a\nb",
    "a\tb",
    "\x1b[31m",
    "é",
    "e\u0301",
    "\u202eabc",
    "日本語",
    "\U0001f600",
    "null",
    "8",
    "config.json",
    "checkpoints",
    "model.safetensors",
    "a" * 200,
    "C:",
)

PATTERNS = ("a*", "a?b", "[a]", "[!a]", "**", "a\\b")  # if they were taken for some


def places(draw, folder):
    """Run, model and text under other names, some through links, some below another folder."""
    names = {}
    for kind in ("run", "lm", "text"):
        above = folder / f"{draw.choice(NAMES)} above" if draw.random() < 0.3 else folder  # never in another kind's
        above.mkdir(exist_ok=True)
        choice = NAMES if kind == "run" else NAMES + PATTERNS
        name = draw.choice([name for name in choice if not (above / name).exists()])
        (folder / kind).rename(above / name)
        path = above / name
        if draw.random() < 0.3:
            free = [name for name in NAMES if not os.path.lexists(folder / name)]
            link = folder / draw.choice(free)
            link.symlink_to(path if draw.random() < 0.5 else os.path.relpath(path, folder), target_is_directory=True)
            path = link
        names[kind] = str(path.relative_to(folder))
    where = draw.choice(("absolute", "relative", "above", "dotted"))
    (folder / "names.json").write_text(json.dumps(names | {"where": where}))


def use_places(folder):
    try:
        compare_places(folder)
    except UserError as error:
        raise AssertionError((folder / "names.json").read_text()) from error


def compare_places(folder):
    """All that a run which continues, and one that is measured, compares; nothing is compiled."""
    names = json.loads((folder / "names.json").read_text())
    where, here = names.pop("where"), Path.cwd()
    below = folder if where == "relative" else folder.parent
    prefix = {
        "absolute": f"{folder}/",
        "relative": "",
        "above": f"{folder.name}/",
        "dotted": f"./../{below.name}/mutant/",
    }
    paths = {kind: prefix[where] + name for kind, name in names.items()}
    paths = {kind: f"./{path}" if path.startswith("~") else path for kind, path in paths.items()}  # else it is a home
    with contextlib.chdir(below):
        recorded = run_directory.Workdir(paths["run"]).experiment()
        experiment = dataclasses.replace(
            recorded,
            lm=dataclasses.replace(recorded.lm, path=paths["lm"]),
            data=dataclasses.replace(recorded.data, path=paths["text"]),
        )
        workdir = run_directory.Workdir(paths["run"])
        assert workdir.sound_step() == 8
        workdir.check(config_trees.to_dict(sae_loading.pinned(experiment, paths["run"])))
        facts, checkpoint = workdir.facts(8), Checkpoint.open(paths["lm"])
        workdir.check_model(facts, experiment.lm, checkpoint.fingerprint())
        tokenizer = checkpoint.tokenizer()
        train = rows.open_rows(experiment.data, "train", tokenizer, preparation.tokens_needed(experiment))
        held_out = rows.held_out_rows(experiment, tokenizer, experiment.evaluation.tokens)
        assert (facts.rows, facts.held_out) == (train.fingerprint, held_out.fingerprint)
        assert set(gsae_jax.load(paths["run"])) == {"gated_0", "baseline_0"}
        assert Path(storage_paths.absolute(paths["text"])).is_absolute()
    assert Path.cwd() == here


def a_foreign_file(draw, folder):
    """Other contents of a file, or a file gone, under another name or beside the others; or all as it was."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file, kind = draw.choice(files), draw.randrange(10)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        file.rename(file.with_name(draw.choice(("cfg.json", "config.json", "ae.pt", "sae.safetensors", "params.npz"))))
    elif kind == 2:
        strays = ("config.json", "cfg.json", "ae.pt", "sae.safetensors", "params.npz", "tokenizer.json")
        (file.parent / draw.choice(strays)).write_text(draw.choice(("", "{}", "[]", json.dumps({"seed": 0}))))
    elif kind == 3:
        (folder / "inside").mkdir()
        for path in list(folder.iterdir()):
            if path.name != "inside":
                path.rename(folder / "inside" / path.name)
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    elif kind > 4:
        mutate = {".json": mutants.json_file, ".safetensors": mutants.safetensors_file}.get(file.suffix, mutants.file)
        file.write_bytes(mutate(draw, file.read_bytes()))


def use_foreign(folder):
    for sae in gsae_jax.load(folder).values():
        assert np.isfinite(np.asarray(sae(np.ones((2, sae.config.d_in), np.float32)))).all()


KINDS = {
    "paths": ("places", places, use_places),
    "foreign folders": ("foreign", a_foreign_file, use_foreign),
}
ALWAYS = ("paths",)  # that work


@pytest.fixture(scope="module")
def originals(tmp_path_factory, text_dir, lm_dir):
    """What mutants are made of."""
    root = tmp_path_factory.mktemp("folders")
    shutil.copytree(lm_dir, root / "places" / "lm")
    (root / "places" / "text").mkdir()
    (root / "places" / "text" / "a.txt").write_text((text_dir / "a.txt").read_text()[:120_000])
    config = tiny(root / "places" / "text", root / "places" / "lm", root / "tfds")
    config.stacks.gated.l1_coefficients, config.stacks.gated.seeds = (0.01,), (0,)
    config.train.steps, config.evaluation.tokens = 8, 256
    loop.train(config_trees.from_dict(config_lib.Experiment, config), root / "places" / "run")

    (root / "foreign").mkdir()
    for kind in ("gated", "relu", "jumprelu", "topk", "batch_topk"):
        sae_files.SAES[kind]().save(root / "foreign" / f"saelens {kind}")
    for version, change in {"3": {}, "5": {"architecture": "gated"}, "5 topk": {"activation_fn_str": "topk"}}.items():
        earlier = root / "foreign" / f"saelens {version}"
        shutil.copytree(root / "foreign" / "saelens relu", earlier)
        (earlier / "cfg.json").write_text(json.dumps(sae_files.EARLIER_SAELENS | change))
    sae_files.SAES["jumprelu"]().save(root / "foreign" / "scope", "gemma_scope")
    for act_fn in ("relu", "jumprelu", "topk"):
        sae_files.llamascopium(root / "foreign" / act_fn, act_fn=act_fn)
    sae_files.sparsify(root / "foreign" / "sparsify")
    (root / "foreign" / "several").mkdir()
    shutil.copytree(root / "foreign" / "scope", root / "foreign" / "several" / "a")
    shutil.copytree(root / "foreign" / "sparsify", root / "foreign" / "several" / "b")
    if REAL.exists():
        shutil.copytree(REAL, root / "foreign" / "real")
    return {"places": [root / "places"], "foreign": sorted((root / "foreign").iterdir())}


@pytest.mark.parametrize("kind", KINDS)
def test_folders(kind, originals, tmp_path):
    counts = try_mutants(kind, originals, tmp_path, range(FEW), KINDS)
    assert counts["worked"] == FEW if kind in ALWAYS else counts["refused"]


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_many_folders(kind, originals, tmp_path, table):
    table[kind] = try_mutants(kind, originals, tmp_path, range(FEW, FEW + MANY), KINDS)
    assert table[kind]["worked"] == MANY if kind in ALWAYS else table[kind]["worked"] > MANY // 50
    assert kind in ALWAYS or table[kind]["refused"] > MANY // 50
