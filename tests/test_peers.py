"""Our exports in SAELens and dictionary_learning, and their SAEs here (`pytest -m peers`, with torch)."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import gsae_jax
from benchmarks.peers_environment import environment
from gsae_jax.data import rows
from gsae_jax.formats import jumprelu
from gsae_jax.lms import checkpoints
from gsae_jax.publishing import model_card
from gsae_jax.storage.run_directory import Workdir
from tests import references

pytestmark = pytest.mark.peers
SITE = "blocks.0.hook_mlp_out"
FORMATS = ("saelens", "jumprelu", "gemma_scope", "dictionary_learning")


@pytest.fixture(scope="module")
def folder(quickstart_run, tmp_path_factory):
    """Held-out tokens, activations, and a gated SAE and a baseline of the quickstart in every format."""
    folder = tmp_path_factory.mktemp("peers")
    lm, config = gsae_jax.load_lm(), Workdir(quickstart_run).experiment()
    batches = np.stack(list(rows.held_out(config, lm.tokenizer, config.evaluation.tokens)))
    np.save(folder / "tokens.npy", batches)
    np.save(folder / "x.npy", np.asarray(lm.activations(batches[0], [SITE])[SITE]).reshape(-1, lm.sites[SITE]))
    (folder / "special_tokens.json").write_text(json.dumps(lm.special_tokens))
    shutil.copytree(checkpoints.EMBEDDED, folder / "lm")
    for name in ("gated_1", "baseline_1"):
        for format in FORMATS:
            gsae_jax.load(quickstart_run)[name].save(folder / "ours" / format / name, format)
    return folder


def ask(order, folder):
    worker = Path(__file__).with_name("peers_worker.py")
    subprocess.run([environment(), worker, order, folder], check=True)


def outputs(file):
    """{name: {"f", "x_hat"}} of what the worker saved."""
    found = {}
    for key, value in np.load(file).items():
        name, _, kind = key.partition(":")
        found.setdefault(name, {})[kind] = value
    return found


def assert_same(sae, x, theirs):
    """Features to 1e-5 of a token's largest, reconstructions to 1e-5 of their norm."""
    f = np.asarray(sae.encode(x))
    assert 0.01 < (f > 0).mean() < 0.9
    references.assert_same_support(f, theirs["f"], x, jumprelu.form(sae).params)
    close = np.abs(f - theirs["f"]) <= 1e-5 * f.max(-1, keepdims=True)
    assert close[(f > 0) == (theirs["f"] > 0)].all()
    x_hat = np.asarray(sae.decode(f))
    error, norms = (np.linalg.norm(value, axis=-1) for value in (x_hat - theirs["x_hat"], x_hat))
    assert (error <= 1e-5 * norms).all()


def test_their_readers_give_our_features(folder, quickstart_run):
    ask("read", folder)
    x, saes = np.load(folder / "x.npy"), gsae_jax.load(quickstart_run)
    found = outputs(folder / "read.npz")
    assert sorted(found) == sorted(f"{format}/{name}" for format in FORMATS for name in ("gated_1", "baseline_1"))
    for name, theirs in found.items():
        assert_same(saes[name.partition("/")[2]], x, theirs)


def test_their_saes_give_the_same_features_here(folder):
    """Gated, ReLU and JumpReLU ones; with inputs that are centred and that are not."""
    ask("make", folder)
    x, saes = np.load(folder / "x.npy"), gsae_jax.load(folder / "theirs")
    found = outputs(folder / "made.npz")
    assert sorted(found) == sorted(saes)
    assert len(found) == 10
    kinds = {"gated": "gated", "standard": "relu", "jumprelu": "jumprelu"}
    trainers = ("gated", "relu", "jumprelu", "relu")
    for name, theirs in found.items():
        stack, _, index = name.rpartition("_")
        assert saes[name].architecture == kinds.get(stack, trainers[int(index)]), name
        assert saes[name].metadata["model_name"] == "small"
        assert_same(saes[name], x, theirs)


def test_the_model_card_loads_in_their_libraries(folder, quickstart_run):
    model_card.write(str(quickstart_run), "user/name", ["saelens", "dictionary_learning"], folder / "repo")
    ask("card", folder)
    sae, x = gsae_jax.load(quickstart_run)["gated_0"], np.load(folder / "x.npy")
    found = np.load(folder / "card.npz")
    assert sorted(found) == ["dictionary_learning", "saelens"]
    for theirs in found.values():
        f = np.asarray(sae.encode(x))
        references.assert_same_support(f, theirs, x, jumprelu.form(sae).params)


def test_saelens_measures_what_our_report_says(folder, quickstart_run):
    """Its own evaluation, on the same tokens, with the embedded model in TransformerLens."""
    ask("measure", folder)
    ours = {r["name"]: r for r in json.loads((quickstart_run / "report" / "report.json").read_text())["saes"]}
    found = json.loads((folder / "measured.json").read_text())
    assert sorted(found) == ["baseline_1", "gated_1"]
    for name, theirs in found.items():
        record = ours[name]
        expected = {"l0": record["l0"], "explained_variance": 1 - record["fvu"]}
        expected |= {"ce_loss_score": record["loss_recovered"], "l1": record["l1"], "cossim": record["cosine"]}
        assert {key: theirs[key] for key in expected} == pytest.approx(expected, rel=1e-5), name
