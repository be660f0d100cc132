"""LoRA adapters that are merged as weights are read, against float64 and against peft's own rules."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import gsae_jax
from gsae_jax.lms import adapters, weights
from gsae_jax.lms.checkpoints import Checkpoint
from tests.fixtures.adapters import make as make_adapters
from tests.fixtures.lms import make
from tests.refusals import refused

FIXTURES = Path(make.__file__).parent
ROOT = FIXTURES.parents[2]
R, ALPHA = 3, 5
# By fixture: the modules that are changed, as PEFT names them.
GPT2 = tuple(f"transformer.h.{module}" for module in ("0.attn.c_attn", "1.attn.c_proj", "0.mlp.c_fc", "1.mlp.c_proj"))
LLAMA = tuple(f"model.layers.{n}.self_attn.{module}_proj" for n in (0, 1) for module in "qkvo")
LLAMA += tuple(f"model.layers.1.mlp.{module}_proj" for module in ("gate", "up", "down"))
MODULES = {"gpt2": GPT2, "llama_2": LLAMA, "qwen3": LLAMA}


def tensors_of(folder):
    files = map(safetensors.numpy.load_file, sorted(folder.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def adapter(folder, base, dora=False, more=(), drop=(), dtype=np.float32, modules=None, **settings):
    """Write a random adapter, as peft does, and return its matrices by module."""
    random, own = np.random.default_rng(7), tensors_of(base)
    conv1d = base.name == "gpt2"
    matrices, written = {}, {}
    patterns = settings.get("rank_pattern", {}) if isinstance(settings.get("rank_pattern"), dict) else {}
    for module in modules or MODULES[base.name]:
        shape = own[f"{module}.weight" if f"{module}.weight" in own else f"{module.partition('.')[2]}.weight"].shape
        out, into = shape[::-1] if conv1d else shape
        rank = next((r for end, r in patterns.items() if module.endswith(end)), R)
        sizes = {"lora_A": (rank, into), "lora_B": (out, rank)} | ({"lora_magnitude_vector": (out,)} if dora else {})
        parts = {part: random.normal(0, 0.3, size) + (part == "lora_magnitude_vector") for part, size in sizes.items()}
        matrices[module] = {part: value.astype(dtype) for part, value in parts.items()}
        written |= {f"base_model.model.{module}.{part}.weight": value for part, value in matrices[module].items()}
    written = {name: value for name, value in (written | dict(more)).items() if name not in drop}
    folder.mkdir()
    safetensors.numpy.save_file(written, folder / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": R, "lora_alpha": ALPHA, "revision": None}
    known |= {"task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.1, "megatron_core": "megatron.core"}
    known |= {"fan_in_fan_out": conv1d, "target_modules": ["c_attn"], "init_lora_weights": True, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(known | settings))
    return matrices


def merged(base, matrices, scale):
    """The base's tensors with W + scale B A in float64; `scale` by module."""
    own = {name: tensor.astype(np.float64) for name, tensor in tensors_of(base).items()}
    for module, parts in matrices.items():
        name = f"{module}.weight" if f"{module}.weight" in own else f"{module.partition('.')[2]}.weight"
        A, B = (parts[part].astype(np.float64) for part in ("lora_A", "lora_B"))
        weight = own[name].T if base.name == "gpt2" else own[name]
        weight = weight + scale(module) * B @ A
        if "lora_magnitude_vector" in parts:
            weight = weight * (parts["lora_magnitude_vector"] / np.sqrt((weight**2).sum(1)))[:, None]
        own[name] = weight.T if base.name == "gpt2" else weight
    return own


def assert_same_lm(folder, tensors, base, tmp_path):
    """The adapter's model is the checkpoint of these tensors."""
    expected = tmp_path / "expected"
    shutil.copytree(base, expected)
    for file in expected.glob("*.safetensors*"):
        file.unlink()
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(tensors, expected / weights.WEIGHTS)
    ours, theirs = gsae_jax.load_lm(folder), gsae_jax.load_lm(expected)
    assert jax.tree.structure(ours.params) == jax.tree.structure(theirs.params)
    for one, other in zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-6)
    tokens = np.random.default_rng(0).integers(0, ours.config.d_vocab, (2, 9))
    np.testing.assert_allclose(ours.logits(tokens), theirs.logits(tokens), rtol=1e-4, atol=1e-4)
    plain = gsae_jax.load_lm(base)
    assert np.abs(np.asarray(plain.logits(tokens)) - ours.logits(tokens)).max() > 1e-2


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns"])
def test_the_weights_are_those_of_float64(tmp_path, name, kind, monkeypatch):
    if kind == "lora":
        monkeypatch.setattr(adapters, "ROWS", 5)
    base = FIXTURES / name
    first = MODULES[name][0].rpartition(".")[2]
    settings = {"rslora": {"use_rslora": True}, "dora": {"dora": True}}.get(kind, {})
    if kind == "patterns":
        settings = {"rank_pattern": {first: 2}, "alpha_pattern": {rf"0\.\w+\.{first}": 9}}
    matrices = adapter(tmp_path / "adapter", base, **settings)
    scale = {"rslora": ALPHA / math.sqrt(R)}.get(kind, ALPHA / R)

    def of(module):
        if kind != "patterns" or not module.endswith(first):
            return scale
        return (9 if ".0." in module else ALPHA) / 2

    assert_same_lm(tmp_path / "adapter", merged(base, matrices, of), base, tmp_path)


def test_matrices_in_half_precision(tmp_path):
    base = FIXTURES / "llama_2"
    matrices = adapter(tmp_path / "adapter", base, dtype=np.float16)
    assert_same_lm(tmp_path / "adapter", merged(base, matrices, lambda module: ALPHA / R), base, tmp_path)


def test_biases_and_whole_modules_are_replaced(tmp_path):
    base = FIXTURES / "qwen2"
    own = tensors_of(base)
    names = ["model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
    new = {name: own[name] + 1 for name in names}
    more = {
        f"base_model.model.{names[0].replace('.bias', '.base_layer.bias')}": new[names[0]],
        f"base_model.model.{names[1].replace('norm.', 'norm.modules_to_save.')}": new[names[1]],
    }
    modules = ["model.layers.0.self_attn.q_proj"]
    adapter_of = {"bias": "lora_only", "modules_to_save": ["norm"]}
    matrices = adapter(tmp_path / "adapter", base, more=more, modules=modules, **adapter_of)
    expected = merged(base, matrices, lambda module: ALPHA / R) | new
    assert_same_lm(tmp_path / "adapter", expected, base, tmp_path)


def test_an_adapter_has_a_fingerprint_of_its_own_and_may_have_a_tokenizer(tmp_path):
    base = FIXTURES / "llama_2"
    adapter(tmp_path / "one", base)
    plain, one = Checkpoint.open(base), Checkpoint.open(tmp_path / "one")
    assert one.fingerprint()["weights"] not in (plain.fingerprint()["weights"], None)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert Checkpoint.open(tmp_path / "two").fingerprint() == one.fingerprint()
    settings = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    (tmp_path / "two" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert Checkpoint.open(tmp_path / "two").fingerprint() != one.fingerprint()
    assert one.tokenizer().get_vocab() == plain.tokenizer().get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path / "one")
    (tmp_path / "one" / "chat_template.jinja").write_text("own")
    assert Checkpoint.open(tmp_path / "one").tokenizer().chat_template == "own"
    lm = gsae_jax.load_lm(tmp_path / "one", num_layers=1)
    assert "blocks.1" not in lm.params


@pytest.mark.parametrize("name", make_adapters.CASES)
def test_logits_are_those_of_peft(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # the adapters name their base models by a relative path
    lm = gsae_jax.load_lm(make_adapters.FOLDER / name)
    expected = np.load(make_adapters.FOLDER / name / "logits.npy")
    np.testing.assert_allclose(lm.logits(make_adapters.TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(gsae_jax.load_lm(FIXTURES / name).logits(make_adapters.TOKENS) - expected).max() > 0.1


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
REFUSED = [
    ({"peft_type": "IA3"}, ("'IA3'", "merge_and_unload")),
    ({"peft_type": None}, ("mlx_lm.fuse",)),
    ({"init_lora_weights": "pissa"}, ("init_lora_weights = 'pissa'",)),
    ({"lora_bias": True}, ("lora_bias = True",)),
    ({"use_qalora": True, "layer_replication": [[0, 1]]}, ("use_qalora", "layer_replication")),
    ({"trainable_token_indices": [1]}, ("trainable_token_indices",)),
    ({"r": 0}, ("r = 0",)),
    ({"lora_alpha": "x"}, ("lora_alpha = 'x'",)),
    ({"rank_pattern": [1]}, ("rank_pattern",)),
    ({"base_model_name_or_path": None}, ("base_model_name_or_path",)),
    ({"base_model_name_or_path": "/nowhere/at all"}, ("base_model_name_or_path in", "/nowhere/at all")),
    ({"r": 4}, ("shapes [3, ", "rank 4")),
    ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {}}, None),
    ({"use_dora": True}, ("lora_magnitude_vector",)),
    ({"drop": (B,)}, (A, "lora_B")),
    ({"more": {A.replace("lora_A", "lora_C"): np.zeros(1, np.float32)}}, ("lora_C", "not supported")),
    ({"more": {"base_model.model.score.weight": np.zeros(1, np.float32)}}, ("score.weight is not of this model",)),
    (
        {"more": {each.replace("layers.0", "layers.9"): np.zeros((3, 3), np.float32) for each in (A, B)}},
        ("model.layers.9.self_attn.q_proj.weight", "does not have"),
    ),
    ({"more": {A: np.zeros((3, 4), np.int32)}}, ("lora_A", "F32, F16, BF16")),
]


@pytest.mark.parametrize(("changes", "facts"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, changes, facts):
    adapter(tmp_path / "adapter", FIXTURES / "llama_2", **changes)
    if facts is None:  # a pattern that fits the matrices
        gsae_jax.load_lm(tmp_path / "adapter")
        return
    with refused("path", *facts):
        gsae_jax.load_lm(tmp_path / "adapter")


def test_one_of_two_matrices_that_are_one_is_refused(tmp_path):
    base, name, modules = FIXTURES / "gpt2", "transformer.wte.weight", GPT2[:1]
    new = tensors_of(base)[name] + 1
    one = {f"base_model.model.{name}": new}
    adapter(tmp_path / "one", base, more=one, modules=modules)
    with refused("path", "tie_word_embeddings"):
        gsae_jax.load_lm(tmp_path / "one")
    matrices = adapter(tmp_path / "both", base, more=one | {"base_model.model.lm_head.weight": new}, modules=modules)
    expected = merged(base, matrices, lambda module: ALPHA / R) | {name: new}
    expected.pop("lm_head.weight", None)
    assert_same_lm(tmp_path / "both", expected, base, tmp_path)
    adapter(tmp_path / "other", base, more=one | {"base_model.model.lm_head.weight": new + 1}, modules=modules)
    with refused("path", "differ", "tied"):
        gsae_jax.load_lm(tmp_path / "other")


def test_damaged_files(tmp_path):
    adapter(tmp_path / "adapter", FIXTURES / "gpt2")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with refused("path", "adapter_model.safetensors", "copy it again"):
        gsae_jax.load_lm(tmp_path / "adapter")
    file.unlink()
    with refused("path", "no adapter_model.safetensors"):
        gsae_jax.load_lm(tmp_path / "adapter")
    second = tmp_path / "second"
    adapter(second, FIXTURES / "gpt2", base_model_name_or_path=str(tmp_path / "adapter"))
    with refused("path", "itself an adapter"):
        gsae_jax.load_lm(second)
