"""Runs and text in a bucket: on a stand-in below a local folder, and on an emulator of Google Cloud Storage."""

import contextlib
import dataclasses
import gzip
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from matplotlib.figure import Figure

import gsae_jax
from gsae_jax import config_trees
from gsae_jax.data import files as files_lib
from gsae_jax.data import rows as rows_lib
from gsae_jax.data import tokens as tokens_lib
from gsae_jax.evaluation import report, tables
from gsae_jax.lms import loading
from gsae_jax.storage import metrics_log, paths, run_directory
from gsae_jax.training import loop
from tests.refusals import refused
from tests.test_processes import SHORT
from tests.test_processes import end as end_all
from tests.test_processes import start as start_all
from tests.texts import ALL, data_config
from tests.training import metrics_without_time

ROOT = Path(__file__).parent.parent


class Folder(DirFileSystem):
    """gs:// as a local folder without what a bucket does not have: appending, renaming, directories that are made."""

    protocol = ("gs", "gcs")
    cachable = False
    root = ""
    refused = ""

    def __init__(self, **options):
        super().__init__(self.root, LocalFileSystem(auto_mkdir=True))

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("gs://").rstrip("/")

    def open(self, path, mode="rb", **options):
        if self.refused:
            raise RuntimeError(self.refused)  # gcsfs' errors are not OSErrors
        assert "a" not in mode
        return super().open(path, mode, **options)

    def glob(self, path, detail=False, **options):
        found = super().glob(path, detail=True, **options)
        return {name: self._as_listed(info) for name, info in found.items()} if detail else list(found)

    def find(self, path, detail=False, **options):
        found = super().find(path, detail=True, **options)
        return {name: self._as_listed(info) for name, info in found.items()} if detail else list(found)

    def info(self, path, **options):
        return self._as_listed(super().info(path, **options))

    def _as_listed(self, info):
        return info | {"generation": str(int(info["mtime"] * 1e9))}

    def mkdir(self, *args, **options):
        raise AssertionError("a bucket has no directories")

    makedirs = rename = mkdir


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Where the stand-in for gs://bucket lies."""
    monkeypatch.setattr(Folder, "root", str(tmp_path / "gs"))
    monkeypatch.setattr(
        backend.fsspec_backend, "_get_filesystem", lambda name: {"gcs": Folder, "file": LocalFileSystem}[name]()
    )
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url: (Folder(), Folder._strip_protocol(url)))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "gcsfs" or found(name, *rest))
    (tmp_path / "gs" / "bucket").mkdir(parents=True)
    return tmp_path / "gs" / "bucket"


@pytest.mark.parametrize("path", ["s3://bucket/x", "gs:/bucket/x", Path("gs://bucket/x"), "gs://", "gs:///x"])
def test_urls_of_another_kind(path, tmp_path, experiment, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts = (repr(str(path)), "local path", "gs://bucket/folder")
    with refused("--workdir", *facts):
        loop.train(experiment, path)
    with refused("", *facts):
        gsae_jax.load(path)
    for field in ("path", "data_dir"):
        config = dataclasses.replace(experiment.data, **{field: str(path)})
        with refused(f"data.{field}", *facts):
            rows_lib.open_texts(config, "train")
    assert not list(tmp_path.iterdir())


def test_a_bucket_needs_packages(experiment, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    facts = ("gs://b/x", "pip install 'gsae_jax[gcs]'")
    with refused("--workdir", *facts):
        loop.train(experiment, "gs://b/x")
    for field in ("path", "data_dir"):
        config = dataclasses.replace(experiment.data, **{field: "gs://b/x"})
        with refused(f"data.{field}", *facts):
            rows_lib.open_texts(config, "train")


def test_a_run_in_a_bucket_is_checked(bucket, experiment, monkeypatch):
    workdir, config = run_directory.Workdir("gs://bucket/runs/x"), config_trees.to_dict(experiment)
    with refused("--workdir", "gs://bucket/runs/x holds no run"):
        workdir.config()
    workdir.check(config)
    assert not [path for path in bucket.rglob("*") if path.is_file()]
    workdir.create(config, None)
    assert json.loads((bucket / "runs" / "x" / "config.json").read_text()) == workdir.config() == config
    workdir.check(config | {"seed": 1})  # there is no checkpoint yet
    (bucket / "runs" / ".probe-of-another-process").write_text("")
    with refused("--workdir", "gs://bucket/runs exists", "not a run"):
        run_directory.Workdir("gs://bucket/runs").check(config)
    monkeypatch.setattr(Folder, "refused", "403:\nno")
    with refused("--workdir", "gs://bucket/runs/x cannot be written", "RuntimeError: 403: no)"):
        workdir.check(config)
    with refused("--workdir", "gs://bucket/runs/x/config.json cannot be read", "RuntimeError: 403: no)", "log in"):
        workdir.config()


def test_a_folder_that_lists_itself_is_empty(bucket):
    (bucket / "made").mkdir()
    (bucket / "made" / "made").mkdir()  # so a bucket lists the empty object made/
    run_directory.Workdir("gs://bucket/made").check({})


def test_metrics_reach_the_bucket_at_checkpoints_and_at_the_end(bucket):
    workdir = run_directory.Workdir("gs://bucket/run")

    def steps():
        return [line["step"] for line in metrics_log.read_metrics(workdir)]

    metrics = metrics_log.Metrics(workdir, 0, ("tensorboard",), {})
    metrics.write(4, {"loss": [1.0, 2.0]})
    assert steps() == []
    metrics.sync()
    metrics.write(8, {"loss": [1.0, 2.0]})
    assert steps() == [4]
    metrics.close(complete=False)
    assert steps() == [4, 8]
    resumed = metrics_log.Metrics(workdir, 4, ("tensorboard",), {})
    resumed.write(12, {"loss": [1.0, 2.0]})
    scratch = Path(resumed._growing.folder)
    resumed.close(complete=True)
    assert steps() == [4, 12]
    assert not scratch.exists()
    boards = list((bucket / "run" / "tensorboard").iterdir())
    assert boards
    assert all(board.stat().st_size for board in boards)


def test_a_report_in_a_bucket(bucket, monkeypatch):
    written = []
    record = dict.fromkeys(tables.COLUMNS.values(), 1.0) | {"name": "a", "model": "m", "site": "s", "architecture": "b"}
    record |= {"intervals": {}, "ito": 0}
    monkeypatch.setattr(report.frontiers, "ratios", lambda *_: [])
    for name in ("frontier", "gamma", "densities", "training"):
        monkeypatch.setattr(report.plots, name, lambda *_: Figure())
    folder = epath.Path("gs://bucket/run/report")
    copy = type(folder).copy
    monkeypatch.setattr(
        type(folder), "copy", lambda path, to, **options: written.append(path.name) or copy(path, to, **options)
    )
    sums = {"a": {"fired": np.ones(2), "tokens": np.ones(1)}}
    for _ in range(2):
        report.write(folder, 16, [record | {"tokens": 1.0, "alive": 1.0}], sums, [], {})
    assert {file.name for file in (bucket / "run" / "report").iterdir()} == set(written)
    assert written[-1] == "report.json"


def test_earlier_reports_are_kept_in_a_bucket(bucket):
    workdir = run_directory.Workdir("gs://bucket/run")
    assert workdir.set_report_aside() is None
    for number in (1, 2):
        report = bucket / "run" / "report"
        report.mkdir(parents=True, exist_ok=True)
        (report / "report.json").write_text(json.dumps({"step": 8, "number": number}))
        (report / "report.md").write_text("x")
        place = workdir.set_report_aside()
        assert os.fspath(place) == "gs://bucket/run/earlier_reports/step_8" + "_2" * (number == 2)
        assert json.loads((place / "report.json").read_text())["number"] == number
        assert {file.name for file in place.iterdir()} == {"report.json", "report.md"}
        assert not list(report.iterdir())


def test_text_in_a_bucket_is_the_text_of_a_folder(bucket, tmp_path):
    folder = tmp_path / "text"
    (folder / "b" / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("no")
    (folder / "a.txt").write_bytes("one\r\ntwo é".encode())
    (folder / "b" / "x.csv").write_text("no")
    (folder / "b" / "lines.jsonl").write_text('{"text": "é"}\n\n{"text": "2"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"]}), folder / "b" / "deeper" / "t.parquet")
    (folder / "c[1]").mkdir()
    (folder / "c[1]" / "p*.txt.gz").write_bytes(gzip.compress(b"packed"))
    shutil.copytree(folder, bucket / "text")
    for pattern in (
        *("", "/", "/**/*", "/**/*.txt", "/*/*", "/b/lines.jsonl", "/.hidden/*", "/c[1]", "/c[1]/p*.txt.gz"),
    ):
        ours, theirs = files_lib.find(f"gs://bucket/text{pattern}"), files_lib.find(f"{folder}{pattern}")
        assert ours.left_out.get(".csv") == theirs.left_out.get(".csv")
        ours, theirs = list(ours.stamps), list(theirs.stamps)
        assert [file.removeprefix("gs://bucket/text") for file in ours] == [
            file.removeprefix(str(folder)) for file in theirs
        ]
        reader = files_lib.Reader("text", "")
        documents = [[list(reader.documents(f)) for f in files] for files in (ours, theirs)]
        assert documents[0] == documents[1] != []
    before = files_lib.find("gs://bucket/text")
    (bucket / "text" / "a.txt").write_text("else")
    assert files_lib.find("gs://bucket/text") != before
    with refused("data.path", "file matches 'gs://bucket/none'"):
        files_lib.find("gs://bucket/none")


def test_tokens_of_a_bucket_are_copied_to_the_machine(bucket, tmp_path, text_dir, monkeypatch):
    """Machine after machine; the first one tokenizes for all."""
    tokenizer = loading.load_lm().tokenizer
    source, feature = rows_lib.open_texts(data_config(tmp_path, path=str(text_dir), separator="\n"), "train")
    tokenized = []
    real = tokens_lib._tokenize
    monkeypatch.setattr(tokens_lib, "_tokenize", lambda *args: tokenized.append(args[-1]) or real(*args))

    def on_machine(name, limit):
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / name))
        shared = paths.of("gs://bucket/data/tokens-1")
        return tokens_lib.cached(shared, tokens_lib.Text(source, feature, tokenizer, 0, None, None), limit)[:]

    first = on_machine("first", 1000)
    np.testing.assert_array_equal(on_machine("second", 500), first)
    np.testing.assert_array_equal(on_machine("second", 500), first)
    assert tokenized == [1000]
    more = on_machine("second", ALL)
    np.testing.assert_array_equal(on_machine("first", ALL), more)
    assert tokenized == [1000, ALL]
    (bucket / "data" / "tokens-1" / "tokens.bin").write_bytes(b"")  # another machine is writing
    np.testing.assert_array_equal(on_machine("third", ALL), more)
    assert tokenized == [1000, ALL, ALL]


def test_a_bucket_that_tfds_would_have_to_prepare(bucket, tmp_path, text_dir):
    config = data_config(tmp_path, path=str(text_dir), data_dir="gs://bucket/data")
    with refused("data.data_dir", "gs://bucket/data/text_files", "TFDS", "gcloud storage cp"):
        rows_lib.open_texts(config, "train")
    assert not list(bucket.iterdir())


EMULATOR = """
import http, http.server, random, sys, threading
from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

# What it lacks and tensorstore builds on: generations in answers, and writes on condition of one.
download, upload = objects.download, objects._media_upload

def generation(storage, bucket_name, object_id):
    return storage.objects.get(bucket_name, {}).get(object_id, {}).get("generation", "0")

def download_with_generation(request, response, storage):
    response["X-Goog-Generation"] = generation(storage, **request.params)
    download(request, response, storage)

def upload_on_condition(request, response, storage):
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != generation(storage, request.params["bucket_name"], request.query["name"][0]):
        response.status = http.HTTPStatus.PRECONDITION_FAILED
    else:
        upload(request, response, storage)

objects.download, objects._media_upload = download_with_generation, upload_on_condition

# It answers one client after the other, and a silent one would keep all others waiting.
handle, alone = server.Router.handle, threading.Lock()

def handle_alone(router, method):
    if random.random() < float(sys.argv[2]):
        print("failed", flush=True)
        router._request_handler.send_error(503)
        return
    with alone:
        handle(router, method)

server.Router.handle, http.server.HTTPServer = handle_alone, http.server.ThreadingHTTPServer
server.create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
print("up", flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def emulator(log, failing=0.0):
    """Environment variables with which everything that asks Google Cloud Storage asks an emulator.

    It answers a share `failing` of all requests with 503, service unavailable.
    """
    pytest.importorskip("gcp_storage_emulator")
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-c", EMULATOR, str(port), str(failing)], stdout=file, stderr=file)
    deadline = time.time() + 30
    while "up" not in log.read_text():
        assert time.time() < deadline, log.read_text()
        time.sleep(0.2)
    url = f"http://localhost:{port}"
    yield {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # tensorstore's
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a service that the emulator has not
    }
    server.kill()
    server.wait()


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of an emulator that always answers."""
    with emulator(tmp_path_factory.mktemp("emulator") / "log") as variables:
        yield variables


def python(environment, program, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


UPLOAD = """
import sys, fsspec
fsspec.filesystem("gcs").put(sys.argv[1], sys.argv[2], recursive=True)
"""
DOWNLOAD = """
import sys, fsspec
fsspec.filesystem("gcs").get(sys.argv[1], sys.argv[2], recursive=True)
"""
LOAD = """
import sys, gsae_jax
for name, sae in gsae_jax.load(sys.argv[1]).items():
    print(name, sae.params["W_dec"].shape)
"""


@pytest.fixture(scope="module")
def text(environment, tmp_path_factory):
    """Text in the bucket, in two folders."""
    folder = tmp_path_factory.mktemp("text") / "text"
    (folder / "deeper").mkdir(parents=True)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    for index, name in enumerate(("a.txt", "b.md", "deeper/c.txt", "deeper/d.txt")):
        (folder / name).write_bytes(b"".join(file.read_bytes() for file in files[index * 25 : index * 25 + 25]))
    uploaded = python(environment, UPLOAD, f"{folder}/", "bucket/text/")
    assert uploaded.returncode == 0, uploaded.stderr
    return ["--config.data.corpus=text", "--config.data.path=gs://bucket/text/**/*.txt"]


def command(environment, log, name, *flags):
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", f"gsae_jax.{name}", *flags],
            cwd=ROOT,
            env=os.environ | environment | {"JAX_PLATFORMS": "cpu"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.gcs
def test_a_run_in_a_bucket_stops_continues_and_reports(environment, text, tmp_path):
    run = "gs://bucket/runs/x"
    flags = ["--config=configs/quickstart.py", f"--workdir={run}", *SHORT, *text]
    flags += ["--config.train.steps=64", "--config.checkpoint.keep=1"]
    log = tmp_path / "stopped"
    process = command(environment, log, "train", *flags)
    deadline = time.time() + 200
    while " tokens/s" not in log.read_text():  # some steps were logged
        assert process.poll() is None, log.read_text()
        assert time.time() < deadline, log.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, log.read_text()
    assert "is saved; the same command continues from there" in log.read_text()
    assert python(environment, DOWNLOAD, "bucket/runs/x/", tmp_path / "before/").returncode == 0
    (saved,) = (tmp_path / "before" / "checkpoints").iterdir()
    assert not (tmp_path / "before" / "report").exists()
    before = [json.loads(line)["step"] for line in (tmp_path / "before" / "metrics.jsonl").read_text().splitlines()]
    assert before == list(range(4, int(saved.name) + 1, 4))

    log = tmp_path / "continued"
    assert command(environment, log, "train", *flags).wait(300) == 0, log.read_text()
    assert f"continuing from step {int(saved.name):,}" in log.read_text()
    assert f"report: {run}/report/report.md" in log.read_text()
    assert python(environment, DOWNLOAD, "bucket/runs/x/", tmp_path / "after/").returncode == 0
    after = tmp_path / "after"
    assert [path.name for path in (after / "checkpoints").iterdir()] == ["64"]  # one was to be kept
    lines = [json.loads(line)["step"] for line in (after / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(4, 65, 4))
    assert len(list((after / "tensorboard").iterdir())) == 2
    assert {"report.md", "report.json", "frontier.png"} < {path.name for path in (after / "report").iterdir()}
    assert not list(after.glob(".*"))

    log = tmp_path / "again"
    assert command(environment, log, "train", *flags).wait(300) == 0
    assert "is finished; its report is gs://bucket/runs/x/report/report.md. Nothing was changed." in log.read_text()
    loaded = python(environment, LOAD, run)
    assert "gated_0 (512, 256)\n" in loaded.stdout, loaded


@pytest.mark.gcs
def test_a_bucket_that_fails_now_and_then(text_dir, tmp_path):
    """One request in thirty; a run there ends as a local one."""
    flags = ["--config=configs/quickstart.py", *SHORT, "--config.data.corpus=text", f"--config.data.path={text_dir}"]
    flags += [f"--config.data.data_dir={tmp_path / 'data'}"]
    with emulator(tmp_path / "emulator", failing=0.03) as failing:
        for log, run in ((tmp_path / "bucket", "gs://bucket/run"), (tmp_path / "local", tmp_path / "run")):
            assert command(failing, log, "train", f"--workdir={run}", *flags).wait(300) == 0, log.read_text()
        for _ in range(5):  # this one has no patience
            if python(failing, DOWNLOAD, "bucket/run/", tmp_path / "copy/").returncode == 0:
                break
    assert (tmp_path / "emulator").read_text().count("failed\n") > 10
    runs = [tmp_path / "copy", tmp_path / "run"]
    ours, theirs = (json.loads((run / "report" / "report.json").read_text()) for run in runs)
    assert ours == theirs
    assert metrics_without_time(runs[0]) == metrics_without_time(runs[1])


@pytest.mark.gcs
def test_two_processes_share_a_bucket(environment, text, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logs = tmp_path / "two"
    flags = ["--workdir=gs://bucket/runs/two", *text]
    assert end_all(start_all(logs, 2, *flags)) == [0, 0], Path(f"{logs}.0.log").read_text()
    assert "report: gs://bucket/runs/two/report/report.md" in Path(f"{logs}.0.log").read_text()
    loaded = python(environment, LOAD, "gs://bucket/runs/two")
    assert "gated_0 (512, 256)\n" in loaded.stdout, loaded


ROWS = """
import sys, numpy as np
from gsae_jax import config, config_trees
from gsae_jax.data import rows
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
data = {"corpus": "text", "path": sys.argv[1], "data_dir": sys.argv[2]}
try:
    found = rows.open_rows(config_trees.from_dict(config.Data, data), "train", loading.load_lm().tokenizer, 10_000)
    print(np.array([found[index] for index in range(len(found))]).tolist())
except UserError as error:
    print(error)
"""


@pytest.mark.gcs
def test_data_prepared_elsewhere_is_read_from_a_bucket(environment, text, tmp_path):
    path, local, remote = "gs://bucket/text/**/*.txt", tmp_path / "prepared", "gs://bucket/data"
    here = python(environment, ROWS, path, local)
    rows = here.stdout.splitlines()[-1]  # after what is said of the text
    assert rows.startswith("[["), here
    assert python(environment, ROWS, path, remote).stdout.startswith(f"data.data_dir: {remote}/text_files")
    assert python(environment, UPLOAD, f"{local}/", "bucket/data/").returncode == 0
    machine = {"TFDS_DATA_DIR": str(tmp_path / "machine")}
    there = python(environment | machine, ROWS, path, remote)
    assert there.stdout.splitlines()[-1] == rows, there
    assert list((tmp_path / "machine").glob("tokens-*/tokens.bin"))


CHECK = """
import sys, fsspec
from gsae_jax.errors import UserError
from gsae_jax.storage import run_directory
fsspec.filesystem("gcs").touch("bucket/made/")  # an empty object, as consoles make folders
for path in sys.argv[1:]:
    for method in (lambda: run_directory.Workdir(path).check({}), lambda: run_directory.Workdir(path).config()):
        try:
            print(path, method())
        except UserError as error:
            print(path, error)
"""


@pytest.mark.gcs
def test_folders_of_a_bucket_that_cannot_be_used(environment, text):
    paths = [f"gs://{path}" for path in ("none/x", "bucket/new", "bucket/made", "bucket/text", "bucket/text/a.txt")]
    checked = python(environment, CHECK, *paths)
    lines = iter(checked.stdout.splitlines())
    used = "--workdir: {} exists and is not a run"
    expected = ["--workdir: gs://none/x cannot be written (FileNotFoundError: ", "None", "None", used, used]
    for path, message in zip(paths, expected, strict=True):
        assert next(lines).startswith(f"{path} {message.format(path)}"), checked
        assert next(lines).startswith(f"{path} --workdir: {path} holds no run"), checked


@pytest.mark.gcs
def test_a_store_in_a_bucket(environment, text, tmp_path):
    """Written in a bucket, continued after a shard was lost, and trained from; the same as on the disk."""
    small = ["--config=configs/quickstart.py", *SHORT, *text, "--shard_megabytes=1"]
    store = "gs://bucket/stores/x"
    for out in (store, str(tmp_path / "store")):
        log = tmp_path / f"written_{out.startswith('gs')}"
        assert command(environment, log, "store", *small, f"--out={out}").wait(300) == 0, log.read_text()
    lose = """
import fsspec
files = fsspec.filesystem("gcs")
for name in ("index.json", "train/shards/1.json", "train/blocks.0.hook_mlp_out/c/1/0/0"):
    files.rm(f"bucket/stores/x/{name}")
"""
    assert python(environment, lose).returncode == 0
    log = tmp_path / "half"
    flags = ["--config=configs/quickstart.py", *SHORT, *text, f"--config.data.source=store:{store}"]
    assert command(environment, log, "train", *flags, "--workdir=gs://bucket/runs/half").wait(300) == 2
    assert "shards" in log.read_text()
    log = tmp_path / "continued"
    assert command(environment, log, "store", *small, f"--out={store}").wait(300) == 0, log.read_text()
    assert python(environment, DOWNLOAD, "bucket/stores/x/", tmp_path / "copy/").returncode == 0
    ours, theirs = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "copy", tmp_path / "store")
    )
    theirs.pop(".lock", None)
    assert ours == theirs
    log = tmp_path / "trained"
    assert command(environment, log, "train", *flags, f"--workdir={tmp_path / 'run'}").wait(300) == 0, log.read_text()
