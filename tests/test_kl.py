"""The KL divergence of the language model's predictions in the loss."""

import dataclasses
import importlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking, scaling
from gsae_jax.data import rows as rows_lib
from gsae_jax.evaluation import measure, metrics
from gsae_jax.lms import loading
from gsae_jax.lms import loss as loss_lib
from gsae_jax.lms.checkpoints import Checkpoint, abstract_params
from gsae_jax.planning import planner
from gsae_jax.training import end_to_end, lengthening, loop
from gsae_jax.training.step import Program
from tests import references
from tests.refusals import refused
from tests.test_experiments import MODELS
from tests.test_lms import checkpoint
from tests.test_training import replay
from tests.training import (
    Interrupting,
    advance,
    assert_same,
    begin,
    begin_calls,
    metrics_without_time,
    params_of,
    single_device_mesh,
    with_,
)

SITE = "blocks.0.hook_mlp_out"


@pytest.fixture
def tuned(experiment):
    """The gated stack has the KL divergence in the last quarter of eight calls of two updates of eight rows each."""
    stacks = experiment.stacks | {"gated": dataclasses.replace(experiment.stacks["gated"], kl_fraction=0.25)}
    return dataclasses.replace(with_(experiment, train={"batch_size": 128, "log_every": 2}), stacks=stacks)


def from_the_start(tuned, **changes):
    stacks = {name: dataclasses.replace(stack, kl_fraction=1.0, **changes) for name, stack in tuned.stacks.items()}
    return dataclasses.replace(tuned, stacks=stacks)


def moved(params, by):
    """Parameters away from where training starts, where r_mag and biases do not matter."""
    keys = jax.random.split(jax.random.key(7), len(params))
    return {
        name: value + by * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, sorted(params.items()), strict=True)
    }


def loss_in_float64(program, state, lm_dir, tokens, weight):
    """w * mse(params_0) / KL(params_0) * KL(params) of a gated SAE, and KL, on these rows, as a function of params."""
    tensors, settings = checkpoint(lm_dir)
    clean, found = references.gelu_lm(tensors, settings, tokens)
    x, scale, mean = found[SITE], float(state.scales[SITE]), np.asarray(state.means[SITE], np.float64)
    valid = ~np.isin(tokens, program.special_tokens)

    def log_softmax(logits):
        shifted = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def measured(params):
        inputs = ((x - mean) * scale).reshape(-1, x.shape[-1])
        f = references.gated_sae(params, inputs, 0.0)[2]
        x_hat = (f @ params["W_dec"] + params["b_dec"]).reshape(x.shape)
        mse = np.square(x_hat - (x - mean) * scale)[valid].mean()
        spliced = np.where(valid[..., None], x_hat / scale + mean, x)
        logits, _ = references.gelu_lm(tensors, settings, tokens, replace={SITE: spliced})
        log_p, log_q = log_softmax(clean), log_softmax(logits)
        return mse, (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()

    def loss(params, at):
        mse, kl = measured(at)
        return weight * mse / kl * measured(params)[1]

    return measured, loss


def gradients(program, stack, of_stack, state, lm_params, tokens):
    """Gradients and KL of a stack on these rows."""
    ours = end_to_end.EndToEnd(program.loaded, program.mesh, 1)

    @jax.jit
    def compute(of_stack, tokens):
        activations = loading.capture(program.loaded, lm_params, tokens, ours.sites([stack]))
        rows = end_to_end.Rows(tokens, masking.allowed(tokens, program.special_tokens), activations)
        return ours.gradients(stack, of_stack, rows, lm_params, (state.scales, state.means), state.norm_limits)

    return jax.device_get(compute(of_stack, tokens))


def test_the_gradient_is_that_of_differences_in_float64(tuned, lm_dir):
    """Of every parameter, in a random direction, for both SAEs; on a mesh that splits features and rows."""
    program, state, lm_params, stream = begin(with_(from_the_start(tuned), mesh={"data": 2, "latent": 4}))
    stack = next(stack for stack in program.stacks if stack.name == "gated")
    params, tokens = moved(state.stacks["gated"].params, 0.05), next(stream)[:8]
    grads, kl = gradients(
        program, stack, dataclasses.replace(state.stacks["gated"], params=params), state, lm_params, tokens
    )
    measured, loss = loss_in_float64(program, state, lm_dir, tokens, stack.config.kl_weight)
    random, step = np.random.default_rng(0), 1e-5
    for n in range(2):
        at = {name: np.asarray(value[n], np.float64) for name, value in params.items()}
        assert kl[n] == pytest.approx(measured(at)[1], rel=1e-4)
        for name in at:
            direction = random.normal(size=at[name].shape)
            ends = [loss(at | {name: at[name] + sign * step * direction}, at) for sign in (1, -1)]
            expected = (ends[0] - ends[1]) / (2 * step)
            assert (grads[name][n] * direction).sum() == pytest.approx(expected, rel=2e-3), (n, name)
            assert np.any(grads[name][n]) == (name != "b_gate")  # which only opens gates


def test_the_skip_of_a_transcoder_is_part_of_what_is_spliced_in(tuned):
    """W_skip begins at 0, where a gradient is all that shows it."""
    changes = {"architecture": "gated_transcoder", "site": "blocks.0.hook_resid_mid", "target": SITE}
    stack = dataclasses.replace(tuned.stacks["gated"], options={"skip": True}, **changes)
    experiment = dataclasses.replace(tuned, stacks={"gated": stack})
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    tokens = next(stream)[:8]
    grads, _ = gradients(program, program.stacks[0], state.stacks["gated"], state, lm_params, tokens)
    assert all(np.any(one) for one in grads["W_skip"])


def test_tokens_above_the_limit_of_what_a_transcoder_reads_have_no_gradient(tuned):
    """Training on activations leaves them out, too."""
    read = "blocks.0.hook_resid_mid"
    changes = {"architecture": "gated_transcoder", "site": read, "target": SITE}
    stack = dataclasses.replace(tuned.stacks["gated"], options={}, **changes)
    program, state, lm_params, stream = begin(dataclasses.replace(tuned, stacks={"gated": stack}), single_device_mesh())
    tokens, found = next(stream)[:8], []
    for limit in (np.inf, 0.0):
        state.norm_limits = {read: np.float32(limit), SITE: np.float32(np.inf)}
        grads, kl = gradients(program, program.stacks[0], state.stacks["gated"], state, lm_params, tokens)
        found.append(([np.abs(value).max() for value in grads.values()], kl.max()))
    assert max(found[0][0]) > 0 < found[0][1]
    assert max(found[1][0]) == 0 == pytest.approx(found[1][1], abs=1e-6)  # nothing is spliced in


def test_an_update_replaces_a_share_of_the_squared_error(tuned):
    """The gradient that the optimiser saw, by its second moments: they start anew, so that one update shows it."""
    tuned = from_the_start(with_(tuned, train={"batch_size": 256}), kl_weight=0.7)
    program, state, lm_params, stream = begin(tuned, single_device_mesh())
    start, tokens = jax.device_get(state), next(stream)
    stack = next(stack for stack in program.stacks if stack.name == "baseline")
    (served,) = replay(program, start, lm_params, [tokens])[stack.config.site]
    of_kl, _ = gradients(program, stack, start.stacks["baseline"], start, lm_params, tokens)
    params = {name: value[0] for name, value in start.stacks["baseline"].params.items()}
    with_l1, without = (references.relu_sae(params, served, l1)[1] for l1 in (stack.config.l1_coefficients[0], 0.0))
    after, *_ = program.step_at(0)(state, lm_params, program.source.place(tokens))
    for name in ("W_enc", "b_enc", "b_dec"):
        expected = with_l1[name] - 0.7 * without[name] + of_kl[name][0]
        seen = np.sqrt(np.asarray(after.stacks["baseline"].second_moments.nu[name][0]) / 0.001)
        np.testing.assert_allclose(seen, np.abs(expected), rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=name)
        assert np.abs(of_kl[name][0]).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_a_mesh_gives_the_single_device_result(tuned, shape):
    tuned = from_the_start(tuned)
    alone = advance(*begin(tuned, single_device_mesh()), calls=2)
    spread = advance(*begin(with_(tuned, mesh={"data": shape[0], "latent": shape[1]})), calls=2)
    for name, stack in alone[0].stacks.items():
        for key, value in stack.params.items():
            difference = np.abs(np.asarray(value) - np.asarray(spread[0].stacks[name].params[key]))
            assert difference.mean() < 1e-5, (name, key)
        for key, value in alone[1][name].items():
            np.testing.assert_allclose(value, spread[1][name][key], rtol=1e-3, err_msg=f"{name} {key}")
        assert (alone[1][name]["kl"] > 0).all()


def kl_of(path, tokens, lm):
    """KL of each gated SAE of a run, as the report has it."""
    saes = [sae for name, sae in gsae_jax.load(path).items() if name.startswith("gated")]
    sums = measure.measure(lm, saes, [tokens], lm.special_tokens)
    return np.array([metrics.combine(sums[sae.name])["kl"] for sae in saes])


def test_only_the_end_has_it_and_it_lowers_kl(tuned, tmp_path, lm):
    """Before, the run is one without it, to the last bit; after, the KL is below that of the run without."""
    tuned = with_(tuned, train={"steps": 32, "decay_fraction": 0.5})
    plain = dataclasses.replace(tuned.stacks["gated"], kl_fraction=0.0)
    without = dataclasses.replace(tuned, stacks=tuned.stacks | {"gated": plain})
    assert [tuned.kl_stacks(step) for step in (0, 22, 24, 30)] == [(), (), ("gated",), ("gated",)]
    assert loop.train(tuned, tmp_path / "with")
    assert loop.train(without, tmp_path / "without")
    lines, others = (metrics_without_time(tmp_path / name) for name in ("with", "without"))
    assert [line["step"] for line in lines if "gated/kl" in line] == list(range(26, 33, 2))
    assert lines[:12] == others[:12]
    assert not any("baseline/kl" in line for line in lines)
    held_out = next(begin(tuned)[3])
    assert (kl_of(tmp_path / "with", held_out, lm) < kl_of(tmp_path / "without", held_out, lm)).all()


@pytest.mark.variants
@pytest.mark.parametrize("after", [pytest.param(5, marks=pytest.mark.variants), 7])
def test_a_run_resumes_bit_for_bit_before_and_inside_it(tuned, tmp_path, monkeypatch, after):
    assert loop.train(tuned, tmp_path / "whole")
    to_start, real = begin_calls(tuned), rows_lib.batches
    with monkeypatch.context() as patch:
        patch.setattr(rows_lib, "batches", lambda *args: Interrupting(real(*args), to_start + after))
        assert not loop.train(tuned, tmp_path / "parts")
    assert loop.train(tuned, tmp_path / "parts")
    assert_same(params_of(tmp_path / "parts"), params_of(tmp_path / "whole"))
    assert metrics_without_time(tmp_path / "parts") == metrics_without_time(tmp_path / "whole")


def test_what_cannot_be_is_refused_before_anything_is_compiled(tuned):
    gated = tuned.stacks["gated"]
    for field, value, fact in (
        ("kl_fraction", 1.5, "is 1.5"),
        ("kl_fraction", -0.1, "is -0.1"),
        ("kl_weight", 0.0, "is 0"),
        ("kl_weight", 2.0, "is 2"),
    ):
        with refused(field, fact):
            dataclasses.replace(gated, **{field: value})
    with refused("kl_fraction", "writes 2 sites"):
        dataclasses.replace(gated, target=(SITE, "blocks.1.hook_mlp_out"))
    with refused("train.batch_size", "is 8", "stacks.gated.kl_fraction", "data.context_length (16)"):
        with_(tuned, train={"batch_size": 8, "steps": 64})
    rows = with_(tuned, train={"batch_size": 64}, mesh={"data": 8})
    with refused("train.batch_size", "is 64, 4 rows", "stacks.gated.kl_fraction", "a multiple of 128"):
        begin(rows)


def test_a_run_without_it_has_the_step_and_the_language_model_as_before(experiment):
    program, *_ = begin(experiment)
    assert program.step_at(0) is program.train_step
    assert program.step_at(experiment.train.steps - 1) is program.train_step
    assert program.loaded is program.module
    assert not program.module.head


def test_more_steps_move_the_part_that_has_it(tuned):
    sentences = lengthening.consequences(with_(tuned, train={"steps": 32}), 16, 16, [10, 10])
    assert "the loss of gated has the KL divergence from step 24 on (12 before)" in sentences
    assert "between the steps 16 and 24" in " ".join(sentences)


def test_fewer_steps_may_move_its_beginning_before_the_step_of_now(tuned):
    """Then it begins at once, and the moments of earlier gradients are left out there as well."""
    shorter = with_(tuned, train={"steps": 20})  # it begins at 16, and at 24 of 32 steps
    assert lengthening.late(shorter, 32, 18) == ["gated"]
    assert lengthening.late(shorter, 32, 16) == lengthening.late(with_(tuned, train={"steps": 32}), 20, 18) == []
    sentences = lengthening.consequences(shorter, 32, 18, [10, 10])
    assert "the loss of gated has the KL divergence from step 18 on (24 before)" in sentences
    sentences = lengthening.consequences(with_(tuned, train={"steps": 30}), 32, 26, [10, 10])
    assert not any("KL" in sentence for sentence in sentences)  # it had it, and has it


@pytest.mark.variants
def test_a_run_that_becomes_shorter_begins_with_it_late(tuned, tmp_path, monkeypatch):
    """It goes on, and the moments of earlier gradients make a difference."""
    longer, shorter = (with_(tuned, train={"steps": steps}) for steps in (32, 20))
    to_start, real = begin_calls(longer), rows_lib.batches
    with monkeypatch.context() as patch:
        patch.setattr(rows_lib, "batches", lambda *args: Interrupting(real(*args), to_start + 9))
        assert not loop.train(longer, tmp_path / "late")
    shutil.copytree(tmp_path / "late", tmp_path / "kept")
    assert loop.train(shorter, tmp_path / "late")
    monkeypatch.setattr(lengthening, "late", lambda *_: [])
    assert loop.train(shorter, tmp_path / "kept")
    late, kept = (params_of(tmp_path / name) for name in ("late", "kept"))
    assert not np.allclose(late["gated_0"]["W_dec"], kept["gated_0"]["W_dec"], rtol=1e-3)
    np.testing.assert_array_equal(late["baseline_0"]["W_dec"], kept["baseline_0"]["W_dec"])


def test_a_plan_counts_it(tuned):
    """The whole language model, memory and operations; in the mean over all steps."""
    plain = dataclasses.replace(tuned.stacks["gated"], kl_fraction=0.0)
    before, after, all_of_it = (
        planner.plan(
            dataclasses.replace(tuned, stacks=tuned.stacks | {"gated": dataclasses.replace(plain, kl_fraction=part)}),
            "gpu:h100x8",
        )
        for part in (0.0, 0.25, 1.0)
    )
    assert before["bytes_per_device"]["language model"] < after["bytes_per_device"]["language model"]
    assert before["bytes_per_device"]["temporaries"] < after["bytes_per_device"]["temporaries"]
    extra = [report["flops_per_step"] - before["flops_per_step"] for report in (after, all_of_it)]
    assert extra[1] == pytest.approx(4 * extra[0], rel=1e-6)
    assert extra[0] > 0


OTHERS = {
    "relu_april": {},
    "topk": {"k": 8},
    "batch_topk": {"k": 8},
    "matryoshka": {"k": 8},
    "signed_gated": {},
    "jumprelu": {},
}


@pytest.mark.variants
@pytest.mark.parametrize("architecture", OTHERS)
def test_every_architecture_trains_with_it_on_a_mesh(tuned, architecture):
    options = OTHERS[architecture]
    l1 = () if "k" in options else (0.01,)
    stack = config_lib.Stack(architecture, SITE, 64, l1, (1e-2,), options=options, kl_fraction=1.0)
    tuned = dataclasses.replace(with_(tuned, mesh={"data": 2, "latent": 4}), stacks={"a": stack})
    program, state, lm_params, stream = begin(tuned)
    state, first = advance(program, state, lm_params, stream, calls=1)
    state, last = advance(program, state, lm_params, stream, calls=5)
    assert last["a"]["kl"] < first["a"]["kl"]
    assert not last["a"]["skipped"].any()


@pytest.mark.variants
def test_several_forward_passes_and_the_sparse_step_give_the_same(tuned):
    """And a site of the last block, whose predictions hardly any layer is between."""
    tuned = from_the_start(tuned, site="blocks.1.hook_resid_post")
    tuned = with_(tuned, train={"batch_size": 256}, activations={"buffer_size": 2048})
    results = [
        advance(*begin(each, single_device_mesh()), calls=2)
        for each in (
            tuned,
            with_(tuned, activations={"rows_per_forward": 8}),
            with_(tuned, train={"step": "sparse"}),
        )
    ]
    for state, statistics in results[1:]:
        for name, stack in results[0][0].stacks.items():
            np.testing.assert_allclose(stack.params["W_dec"], state.stacks[name].params["W_dec"], atol=2e-4)
            np.testing.assert_allclose(results[0][1][name]["kl"], statistics[name]["kl"], rtol=1e-3)


@pytest.mark.variants
def test_a_large_experiment_traces_with_it():
    """Gemma 2: bfloat16, norms after the site, windows and soft-caps. State and statistics keep shapes and types."""
    config = importlib.import_module("configs.gemma_2_2b").get_config()
    for stack in config.stacks.values():
        stack.kl_fraction = 0.1
    experiment = gsae_jax.experiment(config)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=4, latent=2))
    program = Program.build(experiment, mesh, Checkpoint.open(MODELS / "gemma_2_2b"), special_tokens=(0,))
    state = jax.eval_shape(lambda: program.init(scaling.standard(program.widths)))
    tokens = jax.ShapeDtypeStruct((experiment.rows_per_call, experiment.data.context_length), "int32")
    step = program.step_at(experiment.train.steps - 1)
    after, statistics, _ = jax.eval_shape(step, state, abstract_params(program.loaded, "bfloat16"), tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {of["kl"].shape for of in statistics.values()} == {(3,)}


def test_a_gradient_needs_three_products_with_the_unembedding(lm):
    """Of the clean stream, of the other one, and of the gradient: what the planner counts."""
    rows, T, D, V = 2, 8, lm.config.d_model, lm.config.d_vocab
    x, clean = (jax.random.normal(jax.random.key(n), (rows, T, D)) for n in (0, 1))
    tokens = np.zeros((rows, T), np.int32)
    of_x = jax.value_and_grad(lambda x: loss_lib.divergence(lm.module, lm.params, x, clean, tokens).sum())
    flops = jax.jit(of_x).lower(x).cost_analysis()["flops"]
    assert 3 <= flops / (2 * rows * (T - 1) * D * V) < 3.5


def test_what_the_last_part_needs_is_checked_before_training(tuned, tmp_path, monkeypatch):
    """On accelerators: a run that does not fit would end after most of its time."""
    compiled = []
    original = Program.compile_kl
    monkeypatch.setattr(Program, "compile_kl", lambda *arguments: compiled.append(original(*arguments)))
    on_gpu = SimpleNamespace(platform=lambda mesh: "gpu", sharding=mesh_lib.sharding)
    monkeypatch.setattr(loop, "mesh_lib", on_gpu)
    assert loop.train(tuned, tmp_path / "fits")
    assert loop.train(tuned, tmp_path / "fits")  # which has no step left to make
    assert len(compiled) == 1
    monkeypatch.setattr(mesh_lib, "memory", lambda mesh: 1000.0)
    monkeypatch.setattr(mesh_lib, "check_memory", lambda mesh, needed: None)
    with refused("stacks.gated.kl_fraction", "GiB", "activations.rows_per_forward"):
        loop.train(tuned, tmp_path / "large")
    assert not (tmp_path / "large").exists()
