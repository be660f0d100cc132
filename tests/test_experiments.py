"""Every experiment under configs/: it is a valid config, and its whole program can be traced on its real model."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import gsae_jax
from configs import gemma_7b, pythia_2_8b
from gsae_jax import cli, config_trees
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import scaling
from gsae_jax.config import Experiment
from gsae_jax.experiments import quickstart
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.lms.loss import cross_entropy
from gsae_jax.saes import contract
from gsae_jax.training.stacks import Stack
from gsae_jax.training.step import Program
from tests.refusals import refused

MODELS = Path(__file__).parent / "fixtures" / "configs"  # the published config.json of each
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gpt2_small", "gemma_2_2b") else pytest.param(name, marks=pytest.mark.variants)
        for name in sorted(folder.name for folder in MODELS.iterdir() if folder.is_dir())
    ],
)
def test_experiments_build_and_trace(name):
    experiment = config_trees.from_dict(Experiment, importlib.import_module(f"configs.{name}").get_config())
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=4, latent=2))
    program = Program.build(experiment, mesh, Checkpoint.open(MODELS / name), special_tokens=(0,))
    params = abstract_params(program.module, experiment.lm.dtype)
    state = jax.eval_shape(lambda: program.init(scaling.standard(program.widths)))
    tokens = jax.ShapeDtypeStruct((experiment.rows_per_call, experiment.data.context_length), jnp.int32)
    after, statistics, _ = jax.eval_shape(program.train_step, state, params, tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert set(statistics) == set(experiment.stacks)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(experiment.lm.dtype)}


def given(*arguments):
    values, argv = flags.FlagValues(), ["train", *arguments]
    config = cli.define_config(values, argv)
    cli.parse(argv, values)
    return cli.given(config)


@pytest.mark.filterwarnings("ignore:the load_module.* method is deprecated:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("form", [("--config={}",), ("--config", "{}"), ("-config={}",)], ids=str)
def test_an_experiment_is_given_by_name_or_path(form, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import gsae_jax\n\ndef get_config(site='blocks.0.hook_mlp_out'):\n    config = gsae_jax.experiment_config()\n"
        "    config.stacks.a = gsae_jax.stack_config('relu', site, 64, (0.1,))\n    return config\n"
    )
    (tmp_path / "quickstart").mkdir()  # a folder is no config file
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def config(name):
        return given(*(part.format(name) for part in form), "--config.train.steps=8")

    expected = quickstart.get_config()
    expected.train.steps = 8
    assert config("quickstart") == config(ROOT / "configs" / "quickstart.py") == expected.to_dict()
    for name in ("mine.py", "./mine.py", "~/mine.py", tmp_path / "mine.py"):
        assert config(name)["train"]["steps"] == 8
    assert config("mine.py:blocks.0.mlp.hook_post")["stacks"]["a"]["site"] == "blocks.0.mlp.hook_post"
    for name, *facts in (("quickstrat", "did you mean 'quickstart'", "known: quickstart"), ("mine", "path of a file")):
        with refused("--config", repr(name), *facts):
            config(name)


@pytest.mark.filterwarnings("ignore:the load_module.* method is deprecated:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("arguments", "field", "facts"),
    [
        (["--config.stacks.gated.width=1e3"], "stacks.gated.width", ["'1e3'", "int", "write 1000"]),
        (
            ["--config.stacks.gated.tie_encoder=False"],
            "stacks.gated.tie_encoder",
            ["--config.stacks.gated.options.tie_encoder"],
        ),
        (["--config.train.steps=many"], "train.steps", ["'many'", "int", "an integer"]),
        (["--config.train.decay_fraction=x"], "train.decay_fraction", ["'x'", "float"]),
        (["--config.data.prepend_bos=maybe"], "data.prepend_bos", ["'maybe'", "True or False"]),
        (["--config.steps=5"], "steps", ["'train.steps'"]),
        (["--config.data.sep=x"], "data.sep", ["'separator'"]),
        (["--steps", "5"], "command line", ["'steps'", "--config.train.steps=5"]),
        (["--seed=5"], "command line", ["--config.seed=5"]),
        (["--nothing=5"], "command line", ["'nothing'"]),
        (["--config=nofile.py"], "--config", ["nofile.py does not exist"]),
        (["--config=configs/none/quickstart.py"], "--config", ["does not exist", "`--config quickstart`"]),
        ([], "--workdir", ["is missing", "--workdir=DIRECTORY"]),
    ],
)
def test_what_the_command_line_cannot_have(arguments, field, facts):
    values, argv = flags.FlagValues(), ["train", "--config=quickstart", *arguments]
    cli.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Directory.", flag_values=values, required=True)
    with refused(field, *facts):
        cli.parse(argv + ["--workdir=x"] * bool(arguments), values)


def test_a_list_has_the_values_of_each_time_that_its_flag_is_given(tmp_path):
    values = flags.FlagValues()
    holder = cli.define_list("runs", ["x"], "Runs.", values)
    cli.parse(["compare"], values)
    assert holder.value == ["x"]
    cli.parse(["compare", "--runs=a,b", "--runs", "c"], values)
    assert holder.value == ["a", "b", "c"]
    folder = tmp_path / "lr=1e-3,k=32"
    folder.mkdir()
    again = flags.FlagValues()
    holder = cli.define_list("runs", [], "Runs.", again)
    cli.parse(["compare", f"--runs={folder}", f"--runs={folder}:gated"], again)
    assert holder.value == [str(folder), f"{folder}:gated"]


@pytest.mark.parametrize("experiment", [pythia_2_8b, gemma_7b])
def test_the_papers_sites_can_be_chosen(experiment):
    for layer in experiment.LAYERS:
        for kind, hook in (("mlp", "hook_mlp_out"), ("attn", "attn.hook_z"), ("resid", "hook_resid_post")):
            config = config_trees.from_dict(Experiment, experiment.get_config(f"{kind}{layer}"))
            assert config.sites == [f"blocks.{layer}.{hook}"]
            assert config.stacks["baseline"].width == 1.5 * config.stacks["gated"].width
    with refused("--config", "'resid5'", "did you mean 'resid"):
        experiment.get_config("resid5")


@pytest.mark.variants
def test_a_real_model_on_its_own_kind_of_text(real):
    """TinyStories-656K on the first 128 tokens of 1,728 stories: about 2.8 nats per token (a random guess has 7.62)."""
    lm = gsae_jax.load_lm(real / "TinyStories-656K")
    texts = (real / "tinystories" / "tinystories_v2_head10k_lines.txt").read_text("utf-8").split("<|endoftext|>")
    T, space = 128, lm.tokenizer.convert_tokens_to_ids("▁")
    rows, counted = [], []
    for text in filter(None, map(str.strip, texts)):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[1:] if ids[0] == space else ids  # `tokenizers` begins a text with one, the model's training did not
        story = [lm.tokenizer.bos_token_id, *ids, lm.tokenizer.eos_token_id][:T]
        rows.append(story + [0] * (T - len(story)))
        counted.append(np.arange(1, T) < len(story))
    tokens, counted = jnp.array(rows), np.array(counted)
    assert len(tokens) == 1728

    @jax.jit
    def loss(tokens):
        hidden = lm.module.apply({"params": lm.params}, tokens, method="hidden")
        return cross_entropy(lm.module, lm.params, hidden, tokens)

    assert np.asarray(loss(tokens))[counted].mean() == pytest.approx(2.80, abs=0.05)


@pytest.mark.variants
def test_saes_on_a_real_model_by_one_command(tmp_path, real):
    """The command of configs/tinystories.py, with a model directory and a text folder, shortened."""
    overrides = {
        "lm.path": real / "TinyStories-656K",
        "data.path": real / "tinystories",
        "data.data_dir": tmp_path / "data",
        "train.steps": 240,
        "train.warmup_steps": 40,
        "evaluation.tokens": 2**13,
    }
    command = [sys.executable, "-m", "gsae_jax.train", "--config", "configs/tinystories.py"]
    command += [f"--config.{field}={value}" for field, value in overrides.items()] + [f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    rows = {row["name"]: row for row in report["saes"]}
    assert rows["gated_0"]["site"] == "blocks.1.hook_resid_post"
    assert rows["gated_0"]["loss_recovered"] > 0.6


DIFFERING = """
from ml_collections import ConfigDict

def get_config():
    stack = {"architecture": "gated", "site": "blocks.0.hook_mlp_out", "width": 64, "l1_coefficients": [0.1, 0.2]}
    other = {"architecture": "relu", "site": "blocks.0.hook_mlp_out", "l1_coefficients": 1, "options": {"tie": 1}}
    tree = {"stacks": {"a": stack, "b": stack, "c": other}, "train": {"steps": 100, "decay_fraction": 1}}
    return RETURNED
"""


@pytest.mark.filterwarnings("ignore:the load_module.* method is deprecated:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("returned", ["tree", "ConfigDict(tree)"])
def test_a_config_of_what_differs_can_be_changed_in_every_field(returned, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DIFFERING.replace("RETURNED", returned))
    changes = {
        "lm.path": "somewhere",  # a group that the file does not have
        "train.warmup_steps": "7",
        "train.decay_fraction": "0.5",  # an integer in the file
        "train.resample_steps": "(10,20)",
        "loggers": "()",
        "stacks.a.learning_rates": "(1e-3,2e-3)",
        "stacks.a.l1_coefficients": "(0.3,0.4)",  # a list in the file
        "stacks.a.target": "blocks.0.hook_resid_post",
        "stacks.a.options.tie_encoder": "False",
        "stacks.c.width": "32",  # has no default, and is not in the file
        "stacks.c.l1_coefficients": "0.5",
        "stacks.c.options.tie": "0.25",
    }
    config = given(f"--config={path}", *(f"--config.{name}={value}" for name, value in changes.items()))
    assert config["lm"] == config_trees.to_dict(config_lib.LM("somewhere"))
    train = config["train"]
    assert (train["steps"], train["warmup_steps"], train["decay_fraction"]) == (100, 7, 0.5)
    assert (train["resample_steps"], config["loggers"], config["data"]["corpus"]) == ((10, 20), (), "stdlib")
    a, b, c = (config["stacks"][name] for name in "abc")
    assert (a["learning_rates"], a["l1_coefficients"]) == ((1e-3, 2e-3), (0.3, 0.4))
    assert (a["target"], a["options"]) == ("blocks.0.hook_resid_post", {"tie_encoder": False})
    if returned == "tree":  # in a ConfigDict, one dict that stands in two places stays one
        assert (b["learning_rates"], b["l1_coefficients"], b["options"]) == ((), (0.1, 0.2), {})
    assert (c["width"], c["l1_coefficients"], c["options"]) == (32, (0.5,), {"tie": 0.25})
    with refused("stacks.c.width", "missing"):
        config_trees.from_dict(Experiment, given(f"--config={path}"))
    with refused("train.stps", "'steps'"):
        given(f"--config={path}", "--config.train.stps=3")


@pytest.mark.filterwarnings("ignore:the load_module.* method is deprecated:DeprecationWarning")  # of ml_collections
def test_fields_that_refer_to_each_other_still_do_after_they_are_completed(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        "    config = ConfigDict({'train': {'steps': 10}})\n"
        "    config.checkpoint = ConfigDict({'every': config.train.get_ref('steps') // 2})\n    return config\n"
    )
    config = given(f"--config={path}", "--config.train.steps=40", "--config.checkpoint.keep=3")
    assert (config["checkpoint"]["every"], config["checkpoint"]["keep"]) == (20, 3)
    path.write_text("def get_config():\n    pass\n")
    with refused("--config", "returns nothing"):
        given(f"--config={path}")


def test_an_experiment_in_python_is_what_differs(tmp_path):
    changed = gsae_jax.experiment("quickstart", train={"steps": 700}, stacks={"gated": {"width": 256}})
    expected = quickstart.get_config()
    expected.train.steps, expected.stacks.gated.width = 700, 256
    assert changed == config_trees.from_dict(Experiment, expected)
    assert gsae_jax.experiment(expected) == gsae_jax.experiment(expected.to_dict()) == changed
    assert gsae_jax.experiment(changed, seed=3).seed == 3
    stack = gsae_jax.stack_config("gated", "blocks.0.hook_mlp_out", 64, 0.1, tie_encoder=False)
    path = tmp_path / "mine.py"
    path.write_text("def get_config(seed='0'):\n    return {'seed': int(seed)}\n")
    of_a_file = gsae_jax.experiment(f"{path}:5", stacks={"a": stack}, lm=config_lib.LM("gpt2"))
    assert (of_a_file.seed, of_a_file.lm.path, of_a_file.stacks["a"].width) == (5, "gpt2", 64)
    assert of_a_file.stacks["a"].options == {"tie_encoder": False}
    assert gsae_jax.experiment({"stacks": {"a": stack}}) == gsae_jax.experiment(stacks={"a": stack})
    with refused("stacks", "empty"):
        gsae_jax.experiment()
    with refused("train.stps", "'steps'"):
        gsae_jax.experiment("quickstart", train={"stps": 3})
    with refused("base", "'quickstart'"):
        gsae_jax.experiment("quickstrat")
    with refused("base", "3"):
        gsae_jax.experiment(3, stacks={"a": stack})
    path.write_text("def get_config():\n    return 1 / 0\n")
    with refused("base", "line 2", "ZeroDivisionError"):
        gsae_jax.experiment(path, stacks={"a": stack})


def test_settings_become_trained_saes_in_one_call(config_dict, tmp_path):
    saes = gsae_jax.fit(config_dict, tmp_path / "run")
    assert sorted(saes) == ["baseline_0", "gated_0", "gated_1"]
    assert (tmp_path / "run" / "report" / "report.md").exists()
    again = gsae_jax.fit(config_dict.to_dict(), tmp_path / "run")
    np.testing.assert_array_equal(again["gated_1"].params["W_dec"], saes["gated_1"].params["W_dec"])


def test_a_grid_is_every_combination_once():
    """The config lists each SAE, and is checked as any other."""

    def stack(**settings):
        config = gsae_jax.stack_config("gated", "blocks.0.hook_mlp_out", 64, (0.1, 0.2), grid=True, **settings)
        return config_trees.from_dict(config_lib.Stack, config)

    several = stack(learning_rates=(1e-3, 3e-3), seeds=(0, 1, 2), tie_encoder=False)
    expected = [(l1, rate, seed) for l1 in (0.1, 0.2) for rate in (1e-3, 3e-3) for seed in (0, 1, 2)]
    assert several.numbers() == expected
    assert several.options == {"tie_encoder": False}
    assert contract.with_recipe(stack()).numbers() == [(0.1, 3e-4, 0), (0.2, 3e-4, 0)]
    with_targets = stack(target_l0=(8.0, 16.0), seeds=(0, 1))
    assert with_targets.target_l0 == (8.0, 8.0, 16.0, 16.0)
    assert [(l1, seed) for l1, _, seed in with_targets.numbers()] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    # A target needs no λ to start from; an architecture without λ gets none.
    for architecture, l1_coefficients in (("topk", ()), ("gated", (0.01,))):
        config = gsae_jax.stack_config(architecture, "site", 64, grid=True, target_l0=(8.0, 16.0), seeds=(0, 1))
        plain = config_trees.from_dict(config_lib.Stack, config)
        without = contract.with_recipe(plain)
        assert (without.target_l0, without.seeds) == ((8.0, 8.0, 16.0, 16.0), (0, 1, 0, 1))
        assert without.l1_coefficients == l1_coefficients
    assert contract.with_recipe(without) == without == Stack.build("a", plain, {"site": 32}, "float32").config
    with refused("seeds", "has no values"):
        stack(seeds=())
    with refused("l1_coefficients", "has 2 values; write 1 or 3"):
        stack(target_l0=(8.0, 16.0, 20.0), seeds=(0, 1))


@pytest.mark.filterwarnings("ignore:the load_module.* method is deprecated:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("returned", ["tree", "ConfigDict(tree)"])
def test_what_a_config_file_and_the_command_line_state(returned, tmp_path):
    """`evaluate` takes these fields only; the others are those of the run that it measures."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        f"    tree = {{'evaluation': {{'tokens': 5}}}}\n    return {returned}\n"
    )
    values = flags.FlagValues()
    argv = ["command", f"--config={path}", "--config.lm.path=x", "--config.evaluation.tokens=7"]
    config = cli.define_config(values, argv)
    cli.parse(argv, values)
    assert cli.stated(config, values) == {"lm": {"path": "x"}, "evaluation": {"tokens": 7}}


def test_a_misspelled_field_of_a_stack_is_refused_at_once():
    """But an option is not, nor what may be one of a user's own architecture, whose file is not run for it."""
    site = "blocks.0.hook_mlp_out"
    for name, field in (("learning_rate", "learning_rates"), ("l1_coefficient", "l1_coefficients"), ("seed", "seeds")):
        for architecture in ("gated", "relu"):
            with refused(name, f"did you mean {field}?"):
                gsae_jax.stack_config(architecture, site, 64, 0.1, **{name: 1})
    assert gsae_jax.stack_config("gated", site, 64, 0.1, use_r_mag=False).options.use_r_mag is False
    assert gsae_jax.stack_config("nowhere/own.py", site, 64, 0.1, seed=1).options.seed == 1


def test_a_recipe_names_the_architecture_that_is_trained():
    site = "blocks.0.hook_mlp_out"
    for k, width, first in ((4, 512, 64), (4, 32, 32), (64, 512, 64), (100, 512, 100)):
        settings = {"initial_k": first, "coefficient_warmup_fraction": 0.2, "learning_rates": (1e-3,)}
        settings |= {"k": k, "auxk_coefficient": 1 / 8, "kl_fraction": 0.1}
        by_name = gsae_jax.stack_config("gated_batch_topk", site, width, **settings)
        stack = gsae_jax.stack_config("gated", site, width, k=k, learning_rates=(1e-3,), recipe="2026")
        assert stack.to_dict() == by_name.to_dict()
    given = gsae_jax.stack_config("gated", site, 64, k=4, initial_k=8, kl_fraction=0.0, recipe="2026")
    assert (given.options.initial_k, given.kl_fraction) == (8, 0)
    for left_out in ({"initial_k": 0}, {"coefficient_warmup_fraction": 0.0}):
        stack = gsae_jax.stack_config("gated", site, 64, k=4, learning_rates=(1e-3,), recipe="2026", **left_out)
        assert not stack.options.get("initial_k")
        assert not stack.coefficient_warmup_fraction
        gsae_jax.experiment(stacks={"a": stack})
    with refused("k", "write active features"):
        gsae_jax.stack_config("gated", site, 64, recipe="2026")
    with refused("recipe", "known: 2026"):
        gsae_jax.stack_config("gated", site, 64, k=4, recipe="2025")
    with refused("recipe", "for 'gated' and not for 'relu'"):
        gsae_jax.stack_config("relu", site, 64, 0.1, recipe="2026")
    later = gsae_jax.experiment_config()
    later.stacks.other = gsae_jax.stack_config("topk", site, 512, k=4)
    assert (
        gsae_jax.stack_config("gated", site, 512, k=later.stacks.other.options.get_ref("k"), recipe="2026")
    ).options.initial_k == 64
    with refused("site", "is for one site"):
        gsae_jax.stack_config("gated", (site, "blocks.0.hook_resid_post"), 64, k=4, recipe="2026")
    with refused("l1_coefficients", "write k=32"):
        gsae_jax.stack_config("gated", site, 64, 0.1, k=4, recipe="2026")


def test_stacks_are_replaced_and_left_out():
    changed = gsae_jax.experiment("quickstart", stacks={"gated": None, "baseline": {"width": 512}})
    assert {name: stack.width for name, stack in changed.stacks.items()} == {"baseline": 512}
    untied = gsae_jax.stack_config("gated", "blocks.0.hook_mlp_out", 64, 0.1, tie_encoder=False)
    plain = gsae_jax.stack_config("relu", "blocks.0.hook_mlp_out", 64, 0.1)
    base = gsae_jax.experiment(stacks={"a": untied})
    assert gsae_jax.experiment(base, stacks={"a": plain}).stacks["a"].options == {}
