"""The train step: its loss, its optimiser, the batches that it serves, and meshes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gsae_jax
from gsae_jax.activations import scaling, sources
from gsae_jax.data import rows as rows_lib
from gsae_jax.lms.checkpoints import Checkpoint
from gsae_jax.lms.loading import capture
from gsae_jax.saes import gated
from gsae_jax.training import loop, preparation
from tests import references
from tests.training import advance, begin, single_device_mesh, with_


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.variants)])
def test_a_mesh_gives_the_single_device_result(experiment, shape):
    alone = begin(experiment, single_device_mesh())
    spread = begin(with_(experiment, mesh={"data": shape[0], "latent": shape[1]}))
    for site in experiment.sites:
        np.testing.assert_allclose(alone[1].store[site], spread[1].store[site], rtol=1e-5, atol=1e-5)
    programs = alone[0], spread[0]
    (alone, metrics_alone), (spread, metrics_spread) = advance(*alone, calls=3), advance(*spread, calls=3)
    assert [program.train_step._cache_size() for program in programs] == [1, 1]  # compiled once for all calls
    assert int(alone.step) == int(spread.step) == 12
    for name, stack in alone.stacks.items():
        for key, value in stack.params.items():
            # Adam moves a weight with a vanishing gradient by its sign, so single entries may differ by a step.
            difference = np.abs(np.asarray(value) - np.asarray(spread.stacks[name].params[key]))
            assert difference.mean() < 1e-5, (name, key)
        np.testing.assert_array_equal(stack.steps_since_fired, spread.stacks[name].steps_since_fired)
        # Adam hides a gradient that is too large by a factor; its second moment does not.
        moments, others = (jax.tree.leaves(s.stacks[name].second_moments) for s in (alone, spread))
        for ours, theirs in zip(moments, others, strict=True):
            np.testing.assert_allclose(np.mean(ours), np.mean(theirs), rtol=1e-2)
        for key, value in metrics_alone[name].items():
            np.testing.assert_allclose(value, metrics_spread[name][key], rtol=1e-3, err_msg=f"{name} {key}")
    for leaf in jax.tree.leaves((spread.stacks["gated"].params["W_dec"], spread.stacks["gated"].steps_since_fired)):
        assert leaf.addressable_shards[0].data.size == leaf.size // 8  # whatever the mesh's shape


def test_a_step_is_the_papers_loss_and_adam(experiment):
    """Ten updates of every SAE against float64 gradients and optax.adam, on the batches that the buffer served."""
    baseline = dataclasses.replace(experiment.stacks["baseline"], b1=0.5, b2=0.9)
    experiment = dataclasses.replace(experiment, stacks=experiment.stacks | {"baseline": baseline})
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    config = experiment.train
    start = jax.device_get(state)
    tokens = [next(stream) for _ in range(3)]
    served = replay(program, start, lm_params, tokens)
    for call in tokens:
        state, *_ = program.train_step(state, lm_params, program.source.place(call))
    for stack in program.stacks:
        b1, b2 = (0.0, 0.999) if stack.name == "gated" else (0.5, 0.9)
        adam = optax.adam(lambda step: jnp.minimum(1.0, (step + 1) / config.warmup_steps), b1, b2)
        update = jax.jit(adam.update)
        for index, (l1, rate, _) in enumerate(stack.config.numbers()):
            params = {
                name: np.asarray(value[index], np.float64) for name, value in start.stacks[stack.name].params.items()
            }
            moments = adam.init({name: jnp.array(value, jnp.float32) for name, value in params.items()})
            for batch in served[stack.config.site]:
                reference = references.gated_sae if stack.architecture is gated else references.relu_sae
                _, grads, _ = reference(params, batch, l1)
                along = (grads["W_dec"] * params["W_dec"]).sum(-1, keepdims=True)
                grads["W_dec"] -= along * params["W_dec"]
                updates, moments = update({name: np.asarray(g, np.float32) for name, g in grads.items()}, moments)
                params = {name: value + rate * np.asarray(updates[name], np.float64) for name, value in params.items()}
                params["W_dec"] /= np.linalg.norm(params["W_dec"], axis=-1, keepdims=True)
            for name, value in params.items():
                difference = np.abs(np.asarray(state.stacks[stack.name].params[name][index]) - value)
                assert difference.mean() < 2e-5, (stack.name, index, name)


def replay(program, state, lm_params, tokens):
    """The batches {site: [update, B, D]} that the train program serves, by plain indexing of the store."""
    store = {site: np.array(value) for site, value in state.store.items()}
    batch, slots = next(iter(store.values())).shape[:2]
    updates, served = program.config.updates_per_call, {site: [] for site in store}
    for call, rows in enumerate(tokens):
        fresh = jax.jit(lambda tokens: capture(program.module, lm_params, tokens, program.config.sites))(rows)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), call * updates)
        picks = jax.random.randint(jax.random.fold_in(key, 1), (updates, batch), 0, slots)
        shift = int(jax.random.randint(jax.random.fold_in(key, 2), (), 0, rows.shape[1]))
        valid = np.roll(~np.isin(rows, program.special_tokens), shift, axis=1).reshape(batch, updates)
        for update in range(updates):
            for site, values in store.items():
                incoming = np.roll(np.asarray(fresh[site]), shift, axis=1).reshape(batch, updates, -1)[:, update]
                served[site].append(
                    (values[np.arange(batch), picks[update]] - state.means[site]) * float(state.scales[site])
                )
                for stratum in range(batch):
                    if valid[stratum, update]:
                        values[stratum, picks[update, stratum]] = incoming[stratum]
    return served


def test_the_store_starts_full_of_valid_scaled_activations(experiment):
    program, state, lm_params, _ = begin(experiment)
    for site, width in program.widths.items():
        x = np.asarray(state.store[site])
        assert np.abs(x).sum(-1).min() > 0  # no slot is empty
        inputs = (x - np.asarray(state.means[site])) * float(state.scales[site])
        assert np.square(inputs).sum(-1).mean() == pytest.approx(width, rel=0.1)
        assert np.abs(inputs.mean((0, 1))).max() < 0.3 < np.abs(x * float(state.scales[site])).mean((0, 1)).max()
    tokens = next(begin(experiment)[3])
    bos = capture(program.module, lm_params, jnp.array(tokens), ["blocks.0.hook_mlp_out"])["blocks.0.hook_mlp_out"][
        0, 0
    ]
    distance = np.abs(np.asarray(state.store["blocks.0.hook_mlp_out"]) - np.asarray(bos)).max(-1)
    assert distance.min() > 1e-3  # BOS, the same in every row, is not among them


def test_tokens_of_extreme_norm_are_dropped(experiment):
    limited = with_(experiment, activations={"max_norm_multiple": 1.05})
    program, state, _, _ = begin(limited)
    _, unlimited, _, _ = begin(experiment)
    for site in program.widths:
        norms = np.linalg.norm(np.asarray(state.store[site]), axis=-1)
        assert norms.max() <= float(state.norm_limits[site]) * (1 + 1e-5)
        assert np.linalg.norm(np.asarray(unlimited.store[site]), axis=-1).max() > float(state.norm_limits[site])


@pytest.mark.variants
def test_a_batch_may_take_several_forward_passes(experiment):
    """Two forwards of 8 rows per update and one of 16 see the same tokens in the same order."""
    one = with_(experiment, train={"batch_size": 256}, activations={"buffer_size": 2048})
    two = with_(one, activations={"rows_per_forward": 8})
    assert (one.forwards_per_call, two.forwards_per_call, two.rows_per_call) == (1, 2, 16)
    (one, _), (two, _) = advance(*begin(one), calls=2), advance(*begin(two), calls=2)
    np.testing.assert_allclose(one.stacks["gated"].params["W_dec"], two.stacks["gated"].params["W_dec"], atol=1e-4)


@pytest.mark.variants
def test_one_row_a_call(experiment):
    """On eight devices, which then all lie along the dictionary, as on one."""
    one = with_(experiment, activations={"rows_per_forward": 1}, train={"batch_size": 8})
    alone, _ = advance(*begin(one, single_device_mesh()), calls=3)
    spread, _ = advance(*begin(with_(one, mesh={"latent": 8})), calls=3)
    assert int(alone.step) == int(spread.step) == 6
    for name, stack in alone.stacks.items():
        for key, value in stack.params.items():
            difference = np.abs(np.asarray(value) - np.asarray(spread.stacks[name].params[key]))
            assert difference.mean() < 1e-5, (name, key)


def lm_flops(experiment):
    """FLOPs of the compiled forward pass that feeds the stacks."""
    checkpoint = Checkpoint.open(experiment.lm.path)
    program, _ = preparation.build(experiment, single_device_mesh(), checkpoint)
    lm_params = checkpoint.params(program.module, "float32")
    tokens = jnp.zeros((experiment.rows_per_call, experiment.data.context_length), jnp.int32)
    return jax.jit(program.source.__call__).lower(lm_params, tokens).compile().cost_analysis()["flops"]


def step_flops(experiment):
    """FLOPs of the whole compiled train program (XLA counts a scan's body once, whatever its length)."""
    checkpoint = Checkpoint.open(experiment.lm.path)
    program, _ = preparation.build(experiment, single_device_mesh(), checkpoint)
    lm_params = checkpoint.params(program.module, "float32")
    tokens = jnp.zeros((experiment.rows_per_call, experiment.data.context_length), jnp.int32)
    return (
        program.train_step.lower(program.init(scaling.standard(program.widths)), lm_params, tokens)
        .compile()
        .cost_analysis()["flops"]
    )


def test_one_forward_pass_serves_every_stack(experiment):
    """A stack more, at the same or an earlier site, costs its own update only; the language model's FLOPs stay."""
    stack = experiment.stacks["gated"]
    elsewhere = dataclasses.replace(stack, site="blocks.0.hook_resid_pre")

    def with_stacks(**stacks):
        return dataclasses.replace(experiment, stacks=stacks)

    alone = with_stacks(a=stack)
    same, other = with_stacks(a=stack, b=stack), with_stacks(a=stack, b=elsewhere)
    assert lm_flops(same) == lm_flops(alone) == lm_flops(other)
    lm, one, two, both = lm_flops(alone), step_flops(alone), step_flops(with_stacks(b=elsewhere)), step_flops(other)
    # Two runs would pay for two forward passes; together they pay for one, and for one set of random draws.
    assert both < one + two - 0.9 * min(lm, lm_flops(with_stacks(b=elsewhere)))
    assert step_flops(same) - one < one - 0.9 * lm


def test_the_train_step_moves_nothing_between_host_and_device(experiment):
    """Under a transfer guard: tokens are placed before a step, and statistics are fetched by an explicit call."""
    program, state, lm_params, stream = begin(experiment)
    state, _ = advance(program, state, lm_params, stream, calls=1)  # compiling places constants
    batches = [program.source.place(next(stream)) for _ in range(2)]
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics, dropped = program.train_step(state, lm_params, batch)
        jax.device_get((metrics, dropped))
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.jit(lambda x: x + 1)(np.ones(3, np.float32))


def test_a_target_moves_the_l1_coefficients(experiment, tmp_path):
    """Up where too many features fire, more slowly down where too few, and only until two thirds of training."""
    stacks = {"gated": dataclasses.replace(experiment.stacks["gated"], target_l0=(1.0, 60.0), l1_coefficients=())}
    experiment = dataclasses.replace(with_(experiment, train={"log_every": 4}), stacks=stacks)
    assert loop.train(experiment, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, second = zip(*(line["gated/l1_coefficient"] for line in lines), strict=True)
    assert first[0] == pytest.approx(0.01)  # warm-up
    assert first[0] < first[1] < first[2] < first[3]  # means over four steps
    assert second[0] > second[1] > second[2] > second[3]
    assert np.log(second[0] / second[3]) < 0.3 * np.log(first[3] / first[0])
    saes = gsae_jax.load(tmp_path / "run")
    assert [sae.l1_coefficient for sae in saes.values()] == pytest.approx([first[3], second[3]])


@pytest.mark.variants
def test_a_scale_is_measured_on_the_text_that_there_is(experiment, tmp_path, monkeypatch):
    """At most once over, however many tokens are asked for."""
    placed, calls = sources.LanguageModel.place, []
    monkeypatch.setattr(sources.LanguageModel, "place", lambda *args: calls.append(args) or placed(*args))
    tokenizer = gsae_jax.load_lm(experiment.lm.path).tokenizer
    rows = rows_lib.open_rows(experiment.data, "train", tokenizer, 2**40)
    once = len(rows) // experiment.rows_per_call
    assert loop.train(with_(experiment, activations={"scale_tokens": 10**9}), tmp_path / "run")
    assert once < len(calls) < once + 100


@pytest.mark.variants
@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"tie_encoder": False}},
        {"options": {"use_r_mag": False}},
        {"options": {"freeze_aux_decoder": False}},
        {"options": {"penalty": "tanh"}},
        {"options": {"aligned": True}},
        {"train": {"compute_dtype": "bfloat16"}, "lm": {"dtype": "bfloat16"}},
        {"activations": {"drop_special_tokens": False}},
    ],
    ids=str,
)
def test_every_variant_trains_on_a_mesh(experiment, changes):
    options = changes.pop("options", {})
    stacks = {"gated": dataclasses.replace(experiment.stacks["gated"], options=options)}
    experiment = dataclasses.replace(with_(experiment, mesh={"data": 2, "latent": 4}, **changes), stacks=stacks)
    program, state, lm_params, stream = begin(experiment)
    before = jax.device_get(state.stacks["gated"].params)
    state, first = advance(program, state, lm_params, stream, calls=1)
    state, last = advance(program, state, lm_params, stream, calls=4)
    assert (last["gated"]["loss"] < first["gated"]["loss"]).all()
    moved = {name for name, value in state.stacks["gated"].params.items() if np.any(np.asarray(value) != before[name])}
    fixed = options.get("use_r_mag") is False or options.get("aligned")
    assert moved == set(before) - ({"r_mag"} if fixed else set())
    assert all(value.dtype == np.float32 for value in before.values())


def test_a_skipped_update_leaves_the_age_of_features(experiment):
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    state, _ = advance(program, state, lm_params, stream, calls=1)
    stack = state.stacks["gated"]
    stack.params["b_dec"] = stack.params["b_dec"].at[1].set(jnp.nan)
    stack.steps_since_fired = jnp.full_like(stack.steps_since_fired, 7)
    state, _ = advance(program, state, lm_params, stream, calls=1)
    after = jax.device_get(state.stacks["gated"])
    assert (after.steps_since_fired[1] == 7).all()
    assert set(np.unique(after.steps_since_fired[0])) <= {0, *range(8, 64)}
    assert after.skipped[0] == 0 < after.skipped[1]


def test_frozen_parameters_keep_every_bit(experiment):
    stack = dataclasses.replace(experiment.stacks["gated"], options={"only_magnitude": True}, start_from="run:stack")
    experiment = dataclasses.replace(experiment, stacks={"rescaled": stack})
    program, state, lm_params, stream = begin(experiment, single_device_mesh())
    before = jax.device_get(state.stacks["rescaled"].params)
    state, _ = advance(program, state, lm_params, stream, calls=3)
    after = jax.device_get(state.stacks["rescaled"].params)
    assert {name for name in before if (before[name] != after[name]).any()} == {"r_mag", "b_mag"}
