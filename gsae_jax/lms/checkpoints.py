"""Hugging Face checkpoints, from a directory or the hub."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epy
from huggingface_hub import errors as hub_errors

from gsae_jax import config as config_lib
from gsae_jax import errors, plugins
from gsae_jax.errors import UserError, known_names
from gsae_jax.lms import adapters, gelu, hugging_face, partition, weights
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.transformer import Config, Model
from gsae_jax.storage import reading, writing

with epy.lazy_imports():  # slow to import
    import transformers

EMBEDDED = Path(__file__).parent / "embedded"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
GGUF = (
    "GGUF is not supported: write the Hugging Face checkpoint that it was made from, or load it in transformers with "
    "from_pretrained('{folder}', gguf_file='{file}'), save that with save_pretrained, and write the new directory"
)
QUANTISED = {  # what the tensors of quantised weights are called
    r"\.qweight$": "GPTQ or AWQ",
    r"\.scales$": "MLX",
    r"\.(SCB|weight\.absmax)$": "bitsandbytes",
    r"\.weight_(packed|scale|scale_inv)$": "compressed-tensors or FP8",
}
# Fields of config.json that say who wrote it and how, but nothing about what the model computes.
PROVENANCE = (
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory whose `config.json` describes a model we have.

    Attributes:
        name: what was asked for: a directory, a hub name, or "" for the embedded model.
        folder: where it lies.
        revision: the hub's commit; "" for a directory.
        model_type: `config.json`'s.
        family: the file of `lms/` that knows it.
        config: the model's settings.
        adapter: the LoRA adapter in `folder`, if it holds one.
        base: the model that it is for.
    """

    name: str
    folder: Path
    revision: str
    model_type: str
    family: Any
    config: Config
    adapter: adapters.Adapter | None = None
    base: "Checkpoint | None" = None

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "", revision: str = "") -> "Checkpoint":
        """A checkpoint from a directory or a hub name; "" is the embedded one.

        Raises:
            UserError: there is none, or it is of a model that is not supported.
        """
        if path == config_lib.NO_MODEL:
            raise UserError(
                f"is {path!r}, and this needs the language model that the activations are from; write its directory"
            )
        folder, commit = find(path, revision)
        if adapters.is_adapter(folder):
            return cls._of_adapter(str(path), folder, commit)
        settings = read_settings(folder)
        if "model_type" not in settings and settings.keys() >= set(gelu.SIZES):
            what = f"{path} is a TransformerLens checkpoint, whose weights are a pickle"
            raise UserError(f"{what}; {convert_once(path, commit)}")
        family, config = understand(settings, folder)
        return cls(str(path), folder, commit, settings["model_type"], family, config)

    @classmethod
    def _of_adapter(cls, path: str, folder: Path, commit: str) -> "Checkpoint":
        """The base model with what an adapter changes."""
        adapter = adapters.Adapter.open(folder)
        name, revision = adapter.base
        try:
            base = cls.open(name, revision)
        except UserError as error:
            where = f"base_model_name_or_path in {folder / adapters.CONFIG}"
            raise UserError(f"{where} cannot be used: {error.problem}") from error
        if base.adapter is not None:
            raise UserError(
                f"{folder} is an adapter of {name}, itself an adapter; merge that one first, and name the result"
            )
        return dataclasses.replace(base, name=path, folder=folder, revision=commit, adapter=adapter, base=base)

    def module(self, num_layers: int | None = None, mesh: Any = None) -> Model:
        """The Linen module without its weights: whole, or its first blocks and no unembedding."""
        if num_layers is None:
            return Model(self.config, mesh=mesh)
        if not 0 < num_layers <= self.config.n_layers:
            raise UserError(f"is {num_layers}; this language model has {self.config.n_layers}", "num_layers")
        layers = self.config.layers[:num_layers]
        return Model(dataclasses.replace(self.config, layers=layers), head=False, mesh=mesh)

    def tokenizer(self) -> Any:
        """The tokenizer, a `transformers` one.

        Raises:
            UserError: what `tokenizer.load` refuses, or tokens that the model has no embedding for: words, or EOS.
        """
        # An adapter's directory often has a tokenizer, whose chat template may be another one.
        folder = self.folder
        if self.base is not None and not (folder / tokenizer_lib.FILE).exists():
            folder = self.base.folder
        tokenizer = tokenizer_lib.load(folder)
        # Some models have special tokens without an embedding, such as those for images. Text rarely has them.
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= self.config.d_vocab}
        words = sorted(beyond.keys() - special)
        if words:
            raise UserError(
                f"{self.folder} has a tokenizer of {len(tokenizer)} tokens, but embeddings for {self.config.d_vocab} "
                f"(the first without one is {beyond[words[0]]!r}, {words[0]}); write the directory of one whole model"
            )
        if tokenizer.eos_token_id in beyond:
            raise UserError(
                f"{self.folder} has the EOS token {tokenizer.eos_token!r} with id {tokenizer.eos_token_id}, but "
                f"embeddings for {self.config.d_vocab} tokens; write another eos_token in {tokenizer_lib.CONFIG}"
            )
        if tokenizer.bos_token_id in beyond:
            tokenizer.bos_token = (
                None  # only rows that begin with BOS need it, and `data.rows` refuses those without it
            )
        return tokenizer

    def params(self, module: Model, dtype: str, allow_nan: bool = False) -> dict[str, Any]:
        """The parameters of a `module` of this checkpoint, each put on its shards as it is read.

        Raises:
            UserError: weights that do not fit the model, all of them listed; nothing was loaded then.
        """
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"is {dtype!r}; write 'float32' or 'bfloat16'", "dtype")
        shapes = _shapes(module)
        placed = partition.shardings(shapes, module.mesh)
        params: dict[tuple[str, ...], jax.Array] = {}
        finite: list[tuple[str, jax.Array]] = []
        tensors, sources, faults = self._match(shapes)
        if faults:
            of_model = (self.base or self).folder / "config.json"
            raise UserError(f"{tensors.label} does not fit {of_model}: {'; '.join(faults)}")
        for names, views in sources.items():
            value = tensors.read(*names)
            for path, view in views.items():
                params[path] = weights.place(view(value), dtype, placed[path])
                label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                finite.append((label, weights.finite(params[path])))
            del value  # before the next tensor is read: the host holds one, or one matrix of all experts of a layer
        bad = dict.fromkeys(name for name, ok in finite if not ok)
        if bad and not allow_nan:
            raise UserError(
                f"{self.folder} has weights that are NaN or infinite in {dtype}: {', '.join(bad)}; copy it again, "
                "or use load_lm(..., allow_nan=True) to look at them"
            )
        return flax.traverse_util.unflatten_dict(params)

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of what the model computes: of `config.json` and of the weights."""
        if self.base is not None and self.adapter is not None:
            self._fetch_weights()
            known = self.base.fingerprint()
            return known | {"weights": config_lib.fingerprint(known["weights"], self.adapter.fingerprint())}
        self._fetch_weights()
        settings = read_settings(self.folder)
        described = {name: value for name, value in settings.items() if name not in PROVENANCE}
        tensors = weights.Tensors(self.folder)
        return {"config.json": config_lib.fingerprint(described), "weights": tensors.fingerprint()}

    def faults(self) -> list[str]:
        """Everything in which the weights do not fit the model; reads their names and shapes only."""
        return self._match(_shapes(self.module()))[-1]

    def _match(self, wanted: dict[tuple, Any]) -> tuple[weights.Tensors, dict[tuple[str, ...], dict], list[str]]:
        """The tensors, of each that is wanted how its parts become parameters, and every fault."""
        tensors = self._tensors()
        for pattern, method in QUANTISED.items():
            name = next((name for name in sorted(tensors.names) if re.search(pattern, name)), None)
            if name:
                return tensors, {}, [f"has weights quantised with {method} ({name}); {hugging_face.instead_of(method)}"]
        sources, faults = weights.match(
            tensors,
            wanted,
            whole=_shapes(self.module()),
            table=self.family.MODEL_TYPES[self.model_type],
            prefix=getattr(self.family, "PREFIX", ""),
            ignored=self.family.IGNORED,
            tied=self.config.tied,
        )
        return tensors, sources, list(dict.fromkeys(faults))

    def _tensors(self) -> weights.Tensors:
        """The tensors, with what an adapter changes."""
        self._fetch_weights()
        if self.base is None or self.adapter is None:
            return weights.Tensors(self.folder)
        tensors = self.base._tensors()
        table = self.family.MODEL_TYPES[self.model_type]
        shared = tuple(table[name][0] for name in ("embed.W_E", "unembed.W_U")) if self.config.tied else ()
        input_first = getattr(self.family, "INPUT_FIRST", False)
        self.adapter.merge_into(tensors, getattr(self.family, "PREFIX", ""), input_first, shared)
        return tensors

    def _fetch_weights(self) -> None:
        """Download the weights of a hub name."""
        if not self.revision:
            return
        if self.adapter is not None:
            fetch(self.name, self.revision, adapters.FILE)
            return
        fetch(self.name, self.revision, "model*.safetensors")
        if not list(self.folder.glob("model*.safetensors")):
            raise UserError(
                f"no safetensors weights of {self.name} are here; fetch them with a network, or if the hub has them as "
                f"a pickle only, {convert_once(self.name, self.revision)}"
            )


def open_others(lms: Mapping[str, config_lib.LM]) -> dict[str, Checkpoint]:
    """The checkpoints of `Experiment.lms`; raises `UserError` as `Checkpoint.open`."""
    opened = {}
    for name, lm in lms.items():
        with about_other(name):
            opened[name] = Checkpoint.open(lm.path, lm.revision)
    return opened


def about_other(name: str) -> contextlib.AbstractContextManager[None]:
    """`errors.about` the model with this name of `Experiment.lms`."""
    return errors.about(f"lms.{name}.path", path=f"lms.{name}.path", revision=f"lms.{name}.revision")


def find(path: str | os.PathLike[str], revision: str) -> tuple[Path, str]:
    """(directory, hub commit or "") of a checkpoint; of the hub's, settings and tokenizer are fetched.

    Raises:
        UserError: no such directory, or the hub cannot give it.
    """
    # Path.expanduser raises for an unknown user, and takes ./~ for ~.
    folder = Path(os.path.expanduser(path)) if path else EMBEDDED
    try:
        from_hub = not folder.is_dir()
    except OSError as error:  # a name that is too long, for one
        raise UserError(f"{str(path)!r} cannot be opened ({error}); write a directory that can") from error
    if not from_hub:
        if revision:
            why = f"is {revision!r}, but {str(path)!r} is not a hub name; write '' for a directory"
            raise UserError(why, "revision")
        refuse_other_formats(folder)
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles and not list(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is read; "
                f"{convert_once(folder)}"
            )
    elif folder.is_file():
        how = GGUF.format(folder=folder.parent, file=folder.name)
        how = how if folder.suffix.lower() == ".gguf" else "write the directory that it is in"
        raise UserError(f"{str(path)!r} is a file; {how}")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = fetch(str(path), revision, "*.json", "*.model", "*.txt", "*.jinja")
        if not (folder / "config.json").exists():  # else the weights are still to be fetched
            refuse_other_formats(folder)
    else:
        raise UserError(
            f"{str(path)!r} is not a directory; write a checkpoint directory, a hub name (owner/model), "
            "or '' for the embedded model"
        )
    return folder, folder.name if from_hub else ""


def refuse_other_formats(folder: Path) -> None:
    """Raises `UserError` for a directory of GGUF files, or of an adapter in another format, and no whole model."""
    names = sorted(file.name for file in folder.iterdir())
    if any(map(adapters.WHOLE.fullmatch, names)):
        return
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        raise UserError(f"{folder} has its weights as GGUF ({gguf[0]}); {GGUF.format(folder=folder, file=gguf[0])}")
    others = [name for name in names if re.fullmatch(r"adapters?(_model)?\.(safetensors|bin|npz)", name)]
    if adapters.CONFIG in names and others and adapters.FILE not in others:
        base = reading.read_json(folder / adapters.CONFIG).get("base_model_name_or_path")
        raise UserError(
            f"{folder} is an adapter (LoRA) for {base or 'another model'!r}, but {others[0]} is not {adapters.FILE}; "
            f"{adapters.MERGE}, or save it as {adapters.FILE}"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint directory; raises `UserError` where there is none, or that of a run."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{str(folder)!r} has no config.json; write a Hugging Face checkpoint directory ('' is the embedded model)"
        )
    settings = reading.read_json(folder / "config.json")
    if "stacks" in settings and isinstance(settings.get("lm"), dict):
        path = settings["lm"].get("path", "")
        of_run = "it has none" if path == config_lib.NO_MODEL else f"write its language model, {path!r}"
        of_run += "" if path else " (the embedded one)"
        raise UserError(f"{folder} is a training run and no language model; {of_run}")
    return settings


def understand(settings: dict[str, Any], folder: Path) -> tuple[Any, Config]:
    """The family of a `config.json`, and what it describes; raises `UserError` for what we lack."""
    families = {kind: family for family in plugins.known("lms", "MODEL_TYPES").values() for kind in family.MODEL_TYPES}
    if settings.get("model_type") is None:
        raise UserError(
            f"{folder / 'config.json'} has no model_type: it is not a language model's; write the directory of one"
        )
    model_type = str(settings["model_type"])
    if model_type not in families:
        what, known = f"{folder} is a model of type {model_type!r}, which is not supported", sorted(families)
        inner = settings.get("text_config")
        text = inner.get("model_type") if isinstance(inner, dict) else None
        if text in known:
            advice = (
                f"its language model alone, of type {text!r}, is supported: save that model, and write its directory"
            )
        elif model_type in transformers.CONFIG_MAPPING:  # another model, not a misspelt name
            advice = f"known: {', '.join(known)}"
        else:
            advice = known_names(model_type, known)
        raise UserError(f"{what}; {advice}")
    try:
        return families[model_type], families[model_type].config(settings)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        # A value of a wrong kind, deep within.
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder / 'config.json'} is not valid ({why}); copy it again") from error


def convert_once(source: str | os.PathLike[str], revision: str = "") -> str:
    """What to do with a pickle."""
    flag = f" --revision={revision}" if revision else ""
    return f"convert it once with: python -m gsae_jax.convert_lm {source} OUT{flag}, and write OUT"


def fetch(name: str, revision: str, *patterns: str) -> Path:
    """The local copy of the hub's files that match; its name is the commit.

    Raises:
        UserError: the hub cannot be asked, or has no such thing.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except hub_errors.IncompleteSnapshotError as error:
        raise UserError(
            f"not all of {name!r} was fetched from the hub, which cannot be reached; run this with a network"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{name!r} is not a directory here and was never fetched from the hub, which cannot be reached; "
            "write a checkpoint directory, or run this once with a network"
        ) from error
    except (OSError, ValueError, hub_errors.HTTPError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{name!r} is not a directory here, and the hub refuses it: {why}") from error


def abstract_params(module: Model, dtype: str) -> dict[str, Any]:
    """The shapes and the placement of a module's parameters."""
    shapes = _shapes(module)
    placed = partition.shardings(shapes, module.mesh)
    return flax.traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=placed[path]) for path, x in shapes.items()}
    )


def save(folder: Path, config: Config, params: Any, tokenizer: Any) -> None:
    """Write a GELU model as a new checkpoint directory: bfloat16 weights, `config.json`, tokenizer.

    Raises:
        UserError: the directory exists and is not empty, or cannot be written.
    """
    flat = flax.traverse_util.flatten_dict(params)
    tensors = {".".join(path): np.asarray(value, jnp.bfloat16) for path, value in flat.items()}
    settings = gelu.settings(config) | {"torch_dtype": "bfloat16"}
    with writing.new_folder(folder, or_empty=True) as scratch:
        safetensors.numpy.save_file(tensors, scratch / weights.WEIGHTS, metadata={"format": "flax"})
        (scratch / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        tokenizer.save_pretrained(scratch)


def _shapes(module: Model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    method = "__call__" if module.head else "hidden"
    bare = dataclasses.replace(module, mesh=None)
    tree = jax.eval_shape(lambda: bare.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=method))
    return flax.traverse_util.flatten_dict(tree["params"])
