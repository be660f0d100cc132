"""Selections of the largest features, the architectures that make them, and dead features that explain residuals."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gsae_jax
from gsae_jax import config as config_lib
from gsae_jax import config_trees, sae_sources
from gsae_jax import mesh as mesh_lib
from gsae_jax.evaluation import frontiers, report
from gsae_jax.saes import batch_topk, contract, gated, gated_batch_topk, matryoshka, selection, topk, trained
from gsae_jax.training import lengthening, preparation
from gsae_jax.training.stacks import Stack
from tests import references
from tests.measuring import UNUSED
from tests.refusals import refused
from tests.variants import variants

SITE = "blocks.0.hook_mlp_out"
D, F, B, K = 12, 64, 32, 6
KINDS = {topk: {}, batch_topk: {"of_batch": True}, matryoshka: {"of_batch": True, "sizes": (2, 6, 14, 30, 64)}}
by_kind = pytest.mark.parametrize("module", KINDS, ids=lambda module: module.__name__.rpartition(".")[2])


def values(case, width):
    rng = np.random.default_rng(width)
    normal = np.maximum(rng.normal(size=(16, width)), 0).astype(np.float32)
    match case:
        case "normal":
            return normal
        case "ties":
            return np.round(2 * normal) / 2
        case "all equal":
            return np.ones_like(normal)
        case "few positive":
            return np.where(rng.random(normal.shape) < 2 / width, np.abs(normal), 0).astype(np.float32)
        case "none positive":
            return -np.zeros_like(normal)
        case "in one token":  # more than there are slots for
            normal[3] = np.abs(normal[3]) + 9
            return normal


CASES = ("normal", "ties", "all equal", "few positive", "none positive", "in one token")


@pytest.mark.parametrize("of_batch", [False, True])
# By full counts, by maxima of groups of 8 and 16, and where k is larger than usual.
@pytest.mark.parametrize(("width", "k", "usual"), [(62, 4, 4), (64, 4, 4), (2048, 8, 8), (2048, 20, 8), (2048, 600, 8)])
def test_selections_are_those_of_a_full_sort(width, k, usual, of_batch):
    @jax.jit
    def select(x):
        largest = selection.largest(x, k, of_batch=of_batch, usual=usual)
        return largest.of(x), largest.smallest

    for case in CASES:
        x = values(case, width)
        expected = references.largest(x, k, of_batch)
        on, smallest = select(x)
        np.testing.assert_array_equal(on, np.where(expected, x, 0), err_msg=case)
        axis = None if of_batch else 1
        least = np.where(expected, x, np.inf).min(axis, keepdims=True)
        has_room = expected.sum(axis, keepdims=True) < k * (len(x) if of_batch else 1)
        np.testing.assert_array_equal(smallest, np.where(has_room, 0, least), err_msg=case)


def test_more_values_than_32_bits_can_count(monkeypatch):
    """Counts in two parts, here of few values: with more than 255 in a token, and with numbers that carry."""
    monkeypatch.setattr(selection, "INT32", 100)
    for case in CASES:
        x = values(case, 2048)
        for k in (8, 600):
            on = jax.jit(lambda x, k=k: selection.largest(x, k, of_batch=True).of(x))(x)
            np.testing.assert_array_equal(on, np.where(references.largest(x, k, True), x, 0), err_msg=case)


# The second is cut into groups of 8 features, where k is larger than usual.
@pytest.mark.parametrize(
    ("width", "shape", "usual"), [(64, (2, 4), 8), (256, (2, 4), 2), (2048, (2, 4), 8), (64, (8, 1), 8)]
)
def test_a_mesh_selects_as_one_device(width, shape, usual):
    mesh = mesh_lib.make_mesh(config_lib.Mesh(*shape))
    shards = contract.Shards("latent", "data")

    def select(x):
        return tuple(selection.largest(x, 8, shards, of_batch, usual).of(x) for of_batch in (False, True))

    select = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=P("data", "latent"), out_specs=P("data", "latent")))
    for x in (np.concatenate([values(case, width) for case in CASES]), values("ties", width), values("normal", width)):
        for on, of_batch in zip(select(x), (False, True), strict=True):
            np.testing.assert_array_equal(on, np.where(references.largest(x, 8, of_batch), x, 0))


def test_a_value_that_is_not_a_number_is_selected():
    x = np.ones((2, 8), np.float32)
    x[0, 5], x[1, 6] = np.nan, -np.nan
    assert np.isnan(jax.jit(lambda x: selection.largest(x, 1).of(x))(x)).nonzero()[1].tolist() == [5, 6]


def random_params(module, config, seed=0):
    params = module.init(jax.random.key(seed), config)
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: value + 0.3 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }


def batch_of(x, dead_F):
    return contract.Batch(x, x, lambda: dead_F, jnp.int32(0))


@by_kind
def test_loss_and_gradients_match_float64(module):
    config = module.Config(D, F, k=K, k_aux=5)
    params, x = random_params(module, config), jax.random.normal(jax.random.key(5), (B, D)) + 0.5
    dead_F = jnp.arange(F) % 4 == 1
    state = {"threshold": params.pop("threshold")} if "threshold" in params else {}

    def loss(params):
        return module.loss(params, state, batch_of(x, dead_F), {}, config)

    (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    aux = {"dead": np.asarray(dead_F), "k_aux": 5, "weight": 1 / 32}
    expected, expected_grads, f = references.topk_sae(params, x, K, **KINDS[module], **aux)
    assert value == pytest.approx(expected, rel=1e-5)
    assert statistics.means["l0"] == pytest.approx((f > 0).sum(1).mean())
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(grad, expected_grads[name], rtol=0, atol=1e-5 * scale, err_msg=name)
    if state:
        before, here = np.asarray(state["threshold"]), f[f > 0].min()
        after = np.where(before > 0, 0.99 * before + 0.01 * here, here)
        np.testing.assert_allclose(statistics.state["threshold"], after, rtol=1e-5)
    else:
        np.testing.assert_allclose(module.encode(params, x, config), f, rtol=1e-4, atol=1e-5)


def test_gates_that_are_selected_match_float64():
    """Loss and gradients; the threshold; and the same function as a gated SAE, afterwards."""
    config = gated_batch_topk.Config(D, F, k=K, k_aux=5)
    params, x = random_params(gated_batch_topk, config), jax.random.normal(jax.random.key(5), (B, D)) + 0.5
    dead_F, before = jnp.arange(F) % 4 == 1, params.pop("threshold")

    def loss(params):
        return gated_batch_topk.loss(params, {"threshold": before}, batch_of(x, dead_F), {}, config)

    (value, statistics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    expected, expected_grads, f, gates = references.gated_batch_topk_sae(params, x, K, np.asarray(dead_F), 5, 1 / 32)
    assert value == pytest.approx(expected, rel=1e-5)
    assert statistics.means["l0"] == pytest.approx((f > 0).sum(1).mean())
    np.testing.assert_array_equal(statistics.fired, (f > 0).any(0))
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(grad, expected_grads[name], rtol=0, atol=1e-5 * scale, err_msg=name)
    before, here = np.asarray(before), gates[gates > 0].min()
    after = np.where(before > 0, 0.99 * before + 0.01 * here, here)
    np.testing.assert_allclose(statistics.state["threshold"], after, rtol=1e-5)
    params["threshold"] = jnp.full(F, 1.5 * here, jnp.float32)
    on = gates > 1.5 * here
    np.testing.assert_array_equal(gated_batch_topk.gate(params, x, config), on)
    for start in (params, gated_batch_topk.from_gated(gated.from_gated_batch_topk(params, config), config)):
        np.testing.assert_allclose(gated_batch_topk.encode(start, x, config), np.where(on, f, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [batch_topk, *variants(topk, matryoshka)])
def test_k_falls_during_the_warm_up(module):
    """In one program, at the beginning, in between, and at the end; the threshold follows."""
    config = module.Config(D, 2048, k=4, initial_k=20)
    params, x = random_params(module, config), jax.random.normal(jax.random.key(5), (B, D))
    state = {"threshold": params.pop("threshold")} if "threshold" in params else {}

    @jax.jit
    def loss(warmup):
        return module.loss(params, state, batch_of(x, jnp.zeros(2048, bool)), {"warmup": warmup}, config)

    for warmup, k in ((0.0, 20), (0.25, 16), (0.5, 12), (1.0, 4)):
        value, statistics = loss(warmup)
        constant = dataclasses.replace(config, k=k, initial_k=0)
        expected, expected_statistics = module.loss(params, state, batch_of(x, jnp.zeros(2048, bool)), {}, constant)
        assert value == pytest.approx(float(expected), rel=1e-5)
        assert statistics.means["l0"] == expected_statistics.means["l0"] == k
        np.testing.assert_array_equal(statistics.fired, expected_statistics.fired)
        for name, each in expected_statistics.state.items():
            np.testing.assert_allclose(statistics.state[name], each, rtol=1e-6)


@pytest.mark.variants
def test_a_run_has_more_features_at_its_start(config_dict, tmp_path):
    """On a mesh; with the coefficient's warm-up of another stack beside it."""
    config_dict.stacks = {
        "batch": gsae_jax.stack_config("batch_topk", SITE, F, k=4, initial_k=16, coefficient_warmup_fraction=0.5),
        "gated": config_dict.stacks.gated.to_dict(),
    }
    config_dict.mesh.data, config_dict.mesh.latent, config_dict.loggers, config_dict.train.log_every = 2, 4, (), 1
    gsae_jax.fit(config_dict, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    l0 = [line["batch/l0"][0] for line in lines if "batch/l0" in line]
    assert 8 < l0[0] <= 16
    assert l0[-2:] == [4, 4]  # the second half of training
    assert sorted(l0, reverse=True) == l0
    assert len(set(l0)) > 2


def test_a_warm_up_needs_both_of_its_settings(config_dict):
    def with_(kind="topk", **settings):
        config_dict.stacks = {"a": gsae_jax.stack_config(kind, SITE, F, **settings)}
        gsae_jax.experiment(config_dict)
        stack = config_trees.from_dict(config_lib.Experiment, config_dict).stacks["a"]
        contract.build(contract.with_recipe(stack), {SITE: 32}, "float32")

    with_(k=4, initial_k=8, coefficient_warmup_fraction=0.1)
    with refused("coefficient_warmup_fraction", "initial_k"):
        with_(k=4, coefficient_warmup_fraction=0.1)
    with refused("options.initial_k", "coefficient_warmup_fraction"):
        with_(k=4, initial_k=8)
    for wrong in (3, F + 1, -1):
        with refused("options.initial_k", str(wrong)):
            with_(k=4, initial_k=wrong, coefficient_warmup_fraction=0.1)


@pytest.mark.parametrize("freeze", [True, False])
def test_auxk_of_a_gated_sae_matches_float64(freeze):
    """Beside the loss of a gated SAE, by pi_gate alone: the decoder is frozen, and so is the residual."""
    config = gated.Config(D, F, auxk_coefficient=0.5, k_aux=5, freeze_aux_decoder=freeze)
    params, x = random_params(gated, config), jax.random.normal(jax.random.key(5), (B, D)) + 0.5
    dead_F = jnp.arange(F) % 4 == 1

    def loss(params):
        return gated.loss(params, {}, batch_of(x, dead_F), {"l1_coefficient": 0.07}, config)[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    p = {name: np.asarray(array, np.float64) for name, array in params.items()}
    expected, expected_grads, f = references.gated_sae(params, x, 0.07, freeze=freeze)
    c = np.asarray(x, np.float64) - p["b_dec"]
    pi_gate = c @ p["W_gate"] + p["b_gate"]
    almost, slope = np.where(pi_gate > 0, 1 + pi_gate, np.exp(pi_gate)), np.where(pi_gate > 0, 1, np.exp(pi_gate))
    auxk, by_values, _ = references.auxk(almost, c - f @ p["W_dec"], p["W_dec"], np.asarray(dead_F), 5)
    d_pi_gate = 0.5 * by_values * slope
    assert value == pytest.approx(expected + 0.5 * auxk, rel=1e-5)
    expected_grads["W_gate"] += c.T @ d_pi_gate
    expected_grads["b_gate"] += d_pi_gate.sum(0)
    expected_grads["b_dec"] -= (d_pi_gate @ p["W_gate"].T).sum(0)
    for name, grad in grads.items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(grad, expected_grads[name], rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("case", ["none is dead", "nothing to explain"])
def test_auxk_is_zero_with_finite_gradients(case):
    config = topk.Config(D, F, k=K)
    params = random_params(topk, config)
    dead_F = jnp.full(F, case != "none is dead")
    residual = jnp.zeros((B, D)) if case != "none is dead" else jnp.ones((B, D)) * jnp.arange(B)[:, None]

    def error(W_dec):
        return selection.auxiliary_error(jnp.ones((B, F)), residual, W_dec, dead_F, config)

    value, grad = jax.jit(jax.value_and_grad(error))(params["W_dec"])
    assert value == 0
    assert not grad.any()


def test_a_batch_topk_sae_is_a_relu_sae_before_training_and_a_jumprelu_afterwards():
    config = batch_topk.Config(D, F, k=K)
    x = jax.random.normal(jax.random.key(5), (B, D))
    params = batch_topk.init(jax.random.key(0), config)
    pi = np.maximum(x @ params["W_enc"], 0)
    np.testing.assert_allclose(batch_topk.encode(params, x, config), pi, atol=1e-6)
    f = batch_topk.encode(params | {"threshold": jnp.full(F, 0.7)}, x, config)
    np.testing.assert_allclose(f, pi * (pi > 0.7), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("topk", {"k": 4}),
        pytest.param("gated", {"l1_coefficients": (0.01,), "auxk_coefficient": 0.5}, marks=pytest.mark.variants),
        pytest.param("matryoshka", {"k": 4}, marks=pytest.mark.variants),
    ],
)
def test_dead_features_train_on_a_mesh_as_on_one_device(architecture, settings):
    """A third of the features have not fired for long, as far as the state knows."""
    x = {SITE: jax.random.normal(jax.random.key(1), (B, D))}
    config = gsae_jax.stack_config(architecture, SITE, F, learning_rates=(1e-2,), **settings)
    stack = Stack.build("a", gsae_jax.experiment(stacks={"a": config}).stacks["a"], {SITE: D}, "float32", "auto")
    assert stack.sparsity is None
    states = []
    for shape in ((1, 1), (2, 4)):
        mesh = mesh_lib.make_mesh(config_lib.Mesh(*shape), jax.devices()[: math.prod(shape)])

        def update(state, x):
            return stack.update(state, x, jnp.int32(3), jnp.float32(1), dead_after=9)

        specs = stack.specs()
        step = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())))
        since = jnp.where(jnp.arange(F) % 3 == 1, 9, 0)[None]
        state = dataclasses.replace(stack.init(), steps_since_fired=since)
        state = jax.device_put(state, jax.tree.map(lambda spec, mesh=mesh: NamedSharding(mesh, spec), specs))
        state, statistics = step(state, x)
        assert statistics["auxk"] > 0
        states.append(jax.device_get((step(state, x)[0], statistics)))
    (alone, means), (spread, other_means) = states
    np.testing.assert_array_equal(spread.steps_since_fired, alone.steps_since_fired)
    for name, value in alone.params.items():
        np.testing.assert_allclose(spread.params[name], value, atol=1e-3, err_msg=name)  # of updates by 1e-2
    for name, value in means.items():
        np.testing.assert_allclose(other_means[name], value, rtol=1e-4, err_msg=name)


def test_options_and_coefficients_that_do_not_fit():
    widths = {SITE: D}
    for architecture, settings, field, fact in (
        ("topk", {"k": 0}, "options.k", "from 1 to"),
        ("topk", {"k": F + 1}, "options.k", "from 1 to"),
        ("batch_topk", {"auxk_coefficient": -1.0}, "options.auxk_coefficient", "0 for none"),
        ("topk", {"k_aux": -1}, "options.k_aux", "half of the residual"),
        ("matryoshka", {"prefixes": (0.5, 0.25, 1.0)}, "options.prefixes", "ascend"),
        ("matryoshka", {"prefixes": (0.5,)}, "options.prefixes", "ascend"),
        ("topk", {"l1_coefficients": (0.1,)}, "l1_coefficients", "the option k"),
        ("topk", {"target_l0": (5.0,)}, "target_l0", "the option k"),
        ("gated", {}, "l1_coefficients", "no values"),
        (
            "gated",
            {"l1_coefficients": (0.1,), "only_magnitude": True, "auxk_coefficient": 1.0},
            "options.auxk_coefficient",
            "only_magnitude",
        ),
    ):
        stack = gsae_jax.stack_config(architecture, SITE, F, **settings)
        with refused(field, fact):
            contract.build(gsae_jax.experiment(stacks={"a": stack}).stacks["a"], widths, "float32")


def test_an_untied_gated_sae_has_no_form_with_batch_topk():
    config = gated.Config(D, F, tie_encoder=False)
    with refused("start_from", "untied"):
        gated_batch_topk.from_gated(gated.init(jax.random.key(0), config), gated_batch_topk.Config(D, F, k=K))


def test_a_longer_warm_up_and_auxk_without_dead_features_are_said(config_dict):
    stack = gsae_jax.stack_config("gated", SITE, F, k=4, initial_k=64, kl_fraction=0, recipe="2026")
    config_dict.stacks = {"a": stack.to_dict(), "relu": config_dict.stacks.baseline.to_dict()}
    config_dict.train.steps, config_dict.train.dead_after = 100, 101
    config = config_trees.from_dict(config_lib.Experiment, config_dict)
    (sentence,) = lengthening.consequences(config, 10, 10, [10, 10])
    assert "a's sparsity was at 100% and continues at 50%" in sentence
    assert "auxk_coefficient will do nothing in a;" in preparation.warnings(config)[0]


def test_a_grid_without_coefficients():
    stack = gsae_jax.stack_config("topk", SITE, F, k=4, learning_rates=(1e-3, 2e-3), seeds=(0, 1), grid=True)
    assert (stack.learning_rates, stack.seeds) == ((1e-3, 1e-3, 2e-3, 2e-3), (0, 1, 0, 1))
    assert len(gsae_jax.experiment(stacks={"a": stack}).stacks["a"]) == 4


def test_stacks_of_one_recipe_are_one_frontier_and_others_are_not():
    """Also where k is above the number of features with which training begins. Runs are told apart, too."""
    stacks = {
        **{f"best_{k}": gsae_jax.stack_config("gated", SITE, 512, k=k, recipe="2026") for k in (16, 128)},
        **{
            f"plain_{k}": gsae_jax.stack_config("gated", SITE, 512, k=k, recipe="2026", kl_fraction=0)
            for k in (16, 128)
        },
        **{f"at_k_{k}": gsae_jax.stack_config("gated", SITE, 512, k=k, recipe="2026", initial_k=0) for k in (16, 128)},
    }
    run = gsae_jax.experiment(stacks=stacks)
    saes = {}
    for name, stack in run.stacks.items():
        _, config = contract.build(stack, {SITE: D}, "float32")
        saes[f"{name}_0"] = trained.SAE(f"{name}_0", stack.architecture, config, SITE, {}, stack=name)
    ones = np.ones(4)
    ce = {"ce_clean": 0 * ones, "ce_zero": ones, "ce_mean": ones, "ce_sae": ones / 2}
    sums = dict.fromkeys(saes, dict.fromkeys(UNUSED, ones) | ce | {"tokens": ones, "l0": ones, "fired": np.ones(3)})
    records = report.rows("small", saes, sums, recipes=sae_sources._recipes(run, saes))
    groups = [sorted(record["stack"] for record in members) for members in frontiers.stacks(records).values()]
    assert sorted(groups) == [[f"{name}_128", f"{name}_16"] for name in ("at_k", "best", "plain")]
    twice = [record | {"stack": f"{run}/{record['stack']}"} for record in records for run in ("first", "second")]
    assert len(frontiers.stacks(twice)) == 6


def test_stacks_that_differ_in_k_are_one_frontier(config_dict, tmp_path):
    """Beside a baseline, with dead features that AuxK and resampling take care of; on a mesh."""
    config_dict.stacks = {"baseline": config_dict.stacks.baseline.to_dict()} | {
        f"topk_{k}": gsae_jax.stack_config("topk", SITE, F, k=k, learning_rates=(1e-2,)).to_dict() for k in (4, 8)
    }
    config_dict.train.dead_after, config_dict.train.resample_steps = 2, (8,)
    config_dict.mesh.data, config_dict.mesh.latent, config_dict.loggers = 2, 4, ()
    saes = gsae_jax.fit(config_dict, tmp_path / "run")
    assert math.isnan(saes["topk_4_0"].l1_coefficient)
    x = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    assert ((np.asarray(saes["topk_8_0"].encode(x)) != 0).sum(1) <= 8).all()
    records = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["saes"]
    by_name = {record["name"]: record for record in records}
    assert by_name["topk_8_0"]["variant"] == "topk k=8"
    assert by_name["topk_8_0"]["l1_coefficient"] is None
    assert by_name["topk_8_0"]["l0"] <= 8
    together = {stack: [r["name"] for r in members] for (_, stack), members in frontiers.stacks(records).items()}
    assert together == {"baseline": together["baseline"], "topk": ["topk_4_0", "topk_8_0"]}
    assert "| – |" in (tmp_path / "run" / "report" / "report.md").read_text()
