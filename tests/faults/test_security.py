"""Files are data: none runs code, none is waited for, none reaches the network or gets out of the report's text."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees
from gsae_jax.config import Experiment
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluation import report
from gsae_jax.lms.weights import INDEX, WEIGHTS
from tests.conftest import tiny
from tests.fixtures.lms import make
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
LMS = Path(make.__file__).parent
SCRIPT = "<script>alert(1)</script>"


def test_nothing_unpickles_or_runs_text():
    """But for torch, which is asked for tensors only, and the .py files that a user names."""
    for file in (ROOT / "gsae_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "pickle",
                "dill",
                "cloudpickle",
                "marshal",
                "shelve",
                *(["yaml"] if file.name != "rendering.py" else []),  # which writes a card's front matter
            }
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not called.startswith("yaml.") or called == "yaml.safe_dump", (file, node.lineno)
                runs = {"eval", "exec", "compile", "__import__", "os.system"}
                assert called not in runs - ({"exec", "compile"} if file.name == "plugins.py" else set()), file
                assert keywords.get("allow_pickle", "False") == keywords.get("shell", "False") == "False"
                assert keywords.get("trust_remote_code", "False") == "False"
                assert called != "torch.load" or keywords["weights_only"] == "True"
                assert not called.endswith("Tokenizer.from_pretrained") or "trust_remote_code" in keywords


def edited(folder, name, **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(LMS / "gpt2", tmp_path / "model")
    return tmp_path / "model"


def test_a_model_directory_runs_no_code(folder, lm_dir, monkeypatch):
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    edited(folder, "config.json", auto_map={"AutoConfig": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]})
    template = "{% for x in range(10**9) %}{{ ''.__class__.__mro__ }}{% endfor %}"
    edited(folder, "tokenizer_config.json", chat_template=template)
    assert gsae_jax.load_lm(folder).tokenizer("a")["input_ids"]
    for model in (folder, shutil.copytree(lm_dir, folder.parent / "of no class that transformers knows")):
        edited(
            model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own"
        )
        assert gsae_jax.load_lm(model).tokenizer("a")["input_ids"]
    (model / "tokenizer.json").unlink()
    with refused("path", "code (auto_map in tokenizer_config.json)", "not run"):
        gsae_jax.load_lm(model)
    assert not marker.exists()


def test_a_data_set_imports_no_module(tmp_path, monkeypatch):
    class Small(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": ((number, {"text": "some text"}) for number in range(30))}

        def _generate_examples(self):
            raise AssertionError

    Small(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    (tmp_path / "tfds" / "small").rename(tmp_path / "tfds" / "stranger")  # which no code is known for
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_lib.Data(corpus="tfds", name="stranger", data_dir=str(tmp_path / "tfds"))
    assert len(rows_lib.open_texts(config, "train")[0]) == 30
    features = tmp_path / "tfds" / "stranger" / "1.0.0" / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.text_feature", "foreign"))
    with refused("data.name", "features.json", "'foreign.Text'", "not a feature of TFDS"):
        rows_lib.open_texts(config, "train")
    assert not (tmp_path / "ran").exists()


def test_files_that_have_no_end_are_not_waited_for(folder, tmp_path):
    """Pipes and devices, in place of files or by name."""
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        content = (folder / name).read_bytes()
        for make_one in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            (folder / name).unlink()
            make_one(folder / name)
            with refused("path", name):
                gsae_jax.load_lm(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    (folder / WEIGHTS).unlink()
    for elsewhere in ("/dev/zero", "../model.safetensors", 3, None):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"wte.weight": elsewhere}}))
        with refused("path", INDEX, repr(elsewhere), "not a file in the same directory"):
            gsae_jax.load_lm(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    os.mkfifo(texts / "a.txt")
    config = config_lib.Data(corpus="text", path=str(texts))
    with refused("data.path", str(texts), "no .txt"):
        rows_lib.open_texts(config, "train")


def test_text_in_a_report_is_text(tmp_path, config_dict):
    intervals = {"l0": (1.0, 2.0), "loss_recovered": (0.1, 0.2), "gamma": (0.9, 1.0)}
    numbers = ("l0", "loss_recovered", "gamma", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "kl", "fvu", "alive", "ito")
    record = dict.fromkeys(numbers, 0.5) | {"ito": 0, "width": 64, "tokens": 8, "l1_coefficient": 0.1}
    record |= {"learning_rate": 0.1, "intervals": intervals, "architecture": "gated"}
    record |= {"name": f"{SCRIPT}|_0", "model": SCRIPT, "site": SCRIPT}
    ratio = dict.fromkeys(("level", "l0", "baseline_l0", "ratio", "low", "high", "learning_rate"), 0.5)
    ratio |= {"site": SCRIPT, "stack": SCRIPT, "baseline": SCRIPT, "variant": SCRIPT, "width": 64, "seeds": (0,)}
    ratio |= {"baseline_learning_rate": 0.1, "unknown": ("", "")}
    for page in report.pages([record], [ratio], {}).values():
        assert "<script" not in page
        assert page.count("&lt;script&gt;") >= 6
    config_dict.stacks[SCRIPT] = config_dict.stacks.gated
    with refused("stacks", "'<script>", "100 letters"):
        config_trees.from_dict(Experiment, config_dict)


def test_errors_hold_nothing_that_a_terminal_acts_on(folder):
    edited(folder, "config.json", model_type="\x1b]0;title\x07\nerror: \ud800")
    with refused("path", "not supported") as error:
        gsae_jax.load_lm(folder)
    assert str(error.value).isprintable()
    assert r"\x1b]0;title\x07" in str(error.value)


OFFLINE = """
import json, socket, sys

def refused(*args, **kwargs):
    raise SystemExit(f"the network was asked for: {args}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refused
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refused
from gsae_jax import train
print(train.run(json.loads(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.faults
def test_local_directories_need_no_network(text_dir, tmp_path):
    """A whole run, from a directory with a Mistral tokenizer, which transformers likes to ask the hub about."""
    config = tiny(text_dir, LMS / "mistral", tmp_path / "tfds")
    del config.stacks["baseline"]
    config.train.steps, config.stacks.gated.l1_coefficients, config.stacks.gated.seeds = 8, (0.01,), (0,)
    config.evaluation.tokens, config.activations.drop_special_tokens = 256, False  # no word of the text is known to it
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, json.dumps(config.to_dict()), str(tmp_path / "run")],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.endswith("\n0\n"), done.stderr[-2000:]
    assert (tmp_path / "run" / "report" / "report.html").exists()


def test_special_tokens_have_ids(folder):
    edited(folder, "tokenizer_config.json", eos_token="<none such>", bos_token="")
    with refused("path", "EOS token '<none such>'"):
        gsae_jax.load_lm(folder)
