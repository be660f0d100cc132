"""What the README shows: its config builds, and (minutes: `pytest -m quickstart`) its main job keeps its promises."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import collecting, config_trees, exporting, measuring
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.data import rows
from gsae_jax.evaluation import measure, metrics
from gsae_jax.features import tables
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.saes import jumprelu
from gsae_jax.storage.run_directory import Workdir
from gsae_jax.training import preparation
from tests import feature_files, references

ROOT = Path(__file__).parent.parent
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_readmes_config_builds():
    (block,) = [block for block in PYTHON_BLOCKS if "def get_config" in block]
    names = {}
    exec(block, names)
    experiment = config_trees.from_dict(config_lib.Experiment, names["get_config"]())
    program, _ = preparation.build(experiment, mesh_lib.make_mesh(experiment.mesh), Checkpoint.open(experiment.lm.path))
    assert [stack.name for stack in program.stacks] == ["gated", "neurons", "untied"]


MINE = """
from gsae_jax import experiment_config, stack_config

def get_config():
    config = experiment_config()
    config.stacks.mine = stack_config("gated", "blocks.0.hook_mlp_out", 64, (1e-2,), tie_encoder=False)
    return config
"""
SHORT = {"train.steps": 8, "train.warmup_steps": 4, "train.batch_size": 1024, "evaluation.tokens": 4096}
SHORT |= {"activations.buffer_size": 4096, "activations.scale_tokens": 4096}


@pytest.mark.quickstart
def test_the_package_trains_without_a_clone(tmp_path):
    """From the wheel of an sdist, in an empty folder: the quickstart by name, and a config file beside it."""
    source, installed, empty = (tmp_path / name for name in ("source", "installed", "empty"))
    shutil.copytree(ROOT / "gsae_jax", source / "gsae_jax", ignore=shutil.ignore_patterns("__pycache__"))
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", *texts):
        shutil.copy(ROOT / name, source)
    empty.mkdir()

    def python(*command):
        environment = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run([sys.executable, *command], cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    # Older ones build no wheels by themselves; pip then fetches one that does.
    versions = [dist.version for dist in metadata.distributions(name="setuptools")]
    own = bool(versions) and int(versions[0].partition(".")[0]) >= 71
    options = ["--no-deps", "--wheel-dir", str(tmp_path), *(["--no-build-isolation"] if own else [])]
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], cwd=source, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    python("-m", "pip", "wheel", *options, str(sdist))
    (wheel,) = tmp_path.glob("*.whl")
    carried = {str(path.relative_to(source)) for path in (source / "gsae_jax").rglob("*") if path.is_file()}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert carried | texts <= names
    assert not {name for name in names if name.startswith(("tests", "build", ".github"))}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == carried
    assert any(name.endswith(".dist-info/licenses/LICENSE") or name.endswith(".dist-info/LICENSE") for name in names)
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    assert python("-c", "import gsae_jax; print(gsae_jax.__file__)") == str(installed / "gsae_jax" / "__init__.py")
    (empty / "mine.py").write_text(MINE)
    for config, saes in (("quickstart", 6), ("mine.py", 1)):
        changes = [f"--config.{field}={value}" for field, value in SHORT.items()]
        python("-m", "gsae_jax.train", f"--config={config}", f"--workdir=runs/{config}", *changes)
        report = json.loads((empty / "runs" / config / "report" / "report.json").read_text())
        assert len(report["saes"]) == saes


@pytest.fixture(scope="module")
def run(quickstart_run):
    return quickstart_run


@pytest.fixture(scope="module")
def held_out(run):
    """The language model, and about 100,000 held-out tokens in batches."""
    lm, config = gsae_jax.load_lm(), Workdir(run).experiment()
    return lm, list(rows.held_out(config, lm.tokenizer, 100_000))


@pytest.mark.quickstart
def test_the_gated_frontier_is_above_the_baselines(run):
    records = json.loads((run / "report" / "report.json").read_text())["saes"]
    gated, baseline = (
        sorted((r for r in records if r["architecture"] == name), key=lambda r: r["l0"]) for name in ("gated", "relu")
    )
    assert len(gated) >= 3
    assert len(baseline) >= 3
    assert all(r["width"] * 1.5 == b["width"] for r, b in zip(gated, baseline, strict=True))
    assert all(0.95 <= r["gamma"] <= 1.05 for r in gated), [r["gamma"] for r in gated]
    assert all(b["gamma"] < r["gamma"] for r, b in zip(gated, baseline, strict=True))

    # Where both have SAEs between L0 5 and 100: the gated frontier at each baseline's L0, interpolated in log L0.
    logs = [np.log([r["l0"] for r in records]) for records in (gated, baseline)]
    low, high = max(logs[0][0], logs[1][0], np.log(5)), min(logs[0][-1], logs[1][-1], np.log(100))
    assert low < high
    for at in np.linspace(low, high, 20):
        ours, theirs = (
            np.interp(at, log, [r["loss_recovered"] for r in records])
            for log, records in zip(logs, (gated, baseline), strict=True)
        )
        assert ours > theirs, np.exp(at)


@pytest.mark.quickstart
def test_the_readmes_python_example(run):
    (block,) = [block for block in PYTHON_BLOCKS if "load_lm" in block]
    names = {}
    exec(block.replace("runs/quickstart", str(run)), names)
    assert names["f"].shape == (*names["x"].shape[:2], 1024)
    assert 0 < (np.asarray(names["f"]) > 0).mean() < 0.5
    assert names["logits"].shape == (*names["x"].shape[:2], 4096)


API_BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text("utf-8"), re.DOTALL)


def test_the_references_examples(config_dict, lm_dir, tmp_path, capsys):
    """Those of docs/api.md, with a small run and its language model."""
    run, names = tmp_path / "run", {}
    gsae_jax.fit(config_dict, run)
    capsys.readouterr()
    for block in API_BLOCKS:
        block = block.replace('"runs/quickstart"', repr(str(run))).replace("load_lm()", f"load_lm({str(lm_dir)!r})")
        exec(block.replace('"gated_1"', repr(next(iter(gsae_jax.load(run))))).replace("20_000", "1024"), names)
    x, several = names["x"], names["several"]
    saes = [sae for sae in gsae_jax.load(run).values() if sae.stack == "gated"]
    assert len(several) == len(saes) > 1
    for f, sae in zip(several, saes, strict=True):
        np.testing.assert_allclose(f, sae.encode(x), rtol=1e-4, atol=1e-4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    strongest = names["f"][:, :, names["feature"]].max()
    assert float(lines[0].split()[0]) == pytest.approx(strongest, abs=0.01)
    assert not names["f"][:, 0].any()  # BOS


@pytest.mark.quickstart
def test_the_jumprelu_form_is_the_same_function_on_real_activations(run, held_out):
    """Values to 1e-5 of their own size, or of the feature's mean where a value is a small difference of large ones."""
    lm, batches = held_out
    for sae in gsae_jax.load(run).values():
        if sae.architecture != "gated":
            continue
        x = lm.activations(batches[0], [sae.site])[sae.site].reshape(-1, sae.config.d_in)
        f = np.asarray(sae.encode(x))
        params = jumprelu.from_gated(sae.params, sae.config)
        config = jumprelu.Config(sae.config.d_in, sae.config.width, sae.config.dtype)
        same = np.asarray(jumprelu.encode(params, x, config))
        references.assert_same_support(f, same, x, params)
        mean = f.sum(0) / np.maximum((f > 0).sum(0), 1)
        close = np.abs(same - f) <= 1e-5 * np.maximum(f, mean[None])
        assert close[(same > 0) == (f > 0)].all(), sae.name


@pytest.mark.quickstart
def test_exported_saes_measure_as_they_did(run, tmp_path):
    assert exporting.export(str(run), "saelens", str(tmp_path / "exported")) == list(gsae_jax.load(run))
    measuring.evaluate_saes([str(tmp_path / "exported")], str(tmp_path / "report"), tokens=2**16)
    here, there = (
        json.loads((folder / "report.json").read_text())["saes"] for folder in (tmp_path / "report", run / "report")
    )
    assert len(here) == len(there) == 6
    for ours, theirs in zip(here, there, strict=True):
        told = [name for name, value in theirs.items() if not isinstance(value, float | dict)]
        assert [ours[name] for name in told] == [theirs[name] for name in told]
        numbers = {name: value for name, value in theirs.items() if isinstance(value, float)}
        assert {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


@pytest.mark.quickstart
@pytest.mark.variants
@pytest.mark.parametrize("name", ["gated_1", "baseline_1"])
def test_collected_features_equal_numpy(run, tmp_path, name):
    """On 16,384 tokens; and the activations themselves equal float64."""
    collecting.collect(collecting.Wanted(str(run), [name], str(tmp_path), 2**14))
    lm, sae = gsae_jax.load_lm(), gsae_jax.load(run)[name]
    tokens = gsae_jax.held_out(run, 2**14)
    x = np.concatenate([lm.activations(part, [sae.site])[sae.site] for part in np.array_split(tokens, 4)])
    f = np.concatenate([sae.encode(part) for part in np.array_split(x, 4)])
    valid = ~np.isin(tokens, lm.special_tokens) & (np.linalg.norm(x, axis=-1) <= sae.norm_limit)
    f[~valid] = 0
    feature_files.assert_kept(tables.opened(tmp_path / f"{name}.sqlite"), tokens, f, valid)
    p = {key: np.asarray(value, np.float64) for key, value in sae.params.items()}
    if name.startswith("gated"):
        pi = (x.astype(np.float64) - p["b_dec"]) @ p["W_gate"]
        expected = np.where(pi + p["b_gate"] > 0, np.maximum(np.exp(p["r_mag"]) * pi + p["b_mag"], 0), 0)
    else:
        expected = np.maximum((x.astype(np.float64) - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    expected[~valid] = 0
    # Rounding may open or close a gate that is just at its threshold.
    apart = np.abs(f - expected) > 1e-4
    assert apart.sum() < 1e-5 * f.size
    assert ((f == 0) | (expected == 0))[apart].all()


@pytest.mark.quickstart
def test_pursuit_beats_the_encoder(run, held_out):
    """At the encoder's L0 or just below, the same dictionary recovers more with features chosen by pursuit."""
    lm, batches = held_out
    tokens = [batches[0][:4]]
    for sae in gsae_jax.load(run).values():
        l0 = (np.asarray(sae.encode(lm.activations(tokens[0], [sae.site])[sae.site])) > 0).sum(-1)
        found = measure.measure(
            lm, [sae], tokens, lm.special_tokens, ito=(int(l0[~np.isin(tokens[0], lm.special_tokens)].mean()),)
        )
        encoder, pursuit = (metrics.combine(sums) for sums in found.values())
        assert pursuit["l0"] <= encoder["l0"]
        assert pursuit["fvu"] < encoder["fvu"], sae.name
        assert pursuit["loss_recovered"] > encoder["loss_recovered"], sae.name


@pytest.mark.quickstart
@pytest.mark.variants
def test_sums_over_many_tokens_are_exact(run, held_out):
    """All that is done after the features and the logits, again in float64, over 100,000 tokens: to 1e-6."""
    lm, batches = held_out
    sae = gsae_jax.load(run)["gated_1"]
    ours = metrics.combine(measure.measure(lm, [sae], batches, lm.special_tokens)[sae.name])

    @jax.jit
    def logits(tokens, replacement):
        return lm.run(tokens, lambda site, x: replacement if site == sae.site else x)[:, :-1]

    def nats(tokens, replacement):
        found = np.asarray(logits(tokens, replacement.astype(np.float32)), np.float64)
        highest = found.max(-1)
        totals = np.log(np.exp(found - highest[..., None]).sum(-1)) + highest
        return (totals - np.take_along_axis(found, tokens[:, 1:, None], -1)[..., 0]).sum()

    sites = [np.asarray(lm.activations(tokens, [sae.site])[sae.site]) for tokens in batches]
    valid = [~np.isin(tokens, lm.special_tokens) for tokens in batches]
    n = sum(v.sum() for v in valid)
    mean = sum(x[v].sum(0, dtype=np.float64) for x, v in zip(sites, valid, strict=True)) / n
    W_dec, b_dec = (np.asarray(sae.params[name], np.float64) for name in ("W_dec", "b_dec"))
    totals = dict.fromkeys(("l0", "l1", "error", "variance", "x_hat_sq", "dot", "clean", "sae", "zero", "mean"), 0.0)
    for tokens, x, v in zip(batches, sites, valid, strict=True):
        f = np.asarray(sae.encode(x))[v].astype(np.float64)
        x_hat, y = f @ W_dec + b_dec, x[v].astype(np.float64)
        reconstructed = x.copy()
        reconstructed[v] = x_hat
        replaced = {"clean": x, "sae": reconstructed, "zero": np.where(v[..., None], 0, x)}
        replaced["mean"] = np.where(v[..., None], mean, x)
        found = {kind: nats(tokens, value) for kind, value in replaced.items()}
        found |= {"l0": (f > 0).sum(), "l1": f.sum(), "error": ((y - x_hat) ** 2).sum()}
        found |= {"variance": ((y - mean) ** 2).sum(), "x_hat_sq": (x_hat**2).sum(), "dot": (x_hat * y).sum()}
        totals = {key: total + found[key] for key, total in totals.items()}
    predictions = sum(tokens[:, 1:].size for tokens in batches)
    expected = {f"ce_{kind}": totals[kind] / predictions for kind in ("clean", "sae", "zero", "mean")}
    expected |= {"l0": totals["l0"] / n, "l1": totals["l1"] / n, "fvu": totals["error"] / totals["variance"]}
    expected |= {"gamma": totals["x_hat_sq"] / totals["dot"], "tokens": n}
    expected["loss_recovered"] = 1 - (totals["sae"] - totals["clean"]) / (totals["zero"] - totals["clean"])
    assert n > 95_000
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-6)
