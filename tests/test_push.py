"""What is published of a run: its folder and card, and an upload to a stand-in for the hub."""

import ast
import base64
import dataclasses
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

import gsae_jax
from gsae_jax import collecting, config_trees, measuring
from gsae_jax import config as config_lib
from gsae_jax.publishing import model_card
from gsae_jax.publishing.upload import push
from gsae_jax.saes import gated
from gsae_jax.storage import run_directory
from gsae_jax.training import loop
from tests import sae_files, test_rendering
from tests.refusals import refused

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(text_dir, lm_dir, tmp_path_factory):
    from tests import conftest

    config = conftest.config_dict.__wrapped__(text_dir, lm_dir, tmp_path_factory)
    path = tmp_path_factory.mktemp("push") / "run"
    loop.train(conftest.config_trees.from_dict(conftest.config_lib.Experiment, config), path)
    measuring.evaluate(path)
    return path


def test_the_folder_has_every_sae_the_report_and_a_card_that_loads_them(run, lm_dir, tmp_path):
    lm_dir = Path(lm_dir)
    model_card.write(str(run), "user/name", ["saelens", "gemma_scope"], tmp_path / "repo")
    ours = gsae_jax.load(run)
    for format in ("saelens", "gemma_scope"):
        assert list(gsae_jax.load(tmp_path / "repo" / format)) == sorted(ours)
    card = (tmp_path / "repo" / "README.md").read_text()
    for name in ours:
        assert f"| {name} |" in card
    for picture in ("report/frontier.png", "report/report.md"):
        assert f"]({picture})" in card
        assert (tmp_path / "repo" / picture).exists()
    # The card's own lines, with the download in place of the hub's.
    code = card.partition("In gsae_jax:\n\n```python\n")[2].partition("```")[0]
    code = code.replace("from huggingface_hub import snapshot_download", "")
    assert f"load_lm({lm_dir.name!r})".replace("'", '"') in code  # only the folder's name is published
    code = code.replace(f'load_lm("{lm_dir.name}")', f"load_lm({str(lm_dir)!r})")
    names = {"snapshot_download": lambda repo: str(tmp_path / "repo")}
    exec(code, names)
    assert names["features"].shape == (*names["x"].shape[:2], 64)


@pytest.mark.parametrize(
    ("arguments", "field", "facts"),
    [
        (("nowhere", "user/name", ["saelens"]), "--workdir", ("nowhere holds no run",)),
        (("RUN", "name", ["saelens"]), "--repo", ("'name'", "user/name")),
        (("RUN", "user/na me", ["saelens"]), "--repo", ("'user/na me'", "user/name")),
        (("RUN", "user/name", ["saelense"]), "--format", ("'saelense'", "did you mean 'saelens'")),
        (("RUN", "user/name", []), "--format", ("is ''", "saelens")),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_sent(run, arguments, field, facts, monkeypatch):
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with refused(field, *facts):
        push(*(str(run) if argument == "RUN" else argument for argument in arguments))


class Hub(http.server.BaseHTTPRequestHandler):
    """So much of the hub's API as an upload takes: to a new repository, or over the files of an earlier one."""

    def do_GET(self):
        seen = self.server.seen
        if "created" not in seen:
            self.answer({}, 404, "RepoNotFound")
        elif "/tree/" in self.path:
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in seen["there"]])
        else:
            self.answer({"id": "user/name", "private": seen["created"]["private"], "siblings": []})

    def do_POST(self):
        body, seen = self.rfile.read(int(self.headers["Content-Length"])), self.server.seen
        seen["tokens"].add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            seen["created"] = json.loads(body)
            seen["created"]["private"] = seen["created"].get("visibility", "private") == "private"
            self.answer({"url": f"{self.here()}/user/name"})
        elif "/preupload/" in self.path:
            modes = {True: "lfs", False: "regular"}
            self.answer(
                {
                    "files": [
                        {"path": path, "uploadMode": modes[path.endswith(".safetensors")], "shouldIgnore": False}
                        for path in (file["path"] for file in json.loads(body)["files"])
                    ]
                }
            )
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for thing in objects:
                thing["actions"] = {"upload": {"href": f"{self.here()}/put/{thing['oid']}"}}
                if "full" in seen:
                    thing["error"] = {"code": 507, "message": "no room is left"}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            small = [line["value"] for line in lines if line["key"] == "file"]
            large = [line["value"] for line in lines if line["key"] == "lfsFile"]
            seen["files"] = {value["path"]: base64.b64decode(value["content"]) for value in small}
            seen["files"] |= {value["path"]: seen["put"][value["oid"]] for value in large}
            seen["deleted"] = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
            url = f"{self.here()}/user/name/commit/{0:040}"
            self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            assert self.path == "/api/validate-yaml"
            self.answer({})

    def do_PUT(self):
        self.server.seen["put"][self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def here(self):
        return f"http://{self.headers['Host']}"

    def answer(self, what, status=200, error=""):
        content = json.dumps(what).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", len(content))):
            self.send_header(name, str(value))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = {"tokens": set(), "put": {}, "there": ["report/old.png", "saelens/old_0/cfg.json", "notes.md"]}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def command(run, endpoint, *flags):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_stand_in", "JAX_PLATFORMS": "cpu"}
    environment["HF_HUB_DISABLE_XET"] = "1"  # large files by the older of the hub's two protocols
    line = [sys.executable, "-m", "gsae_jax.push", f"--workdir={run}", "--repo=user/name", *flags]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.variants
def test_an_upload_is_the_folder_private_by_default_and_takes_the_place_of_an_earlier_one(run, hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    dry = command(run, endpoint, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "created" not in hub.seen
    assert "nothing was sent. The repository would be user/name." in dry.stdout
    done = command(run, endpoint)
    assert (done.returncode, done.stdout) == (0, f"{endpoint}/user/name\n"), done.stderr
    assert hub.seen["created"]["private"] is True
    assert hub.seen["tokens"] == {"Bearer hf_stand_in"}
    model_card.write(str(run), "user/name", ["saelens"], tmp_path / "repo")
    written = {str(path.relative_to(tmp_path / "repo")): path for path in (tmp_path / "repo").rglob("*")}
    assert hub.seen["files"] == {name: path.read_bytes() for name, path in written.items() if path.is_file()}
    assert all(name in dry.stdout for name in hub.seen["files"])
    assert hub.seen["deleted"] == {"report/old.png", "saelens/old_0/cfg.json"}
    del hub.seen["files"]
    public = command(run, endpoint, "--public")
    hub.seen["created"]["private"] = False
    private = command(run, endpoint)
    hub.seen["full"] = True
    full = command(run, endpoint, "--public")
    for failed, message in (
        (public, "error: --repo: user/name exists and is private; leave --public out, or write another name\n"),
        (private, "error: --repo: user/name exists and is public; add --public, or write another name\n"),
        (full, "error: --repo: user/name cannot be written (ValueError: LFS batch API returned errors: "),
    ):
        assert failed.returncode == 2
        assert failed.stderr.splitlines(keepends=True)[-1].startswith(message)
        assert "Traceback" not in failed.stderr
    assert "files" not in hub.seen


@pytest.mark.variants
def test_pages_become_a_static_space(run, hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    failed = command(copy, endpoint, "--space=user/pages")
    assert failed.returncode == 2
    assert "has no collected features" in failed.stderr
    assert hub.seen["tokens"] == set()
    collecting.collect(collecting.Wanted(str(copy), ["gated_0"], tokens=1024))
    done = command(copy, endpoint, "--space=user/pages")
    assert (done.returncode, done.stdout) == (0, f"{endpoint}/user/name\n{endpoint}/spaces/user/pages\n"), done.stderr
    files = hub.seen["files"]
    assert {"index.html", "gated_0/index.html", "gated_0/0/index.html", "static/viewer.js"} <= files.keys()
    fields = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (fields["sdk"], fields["models"]) == ("static", ["user/name"])


def test_the_card_tells_of_the_weights_beside_it(run, tmp_path):
    """Also where an earlier checkpoint was measured last; and nothing else that lies there is published."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    first, last = (gsae_jax.load(copy, step=step)["gated_0"].params["W_dec"] for step in (8, 16))
    assert np.abs(first - last).max() > 0
    measuring.evaluate(copy, 512, step=8, earlier="replace")
    (copy / "report" / ".ipynb_checkpoints").mkdir()
    (copy / "report" / "notes.txt").write_text("mine")
    model_card.write(str(copy), "user/name", ["saelens"], tmp_path / "repo")
    np.testing.assert_array_equal(gsae_jax.load(tmp_path / "repo" / "saelens")["gated_0"].params["W_dec"], first)
    published = {path.name for path in (tmp_path / "repo" / "report").iterdir()}
    assert published == {path.name for path in (run / "report").iterdir()}
    for broken in ("{", '{"saes": [{"name": "x"}]}'):
        (copy / "report" / "report.json").write_text(broken)
        with refused("--workdir", f"{copy / 'report' / 'report.json'} cannot be read", "gsae_jax.evaluate"):
            model_card.write(str(copy), "user/name", ["saelens"], tmp_path / "again")


def test_a_hub_that_is_not_there_is_one_sentence(run):
    done = command(run, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --repo: user/name ")
    assert "Traceback" not in done.stderr


def test_the_card_says_how_the_saes_were_trained_and_from_what(run, tmp_path):
    labels = model_card.Labels("openai-community/gpt2", "user/stories", "cc-by-4.0")
    assert model_card.write(str(run), "user/name", ["saelens"], tmp_path / "repo", labels) == []
    card = (tmp_path / "repo" / "README.md").read_text()
    fields = yaml.safe_load(card.split("---\n")[1])
    expected = {"library_name": "saelens", "license": "cc-by-4.0", "base_model": "openai-community/gpt2"}
    assert fields == expected | {"datasets": ["user/stories"], "tags": ["sparse-autoencoder", "gated", "relu"]}
    config = json.loads((run / "config.json").read_text())
    trained_on = config["train"]["steps"] * config["train"]["batch_size"]
    read = run_directory.Workdir(run).facts(config["train"]["steps"]).text.tokens_read
    assert read > trained_on
    for row in (
        f"| SAE updates | {config['train']['steps']} |",
        f"| Activations trained on | {trained_on:,} |",
        f"| Tokens read | {read:,} |",
        "| Rows of text | cut from one stream of documents |",
        "jax ",
        "python ",
    ):
        assert row in card
    for words in ("[experiment.json](experiment.json)", "from_pretrained_no_processing", "arXiv:2404.16014"):
        assert words in card
    # The config is that of the run, without this machine's folders.
    published = json.loads((tmp_path / "repo" / "experiment.json").read_text())
    assert published["stacks"] == config["stacks"]
    assert published["lm"]["path"] == Path(config["lm"]["path"]).name
    assert str(tmp_path.parent) not in card + json.dumps(published)
    assert config_trees.from_dict(config_lib.Experiment, published).train.steps == config["train"]["steps"]


@pytest.mark.parametrize(
    ("recorded", "published"),
    [
        ("store:/home/alice/stores/a", "store:a"),
        ("/home/alice/runs/a:gated", "a:gated"),
        ("gs://bucket/texts/*.txt", "texts/*.txt"),
        ("store:gs://bucket/a", "store:a"),
        ("C: what is a colon", "C: what is a colon"),
    ],
)
def test_no_folder_of_this_machine_is_published(recorded, published):
    assert model_card._shareable({"data": [recorded]}) == {"data": [published]}


def test_the_card_says_how_documents_became_rows(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"pack": "documents", "path": "/somewhere/of/mine/stories/*.txt"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    model_card.write(str(tmp_path / "run"), "user/name", ["saelens"], tmp_path / "repo")
    card = (tmp_path / "repo" / "README.md").read_text()
    assert "| Rows of text | each is the first part of one document |" in card
    assert "trained by gsae_jax on stories/&#42;.txt in rows" in card
    published = json.loads((tmp_path / "repo" / "experiment.json").read_text())
    assert published["data"]["path"] == "stories/*.txt"


@pytest.mark.parametrize("base_model", ["", "user/model"])
@pytest.mark.parametrize("formats", [["saelens", "dictionary_learning"], ["gemma_scope"]])
def test_each_code_sample_of_the_card_is_complete(base_model, formats):
    """Every name that one uses is its own or Python's."""
    sae = sae_files.make(gated)
    sae = dataclasses.replace(sae, site="blocks.0.hook_mlp_out")
    labels = model_card.Labels(base_model)
    card = model_card.card("user/name", formats, {sae.name: sae}, [test_rendering.record(sae.name)], {"a": "b"}, labels)
    samples = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(samples) == 3
    for sample in samples:
        nodes = list(ast.walk(ast.parse(sample)))
        given = {alias.asname or alias.name for node in nodes for alias in getattr(node, "names", [])}
        written = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used <= given | written, sample
        assert {"x", "features"} <= written
        assert sample.count("import gsae_jax") <= 1


def test_a_card_without_labels_says_which_are_missing(run, tmp_path):
    missing = model_card.write(str(run), "user/name", ["saelens"], tmp_path / "repo")
    assert missing == ["base_model", "dataset", "license"]
    fields = yaml.safe_load((tmp_path / "repo" / "README.md").read_text().split("---\n")[1])
    assert sorted(fields) == ["library_name", "tags"]
    for field, value in (("base_model", "gpt2"), ("dataset", "a b/c"), ("license", "My Licence")):
        with refused(field, value):
            model_card.Labels(**{field: value})
