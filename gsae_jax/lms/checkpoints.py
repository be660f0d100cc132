"""Hugging Face checkpoints, from a directory or the hub: which model, and its weights tensor by tensor onto shards."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import einops
import flax
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from gsae_jax import plugins
from gsae_jax.config import ConfigError, known_names
from gsae_jax.lms import gelu, partition
from gsae_jax.lms.transformer import Config, Model

EMBEDDED = Path(__file__).parent / "embedded"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
        field: what an error calls the path.
    """

    name: str
    folder: Path
    revision: str
    model_type: str
    family: Any
    config: Config
    field: str

    @classmethod
    def open(cls, path: str | os.PathLike[str] = "", revision: str = "", field: str = "lm.path") -> "Checkpoint":
        """A checkpoint from a directory or a hub name; "" is the embedded one.

        Raises:
            ConfigError: there is none, or it is of a model that is not supported.
        """
        folder, commit = find(path, revision, field)
        settings = read_json(folder / "config.json", field)
        families = {
            kind: family for family in plugins.known("lms", "MODEL_TYPES").values() for kind in family.MODEL_TYPES
        }
        model_type = str(settings.get("model_type"))
        if model_type not in families:
            raise ConfigError(
                field,
                f"{folder} is a model of type {model_type!r}, which is not supported; "
                f"{known_names(model_type, sorted(families))}",
            )
        try:
            config = families[model_type].config(settings)
        except ValueError as error:
            raise ConfigError(field, f"{folder / 'config.json'} {error}") from error
        return cls(str(path), folder, commit, model_type, families[model_type], config, field)

    def module(self, num_layers: int | None = None, mesh: Any = None) -> Model:
        """The Linen module without its weights: whole, or its first blocks and no unembedding."""
        if num_layers is None:
            return Model(self.config, mesh=mesh)
        if not 0 < num_layers <= self.config.n_layers:
            raise ConfigError("num_layers", f"is {num_layers}; this language model has {self.config.n_layers}")
        layers = self.config.layers[:num_layers]
        return Model(dataclasses.replace(self.config, layers=layers), head=False, mesh=mesh)

    def tokenizer(self) -> Any:
        """The tokenizer, a `transformers` one; refused if it has ids that the model has no embedding for."""
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it warns of every model_type it has no class for
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            message = f"{self.folder} has no tokenizer that can be read: {str(error).splitlines()[0]}"
            raise ConfigError(self.field, message) from error
        finally:
            transformers.logging.set_verbosity(verbosity)
        if len(tokenizer) > self.config.d_vocab:
            raise ConfigError(
                self.field,
                f"{self.folder} has a tokenizer of {len(tokenizer)} tokens, but embeddings for {self.config.d_vocab}; "
                "write the directory of one whole model",
            )
        return tokenizer

    def params(self, module: Model, dtype: str, allow_nan: bool = False) -> dict[str, Any]:
        """The parameters of a `module` of this checkpoint, each put on its shards as it is read.

        Raises:
            ConfigError: weights that do not fit the model, all of them listed; nothing was loaded then.
        """
        self._fetch_weights()
        shapes = _shapes(module)
        placed = partition.shardings(shapes, module.mesh)
        params: dict[tuple[str, ...], jax.Array] = {}
        finite: list[tuple[str, jax.Array]] = []
        with _Tensors(self.folder, self.field) as tensors:
            sources = self._match(tensors, shapes, _shapes(self.module()))
            for name, views in sources.items():
                value = tensors.read(name)
                for path, view in views.items():
                    params[path] = _place(view(value), dtype, placed[path])
                    finite.append((name, _finite(params[path])))
                del value  # before the next tensor is read: the host holds one
        bad = dict.fromkeys(name for name, ok in finite if not ok)
        if bad and not allow_nan:
            raise ConfigError(
                self.field,
                f"{self.folder} has NaN or infinite weights in {', '.join(bad)}; copy it again, "
                "or use load_lm(..., allow_nan=True) to look at them",
            )
        return flax.traverse_util.unflatten_dict(params)

    def check(self) -> None:
        """Raises `ConfigError` where the weights do not fit the model; reads their names and shapes only."""
        self._fetch_weights()
        shapes = _shapes(self.module())
        with _Tensors(self.folder, self.field) as tensors:
            self._match(tensors, shapes, shapes)

    def _fetch_weights(self) -> None:
        if not self.revision:
            return
        fetch(self.name, self.revision, self.field, "model*.safetensors")
        if not list(self.folder.glob("model*.safetensors")):
            raise ConfigError(
                self.field,
                f"{self.name} has no safetensors weights on the hub; if they are a pickle, convert them once with: "
                f"python -m gsae_jax.convert_lm {self.name} OUT, and write OUT",
            )

    def _match(self, tensors: "_Tensors", wanted: dict[tuple, Any], known: dict[tuple, Any]) -> dict[str, Any]:
        """{tensor: {our path: how its part is viewed}} for the wanted paths; every fault is raised at once."""
        table, prefix = self.family.MODEL_TYPES[self.model_type], getattr(self.family, "PREFIX", "")
        actual = {name.removeprefix(prefix): name for name in tensors.names}
        prefix = prefix if any(name.startswith(prefix) for name in tensors.names) else ""
        sources: dict[str, Any] = {}
        faults, used = list(tensors.faults), set()
        for path, leaf in (known | wanted).items():
            name, pattern, index = _source(table, path, len(leaf.shape))
            unembedding = table["unembed.W_U"][0] if self.config.tied and path == ("embed.W_E",) else name
            present = [each for each in (name, unembedding) if each in actual]
            used |= set(present)
            if not present:
                faults.append(f"{prefix}{name} is missing")
                continue
            if len(present) == 2 and name != unembedding and not tensors.equal(actual[name], actual[unembedding]):
                faults.append(f"{actual[name]} and {actual[unembedding]} differ, but config.json says they are tied")
            source = actual[present[0]]
            shape, sizes = _layout(pattern, leaf.shape)
            found = tensors.shape(source)
            if found != shape and path in wanted:
                faults.append(f"{source} has shape {list(found)}, not {list(shape)}")
            elif path in wanted:
                view = partial(_view, pattern=pattern, sizes=sizes, index=index)
                sources.setdefault(source, {})[path] = view
        ignored = re.compile(self.family.IGNORED)
        strays = (name for short, name in actual.items() if short not in used and not ignored.search(short))
        faults += [f"{name} is not of this model" for name in sorted(strays)]
        faults += [
            f"{name} is of type {tensors.dtype(name)}, not one of {', '.join(DTYPES)}"
            for name in sources
            if tensors.dtype(name) not in DTYPES
        ]
        if faults:
            shown = "; ".join(dict.fromkeys(faults))
            raise ConfigError(self.field, f"{tensors.label} does not fit {self.folder / 'config.json'}: {shown}")
        return sources


def find(path: str | os.PathLike[str], revision: str, field: str) -> tuple[Path, str]:
    """(directory, hub commit or "") of a checkpoint; of the hub's, settings and tokenizer are fetched.

    Raises:
        ConfigError: no such directory, or the hub cannot give it.
    """
    folder = Path(path) if path else EMBEDDED
    if folder.is_dir():
        if revision:
            raise ConfigError("lm.revision", f"is {revision!r}, but {str(path)!r} is a directory; write '' for those")
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles and not list(folder.glob("*.safetensors")):
            raise ConfigError(
                field,
                f"{folder} has its weights as a pickle ({', '.join(pickles)}), which can run code when it is read; "
                f"convert it once with: python -m gsae_jax.convert_lm {folder} OUT, and write OUT",
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        folder = fetch(str(path), revision, field, "*.json", "*.model", "*.txt", "*.jinja")
    else:
        raise ConfigError(
            field,
            f"{str(path)!r} is not a directory; write a checkpoint directory, a hub name (owner/model), "
            "or '' for the embedded model",
        )
    if not (folder / "config.json").exists():
        raise ConfigError(
            field,
            f"{str(path)!r} has no config.json; write a Hugging Face checkpoint directory ('' is the embedded model)",
        )
    return folder, "" if Path(path).is_dir() or not path else folder.name


def fetch(name: str, revision: str, field: str, *patterns: str) -> Path:
    """The local copy of the hub's files that match; its name is the commit.

    Raises:
        ConfigError: the hub cannot be asked, or has no such thing.
    """
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (huggingface_hub.errors.LocalEntryNotFoundError, huggingface_hub.errors.OfflineModeIsEnabled) as error:
        raise ConfigError(
            field,
            f"{name!r} is not a directory here and was never fetched from the hub, which cannot be reached; "
            "write a checkpoint directory, or run this once with a network",
        ) from error
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise ConfigError(field, f"{name!r} is not a directory here, and the hub refuses it: {why}") from error


def abstract_params(module: Model, dtype: str) -> dict[str, Any]:
    """The shapes and the placement of a module's parameters."""
    shapes = _shapes(module)
    placed = partition.shardings(shapes, module.mesh)
    return flax.traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=placed[path]) for path, x in shapes.items()}
    )


def save(folder: Path, config: Config, params: Any, tokenizer: Any) -> None:
    """Write a GELU model as a checkpoint directory: bfloat16 weights, `config.json`, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params)
    tensors = {".".join(path): np.asarray(value, jnp.bfloat16) for path, value in flat.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "flax"})
    (folder / "config.json").write_text(
        json.dumps(gelu.settings(config) | {"torch_dtype": "bfloat16"}, indent=2) + "\n"
    )
    tokenizer.save_pretrained(folder)


class _Tensors:
    """The tensors of the safetensors files of a directory, opened once each."""

    def __init__(self, folder: Path, field: str):
        self.faults: list[str] = []
        self._field, self._files = field, {}
        if (folder / INDEX).exists():
            self.label = folder / INDEX
            index = read_json(folder / INDEX, field).get("weight_map", {})
            files = sorted(set(index.values()))
            lost = [file for file in files if not (folder / file).exists()]
            if lost:
                raise ConfigError(field, f"{self.label} names {', '.join(lost)}, which are not there; copy them again")
            beside = {file.name for file in folder.glob("model-*.safetensors")} - set(files)
            self.faults += [f"{file} lies there but is not in the index" for file in sorted(beside)]
        else:
            self.label, index, files = folder / WEIGHTS, {}, [WEIGHTS]
        for file in files:
            try:
                opened = safetensors.safe_open(folder / file, "np")
            except FileNotFoundError as error:
                raise ConfigError(
                    field, f"{folder} has no {WEIGHTS} or {INDEX}; its weights must be in that format"
                ) from error
            except safetensors.SafetensorError as error:
                raise self._unreadable(folder / file, error) from error
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                self._files[name] = opened
                if index and index.get(name) != file:
                    self.faults.append(f"{name} is in {file}, but not so in the index")

    def _unreadable(self, file: Path, error: Exception) -> ConfigError:
        return ConfigError(
            self._field, f"{file} cannot be read ({error}); it is truncated or not a safetensors file: copy it again"
        )

    def __enter__(self) -> "_Tensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return self._files[name].get_slice(name).get_dtype()

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def equal(self, one: str, other: str, rows: int = 4096) -> bool:
        """Whether two tensors are the same, some rows at a time."""
        count = self.shape(one)[0]
        if self.shape(one) != self.shape(other):
            return False
        pair = [self._files[name].get_slice(name) for name in (one, other)]
        parts = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
        return all(np.array_equal(*(tensor[part] for tensor in pair)) for part in parts)


def _source(table: Mapping[str, tuple], path: tuple[str, ...], ndim: int) -> tuple[str, str, int | None]:
    """(tensor, layout, part) of one of our parameters; what is not in the table has our name and layout."""
    name = ".".join(path)
    layer = re.match(r"blocks\.(\d+)\.", name)
    key = f"blocks.{{}}.{name[layer.end() :]}" if layer else name
    if key not in table:
        axes = " ".join("abcd"[:ndim])
        return name, f"{axes} -> {axes}", None
    source, pattern, *index = table[key]
    return source.format(layer[1]) if layer else source, pattern, index[0] if index else None


def _layout(pattern: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], dict[str, int]]:
    """The checkpoint's shape of a tensor, and every axis' size, from our shape and the einops pattern."""
    left, right = pattern.split(" -> ")
    axes = right.split()
    sizes = {"qkv": 3} | dict(zip(axes[-len(shape) :], shape, strict=True))
    groups = re.findall(r"\(([^)]+)\)|(\S+)", left)
    theirs = tuple(math.prod(sizes[axis] for axis in (group or single).split()) for group, single in groups)
    return theirs, {axis: size for axis, size in sizes.items() if axis in axes}


def _view(value: np.ndarray, pattern: str, sizes: dict[str, int], index: int | None) -> np.ndarray:
    ours = einops.rearrange(value, pattern, **sizes)
    return ours if index is None else ours[index]


def _place(value: np.ndarray, dtype: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on its shards, of which the host holds one at a time."""
    shards = [
        jax.block_until_ready(jax.device_put(np.asarray(value[index], dtype, order="C"), device))
        for device, index in sharding.addressable_devices_indices_map(value.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def _shapes(module: Model) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    method = "__call__" if module.head else "hidden"
    bare = dataclasses.replace(module, mesh=None)
    tree = jax.eval_shape(lambda: bare.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=method))
    return flax.traverse_util.flatten_dict(tree["params"])


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def read_json(file: Path, field: str) -> dict[str, Any]:
    """A JSON object; raises `ConfigError` where the file holds none."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(field, f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(field, f"{file} is not a JSON object")
    return value
