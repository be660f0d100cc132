"""What an accelerator may do differently (`pytest -m gpu`); `benchmarks/accelerator.py` runs this file.

It needs no text, as tokens are random, and no package for text. Without a GPU the tests run on the CPU, but for those
that would compare it with itself. Each test records its largest error, which the command above writes down.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsae_jax
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import scaling
from gsae_jax.lms import attention
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.planning import planner
from gsae_jax.saes import contract, features
from gsae_jax.storage import checkpoints, paths
from gsae_jax.storage.facts import Facts
from gsae_jax.training import starting
from gsae_jax.training.step import Program
from tests import references

pytestmark = pytest.mark.gpu
REFERENCES = {"gated": references.gated_sae, "relu": references.relu_sae}
SITE = "blocks.0.hook_mlp_out"


def needs_gpu(why):
    if jax.default_backend() == "cpu":
        pytest.skip(f"there is no GPU: {why}")


def exact(name, D=512, F=4096, B=512):
    """(parameters, inputs) with pre-activations that every precision has exactly, and none of which is near 0.

    So rounding opens or closes no gate. Inputs and the encoder are small multiples of powers of two, as are biases, but
    for a part that is smaller than the distance between two pre-activations.
    """
    random = np.random.default_rng(0)
    x, b_dec = random.integers(-1, 2, (B, D)), random.integers(-2, 3, D) / 4
    W, W_dec = random.integers(-8, 9, (D, F)) / 8, random.normal(size=(F, D))
    typical = np.std((x[:64] - b_dec) @ W)
    bias = np.round(random.normal(-2, 0.1, F) * typical)  # two deviations: a fiftieth of the features is active
    params = {"W_dec": W_dec / np.linalg.norm(W_dec, axis=1, keepdims=True), "b_dec": b_dec}
    if name == "gated":
        r_mag = random.integers(-1, 2, F) * np.log(2)
        params |= {"W_gate": W, "b_gate": bias + 1 / 64, "b_mag": bias + 5 + 1 / 128, "r_mag": r_mag}
    else:
        params |= {"W_enc": W, "b_enc": bias + 1 / 64}
    return {key: jnp.asarray(value, jnp.float32) for key, value in params.items()}, jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("step", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        pytest.param("highest", "float32", 1e-5, id="float32"),
        # What JAX does by default: TF32 on NVIDIA's GPUs since Ampere, with 10 bits of a float32's 23; float32 on CPUs.
        pytest.param("default", "float32", 2e-3, id="TF32"),
        pytest.param("default", "bfloat16", 1e-2, id="bfloat16"),
    ],
)
@pytest.mark.parametrize("name", ["gated", "relu"])
def test_losses_and_gradients_against_float64(name, precision, dtype, tolerance, step, record_property):
    """Gradients by their norms."""
    params, x = exact(name)
    module = contract.module_of(name)
    config = contract.build_config(module, name, (x.shape[1],), None, params["W_dec"].shape[0], dtype, {})

    def loss(params, x, by=None):
        batch = contract.Batch(x, x, lambda: jnp.zeros(config.width, bool), jnp.int32(0))
        more = {} if by is None else {"features": by}
        return module.loss(params, {}, batch, {"l1_coefficient": 0.07}, config, **more)

    def by_active(params, x):
        how = features.Sparsity((256,), features.block(jax.default_backend()))
        choice = features.Choice(lambda params: contract.encoder(module, params, config))
        return features.gradients(loss, choice, params, x, x, dtype, how)

    with jax.default_matmul_precision(precision):
        gradients = jax.grad(loss, has_aux=True) if step == "dense" else by_active
        grads, statistics = jax.jit(gradients)(params, x)
        pre = (x - params["b_dec"][None]) @ params["W_gate" if name == "gated" else "W_enc"]
    expected, expected_grads, f = REFERENCES[name](params, x, 0.07)
    np.testing.assert_array_equal(pre, np.asarray(pre * 32).round() / 32)
    assert (f > 0).sum(1).mean() > 50
    assert (f > 0).sum(1).max() <= 256
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))
    errors = {"loss": abs(float(statistics.means["loss"]) / expected - 1)}
    assert grads.keys() == expected_grads.keys()
    for key, value in expected_grads.items():
        errors[key] = float(np.linalg.norm(np.asarray(grads[key], np.float64) - value) / np.linalg.norm(value))
    record_property("error", max(errors.values()))
    assert max(errors.values()) <= tolerance, errors


def experiment(width=512, **train):
    """Two stacks at the embedded language model's site."""
    stack = {"site": SITE, "width": width, "learning_rates": (1e-3,)}
    return gsae_jax.experiment(
        stacks={
            "gated": stack | {"architecture": "gated", "l1_coefficients": (1e-2, 2e-2)},
            "baseline": stack | {"architecture": "relu", "l1_coefficients": (6e-3,)},
        },
        data={"context_length": 64},
        activations={"rows_per_forward": 16, "buffer_size": 8 * 256, "scale_tokens": 2048},
        train={"steps": 400, "batch_size": 256, "warmup_steps": 4, "dead_after": 100} | train,
        mesh={"data": 1},
        loggers=(),
    )


def program_on(config, device):
    """(the train program on one device, the language model's parameters, endless random tokens)."""
    mesh = mesh_lib.make_mesh(config.mesh, [device])
    checkpoint = Checkpoint.open(config.lm.path)
    program = Program.build(config, mesh, checkpoint, special_tokens=(0,))
    random, shape = np.random.default_rng(0), (config.rows_per_call, config.data.context_length)
    tokens = (random.integers(1, checkpoint.config.d_vocab, shape, np.int32) for _ in itertools.count())
    return program, checkpoint.params(program.module, config.lm.dtype), tokens


def train(program, lm_params, tokens, state, calls):
    """(the state after so many calls, the loss of every SAE at each)."""
    losses = []
    for _ in range(calls):
        state, metrics, _ = program.train_step(state, lm_params, program.source.place(next(tokens)))
        losses.append(np.concatenate([metrics[stack]["loss"] for stack in ("gated", "baseline")]))
    return state, np.array(losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_that_of_the_cpu(dtype, record_property):
    """40 updates. Adam moves a weight whose gradient vanishes by its sign, so that single weights may differ."""
    needs_gpu("the CPU's training would be compared with itself")
    config, ends = experiment(compute_dtype=dtype), []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_matmul_precision("highest"):
            program, lm_params, tokens = program_on(config, device)
            first = starting.start(program, lm_params, tokens)
            before = jax.device_get(first.stacks)
            state, losses = train(program, lm_params, tokens, first, 10)
        ends.append((before, jax.device_get(state.stacks), losses))
    (_, ours, losses), (before, theirs, expected) = ends
    record_property("error", float(np.abs(losses / expected - 1).max()))
    np.testing.assert_allclose(losses, expected, rtol=1e-3 if dtype == "float32" else 1e-2)
    for name, stack in theirs.items():
        for key, value in stack.params.items():
            moved = np.linalg.norm(value - before[name].params[key])
            apart = np.linalg.norm(ours[name].params[key] - value)
            assert apart <= (0.05 if dtype == "float32" else 0.3) * moved, (name, key, apart / moved)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("heads", [12, 4])
def test_fused_attention_is_that_of_xla(window, heads, monkeypatch, record_property):
    """cuDNN's kernel and XLA's against float64."""
    B, T, H, K = 2, 600, 12, 64
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, n, K), jnp.bfloat16) for key, n in zip(keys, (H, heads, heads), strict=True)
    )
    if not attention._has_fused(q):
        pytest.skip("cuDNN's attention is for NVIDIA's GPUs since Ampere")
    wide = [np.repeat(np.asarray(x, np.float64), H // x.shape[2], axis=2) for x in (q, k, v)]
    place = np.arange(T)
    seen = (place[:, None] >= place) & (place[:, None] - place < (window or T))
    scores = np.where(seen, np.einsum("bthk,bshk->bhts", *wide[:2]) * K**-0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bshk->bthk", weights / weights.sum(-1, keepdims=True), wide[2])
    attend = partial(attention.attend, mask_BxT=None, scores=attention.Scores(window, K**-0.5), mesh=None)
    errors = {}
    for kernel, fused in (("cuDNN", True), ("XLA", False)):
        monkeypatch.setattr(attention, "_has_fused", lambda q, fused=fused: fused)
        out = np.asarray(jax.jit(lambda *arrays: attend(*arrays))(q, k, v), np.float64)
        errors[kernel] = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
    record_property("error", errors["cuDNN"])
    assert max(errors.values()) < 1e-2, errors


def continue_run(folder):
    """Take the checkpoint of the test below, train on, and write the state."""
    program, lm_params, tokens = program_on(experiment(), jax.devices()[0])
    saved = checkpoints.Checkpoints(checkpoints.SavedCheckpoints(paths.of(folder), "folder"), program.config.checkpoint)
    state, position = starting.restore(program, saved, 8, buffer=True)
    saved.close()
    tokens = itertools.islice(tokens, position["batches"], None)
    state, _ = train(program, lm_params, tokens, state, 3)
    np.savez(Path(folder) / "end.npz", *jax.tree.leaves(jax.device_get(state)))


def test_another_process_continues_bit_for_bit(tmp_path):
    program, lm_params, tokens = program_on(experiment(), jax.devices()[0])
    read = [0]

    def counted():
        for batch in tokens:
            read[0] += 1
            yield batch

    stream = counted()
    state, _ = train(program, lm_params, stream, starting.start(program, lm_params, stream), 2)
    saved = checkpoints.Checkpoints(
        checkpoints.SavedCheckpoints(paths.of(tmp_path), "folder"), program.config.checkpoint
    )
    saved.save(8, *starting.saved_parts(state, True), {"batches": read[0]}, Facts(rows="random"), None)
    saved.close()
    state, _ = train(program, lm_params, stream, state, 3)
    code = f"from tests import test_gpu; test_gpu.continue_run({str(tmp_path)!r})"
    uncached = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=uncached, check=True)
    with np.load(tmp_path / "end.npz") as end:
        for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(jax.device_get(state))):
            np.testing.assert_array_equal(end[f"arr_{number}"], leaf, err_msg=jax.tree_util.keystr(path))


def test_the_planners_bytes_are_allocated(record_property):
    """What the state takes, and the most that a step takes."""
    device = jax.devices()[0]
    if not device.memory_stats():
        pytest.skip(f"{device.device_kind} does not say what it has allocated")
    program, lm_params, tokens = program_on(experiment(width=2**16, batch_size=1024), device)
    case = planner.Case.of(program, Checkpoint.open(program.config.lm.path))
    planned, _, method = case.measure()
    assert method["bytes"] == "compiled"
    before = device.memory_stats()
    state = program.init(scaling.standard(program.widths))
    jax.block_until_ready(state)
    held = device.memory_stats()["bytes_in_use"] - before["bytes_in_use"]
    assert held == pytest.approx(planned["SAEs"] + planned["optimiser"] + planned["buffer"], rel=0.02)
    jax.block_until_ready(train(program, lm_params, tokens, state, 1)[0])
    lm = sum(leaf.nbytes for leaf in jax.tree.leaves(lm_params))
    peak = device.memory_stats()["peak_bytes_in_use"] - before["bytes_in_use"] + lm
    record_property("error", peak / planned["total"] - 1)
    if before["peak_bytes_in_use"] - before["bytes_in_use"] + lm < planned["total"]:  # else another test took more
        assert peak == pytest.approx(planned["total"], rel=0.2)
    assert 0.5 < case.estimate()["total"] / planned["total"] < 2
