"""A store of activations: what it holds, and runs from it."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, storing, train
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import store as store_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.lms import checkpoints, loading
from gsae_jax.lms.checkpoints import Checkpoint
from tests import training
from tests.conftest import tiny
from tests.refusals import refused
from tests.test_processes import SHORT, same

ROOT = Path(__file__).parent.parent
SMALL = 16 * 64 * 4 * 32  # bytes of a shard of 32 rows: several in a store of the tiny experiment


def write(config, out, **options):
    return storing.of_model(config, storing.Wanted(str(out), shard_bytes=SMALL, **options))


def files_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != storing.LOCK
    }


@pytest.fixture(scope="module")
def made(text_dir, lm_dir, tmp_path_factory):
    """(config, its store)"""
    config = tiny(text_dir, lm_dir, tmp_path_factory.getbasetemp() / "tfds")
    out = tmp_path_factory.mktemp("stores") / "store"
    write(config, out)
    return config, out


def from_store(config, store, **changes):
    config = config.copy_and_resolve_references()
    config.data.source = f"store:{store}"
    config.update_from_flattened_dict(changes)
    return config


def opened(config):
    experiment = config_trees.from_dict(config_lib.Experiment, config)
    checkpoint = Checkpoint.open(experiment.lm.path)
    return experiment, checkpoint


def test_holds_what_the_model_gives_in_the_order_of_its_run(made):
    config, out = made
    experiment, checkpoint = opened(config)
    store = store_lib.Store.open(out)
    tokenizer = checkpoint.tokenizer()
    for split in ("train", "test"):
        if split == "train":
            limit = 16 * 64 + 1024 + 2 * 512
            rows = rows_lib.open_rows(experiment.data, "train", tokenizer, limit)
            text = rows_lib.shuffled(rows, experiment.seed)
        else:
            rows = text = rows_lib.held_out_rows(experiment, tokenizer, experiment.evaluation.tokens)
        stored = store.rows(split)
        assert len(stored) == len(rows) == store.manifest.rows[split]
        batch = stored.arrays.read(range(len(rows)))
        np.testing.assert_array_equal(batch.tokens, np.stack([text[number] for number in range(len(rows))]))
        assert batch.mask.all()
        lm = gsae_jax.load_lm(experiment.lm.path)
        for site in experiment.sites:
            expected = loading.capture(lm.module, lm.params, batch.tokens, {site})[site]
            np.testing.assert_allclose(batch.activations[site], expected, atol=1e-5)
    seen = batch.activations["blocks.0.hook_mlp_out"]
    assert seen.dtype == np.float32
    assert store.manifest.shards("train") > 2


@pytest.mark.parametrize("latent", [1, pytest.param(4, marks=pytest.mark.variants)])
def test_run_equals_the_run_with_the_model(made, tmp_path, latent):
    config, _ = made
    config = config.copy_and_resolve_references()
    config.train.steps, config.mesh.latent = 24, latent
    config.train.log_every = 4
    write(config, tmp_path / "store")
    assert train.run(config, tmp_path / "with_model") == 0
    assert train.run(from_store(config, tmp_path / "store"), tmp_path / "from_store") == 0
    with_model, stored = (training.metrics_without_time(tmp_path / name) for name in ("with_model", "from_store"))
    assert len(stored) == 6
    for ours, theirs in zip(stored, with_model, strict=True):
        for name in ("gated/loss", "baseline/loss"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6)
    reports = [
        json.loads((tmp_path / name / "report/report.json").read_text()) for name in ("with_model", "from_store")
    ]
    for ours, theirs in zip(*(report["saes"] for report in reports), strict=True):
        np.testing.assert_allclose(ours["loss_recovered"], theirs["loss_recovered"], atol=1e-3)


def test_a_pass_reads_every_row_once_and_seeds_differ(made):
    rows = store_lib.Store.open(made[1]).rows("train", ["blocks.0.hook_mlp_out"])
    count, places = len(rows), np.arange(len(rows))
    orders = {}
    for seed, in_order in ((0, True), (1, False), (2, False)):
        order = store_lib.Order([count], 4, seed, in_order)
        passes = [order[places + number * count] for number in range(3)]
        for each in passes:
            np.testing.assert_array_equal(np.sort(each), places)
        assert not np.array_equal(passes[1], passes[2])
        orders[seed] = passes
    np.testing.assert_array_equal(orders[0][0], places)
    assert not np.array_equal(orders[1][0], orders[2][0])


def test_lengthened_runs_keep_the_place_of_what_they_read():
    places = np.arange(1000)
    for seed, in_order in ((0, True), (1, False)):
        before = store_lib.Order([400], 8, seed, in_order)[places[:400]]
        after = store_lib.Order([400, 1000], 8, seed, in_order)[places]
        np.testing.assert_array_equal(after[:400], before)
        np.testing.assert_array_equal(np.sort(after), places)


def test_distance_from_an_ideal_shuffle():
    """Two rows of a block are read together in every pass; any other two rows are as far apart as at random."""
    count, block, per_batch = 4096, 8, 32
    order = store_lib.Order([count], block, 3, False)
    batch_of = np.empty((20, count), int)
    for number in range(20):
        batch_of[number, order[np.arange(count) + number * count]] = np.arange(count) // per_batch
    together = lambda distance: (batch_of[:, :-distance] == batch_of[:, distance:]).mean()  # noqa: E731
    ideal = (per_batch - 1) / (count - 1)
    # Of neighbours, 7 of 8 pairs are in one block.
    np.testing.assert_allclose(together(1), (block - 1) / block + ideal / block, atol=0.01)
    for distance in (block, 3 * block, 1000):
        np.testing.assert_allclose(together(distance), ideal, atol=0.004)


def test_batches_depend_on_seed_and_step_alone(made):
    rows = store_lib.Store.open(made[1]).rows("train")
    whole = rows.batches(32, 7, np.arange(32), ())
    batches = [next(whole) for _ in range(12)]  # more than one pass
    resumed = rows.batches(32, 7, np.arange(32), ())
    for _ in range(5):
        next(resumed)
    position = resumed.get_state()
    other = rows.batches(32, 7, np.arange(32), ())
    other.set_state(position)
    for expected, ours in zip(batches[5:], other, strict=False):
        jax.tree.map(np.testing.assert_array_equal, ours, expected)
    halves = [rows.batches(32, 7, part, ()) for part in (np.arange(16), np.arange(16, 32))]
    for expected in batches[:3]:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts]), expected.tokens)


def test_second_pass_and_resumption_are_bit_identical(made, tmp_path):
    config, out = made
    config = from_store(config, out, **{"train.steps": 200, "checkpoint.every": 64, "seed": 5})
    assert train.run(config, tmp_path / "whole") == 0
    part = from_store(config, out, **{"train.steps": 200, "checkpoint.every": 64, "seed": 5})
    command = f"""
import signal, sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from gsae_jax import train, config_trees
from gsae_jax.training import loop
from tests.training import Interrupting
prepare = loop.prepare
def prepared(*arguments):
    run = prepare(*arguments)
    run.stream = Interrupting(run.stream, 30)
    return run
loop.prepare = prepared
sys.exit(train.run({config_trees.plain(part.to_dict())!r}, {str(tmp_path / "part")!r}))
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 75
    assert train.run(part, tmp_path / "part") == 0
    training.assert_same(training.params_of(tmp_path / "part"), training.params_of(tmp_path / "whole"))


@pytest.mark.variants
def test_fewer_bits(made, tmp_path):
    config, out = made
    for dtype in ("bfloat16", "float16"):
        write(config, tmp_path / dtype, dtype=dtype)
        store, exact = store_lib.Store.open(tmp_path / dtype), store_lib.Store.open(out)
        ours, expected = (each.rows("train").arrays.read(range(8)).activations for each in (store, exact))
        for site, x in ours.items():
            assert x.dtype == dtype
            # Another program computes them, so that the last bit of float32 may differ before they are rounded.
            stored, wanted = (np.asarray(value, np.float64) for value in (x, expected[site]))
            np.testing.assert_allclose(stored, wanted, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)
    changes = {"lm.dtype": "bfloat16"}
    assert train.run(from_store(config, tmp_path / "bfloat16", **changes), tmp_path / "run") == 0


def test_a_half_written_store_is_continued(made, tmp_path):
    config, out = made
    write(config, tmp_path / "s")
    expected = files_of(tmp_path / "s")
    record = store_lib.record_path(store_lib.paths.of(tmp_path / "s"), "train", 1)
    record.unlink()
    (tmp_path / "s" / store_lib.INDEX).unlink()
    number = sum(store_lib.read_manifest(out).shards(split) for split in ("train", "test"))
    with refused("data.source", f"{number - 1} of {number} shards"):
        train.run(from_store(config, tmp_path / "s"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "s" / "train" / "blocks.0.hook_mlp_out" / "c" / "1" / "0" / "0").write_bytes(b"half")
    write(config, tmp_path / "s")
    assert files_of(tmp_path / "s") == expected
    assert "whole" in write(config, tmp_path / "s")  # and a whole one stays
    assert files_of(tmp_path / "s") == expected


def test_fewer_tokens_end_a_store_early(made, tmp_path):
    config, out = made
    write(config, tmp_path / "s")
    (tmp_path / "s" / store_lib.INDEX).unlink()
    for number in (2, 3):
        store_lib.record_path(store_lib.paths.of(tmp_path / "s"), "train", number).unlink()
    manifest = store_lib.read_manifest(tmp_path / "s")
    write(config, tmp_path / "s", tokens=2 * manifest.shard_rows * manifest.stride)
    rows, all_rows = (store_lib.Store.open(path).rows("train") for path in (tmp_path / "s", out))
    assert len(rows) == 2 * manifest.shard_rows < len(all_rows)
    ours, expected = (each.arrays.read(range(len(rows))) for each in (rows, all_rows))
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    with refused("--out", "tokens"):
        write(config, tmp_path / "s", tokens=2**20)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_damaged_shards_are_named_and_written_again(made, tmp_path, damage):
    config, _ = made
    write(config, tmp_path / "s")
    expected = files_of(tmp_path / "s")
    folder = tmp_path / "s" / "train" / "blocks.0.hook_mlp_out" / "c"
    file = folder / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[1000] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "swap":  # every checksum in it is right
        file.write_bytes((folder / "0" / "0" / "0").read_bytes())
    else:
        file.unlink()
    wanted = storing.Wanted(str(tmp_path / "s"))
    with refused("--out", "shard 1 of train"):
        storing.check(wanted)
    if damage != "swap":
        with pytest.raises(TrainingError, match=r"shard 1 of .*blocks.0.hook_mlp_out"):
            train.run(from_store(config, tmp_path / "s", **{"train.steps": 64}), tmp_path / "run")
    write(config, tmp_path / "s", check=True)
    assert files_of(tmp_path / "s") == expected
    assert "is whole" in storing.check(wanted)


def test_what_does_not_belong_to_the_store_is_refused(made, tmp_path, lm_dir):
    config, out = made
    other = tmp_path / "other"
    lm = gsae_jax.load_lm(lm_dir)
    checkpoints.save(other, lm.config, jax.tree.map(lambda x: x * 1.01, lm.params), lm.tokenizer)
    cases = {
        "lm.path": {"lm.path": str(other)},
        "stacks.gated.site": {"stacks.gated.site": "blocks.1.hook_mlp_out"},
        "data.context_length": {"data.context_length": 32},
        "stacks.gated.kl_fraction": {"stacks.gated.kl_fraction": 0.5},
        "data.prepend_bos": {"data.prepend_bos": False},
        "data.source": {"data.path": "", "data.corpus": "stdlib"},
    }
    for field, changes in cases.items():
        with refused(field):
            train.run(from_store(config, out, **changes), tmp_path / "run")
    words = (lm_dir / "tokenizer.json").read_text()
    same = tmp_path / "same"
    checkpoints.save(same, lm.config, lm.params, lm.tokenizer)
    tokenizer = json.loads(words)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (same / "tokenizer.json").write_text(json.dumps(tokenizer))
    with refused("lm.path", "tokenizer"):
        train.run(from_store(config, out, **{"lm.path": str(same)}), tmp_path / "run")
    for source, field in (
        ("store:", "data.source"),
        (str(out), "data.source"),
        (f"store:{tmp_path}/no", "data.source"),
    ):
        with refused(field):
            train.run(from_store(config, out, **{"data.source": source}), tmp_path / "run")
    with refused("lm.path", "data.source"):
        none = config.copy_and_resolve_references()
        none.lm.path = "none"
        train.run(none, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.variants
def test_a_changed_store_does_not_continue_a_run(made, tmp_path):
    config, out = made
    assert train.run(from_store(config, out), tmp_path / "run") == 0
    longer = {"train.steps": 32}
    write(config, tmp_path / "other", tokens=6000)
    with refused("data", "store"):
        train.run(from_store(config, tmp_path / "other", **longer), tmp_path / "run")
    moved = tmp_path / "moved"
    subprocess.run(["cp", "-r", out, moved], check=True)
    assert train.run(from_store(config, moved, **longer), tmp_path / "run") == 0


def test_writing_is_refused_where_it_would_lose_something(made, tmp_path, monkeypatch):
    config, out = made
    with refused("data.source", str(out)):
        write(from_store(config, out), tmp_path / "of_a_store")
    before = files_of(out)
    with refused("--out", "dtype"):
        write(config, out, dtype="float16")
    assert files_of(out) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with refused("--out", "is no store"):
        write(config, tmp_path / "notes")
    with refused("--sites"):
        write(config, tmp_path / "s", sites=["blocks.7.hook_mlp_out"])
    with refused("--dtype", "float16"):
        write(config, tmp_path / "s", dtype="int8")
    disk = monkeypatch.setattr(storing, "_free", lambda folder: 100_000)
    with refused("--out", "--tokens="):
        write(config, tmp_path / "s")
    assert disk is None
    assert not (tmp_path / "s" / store_lib.MANIFEST).exists()


def test_a_full_disk_keeps_what_is_whole(made, tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    config, out = made
    expected = files_of(out)
    command = f"""
import resource, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from gsae_jax import storing
from gsae_jax.errors import TrainingError
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
try:
    wanted = storing.Wanted({str(tmp_path / "s")!r}, shard_bytes={SMALL})
    storing.of_model({config_trees.plain(config.to_dict())!r}, wanted)
except TrainingError as error:
    print(error)
    sys.exit(1)
"""
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "shards are whole" in done.stdout
    write(config, tmp_path / "s")
    assert files_of(tmp_path / "s") == expected


COMMAND = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from gsae_jax import storing, train
config, out, run, shard_bytes = {arguments!r}
if run:
    sys.exit(train.run(config, run))
storing.of_model(config, storing.Wanted(out, shard_bytes=shard_bytes))
"""


def command(config, log, out, run="", shard_bytes=SMALL // 4):
    """A process that writes a store, or trains a run."""
    arguments = config_trees.plain(config.to_dict()), str(out), str(run), shard_bytes
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    program = [sys.executable, "-c", COMMAND.format(arguments=arguments)]
    with log.open("w") as file:
        return subprocess.Popen(program, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.faults
def test_killed_while_writing(made, tmp_path):
    config, _ = made
    config = config.copy_and_resolve_references()
    config.train.steps, log = 400, tmp_path / "log"
    whole = command(config, log, tmp_path / "whole")
    assert whole.wait() == 0, log.read_text()
    shards = store_lib.read_manifest(tmp_path / "whole").shards("train")
    assert shards > 30
    chance, places = random.Random(0), []
    records = tmp_path / "s" / "train" / "shards"
    while len(places) < 10:
        process, aim = command(config, log, tmp_path / "s"), chance.randrange(1, 4)
        before = len(list(records.glob("*.json")))
        while process.poll() is None and len(list(records.glob("*.json"))) < before + aim:
            time.sleep(0.001)
        time.sleep(chance.random() / 50)
        assert process.poll() is None, (places, log.read_text())
        process.send_signal(signal.SIGKILL)
        process.wait()
        places.append(len(list(records.glob("*.json"))))
    assert places == sorted(places)
    last = command(config, log, tmp_path / "s")
    assert last.wait() == 0, log.read_text()
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


@pytest.mark.faults
def test_killed_while_training(made, tmp_path):
    config, out = made
    config = from_store(config, out, **{"train.steps": 2000, "checkpoint.every": 100, "train.log_every": 100})
    log = tmp_path / "log"
    whole = command(config, log, "", tmp_path / "whole")
    assert whole.wait() == 0, log.read_text()
    chance, kills = random.Random(1), 0
    checkpoints = tmp_path / "run" / "checkpoints"
    while kills < 10:
        process = command(config, log, "", tmp_path / "run")
        before = max([int(f.name) for f in checkpoints.glob("[0-9]*") if f.name.isdigit()], default=0)
        while process.poll() is None and not any(
            f.name.isdigit() and int(f.name) > before for f in checkpoints.glob("[0-9]*")
        ):
            time.sleep(0.01)
        time.sleep(chance.random() / 5)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    last = command(config, log, "", tmp_path / "run")
    assert last.wait() == 0, log.read_text()
    assert kills == 10
    training.assert_same(training.params_of(tmp_path / "run"), training.params_of(tmp_path / "whole"))


def test_arrays_open_in_another_program(made):
    """The metadata are those of Zarr 3, and a shard is one file."""
    _, out = made
    described = json.loads((out / "train" / "blocks.0.hook_mlp_out" / "zarr.json").read_text())
    manifest = store_lib.read_manifest(out)
    assert described["zarr_format"] == 3
    assert described["shape"] == [manifest.rows["train"], 16, 32]
    assert len(list((out / "train" / "tokens" / "c").glob("*/0"))) == manifest.shards("train")


def test_unusable_manifests(made, tmp_path):
    _, out = made
    tree = json.loads((out / store_lib.MANIFEST).read_text())
    for name, value in (("format", 9), ("dtype", "int8"), ("widths", {}), ("rows", {"train": 1}), ("shard_rows", 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / store_lib.MANIFEST).write_text(json.dumps(tree | {name: value}))
        with pytest.raises(UserError):
            store_lib.Store.open(folder)


def test_local_values_are_the_rows_of_this_process():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(latent=2))
    x = np.arange(48.0).reshape(16, 3)
    placed = mesh_lib.place_rows(mesh, x, 16)
    np.testing.assert_array_equal(mesh_lib.local_values(mesh, placed), x)


def together(count, store, run, *overrides):
    """Exit codes and outputs of `count` processes with 8 devices together: the store is written, or a run trained."""
    module = ["gsae_jax.train", "--workdir", str(run)] if run else ["gsae_jax.store", "--out", str(store)]
    command = [sys.executable, "-m", *module, "--config", "configs/quickstart.py", *SHORT, *overrides]
    if run:
        command += [f"--config.data.source=store:{store}"]
    else:
        command += ["--shard_megabytes=1"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    flags = [[f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={n}"] for n in range(count)]
    started = [
        subprocess.Popen(
            command + (flags[n] if count > 1 else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in range(count)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], outputs


@pytest.mark.processes
def test_two_processes(tmp_path):
    for count in (1, 2):
        codes, outputs = together(count, tmp_path / f"store_{count}", "")
        assert codes == [0] * count, outputs
    one, two = (store_lib.Store.open(tmp_path / f"store_{count}") for count in (1, 2))
    assert one.manifest == two.manifest
    assert one.manifest.shards("train") > 8
    for split in ("train", "test"):
        ours, theirs = (each.rows(split).arrays.read(range(one.manifest.rows[split])) for each in (one, two))
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        for site, x in ours.activations.items():
            np.testing.assert_allclose(x, theirs.activations[site], atol=1e-5)
    for count in (1, 2):
        codes, outputs = together(count, tmp_path / f"store_{count}", tmp_path / f"run_{count}")
        assert codes == [0] * count, outputs
    same(tmp_path / "run_1", tmp_path / "run_2")
    codes, outputs = together(1, tmp_path / "store_1", "", "--config.seed=3")
    assert codes == [2]
    assert "seed" in outputs[0]
