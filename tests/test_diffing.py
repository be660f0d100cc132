"""Two language models in one run: a base and its finetune, read by crosscoders and by ordinary SAEs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gsae_jax
from gsae_jax import collecting, config_trees, exporting, measuring, sae_loading, viewing
from gsae_jax import config as config_lib
from gsae_jax import train as train_command
from gsae_jax.evaluation import measure
from gsae_jax.lms import checkpoints, loading
from gsae_jax.mesh import make_mesh
from gsae_jax.planning import planner
from gsae_jax.saes import batch_topk_crosscoder, relu, trained
from gsae_jax.training import loop, preparation
from gsae_jax.viewer.live import Live
from gsae_jax.viewer.pages import Links
from tests.conftest import tiny
from tests.measuring import as_sae, batches, identity
from tests.refusals import refused
from tests.training import advance, assert_same, begin, params_of, with_
from tests.variants import variants

HOOK = "blocks.0.hook_resid_post"
OTHER = f"{HOOK}@tuned"


def save_finetune(lm, folder, change):
    """A checkpoint with changed parameters of a language model."""
    params = jax.tree_util.tree_map_with_path(lambda path, x: change(path[-1].key, np.array(x)), lm.params)
    checkpoints.save(folder, lm.config, params, lm.tokenizer)
    return folder


@pytest.fixture(scope="session")
def tuned_dir(lm, tmp_path_factory):
    """The small model with noise in its weights."""
    noise = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    return save_finetune(lm, folder, lambda _, x: x + 0.05 * noise.normal(size=x.shape))


@pytest.fixture(scope="session")
def tuned(tuned_dir):
    return loading.load_lm(tuned_dir)


def stack(architecture, site, l1=(0.01,), **settings):
    return gsae_jax.stack_config(architecture, site, 64, l1, learning_rates=(1e-2,), **settings)


@pytest.fixture(scope="session")
def two(text_dir, lm_dir, tuned_dir, tmp_path_factory):
    """A crosscoder of the same site of both models, and a gated SAE on the finetune."""
    config = tiny(text_dir, lm_dir, tmp_path_factory.getbasetemp() / "tfds")
    config.lms.tuned = {"path": str(tuned_dir)}
    config.stacks = {
        "cross": stack("batch_topk_crosscoder", (HOOK, OTHER), (), k=8),
        "alone": stack("gated", OTHER),
    }
    return config_trees.from_dict(config_lib.Experiment, config)


@pytest.fixture(scope="session")
def run(two, tmp_path_factory):
    """A finished run."""
    path = tmp_path_factory.mktemp("two") / "run"
    assert train_command.run(two, path) == 0
    return path


def changed(experiment, **changes):
    return gsae_jax.experiment(experiment, **changes)


@pytest.mark.parametrize("mesh", [(2, 4), *variants((8, 1))])
def test_the_activations_are_those_of_each_model(two, lm, tuned, mesh):
    experiment = with_(two, mesh={"data": mesh[0], "latent": mesh[1]})
    program, state, params, stream = begin(experiment)
    assert program.widths == {HOOK: 32, OTHER: 32}
    assert all(model.module.config.n_layers == 1 for model in program.models.values())  # of two
    tokens = next(stream)
    activations, _ = jax.jit(program.source)(params, program.source.place(tokens))
    for site, model in ((HOOK, lm), (OTHER, tuned)):
        np.testing.assert_allclose(activations[site], model.activations(tokens, HOOK)[HOOK], atol=2e-5)
        scale = state.scales[site] * np.asarray(activations[site] - state.means[site][None, None])
        assert np.square(scale).sum(-1).mean() == pytest.approx(32, rel=0.2)
    # As rows of conversations are, whose roles hide tokens.
    hidden = np.where(np.arange(tokens.shape[1]) % 2, tokens, ~tokens)
    same, allowed = jax.jit(program.source)(params, program.source.place(hidden))
    np.testing.assert_array_equal(program.source.tokens(hidden), tokens)
    np.testing.assert_array_equal(same[OTHER], activations[OTHER])
    assert not allowed[:, ::2].any()
    state, metrics = advance(program, state, params, stream, 1)
    assert np.isfinite(metrics["cross"]["loss"]).all()


@pytest.mark.variants
def test_an_sae_of_the_second_model_trains_as_if_it_were_the_only_one(two, tuned_dir):
    """With the KL divergence of the second model's predictions in every step."""
    kl = {"kl_fraction": 1.0}
    beside = changed(two, stacks={"alone": kl, "cross": None, "first": stack("relu", HOOK).to_dict()})
    alone = {"alone": {"site": HOOK, **kl}, "cross": None}
    only = changed(two, lm={"path": str(tuned_dir)}, lms={"tuned": None}, stacks=alone)
    ends = []
    for experiment in (with_(each, mesh={"latent": 2}) for each in (beside, only)):
        program, state, params, stream = begin(experiment)
        state, metrics = advance(program, state, params, stream, 2)
        ends.append((jax.device_get(state.stacks["alone"].params), metrics["alone"]))
    (ours, our_metrics), (theirs, their_metrics) = ends
    assert their_metrics["kl"] > 0
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-4, err_msg=name)
    for name in ("kl", "loss", "l0"):
        np.testing.assert_allclose(our_metrics[name], their_metrics[name], rtol=1e-3, err_msg=name)


@pytest.mark.variants
def test_a_run_of_two_models_is_reported_by_model(run, two, tuned):
    report = json.loads((run / "report" / "report.json").read_text())
    records = {record["name"]: record for record in report["saes"]}
    sites = {f"cross_0@{HOOK}": HOOK, f"cross_0@{OTHER}": OTHER, "alone_0": OTHER}
    assert {name: record["site"] for name, record in records.items()} == sites
    models = {name: record["model"] for name, record in records.items()}
    assert models == {name: "tuned" if "@tuned" in site else "small" for name, site in sites.items()}
    # Every model has its own losses, and the first one's do not depend on reconstructions in the second.
    assert records["alone_0"]["ce_clean"] == records[f"cross_0@{OTHER}"]["ce_clean"]
    assert records["alone_0"]["ce_clean"] != records[f"cross_0@{HOOK}"]["ce_clean"]
    assert report["runs"]["run"]["language_model"] == "small"
    assert report["runs"]["run"]["language_model_tuned"] == report["measured"]["language_model_tuned"] == "tuned"
    assert (run / "report" / "models.png").exists()
    text = (run / "report" / "report.md").read_text()
    assert OTHER in text
    assert "tuned (@tuned)" in text

    (compared,) = report["models"]
    saes = gsae_jax.load(run)
    found = gsae_jax.compare_models(saes["cross_0"])
    assert found.models == ("", "tuned")
    counts = [compared[name] for name in ("only_first", "shared", "only_second", "between")]
    assert sum(counts) == compared["alive"] == sum(compared["shares"]) > 0
    assert compared["alive"] == pytest.approx(64 * records[f"cross_0@{HOOK}"]["alive"])
    assert counts[1] <= int(found.shared.sum())
    # The SAE of the finetune alone works on that model by itself.
    alone = trained.for_export(saes["alone_0"])
    assert (alone.site, alone.metadata["model_name"]) == (HOOK, "tuned")
    tokens = gsae_jax.held_out(run, 256)
    sums = measure.measure(tuned, [alone], [tokens], tuned.special_tokens)["alone_0"]
    assert sums["ce_clean"].sum() / sums["predictions"].sum() == pytest.approx(records["alone_0"]["ce_clean"], rel=0.2)
    with refused("sites", "'tuned'", HOOK):
        tuned.activations(tokens, saes["alone_0"].site)


def test_a_resumed_run_is_the_same_and_other_models_are_refused(run, two, tuned_dir, lm, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(path / "checkpoints" / "16")
    shutil.rmtree(path / "report")
    moved = shutil.copytree(tuned_dir, tmp_path / "moved")
    other = save_finetune(lm, tmp_path / "other", lambda _, x: 1.01 * x)
    with refused("lms.tuned.path", "other", "weights"):
        loop.train(changed(two, lms={"tuned": {"path": str(other)}}), path)
    assert loop.train(changed(two, lms={"tuned": {"path": str(moved)}}), path)
    assert_same(params_of(path), params_of(run))
    recorded = json.loads((path / "config.json").read_text())["lms"]
    assert recorded["tuned"]["path"] == str(moved)
    with refused("lms.tuned.path", "other", "weights"):
        measuring.evaluate(run, config={"lms": {"tuned": {"path": str(other)}}})
    with refused("--workdir", "lms.tuned.dtype: 'float32' != 'bfloat16'"):
        loop.train(changed(two, lms={"tuned": {"dtype": "bfloat16"}}), path)


def test_each_model_is_spliced_and_measured_by_itself(lm, tuned):
    """An identity at a site of the second model, and a crosscoder that is one at both, beside what each alone gives."""
    tokens = batches(lm, 2, 8, 12)
    both = np.concatenate([np.eye(32), -np.eye(32)]).astype(np.float32)
    halves = {"W_enc_0": both.T / 2, "W_enc_1": both.T / 2}  # of the mean of the two sites
    params = halves | {"b_enc": np.zeros(64, np.float32), "W_dec_0": both, "W_dec_1": both}
    params |= {
        "b_dec_0": np.zeros(32, np.float32),
        "b_dec_1": np.zeros(32, np.float32),
        "threshold": np.zeros(64, np.float32),
    }
    config = batch_topk_crosscoder.Config(d_in=(32, 32), width=64, dtype="float32", k=8)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    cross = as_sae("c_0", batch_topk_crosscoder, params, config, (HOOK, OTHER))
    of_tuned = as_sae("i_0", relu, identity(32), relu.Config(d_in=32, width=64, dtype="float32"), OTHER)
    sums = measure.measure(lm, [cross, of_tuned], tokens, lm.special_tokens, others={"tuned": tuned})
    assert sums["i_0"]["squared_error"].sum() < 1e-3 * sums["i_0"]["variance"].sum()
    np.testing.assert_allclose(sums["i_0"]["ce_sae"], sums["i_0"]["ce_clean"], rtol=1e-4)
    for site, model in ((HOOK, lm), (OTHER, tuned)):
        x = {s: m.activations(tokens.reshape(-1, 12), HOOK)[HOOK] for s, m in ((HOOK, lm), (OTHER, tuned))}
        valid = ~np.isin(tokens.reshape(-1, 12), lm.special_tokens)[..., None]
        mean = (x[HOOK] + x[OTHER]) / 2

        def tap(name, value, mean=mean, valid=valid):
            return np.where(valid, mean, value) if name == HOOK else None

        log_p = np.asarray(jax.nn.log_softmax(model.run(tokens.reshape(-1, 12), tap)), np.float64)
        targets = tokens.reshape(-1, 12)[:, 1:, None]
        expected = -np.take_along_axis(log_p[:, :-1], targets, -1)[..., 0].sum(-1)
        np.testing.assert_allclose(sums[f"c_0@{site}"]["ce_sae"], expected, rtol=1e-4)


def test_models_are_compared_in_units_of_their_sites():
    random = np.random.default_rng(0)
    W = {name: random.normal(size=(6, D)) for name, D in (("W_dec_0", 8), ("W_dec_1", 8))}
    W["W_dec_0"][0], W["W_dec_1"][1] = 0, 0
    W["W_dec_1"][2] = 7 * W["W_dec_0"][2]
    W["W_dec_0"][3] = W["W_dec_1"][3] = 0
    scales = (2.0, 0.5)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in W.items()}
    config = batch_topk_crosscoder.Config(d_in=(8, 8), width=6, dtype="float32", k=2)
    sae = trained.SAE("c_0", "batch_topk_crosscoder", config, (OTHER, HOOK), params, scale=scales)
    found = gsae_jax.compare_models(sae)
    a, b = (scale * np.linalg.norm(W[name], axis=1) for name, scale in (("W_dec_1", 0.5), ("W_dec_0", 2.0)))
    assert found.models == ("", "tuned")
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.share, b / (a + b), rtol=1e-5)
    assert found.share[:2].tolist() == [0, 1]
    assert np.isnan(found.share[3])
    assert np.isnan(found.cosine[:2]).all()
    np.testing.assert_allclose(found.cosine[2], 1, rtol=1e-5)
    assert found.only_first.tolist()[:4] == [True, False, False, False]
    assert found.only_second.tolist()[:4] == [False, True, False, False]
    swapped = gsae_jax.compare_models(sae, ("tuned", ""))
    np.testing.assert_allclose(swapped.share[4:], 1 - found.share[4:], rtol=1e-5)
    alone = dataclasses.replace(sae, site=("blocks.0.hook_resid_pre", HOOK))
    with refused("sae", "one language model"):
        gsae_jax.compare_models(alone)
    with refused("models", "''", "'tuned'"):
        gsae_jax.compare_models(sae, ("", "base"))


def test_configs_that_name_no_model_are_refused(two, lm_dir, tuned_dir, tmp_path):
    def refuse(field, *facts, **changes):
        with refused(field, *facts):
            changed(two, **changes)

    refuse("stacks.alone.site", "'tund'", "tuned", stacks={"alone": {"site": f"{HOOK}@tund"}})
    refuse("stacks.alone.site", f"{HOOK}@", stacks={"alone": {"site": f"{HOOK}@"}})
    refuse("lms.more", "HOOK@more", lms={"more": {"path": "x"}})
    refuse("lms", "a b", lms={"a b": {"path": "x"}})
    refuse("lm", "lms.tuned", stacks={"cross": None})
    refuse("lms.tuned.path", str(lm_dir), lms={"tuned": {"path": str(lm_dir)}})
    with refused("stacks.alone.site", "blocks.0.hook_mlp_out@tuned"):
        begin(changed(two, stacks={"alone": {"site": "blocks.0.hook_mlp@tuned"}}))
    with refused("lms.tuned.path", "nowhere"):
        train_command.run(changed(two, lms={"tuned": {"path": "nowhere"}}), tmp_path / "run")
    # Another tokenizer: two tokens with each other's ids.
    swapped = shutil.copytree(tuned_dir, tmp_path / "swapped")
    tree = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (swapped / "tokenizer.json").write_text(json.dumps(tree))
    with refused("lms.tuned.path", str(lm_dir), str(swapped), "300"):
        begin(changed(two, lms={"tuned": {"path": str(swapped)}}))
    # And one that splits text in another way.
    tree = json.loads((tuned_dir / "tokenizer.json").read_text())
    (swapped / "tokenizer.json").write_text(json.dumps(tree | {"normalizer": {"type": "Lowercase"}}))
    with refused("lms.tuned.path", str(swapped), "normalizer"):
        begin(changed(two, lms={"tuned": {"path": str(swapped)}}))
    assert not (tmp_path / "run").exists()


@pytest.mark.variants
def test_features_are_collected_and_shown(run, lm, tuned):
    collecting.collect(collecting.Wanted(str(run), tokens=1024))
    pages, live = viewing.pages(viewing.Wanted(str(run)))
    entry = pages.library.entries["cross_0"]
    fired = int(np.argmax(entry.columns["fired"]))
    page = pages.feature(Links(), entry, fired)
    assert OTHER in page
    assert "language model tuned" in page
    sae = gsae_jax.load(run)["cross_0"]
    effects = entry.page(fired).feature.effects
    expected = np.asarray(tuned.logit_effects(sae.W_dec_1[fired], HOOK))
    assert effects["direct"][0].effect == pytest.approx(expected.max(), rel=1e-3)
    assert effects["ablation"]
    # What is computed for a text, and steering with an SAE of the second model.
    text = "def return import"
    x = tuple(model.activations(text, HOOK)[HOOK][0] for model in (lm, tuned))
    f = np.asarray(sae.encode(x))
    active = live().active("cross_0", text)["active"]
    assert active[0] is None  # BOS
    for row, pairs in zip(f[1:], active[1:], strict=True):
        assert {number for number, _ in pairs} == {*np.flatnonzero(row).tolist()}
    steered = live().steered(text, [{"sae": "alone_0", "feature": 1, "strength": 0.0}], 16, 0.0, 0)
    assert steered["without"] == steered["with"] == tuned.generate(text, max_new_tokens=16)[len(text) :]
    bare = Live(tuned, {}, prepend_bos=False)
    assert bare._tokens(text) == live()._tokens(text)[1:]
    assert tuned.generate(text, prepend_bos=False, max_new_tokens=8).startswith(text)
    with refused("features", "several language models"):
        live().steered(text, [{"sae": "cross_0", "feature": 1, "strength": 1.0}], 16, 0.0, 0)


def test_exports_name_hooks_that_their_model_has(run, two, tmp_path):
    exporting.export(str(run), "saelens", str(tmp_path / "alone"), "alone_0")
    config = json.loads((tmp_path / "alone" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == HOOK
    assert config["metadata"]["model_name"] == "tuned"
    # It starts SAEs of either model.
    for site in (HOOK, OTHER):
        starting = changed(two, stacks={"alone": {"site": site, "start_from": str(tmp_path / "alone")}})
        started = sae_loading.starts(starting)["alone"]
        np.testing.assert_allclose(started["W_dec"][0], gsae_jax.load(run)["alone_0"].W_dec, atol=1e-6)
    with refused("stacks.alone.start_from", "site"):
        other = {"site": "blocks.0.hook_resid_pre", "start_from": str(tmp_path / "alone")}
        sae_loading.starts(changed(two, stacks={"alone": other}))
    assert len(gsae_jax.load(run)["cross_0"].scale) == 2


def test_the_plan_counts_both_models(two, lm_dir):
    (lm_bytes, flops), (both_bytes, both_flops) = (
        (report["bytes_per_device"]["language model"], report["flops_per_step"])
        for report in (
            planner.plan(
                changed(two, lms={"tuned": None}, stacks={"alone": {"site": HOOK}, "cross": None}), "gpu:h100x8"
            ),
            planner.plan(
                changed(two, stacks={"alone": {"site": HOOK}, "cross": stack("relu", OTHER).to_dict()}), "gpu:h100x8"
            ),
        )
    )
    assert both_bytes == 2 * lm_bytes
    assert both_flops > 1.5 * flops


@pytest.mark.variants
def test_a_planted_difference_is_found(text_dir, lm, tmp_path_factory):
    """A finetune adds a direction at every second position, which the base model's residual stream does not know."""
    folder = tmp_path_factory.mktemp("planted")
    direction = np.random.default_rng(0).normal(size=32)
    direction *= np.linalg.norm(lm.params["embed.W_E"], axis=1).mean() / np.linalg.norm(direction)
    added = {"base": 0 * np.arange(32), "tuned": np.arange(32) % 2}
    for name, times in added.items():
        W_pos = times[:, None] * direction
        save_finetune(lm, folder / name, lambda key, x, W_pos=W_pos: W_pos if key == "pos_embed.W_pos" else x)
    config = tiny(text_dir, folder / "base", tmp_path_factory.getbasetemp() / "tfds")
    config.lms.tuned = {"path": str(folder / "tuned")}
    site = "blocks.0.hook_resid_pre"
    config.stacks = {"cross": stack("batch_topk_crosscoder", (site, f"{site}@tuned"), (), k=3)}
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 400, 256, 20
    config.train.log_every, config.checkpoint.every = 400, 400
    sae = gsae_jax.fit(config, folder / "run")["cross_0"]
    found = gsae_jax.compare_models(sae)
    rows = sae.W_dec_1 / jnp.linalg.norm(sae.W_dec_1, axis=-1, keepdims=True)
    alike = np.asarray(rows @ (direction / np.linalg.norm(direction)).astype(np.float32))
    assert found.share[int(alike.argmax())] > 0.9
    assert alike.max() > 0.95
    # The tokens are features of both models.
    (report,) = json.loads((folder / "run" / "report" / "report.json").read_text())["models"]
    assert report["shared"] > 5 * report["only_second"] > 0
    assert report["cosine"] > 0.9


def test_the_guide_makes_a_finetune_that_its_config_takes(tmp_path, monkeypatch):
    root = Path(__file__).parent.parent
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "guides" / "diffing.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "docs").symlink_to(root / "docs")
    monkeypatch.chdir(tmp_path)
    assert "steps = 200" in blocks[1]
    exec(blocks[1].replace("steps = 200", "steps = 2"), {})
    experiment = gsae_jax.experiment(str(root / "configs" / "diffing.py"))
    others = checkpoints.open_others(experiment.lms)
    program, _ = preparation.build(experiment, make_mesh(experiment.mesh), checkpoints.Checkpoint.open(), others)
    site = "blocks.0.hook_resid_post"
    assert program.widths == {site: 256, f"{site}@finetuned": 256}
    names = {}
    exec(blocks[0], names)
    assert {*gsae_jax.experiment(names["get_config"]()).lms} == {"finetuned"}
