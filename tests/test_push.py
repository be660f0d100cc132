"""What is published of a run: its folder and card, and an upload to a stand-in for the hub."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gsae_jax
from gsae_jax import cards, push, reports
from gsae_jax.config import ConfigError
from gsae_jax.training import loop

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(text_dir, lm_dir, tmp_path_factory):
    from tests import conftest

    config = conftest.config_dict.__wrapped__(text_dir, lm_dir, tmp_path_factory)
    path = tmp_path_factory.mktemp("push") / "run"
    loop.train(conftest.config_lib.from_dict(conftest.config_lib.Experiment, config), path)
    reports.evaluate(path)
    return path


def test_the_folder_has_every_sae_the_report_and_a_card_that_loads_them(run, tmp_path):
    cards.write(str(run), "user/name", ["saelens", "gemma_scope"], tmp_path / "repo")
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
    names = {"snapshot_download": lambda repo: str(tmp_path / "repo"), "activations": np.ones((2, 32), np.float32)}
    exec(code, names)
    assert names["features"].shape == (2, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "user/name", ["saelens"]), "--workdir: nowhere holds no run"),
        (("RUN", "name", ["saelens"]), "--repo: is 'name'"),
        (("RUN", "user/na me", ["saelens"]), "--repo: is 'user/na me'"),
        (("RUN", "user/name", ["saelense"]), "--format: 'saelense' is not known; did you mean 'saelens"),
        (("RUN", "user/name", []), "--format: is ''"),
    ],
)
def test_what_cannot_be_published_is_refused_before_anything_is_sent(run, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.create_repo", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError) as refused:
        push.push(*(str(run) if argument == "RUN" else argument for argument in arguments))
    assert str(refused.value).startswith(message)


class Hub(http.server.BaseHTTPRequestHandler):
    """So much of the hub's API as an upload of small files takes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seen: dict = self.server.seen
        seen.setdefault("tokens", set()).add(self.headers["Authorization"])
        answer = {}
        if self.path == "/api/repos/create":
            seen["create"] = json.loads(body)
            answer = {"url": f"http://{self.headers['Host']}/user/name"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            seen["files"] = {value["path"]: base64.b64decode(value["content"]) for value in values}
            url = f"http://{self.headers['Host']}/user/name/commit/{0:040}"
            answer = {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = {}
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def command(run, endpoint, *flags):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_stand_in", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "gsae_jax.push", f"--workdir={run}", "--repo=user/name", *flags]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_an_upload_is_the_folder_and_private_by_default(run, hub, tmp_path):
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    dry = command(run, endpoint, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not hub.seen
    done = command(run, endpoint)
    assert done.returncode == 0, done.stderr
    created = hub.seen["create"]
    assert created.get("visibility") == "private" or created.get("private") is True, created
    assert hub.seen["tokens"] == {"Bearer hf_stand_in"}
    cards.write(str(run), "user/name", ["saelens"], tmp_path / "repo")
    written = {str(path.relative_to(tmp_path / "repo")): path for path in (tmp_path / "repo").rglob("*")}
    assert hub.seen["files"] == {name: path.read_bytes() for name, path in written.items() if path.is_file()}
    assert all(name in dry.stdout for name in hub.seen["files"])


def test_a_hub_that_is_not_there_is_one_sentence(run):
    done = command(run, "http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --repo: user/name cannot be written")
    assert "Traceback" not in done.stderr
