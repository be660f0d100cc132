"""Small SAEs, and files of other libraries, for tests."""

import json
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from gsae_jax.formats import jumprelu
from gsae_jax.saes import (
    batch_topk,
    batch_topk_transcoder,
    contract,
    gated,
    gated_batch_topk,
    gated_transcoder,
    jumprelu_transcoder,
    matryoshka,
    relu,
    relu_april,
    relu_crosscoder,
    relu_transcoder,
    topk,
    topk_transcoder,
    trained,
)
from tests.small_saes import away_from_init

D, F, K = 12, 40, 6


SITE, TARGET = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"
SITES = ("blocks.3.hook_resid_mid", SITE)  # of crosscoders


def make(module, d_out=D, **options):
    """An SAE of random parameters; `d_out` is the width of what a transcoder writes."""
    transcodes, several = contract.writes_others(module), contract.reads_several(module)
    sizes = {"d_in": (D,) * len(SITES) if several else D} | ({"d_out": d_out} if transcodes else {})
    config = module.Config(width=F, **sizes, **options)
    params = away_from_init(module, config)
    if module in (
        batch_topk,
        matryoshka,
        gated_batch_topk,
        batch_topk_transcoder,
    ):  # one for all features, as training makes it
        params["threshold"] = jnp.full(F, 0.4)
    return trained.SAE(
        name="stack_2",
        architecture=module.__name__.rpartition(".")[2],
        config=config,
        site=SITES if several else SITE,
        target=TARGET if transcodes else "",
        params=params,
        l1_coefficient=0.01,
        learning_rate=3e-4,
        seed=7,
        scale=1.5,
        norm_limit=(20.0, math.inf) if several else 20.0,
        input_norm_limit=30.0 if transcodes else math.inf,
        metadata={"model_name": "small", "context_size": 16, "prepend_bos": True, "dataset_path": "texts"},
    )


SAES = {
    "gated": lambda: make(gated),
    "fixed": lambda: make(gated, use_r_mag=False, freeze_aux_decoder=False),
    "aligned": lambda: make(gated, aligned=True),
    "relu": lambda: make(relu),
    "jumprelu": lambda: jumprelu.form(make(gated)),
    "topk": lambda: make(topk, k=K),
    "batch_topk": lambda: make(batch_topk, k=K, auxk_coefficient=0.5),
    "matryoshka": lambda: make(matryoshka, k=K, prefixes=(0.25, 1.0)),
    "gated_batch_topk": lambda: make(gated_batch_topk, k=K),
    "relu_april": lambda: make(relu_april),
    "relu_transcoder": lambda: make(relu_transcoder),
    "relu_transcoder to others": lambda: make(relu_transcoder, d_out=D + 3, skip=True),
    "gated_transcoder": lambda: make(gated_transcoder),
    "gated_transcoder skip": lambda: make(gated_transcoder, skip=True),
    "jumprelu_transcoder": lambda: make(jumprelu_transcoder),
    "jumprelu_transcoder skip": lambda: make(jumprelu_transcoder, skip=True),
    "topk_transcoder": lambda: make(topk_transcoder, k=K),
    "topk_transcoder skip": lambda: make(topk_transcoder, k=K, skip=True),
    "batch_topk_transcoder": lambda: make(batch_topk_transcoder, k=K, auxk_coefficient=0.5),
    "batch_topk_transcoder skip": lambda: make(batch_topk_transcoder, k=K, skip=True),
    "relu_crosscoder": lambda: make(relu_crosscoder),
}


FORMATS = ["saelens", "jumprelu", "gemma_scope", "llamascopium", "sparsify"]
FORMATS += [pytest.param("dictionary_learning", marks=pytest.mark.torch)]
CONFIGS = ("cfg.json", "config.json", "gsae_jax.json")  # the first of them is the file of a format


def holds(format, kind):
    """Whether a format can hold an SAE, and whether as its own architecture."""
    name, _, rest = kind.partition(" ")
    activation, transcodes, has_skip = name.removesuffix("_transcoder"), "transcoder" in name, bool(rest)
    if name == "relu_crosscoder":
        return format == "llamascopium", True
    if format in ("jumprelu", "gemma_scope"):
        return activation != "topk" and not (has_skip and format == "gemma_scope"), activation == "jumprelu"
    if format == "sparsify":
        return activation == "topk", True
    if format == "saelens":
        return name != "topk_transcoder", name not in ("relu_april", "gated_batch_topk", "gated_transcoder")
    if format == "llamascopium":
        return not has_skip, activation in ("relu", "topk", "jumprelu")
    return not transcodes and name != "relu_april", name != "gated_batch_topk"


def pairs(formats=None, kinds=None):
    """All formats with the kinds of SAEs that they can hold, as parameters of a test."""
    marked = [(format, ()) if isinstance(format, str) else (format.values[0], format.marks) for format in FORMATS]
    return [
        pytest.param(format, kind, marks=marks)
        for format, marks in marked
        for kind in kinds or SAES
        if format in (formats or [format]) and holds(format, kind)[0]
    ]


def config_of(folder):
    return next(folder / name for name in CONFIGS if (folder / name).exists())


def inputs():
    return jax.random.normal(jax.random.key(5), (200, D)) + 0.5


def inputs_of(sae):
    """The same as an SAE takes them; a crosscoder takes them of each site."""
    return tuple(inputs() * (1 + number) for number in range(len(sae.sites))) if len(sae.sites) > 1 else inputs()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_tensors(file, tensors):
    if file.suffix == ".npz":
        np.savez(file, **tensors)
    elif file.suffix == ".safetensors":
        safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, file)
    else:
        import torch

        torch.save({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, file)


def load_tensors(file):
    if file.suffix == ".npz":
        return dict(np.load(file))
    if file.suffix == ".safetensors":
        return safetensors.numpy.load_file(file)
    import torch

    return {name: value.numpy() for name, value in torch.load(file, weights_only=True).items()}


def saelens_with(tmp_path, change=None, tensors=None, kind="gated"):
    """A SAELens folder with some of its fields and tensors replaced."""
    SAES[kind]().save(tmp_path / "a")
    file = tmp_path / "a" / "cfg.json"
    tree = json.loads(file.read_text())
    metadata = tree["metadata"] | (change or {}).get("metadata", {})
    file.write_text(json.dumps(tree | (change or {}) | {"metadata": metadata}))
    weights = tmp_path / "a" / "sae_weights.safetensors"
    save_tensors(weights, safetensors.numpy.load_file(weights) | (tensors or {}))
    return tmp_path / "a"


EARLIER_SAELENS = {  # of SAELens 3
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "activation_fn_str": "relu",
    "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False,
    "context_size": 128,
    "model_name": "gpt2-small",
    "hook_name": "blocks.8.hook_resid_pre",
    "hook_layer": 8,
    "hook_head_index": None,
    "prepend_bos": True,
    "dataset_path": "texts",
    "normalize_activations": "none",
    "dtype": "torch.float32",
    "device": "cpu",
    "sae_lens_training_version": "3.5.0",
}


LLAMASCOPIUM = {
    "sae_type": "sae",
    "d_model": D,
    "expansion_factor": F / D,
    "use_decoder_bias": True,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "hook_point_in": SITE,
    "hook_point_out": SITE,
    "use_glu_encoder": False,
    "top_k": K,
}


CROSSCODER = {
    "sae_type": "crosscoder",
    "d_model": D,
    "expansion_factor": F / D,
    "use_decoder_bias": True,
    "act_fn": "relu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "hook_points": list(SITES),
}


def llamascopium(folder, **changes):
    """A folder as OpenMOSS' library writes it, and its tensors."""
    config = changes if changes.get("sae_type") == "crosscoder" and "hook_points" in changes else LLAMASCOPIUM | changes
    random = np.random.default_rng(0)
    shapes = {
        "W_E": (D, F),
        "b_E": (F,),
        "W_D": (F, D),
        "b_D": (D,),
        "activation_function.log_jumprelu_threshold": (F,),
    }
    if config["act_fn"] != "jumprelu":
        del shapes["activation_function.log_jumprelu_threshold"]
    names = config.get("hook_points", [config.get("hook_point_in"), config.get("hook_point_out")])
    if "hook_points" in config:
        shapes = {name: (len(names), *shape) for name, shape in shapes.items()}
    tensors = {name: random.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    is_set = config["norm_activation"] == "dataset-wise"
    # The second site's is twice the first's.
    norms = {name: 5.0 * (1 + number) for number, name in reversed([*enumerate(names)])}
    norms = {
        f"dataset_average_activation_norm.{name}": np.array(norm if is_set else math.nan, np.float32)
        for name, norm in norms.items()
    }
    folder.mkdir()
    safetensors.numpy.save_file(tensors | norms, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return {name.rpartition(".")[2]: np.asarray(value, np.float64) for name, value in tensors.items()}


SPARSIFY = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": F, "k": K, "d_in": D}


def sparsify(folder, **changes):
    """A folder as EleutherAI's library writes it, and its tensors."""
    random = np.random.default_rng(0)
    shapes = {"encoder.weight": (F, D), "encoder.bias": (F,), "W_dec": (F, D), "b_dec": (D,)}
    shapes |= {"W_skip": (D, D)} if changes.get("skip_connection") and changes.get("transcode") else {}
    tensors = {name: random.normal(size=shape).astype(np.float32) / 2 for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY | changes))
    return {name: np.asarray(value, np.float64) for name, value in tensors.items()}


def header(shape, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
