"""The floors of the house: imports point downward only."""

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import gsae_jax
from gsae_jax import plugins

PACKAGE = Path(gsae_jax.__file__).parent
# Higher floors may import lower ones. Wings on one floor do not know each other; `runs` puts together what wings made.
FLOOR = {
    "errors": -1,
    "kernels": 0,
    "batching": 0,
    "config": 0,
    "config_trees": 0,
    "mesh": 0,
    "plugins": 0,
    "processes": 0,
    "rendering": 0,
    "saes": 1,
    "lms": 1,
    "data": 1,
    "loggers": 1,
    "storage": 1,
    "experiments": 1,
    "activations": 2,
    "taps": 2,
    "formats": 2,
    "evaluation": 3,
    "features": 3,
    "web": 3,
    "training": 4,
    "planning": 4,
    "pretraining": 4,
    "sae_loading": 4,
    "cli": 4,
    "sae_sources": 5,
    "measuring": 6,
    "collecting": 6,
    "exporting": 5,
    "reporting": 7,
    "publishing": 8,
    "viewer": 4,
    "rating": 4,
    "viewing": 7,
    "scoring": 7,
    "studying": 7,
    "storing": 6,
    "synthesis": 7,
    "comparing": 8,
}
# On the highest floor.
COMMANDS = ("train", "evaluate", "collect", "view", "rate", "study", "export", "plan", "push", "pretrain")
COMMANDS += ("convert_lm", "sites", "settings", "store", "compare")
FLOOR |= dict.fromkeys(COMMANDS, 9)
FLOOR["__main__"] = 9
FLOOR["fitting"] = 10  # a function for notebooks, which does what the command `train` does
ALLOWED_ON_ONE_FLOOR = {
    ("storage", "loggers"),
    ("web", "features"),
    ("lms", "storage"),  # who reads and writes files does it with storage's readers and writers
    ("data", "storage"),
    ("batching", "processes"),
    ("config_trees", "config"),
    ("mesh", "config"),
    ("processes", "config"),
    ("config", "plugins"),
    ("planning", "training"),  # which does not know that it is planned
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_downward():
    checked = 0
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for name in imports(file):
            parts = name.split(".")
            if parts[0] != "gsae_jax" or len(parts) < 2 or parts[1] == room:
                continue
            other, checked = parts[1], checked + 1
            if not (PACKAGE / other).exists() and not (PACKAGE / f"{other}.py").exists():
                continue  # a name of gsae_jax/__init__.py
            assert FLOOR[room] > FLOOR[other] or (room, other) in ALLOWED_ON_ONE_FLOOR, f"{room} imports {other}"
    assert checked > 50


def test_every_wing_has_a_floor():
    """A new one fails here until somebody decides what it may know."""
    wings = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert wings - {"__init__"} == set(FLOOR)


def test_only_one_file_knows_orbax_and_few_map_over_devices():
    def users(text):
        return {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if text in file.read_text()}

    assert users("import orbax") == {"storage/checkpoints.py"}
    # The second is one kernel, which the compiler cannot split by itself. In the third, devices must not affect bits.
    # In the last, each device has experts of its own.
    mapped = {"training/step.py", "lms/attention.py", "features/streaming.py", "lms/experts.py"}
    assert users("jax.shard_map(") | users("jax.shard_map,") == mapped
    # Who writes does it with storage/writing.py, and who reads a path does not ask where it is.
    assert users("os.replace(") | users("mkdtemp") == users('startswith("gs://")') == {"storage/paths.py"}
    assert users("import tensorflow as") == users("import pickle") == users("import dill") == set()


def test_nothing_outside_of_saes_knows_an_architecture_by_name():
    """Experiments do, and the tables of other libraries' formats; `lms` has activation functions of its own."""
    named = re.compile(r'"(gated|relu|jumprelu)"|only_magnitude|pre_activations|startswith\("[bW]_')
    knowing = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if file.relative_to(PACKAGE).parts[0] not in ("saes", "formats", "experiments", "lms")
        and named.search(file.read_text())
    }
    assert knowing == {"publishing/model_card.py"}  # jumprelu is the name of a format as well


def test_submodules_of_a_lazy_package_are_imported_by_name():
    """`huggingface_hub.utils` exists only after another module has imported it."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "huggingface_hub":
                assert importlib.util.find_spec(f"huggingface_hub.{node.attr}") is None, (file, node.attr)


def test_no_function_takes_more_than_eight_arguments():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in names if name not in ("self", "cls")]) <= 8, (file, node.name)


def test_commands_are_thin():
    for file in PACKAGE.glob("*.py"):
        if "cli.run(main" in file.read_text():
            assert len(file.read_text().splitlines()) < 80, file


def test_the_package_lists_its_commands(capsys):
    runpy.run_module("gsae_jax", run_name="__main__")
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    listed = {line[2].removeprefix("gsae_jax."): line[3] for line in lines if line[:2] == ["python", "-m"]}
    assert [*listed] == sorted(COMMANDS)
    assert listed["sites"] == "Print the sites of a language model with their widths, from its config.json only."


def test_plugins_are_files():
    trainable = [
        "batch_topk",
        "batch_topk_crosscoder",
        "batch_topk_transcoder",
        "gated",
        "gated_batch_topk",
        "gated_crosscoder",
        "gated_transcoder",
        "jumprelu",
        "jumprelu_transcoder",
        "matryoshka",
        "relu",
        "relu_april",
        "relu_crosscoder",
        "relu_transcoder",
        "signed_gated",
        "topk",
        "topk_transcoder",
    ]
    assert list(plugins.known("saes", "PARAMETERS")) == trainable
    assert list(plugins.known("saes", "loss")) == trainable
    assert list(plugins.known("lms", "MODEL_TYPES")) == [
        "gelu",
        "gemma",
        "gemma4",
        "gpt2",
        "gpt_neox",
        "llama",
        "moe",
        "multimodal",
        "olmo",
        "phi3",
    ]
    assert list(plugins.known("experiments", "get_config")) == ["quickstart"]
    assert list(plugins.known("data.corpora", "open_corpus")) == ["stdlib", "text", "tfds"]
