"""What a checkpoint says of its run, as one dataclass; `facts` in the checkpoint's folder holds its JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from gsae_jax.config import FLOAT32, INT32, Experiment


@dataclasses.dataclass(frozen=True)
class Text:
    """What a run reads.

    Attributes:
        documents: in all, those that are held out included.
        held_out: the fraction of the text that is held out.
        tokens: of the text that is trained on; None if an earlier version tokenized only a part of the text.
        is_estimate: `tokens`, `passes` and `too_short` are estimated from the part of the text that the run needs.
        tokens_read: how many the run reads until its last step, about; each BOS that begins a row is one of them.
        passes: how often that is the text that is trained on; None where `tokens` is.
        too_short: the fraction of documents that no row begins with, as they are shorter; 0 for `data.pack="stream"`.
    """

    documents: int
    held_out: float
    tokens: int | None
    is_estimate: bool
    tokens_read: int
    passes: float | None
    too_short: float = 0.0

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Text":
        """The text of a JSON object; raises `ValueError` for what a run does not write."""
        known: dict[str, Any] = {field.name: tree.get(field.name) for field in dataclasses.fields(cls)}
        for name, value in known.items():
            if name == "is_estimate":
                if not isinstance(value, bool):
                    raise ValueError(f"text.{name} is {value!r}; it is not true or false")
            elif value is not None or name not in ("tokens", "passes"):
                is_count = name in ("documents", "tokens", "tokens_read")
                _number(f"text.{name}", value, most=2.0**63, kind=int if is_count else float)
        return cls(**known)

    def __str__(self) -> str:
        about = "about " if self.is_estimate else ""
        has = "" if self.tokens is None else f"; {about}{self.tokens:,} tokens to train on"
        short = f", {about}{self.too_short:.1%} of them too short for a row" if self.too_short else ""
        often = "" if self.passes is None else f", {about}{_few_digits(self.passes)} passes over the text"
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}{short}"
        return f"{documents}; {self.held_out:.1%} held out{has}; this run reads {self.tokens_read:,} tokens{often}"


def _few_digits(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a checkpoint says of its run. Fields with a default are missing in checkpoints of earlier versions.

    Attributes:
        rows: fingerprint of the text that is trained on.
        widths: of the sites.
        scales: of the sites: what activations, less their mean, are multiplied by.
        norm_limits: of the sites: the norm above which a token is dropped; infinite where there is none.
        means: of the sites [D]; empty without `activations.center`.
        l1_coefficients: of the SAEs of each stack, at this step; the config's where `target_l0` does not move them.
        held_out: fingerprint of the held-out text; "" in earlier checkpoints.
        lm: fingerprint of the language model; empty in earlier checkpoints.
        lms: fingerprints of the other language models, by name.
        starts: fingerprints of what stacks started from, by stack.
        buffer: whether the exchange buffer is saved.
        machine: what must be the same for a run to continue bit for bit: devices, mesh, versions.
        skips: of SAEs that skip updates, since which step, and the tokens of that call.
        text: how much text there is, and how much of it the run reads; None in earlier checkpoints.
        lengths: each `train.steps` that the run has had ("steps"), from which step on ("since"), and how many tokens
            of the text it reads at most in one pass ("tokens"); empty in earlier checkpoints.
        held_out_tokens: how many of the held-out text `held_out` is the fingerprint of; 0 in earlier checkpoints.
        code: fingerprints of the files of architectures that are not the package's, by stack.
    """

    rows: str
    widths: dict[str, int] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    norm_limits: dict[str, float] = dataclasses.field(default_factory=dict)
    means: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    l1_coefficients: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    held_out: str = ""
    lm: dict[str, str] = dataclasses.field(default_factory=dict)
    starts: dict[str, str] = dataclasses.field(default_factory=dict)
    buffer: bool = True
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    skips: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    text: Text | None = None
    lengths: list[dict[str, int]] = dataclasses.field(default_factory=list)
    held_out_tokens: int = 0
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    lms: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes back; JSON has no infinity, so a norm limit that there is not is null."""
        limits = {site: limit if math.isfinite(limit) else None for site, limit in self.norm_limits.items()}
        return dataclasses.asdict(self) | {"norm_limits": limits}

    @classmethod
    def from_json(cls, tree: Any) -> "Facts":
        """The facts of a JSON object; fields of later versions are left out.

        Raises:
            ValueError: a field that is missing, of another type, or a number that training does not give.
        """
        if not isinstance(tree, Mapping):
            raise ValueError("they are no object")
        known = {}
        for field in dataclasses.fields(cls):
            if field.name in tree and not (field.name in ("held_out", "lm", "text") and tree[field.name] is None):
                known[field.name] = _checked(field.name, tree[field.name])
        if "rows" not in known:
            raise ValueError("rows is missing")
        return cls(**known)

    def check(self, config: Experiment) -> None:
        """Raises `ValueError` where they are not those of a run of this config."""
        for name, stack in config.stacks.items():
            for site in (*stack.sites, *stack.targets):
                for field in ("widths", "scales", "norm_limits"):
                    if site not in getattr(self, field):
                        raise ValueError(f"{field} has no {site}")
                if config.activations.center and len(self.means.get(site, ())) != self.widths[site]:
                    raise ValueError(f"means has no mean of width {self.widths[site]} for {site}")
            if len(self.l1_coefficients.get(name, stack.numbers())) != len(stack):
                raise ValueError(f"l1_coefficients does not have one value for each SAE of {name}")


def _checked(name: str, value: Any) -> Any:
    kinds: dict[str, type] = {"rows": str, "held_out": str, "buffer": bool, "lengths": list, "held_out_tokens": int}
    if not isinstance(value, kinds.get(name, dict)):
        raise ValueError(f"{name} is a {type(value).__name__}")
    if isinstance(value, int) and name == "held_out_tokens":
        return _number(name, value, 0, 2**63, int)
    if isinstance(value, list):
        return [_length(item) for item in value]
    if not isinstance(value, dict):
        return value
    if name == "text":
        return Text.from_json(value)
    if name == "widths":
        return {site: _number(f"{name} of {site}", width, 1, INT32, int) for site, width in value.items()}
    if name == "scales":
        return {site: _number(f"{name} of {site}", scale, 1e-30) for site, scale in value.items()}
    if name == "norm_limits":
        return {
            site: math.inf if limit is None else _number(f"{name} of {site}", limit) for site, limit in value.items()
        }
    if name in ("means", "l1_coefficients"):
        least = -FLOAT32 if name == "means" else 0.0
        if not all(isinstance(numbers, list) for numbers in value.values()):
            raise ValueError(f"{name} has an entry that is no list")
        return {
            key: [_number(f"{name} of {key}", number, least) for number in numbers] for key, numbers in value.items()
        }
    return value


def _length(item: Any) -> dict[str, int]:
    if not isinstance(item, Mapping) or item.keys() != {"since", "steps", "tokens"}:
        raise ValueError("lengths has an entry without since, steps and tokens")
    return {key: _number(f"{key} of lengths", value, 0, 2**63, int) for key, value in item.items()}


def _number(what: str, value: Any, least: float = 0.0, most: float = FLOAT32, kind: type = float) -> Any:
    fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not fits or not least <= value <= most:
        raise ValueError(f"{what} is {value!r}; it is not from {least:g} to {most:g}")
    return kind(value)
