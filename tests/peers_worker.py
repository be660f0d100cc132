"""What SAELens and others make of a folder, in their own environment: peers_worker.py ORDER FOLDER.

read: features and reconstructions of `x.npy` [B, D], for every SAE in `ours/FORMAT/NAME`.
make: SAEs of theirs, trained for some steps on `x.npy` and saved by them in `theirs`; with features, as above.
steps: five steps of dictionary_learning's trainers, each from `start/KIND.npz` on `x.npy` [steps, B, D].
card: features [B, F] of `x.npy` by the model card in `repo`, in each library.
cache: activations of `tokens.npy` [rows, T], cached by SAELens in `cached`, with TransformerLens' model of `lm`.
measure: SAELens' `run_evals` of `ours/saelens/NAME` on `tokens.npy` [batches, rows, T], with TransformerLens' model of
the weights in `lm`.
"""

import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from dictionary_learning import training
from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k
from dictionary_learning.utils import load_dictionary
from huggingface_hub.errors import EntryNotFoundError
from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from llamascopium.models.sparse_dictionary import SparseDictionary
from sae_lens import SAE, cache_activations_runner, evals
from sae_lens import saes as sae_lens_saes
from sae_lens.config import CacheActivationsRunnerConfig, SAETrainerConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

SITE, TARGET, STEPS, BATCH, K = "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", 50, 256, 8


def gemma_scope(folder):
    """By SAELens' readers of Gemma Scope, with the file that the hub would have given."""

    def converter(path, device, cfg_overrides):
        sizes, reader, kind = {}, loaders.gemma_2_sae_huggingface_loader, "res"
        sizes["d_sae"], sizes["d_in"] = np.load(path / "params.npz")["W_dec"].shape
        if "transcoder" in path.name:
            sizes["d_out"], reader, kind = sizes["d_in"], loaders.gemma_2_transcoder_huggingface_loader, "transcoders"
        with mock.patch.object(loaders, "hf_hub_download", return_value=path / "params.npz"):
            return reader(f"google/gemma-scope-2b-pt-{kind}", "layer_0/width_16k", device, cfg_overrides=sizes)[:2]

    return SAE.load_from_disk(folder, converter=converter)


def sparsify(folder):
    """Its SAE with features [B, F] instead of the values and the indices of each token's."""
    coder = SparseCoder.load_from_disk(folder)

    def encode(x):
        values, indices, pre_acts = coder.encode(x)
        return torch.zeros_like(pre_acts).scatter_(1, indices, values)

    return SimpleNamespace(
        encode=encode,
        decode=lambda f: coder.decode(*f.topk(coder.cfg.k)),
        W_skip=coder.W_skip,
        forward=lambda x: coder(x).sae_out,
    )


def llamascopium(folder):
    """Its SAE for activations as they are. Where a TopK SAE compares features by their rows' norms, ours have these."""
    sae = SparseDictionary.from_pretrained(str(folder))
    scales = dict.fromkeys(sae.cfg.associated_hook_points, 1.0)
    if sae.cfg.norm_activation == "dataset-wise":  # folding that into its parameters would leave thresholds as they are
        scales = {name: sae.cfg.d_model**0.5 / sae.dataset_average_activation_norm[name] for name in scales}
    if isinstance(sae, Crosscoder):  # its features are the same at each site
        factors = torch.tensor(list(scales.values()))[:, None]
        return SimpleNamespace(
            encode=lambda x: same(sae.encode(of_sites(x) * factors)) / factors[0],
            decode=lambda f: sae.decode((f * factors[0])[:, None].expand(-1, len(factors), -1)) / factors,
        )
    norms = sae.decoder_norm() if sae.cfg.act_fn == "topk" and sae.cfg.sparsity_include_decoder_norm else torch.ones(())
    read, written = (scales[name] for name in (sae.cfg.hook_point_in, sae.cfg.hook_point_out))
    return SimpleNamespace(
        encode=lambda x: sae.encode(x * read) * norms / written,
        decode=lambda f: sae.decode(f * written / norms) / written,
    )


def of_sites(x):
    """Inputs [B, 2, D] of a crosscoder of two sites."""
    return torch.stack([x, x.flip(0)], 1)


def same(f_BxHxF):
    """The features of the first site, up to rounding those of each."""
    torch.testing.assert_close(f_BxHxF, f_BxHxF[:, :1].expand_as(f_BxHxF), rtol=1e-5, atol=1e-7)
    return f_BxHxF[:, 0]


READERS = {
    "sparsify": sparsify,
    "llamascopium": llamascopium,
    "saelens": SAE.load_from_disk,
    "jumprelu": SAE.load_from_disk,
    "gemma_scope": gemma_scope,
    "dictionary_learning": lambda folder: load_dictionary(folder, "cpu")[0],
}


SAELENS = {  # its architectures, as its classes are called
    "gated": ("Gated", {}),
    "standard": ("Standard", {}),
    "jumprelu": ("JumpReLU", {}),
    "topk": ("TopK", {"k": K}),
    "free rows": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("BatchTopK", {"k": float(K)}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": float(K), "matryoshka_widths": [24, 96]}),
}
LAYERS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}


def selecting(D, settings):
    return {
        "k": settings["k"],
        "auxk_alpha": D * settings["auxk_coefficient"],
        "threshold_beta": settings["threshold_decay"],
        "threshold_start_step": 0,
    }


def grouped(D, settings):
    """The mean of its groups' losses, each by a weight, is their sum."""
    groups = len(settings["group_fractions"])
    return selecting(D, settings) | {
        "group_fractions": settings["group_fractions"],
        "group_weights": [float(groups)] * groups,
    }


def penalised(D, settings):
    """Its penalty is (L0 / target - 1)^2; with a large negative target that is a constant plus a multiple of L0."""
    target = -1e6
    return {
        "bandwidth": settings["bandwidth"],
        "target_l0": target,
        "sparsity_penalty": -D * settings["l0_coefficient"] * target / 2,
        "sparsity_warmup_steps": None,
    }


STEPPED = {
    "topk": (top_k.TopKTrainer, selecting),
    "batch_topk": (batch_top_k.BatchTopKTrainer, selecting),
    "matryoshka": (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, grouped),
    "jumprelu": (jumprelu.JumpReluTrainer, penalised),
    "jumprelu of pre-activations": (jumprelu.JumpReluTrainer, penalised),
}


@torch.no_grad()
def outputs(sae, x):
    f = sae.encode(x)
    x_hat = sae.decode(f) if getattr(sae, "W_skip", None) is None else sae.forward(x)
    return {"f": f.numpy(), "x_hat": x_hat.numpy()}


def save(file, found):
    """{name: {kind: array}} as an npz file."""
    np.savez(file, **{f"{name}:{kind}": value for name, kinds in found.items() for kind, value in kinds.items()})


def read(folder, x):
    found = {}
    for path in sorted(folder.glob("ours/*/*")):
        found["/".join(path.parts[-2:])] = outputs(READERS[path.parent.name](path), x)
    save(folder / "read.npz", found)


def make(folder, x):
    found, D = {}, x.shape[1]
    torch.manual_seed(0)
    batches = [x[torch.randint(len(x), (BATCH,))] for _ in range(STEPS)]
    for name, path in (
        *made_by_saelens(D, folder, batches),
        *made_by_dictionary_learning(D, folder, batches),
        *made_by_sparsify(D, folder),
        *made_by_llamascopium(D, folder, x),
    ):
        found[path.name] = outputs(READERS[name](path), x)
    save(folder / "made.npz", found)


def made_by_saelens(D, folder, batches):
    """(Reader, folder) of each kind, with inputs that are centred and that are not."""
    for centred in (True, False):
        for name, (kind, options) in SAELENS.items():
            metadata = SAEMetadata(hook_name=SITE, model_name="small")
            config = getattr(sae_lens_saes, f"{kind}TrainingSAEConfig")(
                D, 96, apply_b_dec_to_input=centred, metadata=metadata, **options
            )
            sae = getattr(sae_lens_saes, f"{kind}TrainingSAE")(config)
            trainer = SAETrainer(SAETrainerConfig(10**9, BATCH, lr=1e-2, lr_end=1e-3), sae, iter(()))
            for batch in batches:
                trainer.step(batch)
                trainer.n_training_steps += 1
            with torch.no_grad():
                sae.b_dec += 0.1 * torch.randn(D)  # a mean: centring, or not, then shows
            path = folder / "theirs" / f"{name}_{int(centred)}"
            sae.save_inference_model(path)
            yield "saelens", path
    for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        metadata = SAEMetadata(hook_name=SITE, hook_name_out=TARGET, model_name="small")
        config_class = getattr(sae_lens_saes, f"{name}Config")
        config = config_class(d_in=D, d_sae=96, d_out=D, apply_b_dec_to_input=False, metadata=metadata)
        sae = getattr(sae_lens_saes, name)(config)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            if "JumpReLU" in name:
                sae.threshold.abs_()
        path = folder / "theirs" / f"{config_class.architecture()}_0"
        sae.save_model(path)
        yield "saelens", path


def made_by_dictionary_learning(D, folder, batches):
    """(Reader, folder) of each trainer."""
    penalised, selecting = dict(sparsity_warmup_steps=10), dict(k=K, threshold_start_step=10)
    trainers = (
        (gdm.GatedSAETrainer, penalised),
        (standard.StandardTrainer, penalised),
        (jumprelu.JumpReluTrainer, penalised),
        (standard.StandardTrainerAprilUpdate, penalised),  # whose rows are not unit
        (top_k.TopKTrainer, selecting),
        (batch_top_k.BatchTopKTrainer, selecting),
        (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, selecting | dict(group_fractions=[0.25, 0.75])),
    )
    settings = dict(activation_dim=D, dict_size=96, layer=0, lm_name="small", lr=1e-2, device="cpu", steps=STEPS)
    settings |= dict(warmup_steps=5, submodule_name="resid_post_layer_0")
    training.trainSAE(
        batches,
        [{"trainer": trainer, **settings, **own} for trainer, own in trainers],
        steps=STEPS,
        save_dir=str(folder / "theirs"),
        device="cpu",
        normalize_activations=True,
    )
    for index in range(len(trainers)):
        yield "dictionary_learning", folder / "theirs" / f"trainer_{index}"


def made_by_sparsify(D, folder):
    """(Reader, folder) of an SAE and of transcoders with random parameters, in folders with the names of modules."""
    transcoders = ({"transcode": True}, {"transcode": True, "skip_connection": True})
    for name, options in zip(("layers.0_0", "layers.0.mlp_0", "layers.0.mlp_1"), ({}, *transcoders), strict=True):
        coder = SparseCoder(D, SparseCoderConfig(k=K, num_latents=96, **options))
        path = folder / "theirs" / name
        with torch.no_grad():
            coder.b_dec += 0.1 * torch.randn(D)
            coder.encoder.bias += 0.1 * torch.randn(96)
            if options:  # in which it starts from zeros
                coder.W_dec += 0.1 * torch.randn_like(coder.W_dec)
            if coder.W_skip is not None:
                coder.W_skip += 0.1 * torch.randn(D, D)
        coder.save_to_disk(path)
        yield "sparsify", path


def made_by_llamascopium(D, folder, x):
    """(Reader, folder) of SAEs and transcoders with random parameters, of each activation function; of a crosscoder."""
    options = (("relu", True, SITE), ("jumprelu", True, SITE), ("topk", True, SITE), ("topk", False, SITE))
    options += (
        ("relu", True, TARGET),
        ("jumprelu", True, TARGET),
        ("topk", True, TARGET),
        ("crosscoder", True, TARGET),
    )
    for index, (act_fn, by_norm, target) in enumerate(options):
        sizes, sites = {"d_model": D, "expansion_factor": 2}, {"hook_point_in": SITE, "hook_point_out": target}
        if act_fn == "crosscoder":
            sae = Crosscoder(CrosscoderConfig(**sizes, hook_points=[SITE, TARGET]))
        else:
            config = SAEConfig(**sizes, **sites, act_fn=act_fn, top_k=K, sparsity_include_decoder_norm=by_norm)
            sae = SparseAutoEncoder(config)
        sae.init_parameters(
            encoder_uniform_bound=D**-0.5, decoder_uniform_bound=D**-0.5, init_log_jumprelu_threshold_value=-1.0
        )
        with torch.no_grad():
            sae.b_D += 0.1 * torch.randn_like(sae.b_D)
            sae.b_E += 0.1 * torch.randn_like(sae.b_E)
        norm = x.norm(dim=1).mean().item()
        norms = {SITE: norm} if target == SITE else {SITE: norm, TARGET: 2 * norm}
        sae.set_dataset_average_activation_norm(norms)
        path = folder / "theirs" / ("crosscoder_0" if act_fn == "crosscoder" else f"llamascopium_{index}")
        sae.save_pretrained(path)
        sae.cfg.save_hyperparameters(path)
        yield "llamascopium", path


def steps(folder, batches):
    """Leaves in `stepped/KIND.npz` their parameters by our names, and losses.

    Their losses sum squared errors over D, and ours divide by it. So Adam's eps and weights of other terms are
    multiplied by D. The batches are small numbers: they clip gradients whose norm is above 1.
    """
    settings = json.loads((folder / "settings.json").read_text())
    D = batches.shape[-1]
    (folder / "stepped").mkdir()
    for name, (trainer_class, own) in STEPPED.items():
        start = {key: torch.from_numpy(value) for key, value in np.load(folder / "start" / f"{name}.npz").items()}
        sizes = dict(activation_dim=D, dict_size=len(start["W_dec"]))
        common = dict(steps=10**9, warmup_steps=0, layer=0, lm_name="small", device="cpu", lr=settings["learning_rate"])
        trainer = trainer_class(**sizes, **common, **own(D, settings))
        trainer.optimizer.param_groups[0]["eps"] *= D
        theirs = dict(trainer.ae.named_parameters())
        names = {ours: ours if ours in theirs else LAYERS[ours] for ours in start}
        with torch.no_grad():
            for ours, value in start.items():
                theirs[names[ours]].copy_(value.T if names[ours].endswith("weight") else value)
        trainer.num_tokens_since_fired[settings["dead"]] = 10**9
        losses, scale = [], settings["jumprelu_scale"] if name.startswith("jumprelu") else 1
        with straight_through(name):
            for number, batch in enumerate(scale * batches, 1):  # before step 1 it sets b_dec
                record = trainer.loss(batch, number, logging=True) if name.startswith("jumprelu") else None
                losses.append(trainer.update(number, batch))
                if record:  # what it returns has a large constant
                    l0 = (record.f > 0).sum(1).float().mean().item()
                    losses[-1] = record.losses["l2_loss"] + D * settings["l0_coefficient"] * l0
        arrays = {ours: theirs[their].detach().numpy() for ours, their in names.items()}
        arrays = {ours: value.T if names[ours].endswith("weight") else value for ours, value in arrays.items()}
        if name in ("batch_topk", "matryoshka"):
            arrays["threshold"] = trainer.ae.threshold.numpy()
        np.savez(folder / "stepped" / f"{name}.npz", losses=losses, **arrays)


def straight_through(name):
    """Its JumpReLU trainer as it is, or with the paper's gradient of L0: by pre-activations.

    `StepFunction.apply(f, ...)` in its loss is of features. These are 0 below the threshold, so that only what lies
    above has a gradient.
    """
    if name != "jumprelu of pre-activations":
        return contextlib.nullcontext()
    activate, step, seen = jumprelu.JumpReLUFunction.apply, jumprelu.StepFunction.apply, []

    def remember(pre, *rest):
        seen[:] = [pre]
        return activate(pre, *rest)

    functions = {"JumpReLUFunction": remember, "StepFunction": lambda f, *rest: step(seen[0], *rest)}
    return mock.patch.multiple(jumprelu, **{name: SimpleNamespace(apply=value) for name, value in functions.items()})


def card(folder, x):
    """The card's own lines, with files that the hub and activations that gsae_jax would have given."""
    repo = folder / "repo"
    _, in_saelens, in_dictionary_learning = re.findall(
        r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL
    )

    def download(repo_id, filename, **rest):
        if not (repo / filename).exists():
            raise EntryNotFoundError(filename)
        return repo / filename

    activations = {SITE: x[None].numpy()}
    lm = SimpleNamespace(activations=lambda text, sites: {site: activations[site] for site in sites})
    found = {}
    with (
        # This environment does not have it.
        mock.patch.dict(sys.modules, gsae_jax=SimpleNamespace(load_lm=lambda: lm)),
        mock.patch.object(loaders, "hf_hub_download", download),
        mock.patch("huggingface_hub.snapshot_download", return_value=str(repo)),
        torch.no_grad(),
    ):
        for name, lines in (("saelens", in_saelens), ("dictionary_learning", in_dictionary_learning)):
            names = {}
            exec(lines, names)
            found[name] = names["features"][0].numpy()
    np.savez(folder / "card.npz", **found)


class Tokens:
    """As much of SAELens' ActivationsStore as its evaluation asks for: the same batches in turn."""

    def __init__(self, batches):
        self.batches, self.next = torch.from_numpy(batches), 0
        self.store_batch_size_prompts, self.context_size = batches.shape[1:]

    def get_batch_tokens(self, rows):
        assert rows == self.store_batch_size_prompts
        self.next += 1
        return self.batches[self.next - 1]

    def reset_input_dataset(self):
        self.next = 0


def hooked_transformer(folder):
    """TransformerLens' model of the weights in `lm`."""
    facts = json.loads((folder / "lm" / "config.json").read_text())
    sizes = {name: facts[name] for name in ("n_layers", "d_model", "n_heads", "d_head", "d_mlp", "d_vocab", "n_ctx")}
    config = HookedTransformerConfig(**sizes, act_fn="gelu", normalization_type="LN", eps=facts["layer_norm_eps"])
    model = HookedTransformer(config)
    weights = {name: value.float() for name, value in load_file(folder / "lm" / "model.safetensors").items()}
    lost = model.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys, lost
    assert all(name.endswith((".mask", ".IGNORE")) for name in lost.missing_keys), lost
    return model


def cache(folder):
    """Activations of `tokens.npy` [rows, T], cached by SAELens in `cached`."""
    tokens = np.load(folder / "tokens.npy")
    model = hooked_transformer(folder)
    model.tokenizer = SimpleNamespace(bos_token_id=0, padding_side="right")
    config = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name="of `lm`",
        model_batch_size=8,
        hook_name=SITE,
        d_in=model.cfg.d_model,
        training_tokens=tokens.size,
        context_size=tokens.shape[1],
        new_cached_activations_path=str(folder / "cached"),
        device="cpu",
        buffer_size_gb=0.002,
        prepend_bos=False,
        streaming=False,
    )
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})
    with mock.patch.object(cache_activations_runner, "load_model", return_value=model):
        cache_activations_runner.CacheActivationsRunner(config, override_dataset=dataset).run()


def measure(folder):
    model = hooked_transformer(folder)
    batches = np.load(folder / "tokens.npy").astype(np.int64)
    special = json.loads((folder / "special_tokens.json").read_text())
    wanted = evals.get_eval_everything_config(batches.shape[1], len(batches), len(batches))
    found = {}
    for path in sorted(folder.glob("ours/saelens/*")):
        sae = SAE.load_from_disk(path)
        metrics, _ = evals.run_evals(
            sae, Tokens(batches), model, ActivationScaler(), wanted, exclude_special_tokens=special
        )
        found[path.name] = {name: value for group in metrics.values() for name, value in group.items()}
    (folder / "measured.json").write_text(json.dumps(found))


if __name__ == "__main__":
    order, folder = sys.argv[1], Path(sys.argv[2])
    if order in ("measure", "cache"):
        {"measure": measure, "cache": cache}[order](folder)
    else:
        orders = {"read": read, "make": make, "steps": steps, "card": card}
        orders[order](folder, torch.from_numpy(np.load(folder / "x.npy")))
