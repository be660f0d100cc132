"""Stores made of other programs' files, and runs from them without a language model."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax import (
    collecting,
    config_trees,
    experiment_config,
    exporting,
    measuring,
    stack_config,
    storing,
    train,
)
from gsae_jax import config as config_lib
from gsae_jax.activations import imports
from gsae_jax.activations import store as store_lib
from gsae_jax.training import loop
from tests.refusals import refused

S, T, D = 60, 24, 8
SETTINGS = imports.Settings(sites=("vision.layer.3",), context_length=16)


@pytest.fixture(scope="module")
def x():
    """[S, T, D] of sequences, whose directions a small SAE can find."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(20, D))
    active = rng.random((S, T, 20)) < 0.1
    noise = 0.01 * rng.normal(size=(S, T, D))
    return (active * rng.random((S, T, 20)) @ directions + 0.5 + noise).astype(np.float32)


def write(files, out, settings=SETTINGS, **options):
    paths = [str(file) for file in files]
    return storing.of_files(paths, storing.Wanted(str(out), shard_bytes=16 * D * 4 * 16, **options), settings)


def everything(out):
    """All tokens of the store, as the rows of the files."""
    store = store_lib.Store.open(out)
    parts = [store.rows(split).arrays.read(range(len(store.rows(split)))) for split in ("train", "test")]
    mask = np.concatenate([part.mask for part in parts])
    values = {site: np.concatenate([part.activations[site] for part in parts]) for site in store.manifest.widths}
    tokens = None if parts[0].tokens is None else np.concatenate([part.tokens for part in parts])
    return values, mask, tokens


def save_arrow(path, x, extension=False, tokens=None):
    """As `datasets.save_to_disk` writes it: a folder with an Arrow stream, one row a sequence."""
    path.mkdir()
    columns = {"vision.layer.3": pyarrow.array(x.tolist(), pyarrow.list_(pyarrow.list_(pyarrow.float32())))}
    if tokens is not None:
        columns["token_ids"] = pyarrow.array(tokens.tolist(), pyarrow.list_(pyarrow.int32()))
    table = pyarrow.table(columns)
    half = len(x) // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        with pyarrow.ipc.new_stream(path / f"data-{number:05}-of-00002.arrow", table.schema) as stream:
            stream.write_table(part, max_chunksize=7)
    (path / "dataset_info.json").write_text("{}")
    (path / "state.json").write_text("{}")


def save(kind, folder, x):
    flat = x.reshape(-1, D)
    if kind == "npy":
        np.save(folder / "a.npy", flat)
    elif kind == "sequences.npy":
        np.save(folder / "a.npy", x)
    elif kind == "folder":
        for number, part in enumerate(np.split(flat, 12)):
            np.save(folder / f"{number}.npy", part)
    elif kind == "npz":
        np.savez(folder / "a.npz", **{"vision.layer.3": x})
    elif kind == "safetensors":
        safetensors.numpy.save_file({"vision.layer.3": x, "other": x + 1}, folder / "a.safetensors")
    elif kind == "parquet":
        table = pyarrow.table({"vision.layer.3": pyarrow.array(flat.tolist(), pyarrow.list_(pyarrow.float32()))})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=100)
    elif kind == "fixed.parquet":
        column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.ravel()), D)
        pyarrow.parquet.write_table(pyarrow.table({"vision.layer.3": column}), folder / "a.parquet")
    else:
        save_arrow(folder / "saved", x)


@pytest.mark.parametrize(
    "kind",
    ["npy", "sequences.npy", "folder", "npz", "safetensors", "parquet", "fixed.parquet", "arrow"],
)
def test_every_kind_of_file(x, tmp_path, kind):
    (tmp_path / "files").mkdir()
    save(kind, tmp_path / "files", x)
    write([tmp_path / "files"], tmp_path / "s")
    values, mask, tokens = everything(tmp_path / "s")
    assert tokens is None
    assert mask.sum() == S * T
    # Each row is a piece of the files, and all pieces are there once.
    pieces = values["vision.layer.3"]
    starts = {piece[0].tobytes(): number for number, piece in enumerate(pieces)}
    flat = x.reshape(-1, D)
    order = [starts[flat[start].tobytes()] for start in range(0, S * T, 16)]
    assert sorted(order) == list(range(len(pieces)))
    assert order != sorted(order)  # they are shuffled
    np.testing.assert_array_equal(pieces[order].reshape(-1, D)[: S * T], flat)


def test_tokens_masks_and_several_sites(x, tmp_path):
    tokens = np.arange(S * T, dtype=np.int64).reshape(S, T) % 50
    mask = np.ones((S, T), np.int8)
    mask[:, -3:] = 0
    arrays = {"a.1": x, "a.2": 2 * x, "input_ids": tokens, "attention_mask": mask}
    safetensors.numpy.save_file(arrays, tmp_path / "f.safetensors")
    settings = imports.Settings(context_length=16, special_tokens=(7,))
    write([tmp_path / "f.safetensors"], tmp_path / "s", settings)
    values, seen, ids = everything(tmp_path / "s")
    np.testing.assert_array_equal(values["a.2"], 2 * values["a.1"])
    assert seen.sum() == mask.sum()
    by_token = {tuple(row): token for row, token in zip(x.reshape(-1, D).round(5), tokens.ravel(), strict=True)}
    for row, token in list(zip(values["a.1"][seen].round(5), ids[seen], strict=True))[:200]:
        assert by_token[tuple(row)] == token
    assert store_lib.Store.open(tmp_path / "s").manifest.special_tokens == (7,)


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_arrays_that_are_not_named_are_not_looked_at(x, tmp_path, kind):
    arrays = {"a": x, "labels": np.arange(len(x)), "weight": np.ones(3, np.float32)}
    if kind == "npz":
        np.savez(tmp_path / "a.npz", **arrays, objects=np.array([{}], object))
    else:
        safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    write([tmp_path / f"a.{kind}"], tmp_path / "s", imports.Settings(("a",), 16))
    assert {*everything(tmp_path / "s")[0]} == {"a"}
    with refused("--sites", "'b'", "a"):
        write([tmp_path / f"a.{kind}"], tmp_path / "t", imports.Settings(("b",), 16))


def test_bfloat16_and_float64(x, tmp_path):
    safetensors.numpy.save_file({"a": x.astype(ml_dtypes.bfloat16)}, tmp_path / "f.safetensors")
    write([tmp_path / "f.safetensors"], tmp_path / "s", imports.Settings(context_length=16))
    assert store_lib.Store.open(tmp_path / "s").manifest.dtype == "bfloat16"
    np.save(tmp_path / "d.npy", x.astype(np.float64))
    write([tmp_path / "d.npy"], tmp_path / "d")
    assert store_lib.Store.open(tmp_path / "d").manifest.dtype == "float32"


def test_is_continued(x, tmp_path):
    np.save(tmp_path / "a.npy", x)
    write([tmp_path / "a.npy"], tmp_path / "s")
    values, _, _ = everything(tmp_path / "s")
    (tmp_path / "s" / store_lib.INDEX).unlink()
    (tmp_path / "s" / "train" / "shards" / "1.json").unlink()
    (tmp_path / "s" / "train" / "vision.layer.3" / "c" / "1" / "0" / "0").unlink()
    write([tmp_path / "a.npy"], tmp_path / "s")
    np.testing.assert_array_equal(everything(tmp_path / "s")[0]["vision.layer.3"], values["vision.layer.3"])
    np.save(tmp_path / "a.npy", x + 1)
    with refused("--out", "text"):
        write([tmp_path / "a.npy"], tmp_path / "s")


def test_held_out_rows_do_not_depend_on_how_many_are_trained_on(x, tmp_path):
    np.save(tmp_path / "a.npy", x)
    write([tmp_path / "a.npy"], tmp_path / "all")
    write([tmp_path / "a.npy"], tmp_path / "some", tokens=320)
    all_rows, some = (store_lib.Store.open(tmp_path / name) for name in ("all", "some"))
    assert some.manifest.rows["train"] == 20
    for ours, theirs in ((some.rows("test"), all_rows.rows("test")), (some.rows("train"), all_rows.rows("train"))):
        count = len(ours)
        np.testing.assert_array_equal(
            ours.arrays.read(range(count)).activations["vision.layer.3"],
            theirs.arrays.read(range(count)).activations["vision.layer.3"],
        )


@pytest.mark.parametrize(
    ("case", "field", "fact"),
    [
        ("integers", "--from", "int64"),
        ("widths", "--from", "width"),
        ("missing", "--from", "does not exist"),
        ("kind", "--from", "not of a known kind"),
        ("empty", "--from", "no file"),
        ("ragged", "--from", "different widths"),
        ("counts", "--from", "different numbers of tokens"),
        ("site", "--sites", "no.such"),
        ("names", "--sites", "one array"),
        ("broken", "--from", "cannot be read"),
        ("pickle", "--from", "cannot be read"),
        ("vector", "--from", "shape"),
        ("tokens", "--from", "no array of activations"),
    ],
)
def test_unusable_files(x, tmp_path, case, field, fact):
    folder, settings = tmp_path / "f", SETTINGS
    folder.mkdir()
    if case == "integers":
        np.save(folder / "a.npy", np.arange(64).reshape(8, 8))
    elif case == "widths":
        np.save(folder / "a.npy", x)
        np.save(folder / "b.npy", x[..., :4])
    elif case == "missing":
        folder = tmp_path / "no"
    elif case == "kind":
        (tmp_path / "a.txt").write_text("words")
        folder = tmp_path / "a.txt"
    elif case == "ragged":
        column = pyarrow.array([[1.0, 2.0], [3.0]], pyarrow.list_(pyarrow.float32()))
        pyarrow.parquet.write_table(pyarrow.table({"vision.layer.3": column}), folder / "a.parquet")
    elif case == "counts":
        np.savez(folder / "a.npz", **{"vision.layer.3": x, "other": x[:4]})
        settings = imports.Settings(context_length=16)
    elif case == "site":
        safetensors.numpy.save_file({"a": x}, folder / "a.safetensors")
        settings = imports.Settings(sites=("no.such",))
    elif case == "names":
        np.save(folder / "a.npy", x)
        settings = imports.Settings(sites=("a", "b"))
    elif case == "broken":
        (folder / "a.safetensors").write_bytes(b"12345678")
    elif case == "pickle":
        np.save(folder / "a.npy", np.array([{}], object), allow_pickle=True)
    elif case == "vector":
        np.save(folder / "a.npy", x[0, 0])
    elif case == "tokens":
        np.savez(folder / "a.npz", tokens=np.arange(8))
        settings = imports.Settings(context_length=16)
    with refused(field, fact):
        write([folder], tmp_path / "s", settings)
    assert not (tmp_path / "s" / store_lib.MANIFEST).exists()


@pytest.mark.parametrize("dtype", store_lib.DTYPES)
def test_a_store_has_the_dtype_that_is_asked_for(x, tmp_path, dtype):
    np.save(tmp_path / "a.npy", x)
    write([tmp_path / "a.npy"], tmp_path / "s", dtype=dtype)
    values, mask, _ = everything(tmp_path / "s")
    stored = values["vision.layer.3"][mask]
    assert stored.dtype.name == dtype
    np.testing.assert_allclose(stored.astype(np.float64).sum(0), x.reshape(-1, D).sum(0), rtol=1e-2)


@pytest.mark.parametrize(
    ("case", "field", "facts"),
    [
        ("nan", "--from", ("b.npy", "row 1,000", "float32")),
        ("inf", "--from", ("b.npy", "row 1,000", "float32")),
        ("large", "--from", ("b.npy", "row 1,000", "float16")),
        ("twice", "--from", ("b.npy",)),
        ("length", "--context_length", ("5000", "2,880")),
        ("shard", "--shard_megabytes", ()),
    ],
)
def test_a_store_that_cannot_be_made_leaves_nothing(x, tmp_path, case, field, facts):
    folder, flat, settings = tmp_path / "f", x.reshape(-1, D).copy(), SETTINGS
    folder.mkdir()
    np.save(folder / "a.npy", flat)
    flat[1000, 3] = {"nan": np.nan, "inf": np.inf, "large": 1e30}.get(case, 0)
    np.save(folder / "b.npy", flat)
    files = [folder, folder / "b.npy"] if case == "twice" else [folder]
    if case == "length":
        settings = imports.Settings(sites=SETTINGS.sites, context_length=5000)
    wanted = storing.Wanted(
        str(tmp_path / "s"),
        dtype="float16" if case == "large" else "",
        shard_bytes=2**60 if case == "shard" else 16 * D * 4 * 16,
    )
    with refused(field, *facts):
        storing.of_files([str(file) for file in files], wanted, settings)
    assert [file.name for file in (tmp_path / "s").rglob("*") if file.name != storing.LOCK] == []


def test_a_masked_activation_may_be_anything(x, tmp_path):
    broken = x.copy()
    broken[3, 4] = np.nan
    np.savez(tmp_path / "a.npz", **{"vision.layer.3": broken, "mask": ~np.isnan(broken).any(-1)})
    write([tmp_path / "a.npz"], tmp_path / "s")
    values, mask, _ = everything(tmp_path / "s")
    assert np.isfinite(values["vision.layer.3"][mask]).all()


def test_special_tokens_need_token_ids(x, tmp_path):
    np.save(tmp_path / "a.npy", x)
    with refused("--special_tokens", "token ids"):
        write([tmp_path / "a.npy"], tmp_path / "s", dataclasses.replace(SETTINGS, special_tokens=(0,)))


def test_a_seed_below_zero_is_refused():
    with refused("--seed", "-1"):
        imports.Settings(seed=-1)


@pytest.fixture(scope="module")
def run(x, tmp_path_factory):
    """(store, finished run without a language model)"""
    folder = tmp_path_factory.mktemp("vision")
    np.save(folder / "a.npy", x)
    write([folder / "a.npy"], folder / "store", imports.Settings(("vision.layer.3",), 16, held_out=0.2))
    config = experiment_config()
    config.data.source, config.lm.path = f"store:{folder / 'store'}", "none"
    config.data.context_length = 16
    config.stacks.gated = stack_config("gated", "vision.layer.3", 32, (0.003, 0.03), learning_rates=(1e-2,))
    config.activations.rows_per_forward, config.activations.buffer_size = 8, 512
    config.activations.scale_tokens = 512
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 400, 64, 20
    config.evaluation.rows_per_forward = 8
    assert train.run(config, folder / "run") == 0
    return folder / "store", folder / "run", config


def test_settings_of_text_need_the_text(run, tmp_path):
    config = run[2].copy_and_resolve_references()
    config.data.corpus, config.data.path, config.data.chat = "text", str(tmp_path), "messages"
    config.data.roles = ("assistant",)
    with refused("data.corpus", "'text'", str(run[0])):
        loop.train(config_trees.from_dict(config_lib.Experiment, config), tmp_path / "run")
    for group, field, value in (("data", "prepend_bos", False), ("lm", "revision", "main")):
        config = run[2].copy_and_resolve_references()
        config[group][field] = value
        with refused(f"{group}.{field}", repr(value), str(run[0])):
            loop.train(config_trees.from_dict(config_lib.Experiment, config), tmp_path / "run")


def test_trains_without_a_language_model(run, x):
    _, path, _ = run
    report = json.loads((path / "report" / "report.json").read_text())
    assert len(report["saes"]) == 2
    dense, sparse = report["saes"]
    for record in (dense, sparse):
        assert record["loss_recovered"] is None
        assert record["kl"] is None
        assert record["ce_clean"] is None
        assert 0 < record["fvu"] < 0.5
    assert dense["fvu"] < sparse["fvu"]
    assert sparse["l0"] < dense["l0"]
    assert any("no language model" in note for note in report["notes"])
    assert not any("diverged" in note for note in report["notes"])
    assert (path / "report" / "frontier.png").exists()
    assert "explained" in (path / "report" / "report.html").read_text()
    # The reported FVU is that of the SAE from Python, on the held-out rows.
    store = store_lib.Store.open(run[0])
    test = store.rows("test")
    batch = test.arrays.read(range(len(test)))
    inputs = batch.activations["vision.layer.3"][batch.mask].astype(np.float64)
    sae = gsae_jax.load(path)["gated_0"]
    error = np.square(inputs - np.asarray(sae(inputs.astype(np.float32)))).sum()
    expected = error / np.square(inputs - inputs.mean(0)).sum()
    np.testing.assert_allclose(dense["fvu"], expected, rtol=1e-4)


def test_is_measured_again_and_trained_further(run, tmp_path, x):
    store, path, config = run
    assert "gated_0_ito_2" in measuring.evaluate(path, ito=(2,))
    path = shutil.copytree(path, tmp_path / "run")
    moved = store.parent / "moved"
    store.rename(moved)
    try:
        longer = config.copy_and_resolve_references()
        longer.train.steps = 480
        with refused("data.source"):
            train.run(longer, path)
        longer.data.source = f"store:{moved}"
        assert train.run(longer, path) == 0
    finally:
        moved.rename(store)


def test_other_commands_ask_for_the_model(run):
    with refused("lm.path", "language model"):
        collecting.collect(collecting.Wanted(workdir=str(run[1])))


def test_exports_without_a_language_model(run, tmp_path):
    exporting.export(run[1], "saelens", tmp_path / "out")
    sae = gsae_jax.load(tmp_path / "out" / "gated_0")
    assert next(iter(sae.values())).site == "vision.layer.3"


@pytest.mark.variants
def test_a_model_for_activations_of_an_unnamed_one(x, tmp_path, lm_dir, text_dir, caplog):
    """The store does not say whose activations it has; the user does."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "a.npy", rng.normal(size=(4000, 32)).astype(np.float32))
    write([tmp_path / "a.npy"], tmp_path / "s", imports.Settings(("blocks.0.hook_mlp_out",), 16))
    config = experiment_config()
    config.lm.path, config.data.source = str(lm_dir), f"store:{tmp_path / 's'}"
    config.data.corpus, config.data.path, config.data.data_dir = "text", str(text_dir), str(tmp_path / "tfds")
    config.data.context_length = 16
    config.stacks.gated = stack_config("gated", "blocks.0.hook_mlp_out", 64, (0.03,), learning_rates=(1e-2,))
    config.activations.rows_per_forward, config.activations.buffer_size = 8, 512
    config.activations.scale_tokens = 512
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 16, 64, 4
    config.evaluation.tokens, config.evaluation.rows_per_forward = 512, 8
    assert train.run(config, tmp_path / "run") == 0
    assert "does not say which language model" in caplog.text
    config.lm.path = ""
    with refused("lm.path", "width"):
        train.run(config, tmp_path / "other")


def guide(heading):
    """The functions of the Python code in a section of the guide."""
    text = (Path(__file__).parent.parent / "docs" / "guides" / "store.md").read_text()
    section = text.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    return names


@pytest.mark.torch
def test_store_of_a_vision_model_by_the_guide(tmp_path):
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    patches = [torch.randn(8, 3, 16, 16) for _ in range(30)]

    class Vit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unfold, self.embed, self.encoder = torch.nn.Unfold(4, stride=4), torch.nn.Linear(48, 16), encoder

        def forward(self, images):
            return self.encoder(self.embed(self.unfold(images).mT))

    model, site = Vit().eval(), "encoder.layers.1"
    guide("From PyTorch")["write_activations"](model, {site: encoder.layers[1]}, patches, str(tmp_path / "a"))
    assert not encoder.layers[1]._forward_hooks
    write([tmp_path / "a"], tmp_path / "store", imports.Settings(context_length=16))
    values, mask, tokens = everything(tmp_path / "store")
    assert tokens is None
    with torch.no_grad():
        expected = torch.cat([model(batch).flatten(0, 1) for batch in patches]).numpy()
    assert mask.sum() == len(expected)
    np.testing.assert_allclose(values[site][mask].sum(0), expected.sum(0), rtol=1e-3, atol=1e-3)
    config = experiment_config()
    config.data.source, config.lm.path, config.data.context_length = f"store:{tmp_path / 'store'}", "none", 16
    config.stacks.gated = stack_config("gated", site, 64, (0.003,), learning_rates=(1e-2,))
    config.activations.rows_per_forward, config.activations.buffer_size = 8, 512
    config.activations.scale_tokens = 512
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 200, 64, 20
    assert train.run(config, tmp_path / "run") == 0
    (record,) = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["saes"]
    assert record["fvu"] < 0.5
