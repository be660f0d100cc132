"""Our exports in other libraries, and their SAEs here (`pytest -m peers`, with torch)."""

import argparse
import dataclasses
import inspect
import json
import math
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gsae_jax
from benchmarks.peers_environment import environment
from gsae_jax import config as config_lib
from gsae_jax import mesh as mesh_lib
from gsae_jax import storing, train
from gsae_jax.activations import imports, store
from gsae_jax.data import rows
from gsae_jax.formats import jumprelu
from gsae_jax.lms import checkpoints
from gsae_jax.publishing import model_card
from gsae_jax.saes import batch_topk, contract, crosscoder, linalg, parameters, relu, relu_crosscoder, trained
from gsae_jax.saes import jumprelu as jumprelu_lib
from gsae_jax.storage.run_directory import Workdir
from gsae_jax.training.stacks import Stack
from tests import references, sae_files

pytestmark = pytest.mark.peers
SITE = "blocks.0.hook_mlp_out"
FORMATS = ("saelens", "jumprelu", "gemma_scope", "dictionary_learning", "llamascopium")


@pytest.fixture(scope="module")
def folder(quickstart_run, tmp_path_factory):
    """Held-out tokens, activations, and a gated SAE and a baseline of the quickstart in every format."""
    folder = tmp_path_factory.mktemp("peers")
    lm, config = gsae_jax.load_lm(), Workdir(quickstart_run).experiment()
    batches = np.stack(list(rows.held_out(config, lm.tokenizer, config.evaluation.tokens)))
    np.save(folder / "tokens.npy", batches)
    np.save(folder / "x.npy", np.asarray(lm.activations(batches[0], [SITE])[SITE]).reshape(-1, lm.sites[SITE]))
    (folder / "special_tokens.json").write_text(json.dumps(lm.special_tokens))
    shutil.copytree(checkpoints.EMBEDDED, folder / "lm")
    for name in ("gated_1", "baseline_1"):
        for format in FORMATS:
            gsae_jax.load(quickstart_run)[name].save(folder / "ours" / format / name, format)
    return folder


@pytest.fixture(scope="module")
def other_kinds(tmp_path_factory):
    """Activations, and an SAE of each other architecture in every format that holds it."""
    folder, lm = tmp_path_factory.mktemp("kinds"), gsae_jax.load_lm()
    tokens = lm.tokenize(inspect.getsource(argparse)).tokens_BxT[0, :4096].reshape(-1, 128)
    x = np.asarray(lm.activations(tokens, [SITE])[SITE]).reshape(-1, lm.sites[SITE])
    np.save(folder / "x.npy", x)
    for name in KINDS:
        for format in (*FORMATS, "sparsify"):
            if sae_files.holds(format, name)[0]:
                of_kind(name, x).save(folder / "ours" / format / name, format)
    return folder


TRANSCODERS = ("relu_transcoder", "gated_transcoder", "jumprelu_transcoder", "topk_transcoder", "batch_topk_transcoder")
KINDS = ("relu", "relu_april", "jumprelu", "topk", "batch_topk", "matryoshka", "relu_crosscoder", *TRANSCODERS)
KINDS += tuple(f"{name} skip" for name in TRANSCODERS)
TARGET, SITES = "blocks.0.hook_resid_post", (SITE, "blocks.0.hook_resid_mid")


def of_kind(name, x, width=512, k=16):
    """An SAE with about k active features on a token, and an encoder that is not the decoder's transpose."""
    if name == "relu_crosscoder":
        sae, widths = of_kind("relu", np.concatenate(of_sites(x), 1), width, k), x.shape[1:] * 2
        params = crosscoder.split(relu.PARAMETERS, sae.params, widths)
        config = relu_crosscoder.Config(width=width, d_in=widths)
        return dataclasses.replace(sae, name=f"{name}_0", architecture=name, config=config, site=SITES, params=params)
    architecture, _, skip = name.partition(" ")
    module = contract.module_of(architecture)
    transcodes, random = contract.writes_others(module), np.random.default_rng(1)
    options = {"k": k} if contract.sparsity(module) else {}
    options |= {"d_out": x.shape[1], "skip": bool(skip)} if transcodes else {}
    config = module.Config(d_in=x.shape[1], width=width, **options)
    params = {key: np.array(value) for key, value in module.init(jax.random.key(0), config).items()}
    if architecture == "relu_april":
        params = {key: np.array(value) for key, value in linalg.with_unit_rows(params).items()}
    encoder, bias = ("W_gate", "b_gate") if "W_gate" in params else ("W_enc", "b_enc")
    params[encoder] += 0.02 * random.standard_normal(params[encoder].shape, np.float32)
    params["b_dec"] = x.mean(0)
    center = "b_in" if "b_in" in params else "b_dec"
    params[center] = x.mean(0)
    if skip:
        params["W_skip"] = 0.1 * random.standard_normal(params["W_skip"].shape, np.float32)
    pi = (x - x.mean(0)) @ params[encoder]
    params[bias] = -pi.mean(0)
    threshold = np.quantile(pi + params[bias], 1 - k / width).astype(np.float32)
    if "threshold" in params:
        params["threshold"] = np.full(width, threshold)
    if "b_mag" in params:
        params |= {"b_mag": params[bias], bias: params[bias] - 1.01 * threshold}
        params["r_mag"] = 0.1 * random.standard_normal(width, np.float32)
    if architecture.startswith("relu"):
        params[bias] -= threshold / 4  # more are active, so that no token has only features that are hardly active
    if architecture.startswith("jumprelu"):
        params["threshold"] *= random.uniform(0.8, 1.2, width).astype(np.float32)
    if parameters.input_bias(module) is None:
        params[bias] -= x.mean(0) @ params[encoder]
    params, target = {key: jnp.asarray(value) for key, value in params.items()}, TARGET * transcodes
    return trained.SAE(f"{name}_0", architecture, config, SITE, params, target=target)


def of_sites(x):
    """Inputs of a crosscoder of two sites, as `peers_worker.of_sites` makes them."""
    return x, x[::-1]


def ask(order, folder):
    worker = Path(__file__).with_name("peers_worker.py")
    subprocess.run([environment(), worker, order, folder], check=True)


def outputs(file):
    """{name: {"f", "x_hat"}} of what the worker saved."""
    found = {}
    for key, value in np.load(file).items():
        name, _, kind = key.partition(":")
        found.setdefault(name, {})[kind] = value
    return found


def assert_same(sae, x, theirs):
    """Features to 1e-5 of a token's largest, reconstructions to 1e-5 of their norm."""
    several = len(sae.sites) > 1
    x = of_sites(x) if several else x
    f, whole = np.asarray(sae.encode(x)), np.concatenate(x, 1) if several else x
    assert 0.01 < (f > 0).mean() < 0.9
    references.assert_same_support(f, theirs["f"], whole, form_of(sae, whole))
    close = np.abs(f - theirs["f"]) <= 1e-5 * f.max(-1, keepdims=True)
    assert close[(f > 0) == (theirs["f"] > 0)].all()
    x_hat = np.stack(sae(x), 1) if several else np.asarray(sae(x))
    error, norms = (np.linalg.norm(value, axis=-1) for value in (x_hat - theirs["x_hat"], x_hat))
    assert (error <= 1e-5 * norms).all()


def form_of(sae, x):
    """The parameters of the JumpReLU form; of a TopK SAE with thresholds [B, 1], each the least selected activation."""
    if sae.architecture == "relu_crosscoder":
        whole = crosscoder.joined(relu.PARAMETERS, sae.params)
        return jumprelu_lib.from_relu(whole, None)
    if not sae.architecture.startswith("topk"):
        return jumprelu.form(sae).params
    center = parameters.input_bias(sae.functions)
    W_enc, b_enc, center = (np.asarray(sae.params[name], np.float64) for name in ("W_enc", "b_enc", center))
    b_enc -= center @ W_enc
    pi = np.sort(x @ W_enc + b_enc, 1)
    return {"W_enc": W_enc, "b_enc": b_enc, "threshold": pi[:, [-sae.config.k]]}


def test_their_readers_give_our_features(folder, quickstart_run):
    ask("read", folder)
    x, saes = np.load(folder / "x.npy"), gsae_jax.load(quickstart_run)
    found = outputs(folder / "read.npz")
    assert sorted(found) == sorted(f"{format}/{name}" for format in FORMATS for name in ("gated_1", "baseline_1"))
    for name, theirs in found.items():
        assert_same(saes[name.partition("/")[2]], x, theirs)


def test_their_readers_give_the_features_of_other_kinds(other_kinds):
    ask("read", other_kinds)
    x, found = np.load(other_kinds / "x.npy"), outputs(other_kinds / "read.npz")
    assert len(found) == sum(sae_files.holds(format, name)[0] for format in (*FORMATS, "sparsify") for name in KINDS)
    for name, theirs in found.items():
        assert_same(of_kind(name.partition("/")[2], x), x, theirs)


def test_their_saes_give_the_same_features_here(other_kinds):
    """With inputs that are centred and that are not. What batches select is a JumpReLU SAE in SAELens' files."""
    folder = other_kinds
    ask("make", folder)
    x, saes = np.load(folder / "x.npy"), gsae_jax.load(folder / "theirs")
    found = outputs(folder / "made.npz")
    assert sorted(found) == sorted(saes)
    assert len(found) == 36
    kinds = {"gated": "gated", "standard": "relu", "topk": "topk", "free rows": "topk"}
    kinds |= dict.fromkeys(("transcoder", "skip_transcoder"), "relu_transcoder")
    kinds |= dict.fromkeys(("jumprelu_transcoder", "jumprelu_skip_transcoder"), "jumprelu_transcoder")
    kinds |= dict.fromkeys(("jumprelu", "batchtopk", "matryoshka"), "jumprelu")
    numbered = {
        "trainer": ("gated", "relu", "jumprelu", "relu", "topk", "batch_topk", "matryoshka"),
        "layers.0": ("topk",),
        "layers.0.mlp": ("topk_transcoder", "topk_transcoder"),
        "llamascopium": (
            "relu",
            "jumprelu",
            "topk",
            "topk",
            *(f"{name}_transcoder" for name in ("relu", "jumprelu", "topk")),
        ),
        "crosscoder": ("relu_crosscoder",),
    }
    for name, theirs in found.items():
        stack, _, index = name.rpartition("_")
        assert saes[name].architecture == (numbered[stack][int(index)] if stack in numbered else kinds[stack]), name
        tells = stack not in ("layers.0", "layers.0.mlp", "llamascopium", "crosscoder")
        assert saes[name].metadata.get("model_name") == ("small" if tells else None)
        assert bool(saes[name].target) == ("transcoder" in saes[name].architecture)
        assert_same(saes[name], x, theirs)


def test_the_model_card_loads_in_their_libraries(folder, quickstart_run):
    model_card.write(str(quickstart_run), "user/name", ["saelens", "dictionary_learning"], folder / "repo")
    ask("card", folder)
    sae, x = gsae_jax.load(quickstart_run)["gated_0"], np.load(folder / "x.npy")
    found = np.load(folder / "card.npz")
    assert sorted(found) == ["dictionary_learning", "saelens"]
    for theirs in found.values():
        f = np.asarray(sae.encode(x))
        references.assert_same_support(f, theirs, x, jumprelu.form(sae).params)


def test_saelens_measures_what_our_report_says(folder, quickstart_run):
    """Its own evaluation, on the same tokens, with the embedded model in TransformerLens."""
    ask("measure", folder)
    ours = {r["name"]: r for r in json.loads((quickstart_run / "report" / "report.json").read_text())["saes"]}
    found = json.loads((folder / "measured.json").read_text())
    assert sorted(found) == ["baseline_1", "gated_1"]
    for name, theirs in found.items():
        record = ours[name]
        expected = {"l0": record["l0"], "explained_variance": 1 - record["fvu"]}
        expected |= {"ce_loss_score": record["loss_recovered"], "l1": record["l1"], "cossim": record["cosine"]}
        assert {key: theirs[key] for key in expected} == pytest.approx(expected, rel=1e-5), name


def test_trained_alike_dictionary_learning_and_we_come_to_the_same(tmp_path):
    """Five steps from the same parameters on the same batches: losses, and parameters by how far they moved."""
    D, F, B, rate, decay = 32, 96, 64, 1e-3, batch_topk.DECAY
    settings = {"k": 8, "auxk_coefficient": 1e-3, "group_fractions": [0.25, 0.25, 0.5], "threshold_decay": decay}
    settings |= {"bandwidth": 0.02, "l0_coefficient": 4e-5, "learning_rate": rate, "dead": list(range(0, F, 3))}
    settings["jumprelu_scale"] = 0.4  # there more features are active, and gradients are larger
    batches = 0.1 * np.random.default_rng(0).standard_normal((5, B, D), np.float32)
    selecting = {"k": 8, "auxk_coefficient": 1e-3, "b1": 0.9}
    own = {
        "topk": selecting,
        "batch_topk": selecting,
        "matryoshka": selecting | {"prefixes": (0.25, 0.5, 1.0)},
        "jumprelu": {"l1_coefficients": (4e-5,), "bandwidth": 0.02 / math.sqrt(D)},
    }
    (tmp_path / "start").mkdir()
    stacks = {}
    for name, options in own.items():
        config = gsae_jax.stack_config(name, SITE, F, learning_rates=(rate,), **options)
        stacks[name] = Stack.build("a", gsae_jax.experiment(stacks={"a": config}).stacks["a"], {SITE: D}, "float32")
        params = {key: np.array(value[0]) for key, value in stacks[name].init().params.items()}
        params["W_enc"] = params["W_enc"] + 0.1 * np.random.default_rng(1).standard_normal((D, F), np.float32)
        params["W_enc"][:, settings["dead"]] *= 0.1  # so that they are positive, and not among the largest
        params.pop("threshold", None)
        if name == "jumprelu":
            params["threshold"] = np.linspace(0.016, 0.024, F, dtype=np.float32)
            np.savez(tmp_path / "start" / "jumprelu of pre-activations.npz", **params)
        np.savez(tmp_path / "start" / f"{name}.npz", **params)
    np.save(tmp_path / "x.npy", batches)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    ask("steps", tmp_path)
    for name, stack in stacks.items():
        start = dict(np.load(tmp_path / "start" / f"{name}.npz"))
        part = settings["jumprelu_scale"] if name == "jumprelu" else 1
        losses, params = stepped(stack, start, part * batches, settings["dead"])

        def apart(theirs, start=start, params=params):
            """How far from theirs each parameter is, relatively to how far it moved."""
            return {
                key: np.linalg.norm(params[key] - theirs[key]) / np.linalg.norm(theirs[key] - value)
                for key, value in start.items()
            }

        theirs = dict(np.load(tmp_path / "stepped" / f"{name}.npz"))
        if name == "jumprelu":
            # What lies below a threshold has no gradient in their L0: `StepFunction.apply(f, ...)` is of features.
            assert losses[0] * D == pytest.approx(theirs["losses"][0], rel=1e-5)
            assert apart(theirs)["threshold"] > 0.01
            theirs = dict(np.load(tmp_path / "stepped" / "jumprelu of pre-activations.npz"))
        np.testing.assert_allclose(np.array(losses) * D, theirs["losses"], rtol=1e-5, err_msg=name)
        assert max(apart(theirs).values()) < 1e-3, (name, apart(theirs))
        if name in ("batch_topk", "matryoshka"):
            np.testing.assert_allclose(params["threshold"], theirs["threshold"], rtol=1e-5)


def stepped(stack, start, batches, dead):
    """(Losses, parameters) of a stack of one SAE after a step on each batch [B, D], from `start`."""
    mesh = mesh_lib.make_mesh(config_lib.Mesh(1, 1), jax.devices()[:1])
    specs = stack.specs()

    def update(state, x):
        return stack.update(state, {SITE: x}, jnp.int32(3), jnp.float32(1), dead_after=9)

    step = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P())))
    state = stack.init()
    since = jnp.zeros_like(state.steps_since_fired).at[:, jnp.array(dead)].set(9)
    params = state.params | {name: jnp.asarray(value)[None] for name, value in start.items()}
    state, losses = dataclasses.replace(state, params=params, steps_since_fired=since), []
    for x in batches:
        state, statistics = step(state, x)
        losses.append(float(statistics["loss"][0]))
    return losses, {name: np.asarray(value[0]) for name, value in state.params.items()}


def test_store_of_activations_that_saelens_cached(tmp_path):
    lm = gsae_jax.load_lm()
    tokens = np.asarray(lm.tokenize(inspect.getsource(argparse)).tokens_BxT)[0, : 64 * 128].reshape(-1, 128)
    np.save(tmp_path / "tokens.npy", tokens)
    shutil.copytree(checkpoints.EMBEDDED, tmp_path / "lm")
    ask("cache", tmp_path)
    settings = imports.Settings(held_out=0.25)
    storing.of_files([str(tmp_path / "cached")], storing.Wanted(str(tmp_path / "store")), settings)
    stored = store.Store.open(tmp_path / "store")
    assert stored.manifest.widths == {SITE: lm.sites[SITE]}
    rows_there = stored.rows("train")
    batch = rows_there.arrays.read(range(len(rows_there)))
    assert batch.mask.all()
    assert {row.tobytes() for row in batch.tokens} <= {row.astype(np.int32).tobytes() for row in tokens}
    np.testing.assert_allclose(batch.activations[SITE], lm.activations(batch.tokens, [SITE])[SITE], atol=1e-4)
    config = gsae_jax.experiment_config()
    config.data.source = f"store:{tmp_path / 'store'}"
    config.stacks.gated = gsae_jax.stack_config("gated", SITE, 512, (1e-2,), learning_rates=(3e-3,))
    config.activations.rows_per_forward, config.activations.buffer_size, config.activations.scale_tokens = 8, 4096, 2048
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 8, 512, 2
    config.evaluation.tokens = 4096
    assert train.run(config, tmp_path / "run") == 0
    (sae,) = gsae_jax.load(tmp_path / "run").values()
    assert sae.site == SITE
