"""The documentation's code, commands and links work, notebooks are committed as they ran; (marked) they run, and the
site builds unwarned."""

import ast
import collections
import contextlib
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from absl import flags

import gsae_jax
from configs import gemma_2_2b
from gsae_jax import cli, config_trees
from gsae_jax import config as config_lib
from gsae_jax.data import rows
from gsae_jax.errors import UserError
from gsae_jax.lms import loading
from gsae_jax.saes import contract
from notebooks import address
from notebooks import run as notebooks_run

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").glob("*.md")),
    *GUIDES,
]


def blocks(guide):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guides" / f"{guide}.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.variants
def test_the_guides_architecture_trains_beside_the_others(config_dict, tmp_path, monkeypatch):
    source, use = blocks("architecture")
    (tmp_path / "tanh.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    exec(use, {"stack_config": gsae_jax.stack_config, "config": config_dict, "site": "blocks.0.hook_mlp_out"})
    config_dict.mesh.data, config_dict.mesh.latent = 4, 2
    sae = gsae_jax.fit(config_dict, tmp_path / "run")["tanh_1"]
    assert (sae.architecture, sae.config.width) == (str(tmp_path / "tanh.py"), 1536)
    records = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["saes"]
    assert {record["architecture"] for record in records} == {"gated", "relu", "tanh.py"}


def test_the_guides_experiment_builds(lm_dir):
    (block,) = blocks("model")
    names = {}
    exec(block, names)
    experiment = config_trees.from_dict(config_lib.Experiment, names["get_config"]())
    assert {stack.architecture for stack in experiment.stacks.values()} == {"gated", "relu"}


def test_too_little_held_out_text_is_said_as_the_guide_has_it(experiment, capsys):
    tokenizer = loading.load_lm().tokenizer
    assert sum(batch.size for batch in rows.held_out(experiment, tokenizer, 2048)) == 2048
    assert not capsys.readouterr().err
    measured = sum(batch.size for batch in rows.held_out(experiment, tokenizer, 10**6))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: evaluation.tokens: you asked for 1,000,000 tokens.")
    assert f" {measured:,} " in warning


def test_the_guides_name_files_that_exist():
    for guide in GUIDES:
        for path in re.findall(r"(?<![\w/])(?:configs|launch|tests|gsae_jax)/[\w/]+\.\w+", guide.read_text("utf-8")):
            assert (ROOT / path).exists(), (guide.name, path)


def text_of(path):
    if path.suffix == ".md":
        return path.read_text("utf-8")
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    return "\n\n".join(re.sub(r"^%%bash\n(.*)", r"```bash\n\1\n```", cell, flags=re.DOTALL) for cell in cells)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)
def test_links_lead_to_files_of_the_repository(path):
    for target in re.findall(r"\]\(([^)\s#]+)", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)):
        assert re.match(r"\w+:", target) or (path.parent / target).exists(), target


def spans(path):
    """Code in sentences."""
    found = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL))
    return [span.replace("\n", " ") for span in found]


def check_command(module, arguments):
    """Parse a command as gsae_jax.MODULE would, its config file included."""
    source = (ROOT / "gsae_jax" / f"{module}.py").read_text("utf-8")
    names = vars(importlib.import_module(f"gsae_jax.{module}")) | {"values": flags.FlagValues()}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    several = [
        node for node in ast.walk(ast.parse(Path(cli.__file__).read_text("utf-8"))) if isinstance(node, ast.Call)
    ]
    (run,) = (call for call in calls if ast.unparse(call.func) == "cli.run")
    for call in calls + (several if any(keyword.arg == "several" for keyword in run.keywords) else []):
        if re.fullmatch(r"flags\.DEFINE_(string|integer|float|bool)|cli\.define_list", ast.unparse(call.func)):
            call.keywords.append(ast.keyword("flag_values", ast.Name("values")))
            eval(ast.unparse(call), names)
    kind = config_lib.Pretrain if module == "pretrain" else config_lib.Experiment
    config = cli.define_config(names["values"], ["", *arguments], kind) if "cli.define_config(" in source else None
    rest = cli.parse(["", *arguments], names["values"])[1:]
    needed = [name for name in run.args[1:] if not ast.literal_eval(name).startswith("[")]
    if not len(needed) <= len(rest) <= len(run.args) - 1:
        raise UserError(f"arguments without a name: {rest}", "command line")
    if config is not None and config.value is not None:
        config_trees.from_dict(kind, cli.given(config))


def commands(path):
    """Module and arguments of each command, and of a launcher or of arguments alone as they would be of a training."""
    training = ["--config=configs/quickstart.py", "--workdir=runs/x"]
    blocks = re.findall(r"```bash\n(.*?)```", text_of(path), re.DOTALL)
    for line in "\n".join([*blocks, *spans(path)]).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line):
            if match := re.search(r"python -m gsae_jax\.(\w+)(.*)", part):
                arguments = shlex.split(match[2].replace("mine.py", "configs/quickstart.py"), comments=True)
                if arguments:  # without, it is a name
                    yield match[1], arguments
            elif re.match(r"\s*(bash|sbatch) launch/|--config\.\w", part):
                yield "train", training + [word for word in shlex.split(part) if word.startswith("--config.")]


DEPRECATED = "ignore:the load_module.* method is deprecated:DeprecationWarning"  # ml_collections uses it


@pytest.mark.filterwarnings(DEPRECATED)
@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)
def test_commands_have_the_flags_and_fields_that_are_written(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, arguments in commands(path):
        try:
            check_command(module, arguments)
        except UserError as error:
            pytest.fail(f"gsae_jax.{module} {shlex.join(arguments)}: {error}")


@pytest.mark.filterwarnings(DEPRECATED)
def test_commands_are_found_and_wrong_ones_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in [*PAGES, *NOTEBOOKS]:
        written = collections.Counter(re.findall(r"python -m gsae_jax\.(\w+) ", text_of(path)))
        assert written <= collections.Counter(module for module, _ in commands(path)), path
    run = ["--config=configs/quickstart.py", "--workdir=x"]
    wrong = [("train", [*run, "--config.train.stps=1"]), ("train", [*run, "--config.stacks.gate.width=8"])]
    wrong += [("evaluate", ["--workdir=x", "--token=5"]), ("evaluate", ["--workdir=x", "--tokens=many"])]
    wrong += [("export", ["--workdir=x", "--out=y"]), ("convert_lm", ["one"]), ("sites", ["DIR"])]
    wrong += [("study", ["--pairs=5"]), ("study", ["serve", "one", "two"])]
    for module, arguments in wrong:
        with pytest.raises(UserError):
            check_command(module, arguments)


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("architectures", "architectures.md"),
        ("kl", "guides/kl.md"),
        ("reproduction", "reproduction.md"),
        ("recipe", "recipe.md"),
    ],
)
def test_tables_are_those_of_the_committed_results(script, page, tmp_path, monkeypatch):
    copy = tmp_path / page
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "docs" / page, copy)
    monkeypatch.setattr(sys, "argv", [f"docs/{script}.py", "--write", str(copy)])
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    runpy.run_path(str(ROOT / "docs" / f"{script}.py"), run_name="__main__")
    assert copy.read_text("utf-8") == (ROOT / "docs" / page).read_text("utf-8")


def test_the_toy_models_table_is_what_the_script_computes(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page = Path(shutil.copy(ROOT / "docs" / "reproduction.md", tmp_path / "docs"))
    page.write_text(
        re.sub(r"(<!-- toy_model -->\n).*?(<!-- end -->)", r"\1\2", page.read_text("utf-8"), flags=re.DOTALL)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    runpy.run_path(str(ROOT / "docs" / "toy_model.py"))
    assert page.read_text("utf-8") == (ROOT / "docs" / "reproduction.md").read_text("utf-8")


def test_flags_that_stand_alone_are_of_some_command():
    sources = [
        *ROOT.glob("gsae_jax/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("docs/*.py"),
        *ROOT.glob("launch/*.sh"),
    ]
    known = r'(?:DEFINE_\w+|define_list|add_argument)\(\s*"(?:--)?([\w-]+)"|^--([\w-]+)\)'
    names = {"config", "help"}.union(*(sum(re.findall(known, path.read_text("utf-8"), re.M), ()) for path in sources))
    for path in [*PAGES, *NOTEBOOKS]:
        for span in spans(path):
            if span.startswith("--"):
                assert {flag.partition(".")[0] for flag in re.findall(r"(?:^| )--([\w.-]+)", span)} <= names, (
                    path,
                    span,
                )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_as_they_ran_from_top_to_bottom(path):
    assert path.stat().st_size < 400_000
    notebook = json.loads(path.read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["metadata"]["gsae_jax"]["code"] == notebooks_run.code_hash(notebook), "python notebooks/run.py"
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert f"/blob/main/notebooks/{path.name})" in "".join(notebook["cells"][0]["source"])  # the badge


GROUPS = ("stacks", "data", "activations", "train", "mesh")  # what the planner reads


def test_the_planners_words_in_the_notebook_are_todays(tmp_path, monkeypatch):
    if importlib.util.find_spec("libtpu"):
        pytest.skip("with libtpu the planner compiles, and says other words")
    cells = json.loads((ROOT / "notebooks" / "tpu_pod.ipynb").read_text("utf-8"))["cells"]
    (cell,) = (cell for cell in cells if "planner.describe(planner.plan(" in "".join(cell["source"]))
    monkeypatch.chdir(tmp_path)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec("".join(cell["source"]), names)
    assert said.getvalue() == "".join(cell["outputs"][0]["text"])
    ours = config_trees.from_dict(config_lib.Experiment, gemma_2_2b.get_config())
    theirs = names["experiment"]()
    assert {group: getattr(ours, group) for group in GROUPS} == {group: getattr(theirs, group) for group in GROUPS}
    published = json.loads((ROOT / "tests/fixtures/configs/gemma_2_2b/config.json").read_text())
    assert names["gemma"].items() <= published.items()


def test_notebooks_install_the_package_where_it_is_not_there(tmp_path):
    """Their first cell: with the package, without it, and in Colab where the address cannot be cloned."""
    first = {"".join(json.loads(path.read_text("utf-8"))["cells"][1]["source"]) for path in NOTEBOOKS}
    (cell,) = first
    trial = """
import importlib.util, sys, types
cell, lacking, colab = sys.argv[1:]
if colab:
    sys.modules["google.colab"] = types.ModuleType("google.colab")
if lacking:
    importlib.util.find_spec = lambda name: None
try:
    exec(cell)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
    no_network = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": "https://github.com/"}
    no_network |= {"GIT_CONFIG_KEY_0": f"url.{tmp_path}/nowhere/.insteadOf"}

    def said(lacking="", colab=""):
        command = [sys.executable, "-c", trial, cell, lacking, colab]
        environment = os.environ | no_network | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert said() == said(colab="yes") == ""
    account = re.search(r"https://github\.com/[\w-]+/gsae_jax", cell)[0]
    assert f"pip install git+{account}" in said("yes")
    assert said("yes", "yes").startswith(f"{account} was not installed")


@pytest.mark.notebooks
def test_notebooks_run(tmp_path):
    """As they are committed, by the command that made them so: they show the same kinds of things."""
    for name, notebook in notebooks_run.executed(notebooks_run.NAMES, tmp_path):
        committed = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))
        for cell, before in zip(notebook["cells"], committed["cells"], strict=True):
            shown, shown_before = (
                [(output["output_type"], sorted(output.get("data", {}))) for output in part.get("outputs", [])]
                for part in (cell, before)
            )
            assert shown == shown_before, (name, before["source"])
    assert (tmp_path / "work" / "runs" / "notebooks" / "report" / "report.json").exists()


@pytest.mark.docs
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/*/index.html")}
    assert {path.stem for path in [*GUIDES, *NOTEBOOKS]} <= pages
    for page in (tmp_path / "site").rglob("index.html"):  # every page and picture it links to is there
        for target in re.findall(r'<(?:img|a)\b[^>]* (?:src|href)="([^"#]+)', page.read_text("utf-8")):
            assert re.match(r"\w+:", target) or (page.parent / target).exists(), (page, target)


def test_the_repositorys_address_is_written_once():
    """In setup.py, from where `notebooks/address.py` copies it; and that reaches every address in the notebooks."""
    setup = (ROOT / "setup.py").read_text("utf-8")
    ours = address.owner(setup)
    for path in NOTEBOOKS:
        text = path.read_text("utf-8")
        owners = {account for _, account in address.OWNER.findall(text)}
        assert owners == {ours}, f"{path.name}: python notebooks/address.py"
        moved = address.with_owner(text, "another-account")
        assert json.loads(moved)
        assert len(re.findall("another-account/gsae_jax", moved)) == len(re.findall(f"{ours}/gsae_jax", text)) >= 2
        assert ours not in moved
    texts = [
        path
        for pattern in ("*", "gsae_jax/**/*", "docs/**/*", "configs/*", "launch/*", ".github/**/*", "tests/*.py")
        for path in ROOT.glob(pattern)
        if path.suffix in (".md", ".py", ".yml", ".toml", ".cff", ".sh", ".html")
    ]
    assert {path.name for path in texts if address.OWNER.search(path.read_text("utf-8"))} == {"setup.py"}
    assert len(address.OWNER.findall(setup)) == 1


@pytest.mark.parametrize(("architecture", "options"), [("relu", {}), ("gated", {"freeze_aux_decoder": False})])
def test_the_guides_lambda_gives_saelens_loss(architecture, options):
    """SAELens' loss in float64 is a multiple of ours, with the guide's λ for its inputs with and without scaling."""
    rng, (B, D, F), c = np.random.default_rng(0), (64, 16, 24), 1.7
    x = rng.normal(size=(B, D)) * 3 + rng.normal(size=D)
    centred = x - x.mean(0)
    scale = np.sqrt(D / np.square(centred).sum(-1).mean())
    module = contract.module_of(architecture)
    config = module.Config(D, F, **options)
    params = {name: np.asarray(value) for name, value in module.init(jax.random.key(0), config).items()}
    params |= {
        name: rng.normal(size=value.shape).astype(np.float32) / 4 for name, value in params.items() if value.ndim == 1
    }
    norm = np.linalg.norm(x, axis=-1).mean()
    spread = np.sqrt(np.square(centred).sum(-1).mean())
    for factor, l1 in ((np.sqrt(D) / norm, c / D * norm / spread), (1.0, c * scale / D)):
        y = (scale * centred).astype(np.float32)
        batch = contract.Batch(inputs=y, targets=y, dead=lambda: np.zeros(F, bool), step=np.int32(0))
        ours, _ = module.loss(params, {}, batch, {"l1_coefficient": l1}, config)
        # The same function of SAELens' inputs, factor * x: encoders as they are, biases in its units.
        unit = factor / scale
        inputs = {name: np.float64(value) for name, value in params.items()}
        inputs |= {name: unit * inputs[name] for name in inputs if name in ("b_enc", "b_gate", "b_mag")}
        b_dec = unit * inputs["b_dec"] + factor * x.mean(0)
        z = factor * x
        pre = (z - b_dec) @ inputs["W_gate" if architecture == "gated" else "W_enc"]
        if architecture == "gated":
            gate = np.maximum(pre + inputs["b_gate"], 0)
            f = (gate > 0) * np.maximum(pre * np.exp(inputs["r_mag"]) + inputs["b_mag"], 0)
        else:
            gate = f = np.maximum(pre + inputs["b_enc"], 0)
        codes = (f, gate) if architecture == "gated" else (f,)
        theirs = sum(np.square(z - code @ inputs["W_dec"] - b_dec).sum(-1).mean() for code in codes)
        theirs += c * (gate * np.linalg.norm(inputs["W_dec"], axis=1)).sum(-1).mean()
        assert float(ours) == pytest.approx(theirs / (D * unit**2), rel=1e-5)


def test_the_python_reference_names_what_is_there():
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE):
        assert pkgutil.resolve_name(name).__doc__, name


def test_the_citation_is_of_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == metadata.version("gsae_jax")


def test_each_promise_names_a_test_that_there_is():
    text, file, names = (ROOT / "docs" / "reliability.md").read_text("utf-8"), None, 0
    for path, name in re.findall(r"`((?:faults/)?test_\w+\.py)?(?:::(test_\w+))?`", text):
        file = ROOT / "tests" / path if path else file
        assert file is None or file.exists(), path
        if name:
            assert f"def {name}(" in file.read_text("utf-8"), name
        names += bool(path or name)
    assert names > 30
