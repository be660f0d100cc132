"""`gsae_jax.collect` on a run and on SAEs from elsewhere, what is read back, and what is refused."""

import contextlib
import json
import re
import shutil
import sqlite3
from pathlib import Path

import filelock
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import collecting, features
from gsae_jax.collecting import Wanted, collect
from gsae_jax.exporting import export
from gsae_jax.features import neuronpedia
from gsae_jax.saes import matryoshka
from tests.refusals import refused
from tests.sae_files import make
from tests.viewed import change_about


@pytest.fixture(scope="module")
def run(collected_run):
    return collected_run


@pytest.fixture(scope="module")
def collected(run):
    """The files of the run."""
    return features.load(run)


def test_a_run_has_a_file_for_each_sae(run, collected):
    saes = gsae_jax.load(run)
    assert list(collected) == sorted(saes)
    for name, sae in saes.items():
        read = collected[name]
        about = read.about["collection"]
        assert (read.sae, len(read), about["targets"]) == (name, sae.width, [sae.site])
        assert (about["run"], about["step"], about["context_length"]) == ("run", 16, 16)
        assert read.about["tokens"] <= about["rows"] * 16 <= 4096
        columns = read.columns()
        assert {"feature", "fired", "density", "strongest", "divergence"} <= columns.keys()
        if sae.architecture == "gated":
            np.testing.assert_array_equal(columns["threshold"], np.asarray(sae.threshold, float))
            np.testing.assert_array_equal(columns["r_mag"], np.asarray(sae.r_mag, float))
        np.testing.assert_array_equal(columns["density"], columns["fired"] / read.about["tokens"])
        feature = read[int(columns["strongest"].argmax())]
        assert feature.histogram.sum() == feature.numbers["fired"] == columns["fired"][feature.number]
        (first, *_) = feature.contexts
        assert first.quantile is None
        assert first.activation == feature.numbers["strongest"] == np.float64(first.activations[first.position])
        assert len(first.tokens) == len(first.activations) == 16
        assert [len(effects) for effects in feature.effects.values()] == [20, 20]
        others = {other for other, each in saes.items() if each.targets == sae.targets}
        assert set(feature.neighbours) == others


def copied_with_text(read, folder, text):
    """The same features, with one text for all rows."""
    path = Path(shutil.copy(read.path, folder))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE rows SET text = ?", (text,))
    return features.Features(path)


def test_features_are_found_by_token_and_by_text(collected, tmp_path):
    read = collected["gated_1"]
    every = {feature.number: feature for feature in read}
    word = next(f for f in every.values() if f.contexts).contexts[0]
    token = word.tokens[word.position].strip()
    found = read.active_on(token)
    assert (
        found
        == sorted(n for n, f in every.items() if any(c.tokens[c.position].strip() == token for c in f.contexts))
        != []
    )
    text = "".join(word.tokens[3:6])
    expected = [n for n, f in every.items() if any(text.lower() in "".join(c.tokens).lower() for c in f.contexts)]
    assert read.with_context(text) == expected != []
    with_umlaut = copied_with_text(read, tmp_path, "Ägäis")
    assert with_umlaut.with_context("äGÄ") == [n for n, f in every.items() if f.contexts]
    assert with_umlaut.with_context("x" * 60_000) == []
    assert read.with_context("100%_not_there") == read.active_on("nowhere") == []
    for kind in ("direct", "ablation"):
        effect = next(f for f in every.values() if f.effects[kind]).effects[kind][0]
        expected = [
            n
            for n, f in every.items()
            if any(e.effect > 0 and e.text.strip() == effect.text.strip() for e in f.effects[kind])
        ]
        assert read.promoting(effect.text, kind) == expected != []


def test_a_card_escapes_what_texts_say(run, collected, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>"
    path = tmp_path / "gated_1.sqlite"
    path.write_bytes((run / "features" / "gated_1.sqlite").read_bytes())
    with sqlite3.connect(path) as db:
        db.execute("UPDATE tokens SET text = ?", (hostile,))
    feature = next(f for f in features.load(path)["gated_1"] if f.contexts)
    card = feature._repr_html_()
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in card
    assert "<img" not in card
    assert re.search(rf"<strong>gated_1 / {feature.number}</strong>", card)


def test_files_of_the_same_settings_stay_and_others_are_not_lost(run, collected, capsys):
    files = {path: path.stat().st_mtime_ns for path in (run / "features").glob("*.sqlite")}
    collect(Wanted(str(run), tokens=4096))
    assert files == {path: path.stat().st_mtime_ns for path in files}
    with refused("--out", "gated_0.sqlite", "rows", "--overwrite"):
        collect(Wanted(str(run), ["gated_0"], tokens=1024))
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_features_of_an_earlier_checkpoint_are_named(run, tmp_path, capsys):
    features.load(run)
    assert not capsys.readouterr().err
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report"))
    for file in (copy / "features").glob("*.sqlite"):
        change_about(file, step=12)
    for path in (copy, copy / "features", copy / "features" / "gated_0.sqlite"):
        features.load(path)
        warning = capsys.readouterr().err
        assert warning.count("warning") == 1
        assert all(fact in warning for fact in ("12", "16", f"--workdir {copy} --overwrite")), warning


def test_a_feature_and_a_context_are_short_to_print(collected):
    feature = next(f for f in collected["gated_0"] if f.contexts)
    shown = repr(feature)
    promoted = [repr(each.text) for each in feature.effects["direct"][:3]]
    numbers = [f"{feature.numbers[name]:.4g}" for name in ("density", "strongest")]
    for fact in ("gated_0", str(feature.number), *numbers, *promoted):
        assert fact in shown
    assert len(shown) < 150 > len(repr(feature.contexts[0]))
    first = feature.contexts[0]
    assert repr(first.tokens[first.position]) in repr(first)


def test_what_a_file_says_of_an_sae_is_what_it_was_told():
    """Also of options that JSON gives back as lists, such as Matryoshka's prefixes."""
    about = collecting.about_sae(make(matryoshka))
    assert about["options"]["prefixes"]
    assert json.loads(json.dumps(about)) == about


def test_a_folder_of_ones_own_and_overwriting(run, tmp_path):
    out = tmp_path / "new" / "folder"
    for tokens, rows in ((1024, 64), (512, 32)):
        collect(Wanted(str(run), ["baseline_0"], str(out), tokens, overwrite=True))
        assert {path.name for path in out.iterdir()} == {"baseline_0.sqlite", ".lock"}
        assert features.load(out)["baseline_0"].about["collection"]["rows"] == rows


def test_an_imported_sae_has_the_numbers_that_it_has_in_its_run(run, lm_dir, collected, text_dir, tmp_path):
    gsae_jax.load(run)["gated_1"].save(tmp_path / "exported")
    data = {"corpus": "text", "path": str(text_dir), "context_length": 16}
    data["data_dir"] = json.loads((run / "config.json").read_text())["data"]["data_dir"]
    wanted = Wanted(saes=[str(tmp_path / "exported")], out=str(tmp_path / "out"), tokens=4096, model=str(lm_dir))
    collect(wanted, {"data": data})
    ((name, ours),) = features.load(tmp_path / "out").items()
    theirs = collected["gated_1"].columns()
    assert name == "gated_1"
    for column, values in ours.columns().items():
        np.testing.assert_allclose(values, theirs[column], rtol=1e-4, atol=1e-5, err_msg=column)


def test_features_are_written_for_neuronpedia(run, collected, tmp_path, monkeypatch):
    """The fields of SAEDashboard's batches."""
    monkeypatch.setattr(neuronpedia, "PER_FILE", 48)
    assert export(str(run), "neuronpedia", str(tmp_path / "out")) == list(collected)
    read = collected["gated_0"]
    files = sorted((tmp_path / "out" / "gated_0").iterdir())
    assert [file.name for file in files] == ["batch-0.json", "batch-1.json"]
    batches = [json.loads(file.read_text()) for file in files]
    about = {"model_id": "small", "layer": 0, "sae_set": "gated", "sae_id_suffix": "gated_0"}
    for batch in batches:
        assert {name: batch[name] for name in about} == about
    written = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in written] == [*range(64)]
    for theirs, ours in zip(written, read, strict=True):
        assert theirs["frac_nonzero"] == ours.numbers["density"]
        assert sum(theirs["freq_hist_data_bar_heights"]) == ours.numbers["fired"]
        assert len(theirs["freq_hist_data_bar_heights"]) == len(theirs["freq_hist_data_bar_values"])
        assert [*theirs["pos_str"], *theirs["neg_str"]] == [each.text for each in ours.effects["direct"]]
        assert [*theirs["pos_values"], *theirs["neg_values"]] == [each.effect for each in ours.effects["direct"]]
        for activation, context in zip(theirs["activations"], ours.contexts, strict=True):
            assert activation["tokens"] == list(context.tokens)
            assert activation["values"][activation["qualifying_token_index"]] == context.activation
            if context.quantile is None:
                assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
                assert activation["bin_max"] == ours.numbers["strongest"]
            else:
                assert activation["bin_min"] <= context.activation <= activation["bin_max"]


def test_features_of_two_runs_are_written(collected, tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for number, read in enumerate(collected.values()):
        path = Path(shutil.copy(read.path, folder / f"{number}.sqlite"))
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            about = json.loads(db.execute("SELECT value FROM about WHERE name = 'collection'").fetchone()[0])
            about["sae"] = f"run/{about['sae']}"
            db.execute("UPDATE about SET value = ? WHERE name = 'collection'", (json.dumps(about),))
    names = export(str(folder), "neuronpedia", str(tmp_path / "out"))
    assert sorted(names) == sorted(f"run/{name}" for name in collected)
    for name in names:
        assert (tmp_path / "out" / name / "batch-0.json").exists()


def test_features_are_written_for_delphi(run, collected, tmp_path):
    """The cache of activations on the sample of rows."""
    assert export(str(run), "delphi", str(tmp_path / "out"), "gated_1") == ["gated_1"]
    folder = tmp_path / "out" / "latents" / "blocks.0.hook_mlp_out"
    assert json.loads((folder / "config.json").read_text())["ctx_len"] == 16
    tensors = safetensors.numpy.load_file(folder / "0_63.safetensors")
    numbers = collected["gated_1"].about["sample_rows"]
    tokens = gsae_jax.held_out(run, 4096).reshape(-1, 16)[numbers]
    np.testing.assert_array_equal(tensors["tokens"], tokens)
    sae, lm = (
        gsae_jax.load(run)["gated_1"],
        gsae_jax.load_lm(json.loads((run / "config.json").read_text())["lm"]["path"]),
    )
    f = np.array(sae.encode(lm.activations(tokens, [sae.site])[sae.site]))
    f[np.isin(tokens, lm.special_tokens)] = 0
    np.testing.assert_array_equal(tensors["locations"], np.argwhere(f))
    np.testing.assert_allclose(tensors["activations"], f[f != 0], rtol=1e-4, atol=1e-6)
    with refused("--sae", "gated_9"):
        export(str(run), "delphi", str(tmp_path / "two"), "gated_9")
    with refused("--step"):
        export(str(run), "delphi", str(tmp_path / "two"), step=3)
    with refused("--workdir", "gsae_jax.collect"):
        export(str(tmp_path), "delphi", str(tmp_path / "two"))
    assert not (tmp_path / "two").exists()


def test_what_cannot_be_collected_is_refused(run, collected, tmp_path, monkeypatch):
    for tokens in (0, 2**31):
        with refused("--tokens", str(tokens)):
            collect(Wanted(str(run), tokens=tokens))
    with refused("--sae", "gated_7", "gated_1"):
        collect(Wanted(str(run), ["gated_7"]))
    with refused("--out", "missing"):
        collect(Wanted(saes=[str(run)]))
    with refused("--workdir", str(tmp_path)):
        collect(Wanted(str(tmp_path)))
    with refused("--out", "gs://bucket/out"):
        collect(Wanted(str(run), out="gs://bucket/out"))
    with refused("--out", "not on this machine"):
        collect(Wanted("gs://bucket/run"))
    with refused("--tokens", "16 tokens"):
        collect(Wanted(str(run), out=str(tmp_path / "few"), tokens=15))
    with filelock.FileLock(run / "features" / ".lock"), refused("--out", "another collection"):
        collect(Wanted(str(run), tokens=4096))
    monkeypatch.setattr(collecting.jax, "process_count", lambda: 2)
    with refused("--num_processes"):
        collect(Wanted(str(run)))


def test_what_holds_no_features_is_refused(run, collected, tmp_path):
    with refused("path", "write another path"):
        features.load(tmp_path / "nothing")
    with refused("path", "gsae_jax.collect --workdir"):
        features.load(tmp_path)
    with refused("feature", "0 to 63"):
        collected["gated_0"][64]
    for wrong in ("a", slice(3), 1.5, True):
        with refused("feature", type(wrong).__name__):
            collected["gated_0"][wrong]
    whole = (run / "features" / "gated_0.sqlite").read_bytes()
    for name, content in (
        ("text", b"not a database, but long enough to be one"),
        ("cut", whole[:5000]),
        ("empty", b""),
    ):
        path = tmp_path / f"{name}.sqlite"
        path.write_bytes(content)
        with refused(str(path)):
            features.load(path)
    path = tmp_path / "later.sqlite"
    path.write_bytes(whole)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE about SET value = '2' WHERE name = 'format'")
    with refused(str(path), "format 2"):
        features.load(path)
