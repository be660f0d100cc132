"""Language models from Hugging Face checkpoint directories."""

import dataclasses
import json
import os
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import transformers

from gsae_jax import plugins
from gsae_jax.config import ConfigError, known_names
from gsae_jax.lms import sites as sites_lib

EMBEDDED = Path(__file__).parent / "embedded"


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A language model: its Linen module, parameters and tokenizer.

    Attributes:
        path: the checkpoint directory.
        module: the Linen module; `module.apply({"params": params}, tokens_BxT, tap)` gives logits.
        params: a nested dict of arrays.
        tokenizer: a `transformers` tokenizer.
    """

    path: str
    module: Any
    params: dict[str, Any]
    tokenizer: Any

    @property
    def config(self) -> Any:
        """The family's Config."""
        return self.module.config

    @cached_property
    def sites(self) -> dict[str, int]:
        """The width of every site."""
        return site_widths(self.module)

    @cached_property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of BOS, EOS, padding and the tokenizer's other special tokens."""
        return special_tokens(self.tokenizer)

    def logits(self, tokens_BxT: jax.typing.ArrayLike) -> jax.Array:
        """Logits [B, T, V], float32."""
        return self.run(tokens_BxT, sites_lib.no_tap)

    def activations(self, tokens_BxT: jax.typing.ArrayLike, sites: Iterable[str]) -> dict[str, jax.Array]:
        """Activations [B, T, D] at each of `sites`."""
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        for site in sites:
            sites_lib.check(site, self.sites, "sites")
        return _activations(self.module, sites, self.params, self._tokens(tokens_BxT))

    def run(self, tokens_BxT: jax.typing.ArrayLike, tap: sites_lib.Tap) -> jax.Array:
        """Logits [B, T, V] of a forward pass in which `tap(site, x_BxTxD)` may replace the activations of any site.

        Not compiled, so that a tap may look at values and keep them; wrap the call in `jax.jit` where it is repeated.
        """
        return self.module.apply({"params": self.params}, self._tokens(tokens_BxT), tap)

    def _tokens(self, tokens_BxT: jax.typing.ArrayLike) -> jax.Array:
        if isinstance(tokens_BxT, jax.core.Tracer):
            return tokens_BxT
        tokens = np.asarray(tokens_BxT)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ConfigError(
                "tokens", f"are {tokens.dtype}{list(tokens.shape)}; give integers of shape [batch, tokens]"
            )
        if tokens.shape[1] > self.config.n_ctx:
            raise ConfigError(
                "tokens", f"have {tokens.shape[1]} positions; this language model has {self.config.n_ctx}"
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.config.d_vocab:
            raise ConfigError(
                "tokens",
                f"go from {tokens.min()} to {tokens.max()}; this language model has ids 0 to {self.config.d_vocab - 1}",
            )
        return jnp.asarray(tokens, jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _activations(module: Any, sites: tuple[str, ...], params: Any, tokens_BxT: jax.Array) -> dict[str, jax.Array]:
    return capture(module, params, tokens_BxT, sites)


def capture(module: Any, params: Any, tokens_BxT: jax.Array, sites: Iterable[str]) -> dict[str, jax.Array]:
    """Activations [B, T, D] at `sites`, one forward pass for all; under jit, what they do not need is not computed."""
    found: dict[str, jax.Array] = {}
    module.apply({"params": params}, tokens_BxT, sites_lib.capture(sites, found), method="hidden")
    return found


def site_widths(module: Any) -> dict[str, int]:
    """The width of every site of a module, in the order they are computed."""
    widths: dict[str, int] = {}

    def tap(site: str, x: jax.Array) -> jax.Array:
        widths[site] = x.shape[-1]
        return x

    jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), tap, method="hidden"))
    return widths


def load_lm(
    path: str | os.PathLike[str] = "",
    *,
    dtype: str = "float32",
    num_layers: int | None = None,
    sharding: Any = None,
    field: str = "lm.path",
) -> LM:
    """A language model from a Hugging Face checkpoint directory; the embedded one by default.

    Args:
        path: directory with `config.json`, `model.safetensors` and a tokenizer; "" is the embedded model.
        dtype: of parameters and activations.
        num_layers: load only so many blocks and no unembedding, for `activations` only.
        sharding: a `jax.sharding.Sharding` for the parameters; one device by default.
        field: what an error calls `path`.

    Raises:
        ConfigError: not a checkpoint, an unsupported model, or weights that do not fit it (all of them listed).
    """
    folder = Path(path) if path else EMBEDDED
    module = load_module(folder, num_layers, field)
    family = _family(folder, field)[0]
    tokenizer = load_tokenizer(folder, module, field)
    return LM(str(folder), module, _load_params(folder, family, module, dtype, sharding, field), tokenizer)


def load_module(folder: Path, num_layers: int | None, field: str) -> nn.Module:
    """The module that a checkpoint's `config.json` describes, without its weights."""
    family, settings = _family(folder, field)
    names = {setting.name for setting in dataclasses.fields(family.Config)}
    missing = {
        setting.name for setting in dataclasses.fields(family.Config) if setting.default is dataclasses.MISSING
    } - settings.keys()
    if missing:
        raise ConfigError(field, f"{folder / 'config.json'} lacks {', '.join(sorted(missing))}")
    config = family.Config(**{name: value for name, value in settings.items() if name in names})
    if num_layers is None:
        return family.Model(config)
    if not 0 < num_layers <= config.n_layers:
        raise ConfigError("num_layers", f"is {num_layers}; this language model has {config.n_layers}")
    return family.Model(dataclasses.replace(config, n_layers=num_layers), head=False)


def load_tokenizer(folder: Path, module: Any, field: str) -> Any:
    """The tokenizer of a checkpoint directory; refused if it has ids that the model has no embedding for."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of every model_type it has no class for
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(field, f"{folder} has no tokenizer that can be read: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if len(tokenizer) > module.config.d_vocab:
        raise ConfigError(
            field,
            f"{folder} has a tokenizer of {len(tokenizer)} tokens, but embeddings for {module.config.d_vocab}; "
            "write the directory of one whole model",
        )
    return tokenizer


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of BOS, EOS, padding and the tokenizer's other special tokens, in order."""
    return tuple(sorted(set(tokenizer.all_special_ids)))


def save(folder: Path, model_type: str, module: Any, params: Any, tokenizer: Any) -> None:
    """Write a checkpoint directory that `load_lm` reads: bfloat16 weights, `config.json`, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    name = _families()[model_type].tensor_name
    tensors = {
        name(path): np.asarray(value, jnp.bfloat16) for path, value in flax.traverse_util.flatten_dict(params).items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "flax"})
    settings = {"model_type": model_type, **dataclasses.asdict(module.config), "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def _families() -> dict[str, Any]:
    return {kind: module for module in plugins.known("lms", "MODEL_TYPES").values() for kind in module.MODEL_TYPES}


def _family(folder: Path, field: str) -> tuple[Any, dict[str, Any]]:
    try:
        settings = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            field,
            f"{str(folder)!r} has no config.json; write a Hugging Face checkpoint directory ('' is the embedded model)",
        ) from error
    except ValueError as error:
        raise ConfigError(field, f"{folder / 'config.json'} is not JSON: {error}") from error
    families = _families()
    model_type = str(settings.get("model_type"))
    if model_type not in families:
        raise ConfigError(
            field,
            f"{folder} is a model of type {model_type!r}, which is not supported; {known_names(model_type, families)}",
        )
    return families[model_type], settings


def _load_params(folder: Path, family: Any, module: Any, dtype: str, sharding: Any, field: str) -> dict[str, Any]:
    def shapes(module: Any) -> dict[tuple[str, ...], Any]:
        method = "__call__" if module.head else "hidden"
        tree = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), method=method))
        return flax.traverse_util.flatten_dict(tree["params"])

    wanted = {family.tensor_name(path): (path, leaf.shape) for path, leaf in shapes(module).items()}
    known = (
        wanted.keys()
        if module.head
        else {family.tensor_name(path) for path in shapes(load_module(folder, None, field))}
    )
    file = folder / "model.safetensors"
    params: dict[tuple[str, ...], jax.Array] = {}
    faults = []
    try:
        with safetensors.safe_open(file, "np") as tensors:
            names = set(tensors.keys())
            faults += [f"{name} is missing" for name in sorted(known - names)]
            faults += [f"{name} is not of this model" for name in sorted(names - known)]
            for name, (path, shape) in wanted.items():
                if name not in names:
                    continue
                found = tuple(tensors.get_slice(name).get_shape())
                if found != shape:
                    faults.append(f"{name} has shape {list(found)}, not {list(shape)}")
                elif not faults:
                    params[path] = jax.device_put(tensors.get_tensor(name).astype(dtype), sharding)
    except FileNotFoundError as error:
        raise ConfigError(field, f"{folder} has no model.safetensors; its weights must be in that format") from error
    except safetensors.SafetensorError as error:
        raise ConfigError(
            field, f"{file} cannot be read ({error}); it is truncated or not a safetensors file: copy it again"
        ) from error
    if faults:
        raise ConfigError(field, f"{file} does not fit {folder / 'config.json'}: {'; '.join(faults)}")
    return flax.traverse_util.unflatten_dict(params)
