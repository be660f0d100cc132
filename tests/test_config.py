import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import base
from gsae_jax import config as config_lib
from gsae_jax import config_trees, experiment_config, measuring, settings, stack_config
from gsae_jax.config import Experiment
from gsae_jax.errors import UserError
from gsae_jax.planning import planner
from gsae_jax.saes import gated
from gsae_jax.saes import trained as trained_lib
from gsae_jax.storage import run_directory
from gsae_jax.training import preparation
from tests.refusals import refused

ROOT = Path(__file__).parent.parent


def changed(config, **changes):
    config.unlock()
    for path, value in changes.items():
        *groups, name = path.split("__")
        target = config
        for group in groups:
            target = target[group]
        target._fields[name] = value  # past ConfigDict's own type check, as a config file's dict literal is
    return config


def trained(config, folder):
    """As the trainer does, until the language model's weights are read."""
    preparation.prepare(config_trees.from_dict(Experiment, config), run_directory.Workdir(folder / "run"), {})


def planned(config, folder):
    planner.plan(config_trees.from_dict(Experiment, config), "cpu:8")


def measured(config, folder):
    measuring.evaluate_saes([str(folder / "sae")], str(folder / "report"), config)


def refusal(use, config, folder):
    """The field and the problem with which a config is refused; nothing is written."""
    before = set(folder.iterdir())
    with pytest.raises(UserError) as error:
        use(config, folder)
    assert set(folder.iterdir()) == before
    return error.value.field, error.value.problem


@pytest.mark.parametrize(
    ("changes", "field", "facts"),
    [
        ({"train__stesp": 3}, "train.stesp", ("did you mean 'steps'",)),  # and not 'step', which is a field too
        ({"train__stps": 3}, "train.stps", ("'steps'", "steps, batch_size")),
        ({"train__step": 3}, "train.step", ("3", "auto, dense, sparse")),
        ({"sed": 3}, "sed", ("'seed'",)),
        ({"steps": 3}, "steps", ("'train.steps'", "known: seed, lm")),
        ({"rows_per_forward": 3}, "rows_per_forward", ("activations.rows_per_forward", "evaluation.rows_per_forward")),
        ({"learning_rate": 3}, "learning_rate", ("'stacks.NAME.learning_rates'",)),
        ({"model": {}}, "model", ("'lm'",)),
        ({"data__sep": "x"}, "data.sep", ("'separator'",)),
        ({"train__steps": "many"}, "train.steps", ("'many'", "str", "int")),
        ({"train__steps": 1.5}, "train.steps", ("1.5", "float", "int")),
        ({"train__steps": True}, "train.steps", ("True", "bool", "int")),
        ({"train__steps": 0}, "train.steps", ("is 0;", "1 or more")),
        ({"train__resample_steps": (5,)}, "train.resample_steps", ("(5,)", "train.dead_after", "1000", "12")),
        (
            {"train__resample_steps": (12,), "train__dead_after": 13},
            "train.resample_steps",
            ("(12,)", "13", "step 12 is the last", "lower train.dead_after"),
        ),
        (
            {"train__resample_steps": (14,), "train__dead_after": 4},
            "train.resample_steps",
            ("(14,)", "from 4", "train.dead_after", "to 12"),
        ),
        (
            {"train__resample_steps": (3,), "train__dead_after": 4},
            "train.resample_steps",
            ("(3,)", "from 4", "train.dead_after", "to 12"),
        ),
        ({"stacks__gated__target_l0": (64.0,)}, "stacks.gated.target_l0", ("(64.0,)", "below the width")),
        (
            {"stacks__gated__target_l0": (9.0, 9.0, 9.0)},
            "stacks.gated.l1_coefficients",
            ("2 values", "1 or 3", "one λ"),
        ),
        (
            {"stacks__gated__target_l0": (9.0,), "train__warmup_steps": 10},
            "train.warmup_steps",
            ("is 10,", "stacks.gated.target_l0", "two thirds", "less than 10"),
        ),
        (
            {"stacks__gated__target_l0": (9.0,), "stacks__gated__coefficient_warmup_fraction": 0.66},
            "stacks.gated.coefficient_warmup_fraction",
            ("is 0.66,", "stacks.gated.target_l0", "two thirds", "at most 0.56"),
        ),
        (
            {"stacks__gated__kl_fraction": 0.5, "checkpoint__keep_best": "gated/mse"},
            "checkpoint.keep_best",
            ("'gated/mse'", "stacks.gated.kl_fraction"),
        ),
        (
            {"data__corpus": "stdlib", "data__path": "books"},
            "data.path",
            ("'books'", "'stdlib'", "data.corpus='text'", "data.path=''"),
        ),
        (
            {"data__corpus": "stdlib", "data__path": "", "data__name": "c4/en"},
            "data.name",
            ("'c4/en'", "data.corpus='tfds'"),
        ),
        ({"data__corpus": "stdlib", "data__path": "", "data__field": "body"}, "data.field", ("'text' or 'tfds'",)),
        ({"data__name": "c4/en"}, "data.name", ("data.corpus='text'", "'tfds'")),
        ({"data__corpus": "tfds", "data__path": "", "data__held_out": "position"}, "data.held_out", ("'position'",)),
        ({"stacks__gated__architecture": "gated_transcoder"}, "stacks.gated.target", ("'gated_transcoder'", "write")),
        ({"stacks__gated__kl_weight": 1.0}, "stacks.gated.kl_weight", ("is 1,", "kl_fraction", "0.5")),
        (
            {"stacks__gated__options": {"only_magnitude": True}},
            "stacks.gated.start_from",
            ("only_magnitude=True", 'start_from="RUN:STACK"'),
        ),
        ({"stacks__gated__options": {"k_aux": 5}}, "stacks.gated.options.k_aux", ("is 5,", "auxk_coefficient is 0")),
        ({"stacks__gated__options": {"k_aux": 2**40, "auxk_coefficient": 1.0}}, "stacks.gated.options.k_aux", ()),
        (
            {"stacks__gated__options": {"k_aux": 65, "auxk_coefficient": 1.0}},
            "stacks.gated.options.k_aux",
            ("is 65,", "64 features"),
        ),
        (
            {"stacks__gated__options": {"tie_encoder": False, "use_r_mag": False}},
            "stacks.gated.options.use_r_mag",
            ("tie_encoder=False",),
        ),
        (
            {"stacks__gated__options": {"only_magnitude": True, "penalty": "log"}, "stacks__gated__start_from": "a:b"},
            "stacks.gated.options.penalty",
            ("'log'", "only_magnitude=True"),
        ),
        (
            {"stacks__gated__options": {"initial_l0": 0}, "stacks__gated__start_from": "a:b"},
            "stacks.gated.options.initial_l0",
            ("is 0,", "start_from"),
        ),
        (
            {"stacks__gated__architecture": "matryoshka", "stacks__gated__l1_coefficients": ()}
            | {"stacks__gated__options": {"prefixes": (0.5, 0.501, 1.0)}},
            "stacks.gated.options.prefixes",
            ("(32, 64)",),
        ),
        ({"stacks__gated__l1_coefficients": (0.1,), "stacks__gated__seeds": (1, 1)}, "stacks.gated.seeds", ("(1, 1)",)),
        ({"train__resample_warmup_steps": 5}, "train.resample_warmup_steps", ("is 5,", "train.resample_steps", "1000")),
        ({"stacks__gated__learning_rates": (1e-60,)}, "stacks.gated.learning_rates", ("1e-60", "1e-30")),
        ({"stacks__gated__learning_rates": (1e31,)}, "stacks.gated.learning_rates", ("1e+31", "1e+30")),
        ({"stacks__gated__l1_coefficients": (0.1, 1e35)}, "stacks.gated.l1_coefficients", ("1e+35", "1e+30")),
        ({"stacks__gated__clip_norm": 1e-60}, "stacks.gated.clip_norm", ("1e-60",)),
        (
            {"stacks__gated__options": {"penalty": "log", "penalty_scale": 1e-60}},
            "stacks.gated.options.penalty_scale",
            ("1e-60",),
        ),
        ({"train__steps": 2, "train__warmup_steps": 0}, "train.steps", ("is 2;", "such as 4")),
        ({"train__steps": 18}, "train.steps", ("is 18;", "multiple of 4", "16 or 20")),
        ({"train__warmup_steps": 16}, "train.warmup_steps", ("is 16;", "train.steps (16)")),
        ({"seed": -1}, "seed", ("-1", "0 to 2147483647")),
        ({"stacks__gated__seeds": (0, 2**31)}, "stacks.gated.seeds", ("0, 2147483648", "0 to 2147483647")),
        ({"train__decay_fraction": 1.5}, "train.decay_fraction", ("1.5", "fraction")),
        ({"train__decay_fraction": float("nan")}, "train.decay_fraction", ("nan", "finite")),
        ({"train__batch_size": 96}, "train.batch_size", ("96", "256", "rows_per_forward x data.context_length")),
        ({"train__compute_dtype": "float16"}, "train.compute_dtype", ("'float16'", "'bfloat16'", "float32")),
        ({"activations__buffer_size": 100}, "activations.buffer_size", ("100", "multiple of train.batch_size (64)")),
        ({"activations__max_norm_multiple": 0.5}, "activations.max_norm_multiple", ("0.5", "write 0", "above 1")),
        ({"data": 3}, "data", ("is 3;", "fields corpus, path")),
        ({"data__context_length": 64}, "data.context_length", ("64", "language model", "32")),
        ({"stacks": ConfigDict()}, "stacks", ("empty", "stack_config")),
        ({"stacks__gated__l1_coefficients": (0.1, 0.2, 0.3)}, "stacks.gated.seeds", ("2 values", "1 or 3")),
        ({"stacks__gated__l1_coefficients": ()}, "stacks.gated.l1_coefficients", ("no values",)),
        (
            {"stacks__gated__target_l0": (9.0,), "train__steps": 1, "train__warmup_steps": 0, "train__batch_size": 256}
            | {"activations__buffer_size": 2048},
            "train.steps",
            ("is 1,", "stacks.gated.target_l0"),
        ),
        ({"stacks__gated__l1_coefficients": (0.1, -0.2)}, "stacks.gated.l1_coefficients", ("negative", "-0.2")),
        ({"stacks__gated__learning_rates": (0.1, -0.2)}, "stacks.gated.learning_rates", ("-0.2", "above 0")),
        ({"stacks__gated__learning_rates": (0.0,)}, "stacks.gated.learning_rates", ("0.0", "above 0")),
        ({"stacks__baseline__options": {"seed": 1}}, "stacks.baseline.options.seed", ("option of 'relu'", "'seeds'")),
        ({"stacks__gated__options": {"initial_l0": -1}}, "stacks.gated.options.initial_l0", ("-1", "0")),
        ({"stacks__gated__options": {"lr": 1}}, "stacks.gated.options.lr", ("'learning_rates'", "tie_encoder")),
        ({"stacks__gated__l1_coefficients": ("a",)}, "stacks.gated.l1_coefficients", ("'a'", "str", "float")),
        ({"stacks__gated__site": "blocks.0.hook_mlp"}, "stacks.gated.site", ("'blocks.0.hook_mlp'", "did you mean")),
        (
            {"stacks__gated__site": "blocks.2.hook_mlp_out"},
            "stacks.gated.site",
            ("'blocks.2.hook_mlp_out'", "known: blocks.0.hook_resid_pre, blocks.0.attn.hook_z"),
        ),
        ({"stacks__gated__architecture": "gate"}, "stacks.gated.architecture", ("'gate'", "'gated'")),
        ({"stacks__gated__options": {"tie": True}}, "stacks.gated.options.tie", ("option of 'gated'", "tie_encoder")),
        ({"mesh__latent": 3}, "mesh.latent", ("is 3;", "divisor", "8")),
        ({"mesh__data": 3}, "mesh.data", ("is 3,", "mesh.latent 1", "8 devices", "write 8", "0 for all")),
        (
            {"mesh__latent": 4, "stacks__gated__width": 66},
            "stacks.gated.width",
            ("66", "devices", "multiple of 8"),
        ),
        (
            {"train__batch_size": 4, "train__steps": 64},
            "train.batch_size",
            ("is 4,", "`data` axis", "multiple of 8"),
        ),
        ({"lm__path": "nowhere"}, "lm.path", ("'nowhere'", "directory", "hub name")),
        ({"data__corpus": "stdlbi"}, "data.corpus", ("'stdlbi'", "'stdlib'")),
        ({"loggers": ("tensorbord",)}, "loggers", ("'tensorbord'", "'tensorboard'")),
        ({"loggers": ("tensorboard", "tensorboard")}, "loggers", ("['tensorboard', 'tensorboard']", "once")),
    ],
)
def test_bad_configs_are_refused_by_the_trainer_and_the_planner(config_dict, changes, field, facts, tmp_path):
    config = changed(config_dict, **changes)
    with refused(field, *facts) as error:
        trained(config, tmp_path)
    assert refusal(planned, config, tmp_path) == (field, error.value.problem)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"train__step": 3},
        {"data__corpus": 3},
        {"train__warmup_steps": 16},
        {"stacks__gated__width": 0},
        {"evaluation": 3},
        {"data__context_length": 64},
        {"lm__path": "nowhere"},
        {"data__corpus": "stdlbi"},
    ],
    ids=str,
)
def test_what_the_trainer_refuses_evaluation_refuses(config_dict, changes, tmp_path):
    config, sae = changed(config_dict, **changes), gated.Config(32, 8)
    params = gated.init(jax.random.key(0), sae)
    trained_lib.SAE("a", "gated", sae, "blocks.0.hook_mlp_out", params).save(tmp_path / "sae")
    assert refusal(measured, config, tmp_path) == refusal(trained, config, tmp_path)


def test_a_config_has_only_what_differs(config_dict):
    """A plain dict of it is the same experiment, and one without stacks says what to measure with."""
    del config_dict.train["resample_steps"]
    config_dict.stacks.gated.options, config_dict.mesh = {}, {}
    assert config_trees.from_dict(Experiment, config_dict).train.resample_steps == ()
    small = {
        "stacks": {"a": stack_config("gated", "blocks.0.hook_mlp_out", 8, 0.1).to_dict()},
        "train": {"steps": 1800},
    }
    small = config_trees.from_dict(Experiment, small)
    assert (small.train, small.stacks["a"].l1_coefficients) == (config_lib.Train(steps=1800), (0.1,))
    measured = config_trees.held_out({"data": {"context_length": 64}})
    assert measured.data == config_lib.Data(context_length=64)
    with refused("width", "missing"):
        config_trees.from_dict(config_lib.Stack, {"architecture": "gated", "site": "blocks.0.hook_mlp_out"})


@pytest.mark.parametrize("read", [functools.partial(config_trees.from_dict, Experiment), config_trees.held_out])
def test_what_is_no_config(read):
    with refused("config", "is 3;", "seed, lm"):
        read(3)


def test_what_a_run_recorded_is_read_as_it_was_meant(config_dict):
    """Fields that did not exist have the values of then; a field that every run recorded must be there."""
    recorded = config_trees.to_dict(config_trees.from_dict(Experiment, config_dict))
    for group, name in (("activations", "center"), ("data", "held_out"), ("checkpoint", "buffer"), ("lm", "revision")):
        del recorded[group][name]
    del recorded["loggers"]
    config = config_trees.from_record(Experiment, recorded)
    assert (config.activations.center, config.data.held_out, config.loggers) == (False, "position", ("tensorboard",))
    now = config_trees.from_dict(Experiment, recorded)
    assert (now.activations.center, now.data.held_out) == (True, "hash")
    for missing in (("train", "steps"), ("stacks", "gated", "seeds"), ("mesh",)):
        tree = json.loads(json.dumps(recorded))
        *groups, name = missing
        functools.reduce(dict.__getitem__, groups, tree).pop(name)
        with refused(".".join(missing), "missing"):
            config_trees.from_record(Experiment, tree)


def test_json_goes_round(config_dict):
    config = config_trees.from_dict(Experiment, config_dict)
    as_json = config_trees.to_dict(config)
    assert config_trees.from_dict(Experiment, as_json) == config
    other = config_trees.to_dict(config_trees.from_dict(Experiment, changed(config_dict, train__steps=32)))
    assert config_trees.differences(as_json, other) == ["train.steps: 16 != 32"]


def test_numbers_of_a_stack_are_matched_up():
    stack = stack_config("gated", "blocks.0.hook_mlp_out", 8, (0.1, 0.2), learning_rates=(1e-3,), seeds=(4, 5))
    config = config_trees.from_dict(config_lib.Stack, stack)
    assert config.numbers() == [(0.1, 1e-3, 4), (0.2, 1e-3, 5)]


def test_a_new_config_has_every_field():
    config = experiment_config()
    config.stacks.a = stack_config("gated", "blocks.0.hook_mlp_out", 8, (0.1,))
    tree = config_trees.to_dict(config_trees.from_dict(Experiment, config))
    assert json.loads(json.dumps(config.to_dict())) == tree


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"b2": 1.0}, "b2"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"learning_rate": 1e-60}, "learning_rate"),
        ({"learning_rate": 5.0}, "learning_rate"),
        ({"epochs": 1e12}, "epochs"),
        ({"vocab_size": 2**31 - 1}, "vocab_size"),
        ({"model": {"d_model": 2**31 - 1}}, "model.d_model"),
        ({"model": {"n_layers": 2**20, "d_mlp": 2**20}}, "model"),
        ({"data": {"source": "store:x"}}, "data.source"),
    ],
    ids=str,
)
def test_a_language_model_that_cannot_be_trained_is_refused(changes, field):
    with refused(field):
        config_trees.from_dict(config_lib.Pretrain, changes)


@pytest.mark.parametrize("kind", [Experiment, config_lib.Pretrain])
def test_every_field_is_listed_with_a_sentence(kind):
    listed = {name: (default, about) for name, default, about in settings.settings(kind)}
    assert all(re.fullmatch(r".{4,}[.?:]", about) for _, about in listed.values()), listed
    for name, (default, _) in listed.items():
        assert f"{name}{default and f' = {default}'} " in settings.listing(kind) or name.endswith(".")
        assert f"| `{name}` |" in settings.markdown(kind) or name.endswith(".")


def test_config_files_of_earlier_versions_build_what_they_did():
    stack = base.stack("gated", "blocks.0.hook_mlp_out", 8, [0.1], (1e-3,), (4, 5), use_r_mag=False)
    now = stack_config(
        "gated", "blocks.0.hook_mlp_out", 8, (0.1,), learning_rates=(1e-3,), seeds=(4, 5), options={"use_r_mag": False}
    )
    assert stack.to_dict() == now.to_dict()
    assert base.data().to_dict() == experiment_config().data.to_dict() == vars(config_lib.Data())


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.stdout


@pytest.mark.parametrize(
    ("arguments", "field", "facts"),
    [
        (["--config.trin.steps=3"], "trin: ", ["'train'"]),
        pytest.param(["--config.train.stps=3"], "train.stps: ", ["'steps'"], marks=pytest.mark.variants),
        (["--config.train.steps=0"], "train.steps: ", ["is 0;", "1 or more"]),
        pytest.param(
            ["--config.stacks.gated.site=nowhere"],
            "stacks.gated.site: ",
            ["'nowhere'", "known: blocks.0."],
            marks=pytest.mark.variants,
        ),
        (["--config.lm.path=nowhere"], "lm.path: ", ["'nowhere'", "directory"]),
        (["--config=configs/quickstrt.py"], "--config: ", ["configs/quickstrt.py does not exist", "--config quickst"]),
        pytest.param(
            ["--config.stacks.gated.b1=2"], "stacks.gated.b1: ", ["is 2;", "from 0"], marks=pytest.mark.variants
        ),
        pytest.param(
            ["--config.stacks.gated.b2=1"], "stacks.gated.b2: ", ["is 1;", "from 0"], marks=pytest.mark.variants
        ),
        pytest.param(
            ["--config.stacks.gated.coefficient_warmup_fraction=0.9"],
            "stacks.gated.coefficient_warm",
            ["is 0.9;"],
            marks=pytest.mark.variants,
        ),
        (["steps=3"], "", ["'steps=3'", "--name=value"]),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, arguments, field, facts):
    workdir = tmp_path / "run"
    code, last_line = command("gsae_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}", *arguments)
    assert (code, last_line.startswith(f"error: {field}")) == (2, True), last_line
    assert all(fact in last_line for fact in facts), last_line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ("evaluate --workdir=x --ito=²", "--ito"),
        ("evaluate --sae=x --out=y --step=0", "--step"),
        ("plan --config=quickstart --topology=cpu:²", "--topology"),
        ("plan --config=quickstart --topology=cpu:99999999999999999999", "--topology"),
        ("store --out=x --check --dtype=float16", "--dtype"),
        ("collect --sae=x --out=y --step=0", "--step"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(arguments, field):
    name, *flags = arguments.split()
    code, last_line = command(f"gsae_jax.{name}", *flags)
    assert (code, last_line.startswith(f"error: {field}: ")) == (2, True), last_line


def test_evaluate_refuses_what_is_not_a_run(tmp_path):
    code, last_line = command("gsae_jax.evaluate", f"--workdir={tmp_path}")
    assert (code, last_line.startswith("error: --workdir: ")) == (2, True), last_line
    assert f"{tmp_path} holds no run" in last_line


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--model=nowhere",)])
def test_a_closed_pipe_is_quiet(arguments):
    """As of `python -m gsae_jax.sites | head -1`; a refusal still says so."""
    command = [sys.executable, "-u", "-m", "gsae_jax.sites", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.stderr.count("\n") == bool(arguments and "model" in arguments[0]), done.stderr
    assert done.returncode == {(): 0, ("--help",): 1}.get(arguments, 2)  # 1 is absl's code for help


def test_help_says_how_a_config_is_given_and_changed():
    done = subprocess.run([sys.executable, "-m", "gsae_jax.train", "--help"], cwd=ROOT, capture_output=True, text=True)
    for flag in ("--config:", "--config.GROUP.FIELD=value", "--workdir:", "--num_processes:"):
        assert flag in done.stdout
