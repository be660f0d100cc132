"""LoRA adapters of PEFT, merged into the weights of their base model one tensor at a time, as the weights are read.

LoRA (2106.09685, section 4.1) adds (alpha / r) B A to a weight W [out, in], with A [r, in] and B [out, r]. rsLoRA
(2312.03732) divides by sqrt(r) instead. DoRA (2402.09353, section 4.1) scales each row of the sum to a norm m.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from gsae_jax import config as config_lib
from gsae_jax.errors import UserError
from gsae_jax.lms import weights
from gsae_jax.storage import reading

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it with peft's merge_and_unload(), save the result with save_pretrained, and write its directory"
OUTER = "base_model.model."  # around the names of the base model
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
WHOLE = re.compile(r"(pytorch_)?model.*\.(safetensors|bin|pth)(\.index\.json)?")  # weights of a whole model
ROWS = 4096  # of a weight that are computed at once
# Fields of adapter_config.json that say what is added,
ADDED = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# and those that do not: about training, or about what the names of the tensors say as well. PEFT sets fan_in_fan_out by
# the kind of layer, whatever the file says.
NEUTRAL = {"auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules"}
NEUTRAL |= {"fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"}
NEUTRAL |= {"megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "target_modules", "task_type"}
KNOWN = NEUTRAL | {*ADDED, "peft_type", "base_model_name_or_path", "revision", "init_lora_weights"}
# Other ways to begin, such as PiSSA, change the base model's weights as well.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    if not (folder / "config.json").is_file():
        return (folder / CONFIG).is_file()
    names = [file.name for file in folder.iterdir()]
    return {CONFIG, FILE} <= {*names} and not any(map(WHOLE.fullmatch, names))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's directory and its settings."""

    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Adapter":
        """Raises `UserError` for one that cannot be merged exactly."""
        settings = reading.read_json(folder / CONFIG)
        kind = settings.get("peft_type")
        if kind != "LORA":
            fuse = "" if kind else "; fuse an adapter of MLX with `python -m mlx_lm.fuse`"
            raise UserError(
                f"{folder} is an adapter with peft_type = {kind!r}, and only 'LORA' is supported; {MERGE}{fuse}"
            )
        others = [name for name, value in settings.items() if value and name not in KNOWN]
        if settings.get("init_lora_weights") not in BEGINNINGS:
            others.append("init_lora_weights")
        if others:
            named = ", ".join(f"{name} = {settings[name]!r}"[:100] for name in others)
            raise UserError(f"{folder / CONFIG} has {named}, which is not supported; {MERGE}")
        if not isinstance(settings.get("base_model_name_or_path"), str) or not settings["base_model_name_or_path"]:
            raise UserError(f"{folder / CONFIG} names no base model; write it there as base_model_name_or_path")
        for name, kinds in (("r", int), ("lora_alpha", (int, float))):
            value = settings.get(name)
            if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
                raise UserError(f"{folder / CONFIG} has {name} = {value!r}; it must be a positive number")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(settings.get(name) or {}, dict):
                raise UserError(f"{folder / CONFIG} has {name} = {settings[name]!r}; it must be an object")
        return cls(folder, settings)

    @property
    def base(self) -> tuple[str, str]:
        """The name or path of the base model, and its revision."""
        return self.settings["base_model_name_or_path"], self.settings.get("revision") or ""

    def fingerprint(self) -> str:
        """A name for what the adapter changes."""
        described = {name: value for name, value in self.settings.items() if name in ADDED}
        return config_lib.fingerprint(described, weights.digest(self.folder / FILE))

    def merge_into(
        self, tensors: weights.Tensors, prefix: str | tuple[str, ...], input_first: bool, shared: tuple[str, ...]
    ) -> None:
        """Let the tensors of the base model be read with the adapter merged. What does not fit is one of their faults.

        Args:
            tensors: of the base model.
            prefix: what the names of its tensors may begin with, or several such.
            input_first: whether its weights are [in, out] (Conv1D), except that of the unembedding.
            shared: names of the embedding and of the unembedding if they are one matrix, and have to stay so.
        """
        if not (self.folder / FILE).is_file():
            raise UserError(f"{self.folder} has no {FILE}; save the adapter with peft's save_pretrained")
        try:
            file = safetensors.safe_open(self.folder / FILE, "np")
        except (OSError, safetensors.SafetensorError) as error:
            reading.check_fetched(self.folder / FILE)
            raise UserError(f"{self.folder / FILE} cannot be read ({error}); copy it again") from error
        parts: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for key in sorted(file.keys()):
            name = key.removeprefix(OUTER)
            match = re.fullmatch(rf"(.+)\.({'|'.join(PARTS)})(\.weight)?", name)
            if match:
                parts.setdefault(match[1], {})[match[2]] = key
            elif "lora_" in name:
                tensors.faults.append(f"{key} of the adapter is of a kind that is not supported; {MERGE}")
            else:
                replaced[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = key
        changed = set()
        for module, keys in parts.items():
            name = self._name(f"{module}.weight", tensors, prefix)
            fault = self._fault(module, keys, name, tensors, file)
            if fault:
                tensors.faults.append(fault)
                continue
            r, alpha = self._number(module, "r", "rank_pattern"), self._number(module, "lora_alpha", "alpha_pattern")
            shape = tensors.shape(name)
            stored = [list(file.get_slice(keys[part]).get_shape()) for part in PARTS if part in keys]
            is_input_first = input_first and not name.endswith("lm_head.weight")
            out, into = shape[::-1] if is_input_first else shape
            if stored != [[r, into], [out, r], [out]][: len(stored)]:
                has = " and ".join(map(str, stored))
                what = f"for {name} of shape {list(shape)} and rank {r}"
                tensors.faults.append(f"the adapter has matrices of shapes {has} {what}")
                continue
            scale = alpha / (math.sqrt(r) if self.settings.get("use_rslora") else r)
            tensors.put(name, _Merged(tensors.source(name), file, keys, scale, is_input_first))
            changed.add(name)
        for short, key in replaced.items():
            name = self._name(short, tensors, prefix) or short
            tensors.put(name, _Replaced(file, key))
        both = {self._name(name, tensors, prefix) or name for name in shared}
        new = {self._name(short, tensors, prefix) for short in replaced}
        if both & changed or (both & new and not both <= new):
            tensors.faults.append(
                f"the adapter changes one of {' and '.join(sorted(both))}, which are one matrix by tie_word_embeddings"
            )

    def _fault(
        self, module: str, keys: Mapping[str, str], name: str, tensors: weights.Tensors, file: Any
    ) -> str | None:
        wanted = PARTS if self.settings.get("use_dora") else PARTS[:2]
        if {*keys} != {*wanted}:
            return f"the adapter has {', '.join(keys.values())}, not {', '.join(wanted)} of {module}"
        if not name:
            return f"the adapter changes {module}.weight, which the base model does not have"
        if len(tensors.shape(name)) != 2:
            return f"the adapter changes {name}, which is no matrix; {MERGE}"
        unreadable = [key for key in keys.values() if file.get_slice(key).get_dtype() not in weights.DTYPES]
        return f"{unreadable[0]} of the adapter is not one of {', '.join(weights.DTYPES)}" if unreadable else None

    def _name(self, name: str, tensors: weights.Tensors, prefix: str | tuple[str, ...]) -> str:
        """The base model's name of a tensor, which may have another prefix or none; "" if it has no such tensor."""
        prefixes = (prefix,) if isinstance(prefix, str) else prefix
        short = name.removeprefix(next((each for each in prefixes if name.startswith(each)), ""))
        known = (name, *(f"{each}{short}" for each in prefixes), short)
        return next((each for each in known if each in tensors.names), "")

    def _number(self, module: str, field: str, patterns: str) -> float:
        """A setting of one module. The first pattern counts that is the end of the module's name."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.settings[field]


@dataclasses.dataclass(frozen=True)
class _Replaced:
    """A tensor of the adapter in place of one of the base model."""

    file: Any
    key: str

    def get_slice(self, name: str) -> Any:
        return self.file.get_slice(self.key)

    def get_tensor(self, name: str) -> np.ndarray:
        return self.file.get_tensor(self.key)


@dataclasses.dataclass(frozen=True)
class _Merged:
    """A weight of the base model with what the adapter adds, float32."""

    base: Any
    file: Any
    keys: Mapping[str, str]
    scale: float
    input_first: bool

    def get_slice(self, name: str) -> Any:
        """Shape and type are those of the base model."""
        return self.base.get_slice(name)

    def get_tensor(self, name: str) -> np.ndarray:
        weight = np.array(self.base.get_tensor(name), np.float32)
        by_output = weight.T if self.input_first else weight  # a view
        A, B, *m = (self.file.get_tensor(self.keys[part]).astype(np.float32) for part in PARTS if part in self.keys)
        for start in range(0, len(by_output), ROWS):
            rows = by_output[start : start + ROWS]
            rows += np.float32(self.scale) * (B[start : start + ROWS] @ A)
            if m:
                rows *= (m[0][start : start + ROWS] / np.linalg.norm(rows, axis=1))[:, None]
        return weight
