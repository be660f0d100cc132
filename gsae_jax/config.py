"""An experiment as frozen dataclasses, which hold every setting once: type, default, check, and a sentence about it.

The `ConfigDict` that a config file changes is made from them in `experiments/`. `config_trees.from_dict` makes one of
them from it again, and nothing below sees it. Whatever can be checked without reading a model or a data set is checked
here. `python -m gsae_jax.settings` lists every setting.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal

from gsae_jax import plugins
from gsae_jax.errors import UserError

INT32 = 2**31 - 1  # devices count steps, tokens and features in 32 bits
FLOAT32 = 3.4e38  # and no number in a config may be infinite there
SMALL, LARGE = 1e-30, 1e30  # products of numbers between these, such as squares of gradients, mostly stay in float32


Dtype = Literal["float32", "bfloat16"]
SAME = object()  # the value of `earlier` for a field whose default is what runs without the field did
RESAMPLE_WARMUP = 1000  # the default of `Train.resample_warmup_steps`
KL_WEIGHT = 0.5  # the default of `Stack.kl_weight`
NO_MODEL = "none"  # the `lm.path` of a run from a store without a language model
REQUIRED: Any = dataclasses.MISSING  # the default of a field that every config must give


def setting(default: Any, about: str = "", earlier: Any = dataclasses.MISSING) -> Any:
    """A field of a config, for use in the dataclasses below.

    Args:
        default: its value in a new config. A class (a group of fields, or `dict`) is called for it.
        about: one sentence for the user. A group needs none, because it has the docstring of its class.
        earlier: its value for runs that began before the field existed. `SAME` stands for the default. A field
            without `earlier` has been in the first version already, so that every run has recorded it.
    """
    metadata: dict[str, Any] = {"about": about, "earlier": default if earlier is SAME else earlier}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class LM:
    """The language model whose activations are studied."""

    path: str = setting(
        "", "Hugging Face checkpoint directory or hub name; '' = the embedded model; none = none, with a store."
    )
    dtype: Dtype = setting("float32", "Type of the language model and the exchange buffer.")
    revision: str = setting("", "Branch, tag or commit of a hub name; a run records the commit.", SAME)


@dataclasses.dataclass(frozen=True)
class Data:
    """Text, and how it becomes rows of tokens."""

    corpus: str = setting("stdlib", "stdlib (the library of this Python), text (your files), or tfds (a data set).")
    path: str = setting("", "text: a file, folder or glob of .txt, .md, .json, .jsonl or .parquet, compressed or not.")
    field: str = setting("text", "Field of a JSON object, column of a .parquet, feature of a TFDS set; a.b is nested.")
    separator: str = setting("", "text: separator of the documents in a .txt or .md file; '' = a file is one document.")
    name: str = setting("", "tfds: name of the data set, such as wiki40b/en.")
    train_split: str = setting("train", "Split to train on, in the notation of TFDS, such as train[:90%].")
    test_split: str = setting("test", "Split to measure on.")
    data_dir: str = setting("", "Directory of prepared data; '' = $TFDS_DATA_DIR, or ~/tensorflow_datasets.")
    context_length: int = setting(128, "Tokens in a row, BOS included.")
    prepend_bos: bool = setting(True, "Whether every row begins with BOS.")
    pack: Literal["stream", "documents"] = setting(
        "stream", "stream: rows are cut from one stream of all text; documents: each row begins with a document.", SAME
    )
    held_out: Literal["hash", "position"] = setting(
        "hash", "text: text is held out by its hash, or by its position.", earlier="position"
    )
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "text: whether a row without text is an error or is skipped.", SAME
    )
    source: str = setting("", "store:PATH = activations of a store; '' = the language model runs over the text.", SAME)
    chat: str = setting(
        "", "text: field with a list of messages, which the model's chat template makes a text of; '' = none.", SAME
    )
    roles: tuple[str, ...] = setting(
        (), "Roles of the messages whose content SAEs see, such as ('assistant',), with data.chat; () = all text.", SAME
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpus", plugins.absolute(self.corpus))
        _at_least("context_length", self.context_length, 2)
        if self.pack == "documents" and self.corpus == "text" and self.held_out == "position":
            raise UserError(
                "is 'documents', but data.held_out='position' cuts documents in two; write data.held_out='hash', or "
                "'stream'",
                "pack",
            )
        if self.chat and (self.corpus != "text" or self.held_out == "position"):
            field, value = ("corpus", "text") if self.corpus != "text" else ("held_out", "hash")
            raise UserError(f"is {self.chat!r}, which needs data.{field}={value!r}; write that, or ''", "chat")
        if self.roles and not self.chat:
            raise UserError(
                f"is {self.roles}, but only messages have roles; write data.chat='messages' for the field that has "
                "them, or ()",
                "roles",
            )


@dataclasses.dataclass(frozen=True)
class Activations:
    """How tokens become SAE inputs."""

    rows_per_forward: int = setting(32, "Rows of tokens in one forward pass of the language model.")
    buffer_size: int = setting(2**20, "Activations in the exchange buffer, on all devices together.")
    scale_tokens: int = setting(
        2**16, "Tokens used before training to measure each site's mean, scale and median norm."
    )
    drop_special_tokens: bool = setting(
        True, "Exclude BOS, EOS, padding and other special tokens from training and metrics."
    )
    max_norm_multiple: float = setting(
        0.0, "Drop tokens whose norm is more than this many times the median; 0 = keep all."
    )
    center: bool = setting(True, "Subtract each site's mean from inputs; False = the paper's units.", earlier=False)

    def __post_init__(self) -> None:
        _at_least("rows_per_forward", self.rows_per_forward, 1)
        _at_least("scale_tokens", self.scale_tokens, 1)
        if self.max_norm_multiple != 0 and self.max_norm_multiple <= 1:
            raise UserError(
                f"is {self.max_norm_multiple:g}; write 0 to keep every token, or a multiple of the median norm above 1",
                "max_norm_multiple",
            )


def model_of(site: str) -> str:
    """The name, in `Experiment.lms`, of the language model that a site is of; "" for `Experiment.lm`."""
    return site.partition("@")[2]


class Sites:
    """Something that reads one site or several, and writes the same or others."""

    site: str | tuple[str, ...]
    target: str | tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that it reads."""
        return (self.site,) if isinstance(self.site, str) else self.site

    @property
    def targets(self) -> tuple[str, ...]:
        """The sites that it writes; by default those that it reads."""
        return ((self.target,) if isinstance(self.target, str) else self.target) if self.target else self.sites

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the language models that its sites are of (`model_of`), each once."""
        return tuple(dict.fromkeys(map(model_of, (*self.sites, *self.targets))))


@dataclasses.dataclass(frozen=True)
class Stack(Sites):
    """SAEs of one architecture, width and site. They differ in λ, learning rate or seed, and train together.

    The i-th SAE has the i-th value of `l1_coefficients`, `learning_rates`, `seeds` and, if it is given, `target_l0`. A
    tuple of length 1 is for every SAE. `stack_config(..., grid=True)` makes an SAE for each combination.
    """

    architecture: str = setting(
        REQUIRED,
        "gated, signed_gated, relu, relu_april, jumprelu, topk, batch_topk, matryoshka, gated_batch_topk; "
        "gated_transcoder, relu_crosscoder and their like; or your own: my_package.tanh.",
    )
    site: str | tuple[str, ...] = setting(
        REQUIRED,
        "Site to read: a TransformerLens hook name, or HOOK@NAME of the model lms.NAME; or a tuple of several.",
    )
    width: int = setting(REQUIRED, "Features (the paper's M).")
    l1_coefficients: tuple[float, ...] = setting(
        (),
        "Weight λ of the sparsity penalty: L1, or L0 for jumprelu; () for architectures that have none, such as topk. "
        "With target_l0, () is 0.01, from where the search starts.",
    )
    learning_rates: tuple[float, ...] = setting((), "Learning rates after warm-up; () = the architecture's own.")
    seeds: tuple[int, ...] = setting((0,), "Seeds of the initial parameters.")
    options: dict[str, Any] = setting(dict, "Fields of the architecture's Config, such as tie_encoder=False.")
    target_l0: tuple[float, ...] = setting(
        (), "Target L0: training adjusts l1_coefficients until each SAE reaches it; () = no target.", SAME
    )
    start_from: str = setting("", "RUN:STACK or a folder of SAEs to start from; '' = random parameters.", SAME)
    target: str | tuple[str, ...] = setting(
        "", "Site to reconstruct, named like `site`, such as that of a transcoder; '' = the site that is read.", SAME
    )
    b1: float | None = setting(
        None, "Adam's decay rate of first moments (β₁); 0 = none are kept; None = the architecture's own value.", 0.0
    )
    b2: float | None = setting(
        None, "Adam's decay rate of second moments (β₂); None = the architecture's own value.", 0.999
    )
    clip_norm: float | None = setting(
        None,
        "Largest norm of an SAE's gradient, of squared errors summed over a site; 0 = no limit; None = as for b1.",
        0.0,
    )
    coefficient_warmup_fraction: float | None = setting(
        None,
        "Fraction of training in which the l1 coefficient rises from 0, or the option initial_k falls to k; 0 = none; "
        "None = as for b1.",
        0.0,
    )
    kl_fraction: float = setting(
        0.0,
        "Fraction of training, at its end, whose loss has the KL divergence of the language model's predictions with "
        "the SAE spliced in; 0 = none, 1 = all of training.",
        SAME,
    )
    kl_weight: float = setting(
        KL_WEIGHT, "Share of the squared error that the KL divergence replaces in that part; 1 = all of it.", SAME
    )

    def __len__(self) -> int:
        return max(len(self.l1_coefficients), len(self.learning_rates), len(self.seeds), len(self.target_l0))

    def numbers(self) -> list[tuple[float, float, int]]:
        """(l1_coefficient, learning_rate, seed) of each SAE; NaN for what the stack does not have."""
        columns = (self.l1_coefficients or (math.nan,), self.learning_rates or (math.nan,), self.seeds)
        return list(zip(*(column * len(self) if len(column) == 1 else column for column in columns), strict=True))

    def __post_init__(self) -> None:
        object.__setattr__(self, "architecture", plugins.absolute(self.architecture))
        _at_least("width", self.width, 1)
        for field in ("l1_coefficients", "learning_rates", "seeds", "target_l0"):
            values = getattr(self, field)
            if field != "seeds" and not values:  # `contract` knows who needs one
                continue
            if not values:
                raise UserError("has no values; write one for all SAEs of the stack, or one for each", field)
            if len(values) not in (1, len(self)):
                how = "stack_config(..., grid=True) for every combination"
                if self.target_l0 and field in ("l1_coefficients", "target_l0"):
                    how = "one λ in l1_coefficients, which target_l0 adjusts for each SAE"
                raise UserError(
                    f"has {len(values)} values; write 1 or {len(self)}, as many as the stack has SAEs, or {how}", field
                )
        _seed("seeds", *self.seeds)
        if min(self.l1_coefficients, default=0) < 0:
            raise UserError(f"has a negative value: {self.l1_coefficients}; write numbers >= 0", "l1_coefficients")
        if min(self.learning_rates, default=1) <= 0:
            raise UserError(f"is {self.learning_rates}; write numbers above 0", "learning_rates")
        if self.target_l0 and (min(self.target_l0) <= 0 or max(self.target_l0) >= self.width):
            raise UserError(
                f"is {self.target_l0}; write active features per token, above 0 and below the width",
                "target_l0",
            )
        for field, names in (("site", self.sites), ("target", self.targets)):
            if not names or len(set(names)) < len(names):
                raise UserError(f"is {names}; write one site, or several that differ", field)
            if isinstance(getattr(self, field), tuple) and len(names) == 1:
                object.__setattr__(self, field, names[0])
        for field, most in (("b1", 1.0), ("b2", 1.0), ("clip_norm", INT32), ("coefficient_warmup_fraction", 2 / 3)):
            value = getattr(self, field)
            if value is not None and not 0 <= value < most:
                raise UserError(f"is {value:g}; write a number from 0 to below {most:.4g}", field)
        if not 0 <= self.kl_fraction <= 1:
            raise UserError(
                f"is {self.kl_fraction:g}; write a fraction of training from 0 (none) to 1 (all of it)", "kl_fraction"
            )
        if not 0 < self.kl_weight <= 1:
            raise UserError(
                f"is {self.kl_weight:g}; write a share above 0 and at most 1, or kl_fraction=0 to train without the "
                "KL divergence",
                "kl_weight",
            )
        if self.kl_fraction and len(self.targets) > 1:
            raise UserError(
                f"is {self.kl_fraction:g}, but the stack writes {len(self.targets)} sites, and the KL divergence is "
                "of reconstructions at one; write 0",
                "kl_fraction",
            )
        if self.target_l0 and min(self.l1_coefficients, default=1) == 0:
            raise UserError(
                "has a 0, but target_l0 needs a positive value to start from; write a first guess such as 0.01",
                "l1_coefficients",
            )


@dataclasses.dataclass(frozen=True)
class Train:
    """The optimisation of every stack."""

    steps: int = setting(10_000, "SAE updates.")
    batch_size: int = setting(4096, "Activations in one SAE update, on all devices together.")
    warmup_steps: int = setting(1000, "Warm-up steps, in which the learning rate rises to its full value.")
    decay_fraction: float = setting(
        0.0,
        "Fraction of training, at its end, in which the learning rate decays to 0 along a cosine; 0 = none.",
    )
    compute_dtype: Dtype = setting("float32", "Type of the SAEs' matrix products; bfloat16 suits accelerators.")
    step: Literal["auto", "dense", "sparse"] = setting(
        "auto",
        "sparse: gradients of active features only; dense: of all; auto: sparse for wide stacks on CPUs.",
        earlier="dense",
    )
    log_every: int = setting(50, "Steps between lines of metrics, rounded, as one forward pass gives several updates.")
    resample_steps: tuple[int, ...] = setting(
        (), "Steps after which dead features are re-initialised; () = never.", SAME
    )
    resample_warmup_steps: int = setting(
        RESAMPLE_WARMUP,
        "Steps after resampling in which the learning rate rises from a tenth to its full value.",
        SAME,
    )
    dead_after: int = setting(1000, "A feature is dead if it has not fired for this many steps.", SAME)
    max_skipped: int = setting(100, "Training stops after this many consecutive non-finite updates of one SAE.", SAME)

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "log_every", "resample_warmup_steps", "dead_after", "max_skipped"):
            _at_least(field, getattr(self, field), 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        if self.warmup_steps >= self.steps:
            raise UserError(f"is {self.warmup_steps}; write less than train.steps ({self.steps})", "warmup_steps")
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(
                f"is {self.decay_fraction:g}; write a fraction of training from 0 (constant rate) to 1",
                "decay_fraction",
            )


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work."""

    data: int = setting(0, "Devices along the batch axis; 0 = all devices, divided by `latent`.")
    latent: int = setting(1, "Devices along the axis of features.")

    def __post_init__(self) -> None:
        _at_least("data", self.data, 0)
        _at_least("latent", self.latent, 1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When to save, what to save, and which checkpoints to keep."""

    every: int = setting(1000, "Steps between checkpoints.")
    keep: int = setting(2, "Number of latest checkpoints to keep.")
    keep_every: int = setting(0, "Also keep checkpoints at least this many steps apart; 0 = none.", SAME)
    keep_best: str = setting(
        "",
        "Also keep the checkpoint with the lowest STACK/loss or STACK/mse, after the warm-up of λ or k and the search "
        "for target_l0; '' = none.",
        SAME,
    )
    buffer: bool = setting(True, "Save the exchange buffer; if False, a resumed run fills it with new text.", SAME)

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        _at_least("keep", self.keep, 1)
        _at_least("keep_every", self.keep_every, 0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The held-out measurement at the end of training."""

    tokens: int = setting(2**17, "Held-out tokens.")
    rows_per_forward: int = setting(32, "Rows of tokens in one forward pass of the language model.")

    def __post_init__(self) -> None:
        _at_least("tokens", self.tokens, 1, most=2**62)  # as far as the text goes
        _at_least("rows_per_forward", self.rows_per_forward, 1)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What SAEs are measured with: the language models, the text, and how much of it."""

    lm: LM
    data: Data
    evaluation: Evaluation
    drop_special_tokens: bool
    lms: dict[str, LM] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run: a language model, text, stacks of SAEs, and how they are trained and measured."""

    seed: int = setting(0, "Seed of the data order and the exchange buffer; SAEs have their own seeds.")
    lm: LM = setting(LM)
    lms: dict[str, LM] = setting(
        dict, "Other language models by name, such as a finetune; a stack reads their sites as HOOK@NAME.", {}
    )
    data: Data = setting(Data)
    activations: Activations = setting(Activations)
    stacks: dict[str, Stack] = setting(dict)
    train: Train = setting(Train)
    mesh: Mesh = setting(Mesh)
    checkpoint: Checkpoint = setting(Checkpoint)
    evaluation: Evaluation = setting(Evaluation)
    loggers: tuple[str, ...] = setting(
        ("tensorboard",), "Where metrics also go, besides metrics.jsonl: tensorboard, wandb.", SAME
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "loggers", tuple(map(plugins.absolute, self.loggers)))
        _seed("seed", self.seed)
        if not self.stacks:
            raise UserError(
                "is empty; add one, for example `config.stacks.gated = gsae_jax.stack_config('gated', ...)`", "stacks"
            )
        for name in self.stacks:
            # It becomes part of SAEs' names, of keys in files and of the report's text.
            if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII):
                raise UserError(f"has the name {name!r}; write up to 100 letters, digits, _ and -", "stacks")
        if self.lm.path == NO_MODEL and not self.data.source:
            raise UserError(f"is {NO_MODEL!r}, which needs data.source='store:PATH'; write one of the two", "lm.path")
        self._check_models()
        fresh = self.activations.rows_per_forward * self.data.context_length
        batch = self.train.batch_size
        if fresh % batch and batch % fresh:
            raise UserError(
                f"is {batch}, but one forward pass gives {fresh} activations "
                "(activations.rows_per_forward x data.context_length); write a divisor or a multiple of that",
                "train.batch_size",
            )
        if self.activations.buffer_size < batch or self.activations.buffer_size % batch:
            raise UserError(
                f"is {self.activations.buffer_size}; write a multiple of train.batch_size ({batch}), at least 1x",
                "activations.buffer_size",
            )

        if self.train.steps % (each := self.updates_per_call):
            below = self.train.steps // each * each
            near = f"{below} or {below + each}" if below else f"{each}"
            raise UserError(
                f"is {self.train.steps}; write a multiple of {each}, the updates of one forward pass, such as {near}",
                "train.steps",
            )

        # Features are dead after so many steps at the earliest, and those that begin again need a call to train in.
        earliest, last = self.train.dead_after, self.train.steps - self.updates_per_call
        if self.train.resample_steps and last < earliest:
            raise UserError(
                f"is {self.train.resample_steps}, but this run has no step to resample at: no feature counts as "
                f"dead before step {earliest} (train.dead_after), and step {last} is the last to resample at; lower"
                " train.dead_after, raise train.steps, or write ()",
                "train.resample_steps",
            )
        if any(not earliest <= step <= last for step in self.train.resample_steps):
            raise UserError(
                f"is {self.train.resample_steps}; write steps from {earliest} (train.dead_after) to {last}",
                "train.resample_steps",
            )
        best, _, statistic = self.checkpoint.keep_best.partition("/")
        if self.checkpoint.keep_best and (best not in self.stacks or statistic not in ("loss", "mse")):
            raise UserError(
                f"is {self.checkpoint.keep_best!r}; write STACK/loss or STACK/mse, where STACK is one of "
                f"{', '.join(self.stacks)}",
                "checkpoint.keep_best",
            )
        for name, stack in self.stacks.items():
            if stack.kl_fraction and self.data.source:
                raise UserError(
                    f"is {stack.kl_fraction:g}, but the KL divergence needs the language model in training; write 0, "
                    "or data.source=''",
                    f"stacks.{name}.kl_fraction",
                )
            if stack.kl_fraction and batch % self.data.context_length:
                raise UserError(
                    f"is {batch}, but stacks.{name}.kl_fraction needs whole rows in an update; write a multiple of "
                    f"data.context_length ({self.data.context_length})",
                    "train.batch_size",
                )
            if stack.target_l0 and self.train.steps < 2:
                raise UserError(f"is 1, too few to reach stacks.{name}.target_l0; write more", "train.steps")
            if stack.target_l0 and self.train.warmup_steps >= 2 * self.train.steps // 3:
                raise UserError(
                    f"is {self.train.warmup_steps}, but stacks.{name}.target_l0 is reached between warm-up and "
                    f"two thirds of training; write less than {2 * self.train.steps // 3}",
                    "train.warmup_steps",
                )

    def check_new(self) -> None:
        """Raises `UserError` for what earlier versions accepted, so that only new runs are refused."""
        check_floats(self)
        for name, stack in self.stacks.items():
            if stack.kl_weight != KL_WEIGHT and not stack.kl_fraction:
                raise UserError(
                    f"is {stack.kl_weight:g}, but without kl_fraction nothing is trained on the KL divergence; write "
                    f"kl_fraction=0.1 as well, or {KL_WEIGHT}",
                    f"stacks.{name}.kl_weight",
                )
            targets = stack.target_l0 if len(stack.target_l0) == len(stack) else (None,) * len(stack)
            if not stack.start_from and len({*zip(stack.numbers(), targets, strict=True)}) < len(stack):
                raise UserError(
                    f"is {stack.seeds}, but SAEs of the stack are the same; write other seeds, or leave out copies",
                    f"stacks.{name}.seeds",
                )
        warmup = self.train.resample_warmup_steps
        if warmup != RESAMPLE_WARMUP and not self.train.resample_steps:
            raise UserError(
                f"is {warmup}, but without train.resample_steps no feature begins again; write those, or "
                f"{RESAMPLE_WARMUP}",
                "train.resample_warmup_steps",
            )
        best = self.checkpoint.keep_best.partition("/")[0]
        if best and 0 < self.stacks[best].kl_fraction < 1:
            raise UserError(
                f"is {self.checkpoint.keep_best!r}, but what training minimises changes when the part of "
                f"stacks.{best}.kl_fraction begins, so that earlier and later values do not compare; write ''",
                "checkpoint.keep_best",
            )
        end = 2 * self.train.steps // 3
        for name, stack in self.stacks.items():
            fraction = stack.coefficient_warmup_fraction or 0.0
            if stack.target_l0 and math.ceil(fraction * self.train.steps) >= end:
                most = math.floor(100 * (end - 1) / self.train.steps) / 100
                raise UserError(
                    f"is {fraction:g}, but stacks.{name}.target_l0 is reached between warm-up and two thirds of "
                    f"training; write at most {most:g}",
                    f"stacks.{name}.coefficient_warmup_fraction",
                )

    def _check_models(self) -> None:
        """Raises `UserError` for a model without a site, a site without a model, or models that are not read."""
        if self.lms and self.data.source:
            raise UserError(
                f"is {self.data.source!r}, but a store has the activations of one model; write '', or leave out lms",
                "data.source",
            )
        for name in self.lms:
            if not re.fullmatch(r"[\w-]{1,100}", name, re.ASCII):  # it becomes part of the names of sites
                raise UserError(f"has the name {name!r}; write up to 100 letters, digits, _ and -", "lms")
        for name, stack in self.stacks.items():
            for field, sites in (("site", stack.sites), ("target", stack.targets)):
                for site in sites:
                    if (model := model_of(site)) not in {"", *self.lms} or site.endswith("@"):
                        known = f"write one of {', '.join(self.lms)}" if self.lms else f"set lms.{model or 'NAME'}.path"
                        raise UserError(
                            f"has {site!r}, but lms has no language model {model!r}; {known}, or leave out the @",
                            f"stacks.{name}.{field}",
                        )
        read = set(map(model_of, self.sites))
        for name, lm in self.lms.items():
            if lm.path == NO_MODEL or (lm.path, lm.revision) == (self.lm.path, self.lm.revision):
                what = "" if lm.path == NO_MODEL else ", as lm.path is"
                raise UserError(f"is {lm.path!r}{what}; write the path of the other model", f"lms.{name}.path")
            if name not in read:
                raise UserError(
                    f"is read by no stack; write a site such as HOOK@{name}, or leave it out", f"lms.{name}"
                )
        if "" not in read:
            raise UserError(
                f"is read by no stack; write the model of lms.{self.sites[0].partition('@')[2]} here, and its sites "
                "without the @",
                "lm",
            )

    def lm_of(self, site: str) -> LM:
        """The language model that a site is of."""
        return self.lms[model_of(site)] if model_of(site) else self.lm

    @property
    def sites(self) -> list[str]:
        """The sites that any stack reads or writes, each once."""
        return sorted({site for stack in self.stacks.values() for site in (*stack.sites, *stack.targets)})

    @property
    def updates_per_call(self) -> int:
        """SAE updates in one call of the train program."""
        return max(1, self.activations.rows_per_forward * self.data.context_length // self.train.batch_size)

    @property
    def resampled_at(self) -> tuple[int, ...]:
        """`train.resample_steps`, as ends of calls of the train program."""
        per_call = self.updates_per_call
        return tuple(sorted({-(-step // per_call) * per_call for step in self.train.resample_steps}))

    def kl_start(self, stack: str, steps: int | None = None) -> int:
        """The step from which the loss of a stack has the KL divergence; `steps` where no step has it.

        It is the end of a call of the train program. `steps` is the length of training, by default that of the config.
        """
        steps, fraction = self.train.steps if steps is None else steps, self.stacks[stack].kl_fraction
        calls = max(1, round(fraction * steps / self.updates_per_call)) if fraction else 0
        return steps - calls * self.updates_per_call

    def kl_stacks(self, step: int) -> tuple[str, ...]:
        """The stacks whose loss has the KL divergence in the call of the train program that begins at this step."""
        return tuple(name for name in self.stacks if self.kl_start(name) <= step < self.train.steps)

    @property
    def forwards_per_call(self) -> int:
        """Forward passes of the language model in one call of the train program."""
        return max(1, self.train.batch_size // (self.activations.rows_per_forward * self.data.context_length))

    @property
    def rows_per_call(self) -> int:
        """Rows of tokens that one call of the train program consumes."""
        return self.forwards_per_call * self.activations.rows_per_forward


@dataclasses.dataclass(frozen=True)
class PretrainModel:
    """The shape of a GELU model, in the names of TransformerLens. By default half the width of GELU-1L."""

    n_layers: int = setting(1, "Blocks.")
    d_model: int = setting(256, "Width of the residual stream.")
    n_heads: int = setting(4, "Attention heads in a block.")
    d_head: int = setting(64, "Width of a head.")
    d_mlp: int = setting(1024, "Neurons of an MLP.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _at_least(field.name, getattr(self, field.name), 1, most=2**20)
        each = 4 * self.d_model * self.n_heads * self.d_head + 2 * self.d_model * self.d_mlp
        if (parameters := self.n_layers * each) > 2**30:
            raise UserError(f"has {parameters:,} parameters in its blocks; write sizes that give at most {2**30:,}")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Training a small language model and its tokenizer from text. The embedded model was made with the defaults."""

    seed: int = setting(0, "Seed of the initial parameters and the data order.")
    data: Data = setting(Data)
    vocab_size: int = setting(4096, "Tokens of the tokenizer.")
    model: PretrainModel = setting(PretrainModel)
    epochs: float = setting(3.0, "Number of passes over the text.")
    batch_size: int = setting(64, "Rows of data.context_length tokens in one update.")
    learning_rate: float = setting(3e-3, "Learning rate after warm-up; it then falls to zero as a cosine.")
    b2: float = setting(0.95, "Adam's decay rate of second moments (beta2).")
    weight_decay: float = setting(0.05, "Weight decay of matrices.")
    warmup_steps: int = setting(200, "Warm-up steps, in which the learning rate rises to its full value.")
    test_tokens: int = setting(2**18, "Held-out tokens to measure the cross-entropy on.")

    def __post_init__(self) -> None:
        _seed("seed", self.seed)
        check_floats(self)
        _at_least("vocab_size", self.vocab_size, 257, most=2**20)  # every byte, and <|endoftext|>
        if self.data.chat:
            raise UserError(
                f"is {self.data.chat!r}, but the new tokenizer has no chat template; write '', and data.field",
                "data.chat",
            )
        for field in ("batch_size", "test_tokens"):
            _at_least(field, getattr(self, field), 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        for field, least, most in (("epochs", SMALL, 1e6), ("learning_rate", SMALL, 1.0), ("weight_decay", 0.0, 100.0)):
            if not least <= getattr(self, field) <= most:
                wanted = f"a number from {least:g} to {most:g}" if not least else f"a positive number up to {most:g}"
                raise UserError(f"is {getattr(self, field):g}; write {wanted}", field)
        if not 0 <= self.b2 < 1:
            raise UserError(f"is {self.b2:g}; write a number from 0 to below 1", "b2")
        if self.data.source:
            raise UserError(
                f"is {self.data.source!r}, but a language model is trained from text; write ''", "data.source"
            )


def check_floats(config: Any) -> None:
    """Raises `UserError` for a number in a dataclass that float32 may make 0 or infinite."""
    for field, value in _floats(dataclasses.asdict(config)):
        if value and not SMALL <= abs(value) <= LARGE:
            raise UserError(f"is {value:g}; write 0, or a number from {SMALL:g} to {LARGE:g} in size", field)


def _floats(tree: Any, field: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested dicts and tuples, and the fields that they are in."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _floats(value, f"{field}.{name}" if field else str(name))
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _floats(value, field)
    elif isinstance(tree, float):
        yield field, tree


def changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not the default."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }
    return {name: getattr(config, name) for name, default in defaults.items() if getattr(config, name) != default}


def fingerprint(*parts: Any) -> str:
    """A short name for JSON-able values: equal values, equal names."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _at_least(field: str, value: int, least: int, most: int = INT32) -> None:
    if value < least:
        raise UserError(f"is {value}; write {least} or more", field)
    if value > most:
        raise UserError(f"is {value}; write {most} or less", field)


def _seed(field: str, *seeds: int) -> None:
    if min(seeds) < 0 or max(seeds) > INT32:
        raise UserError(f"is {', '.join(map(str, seeds))}; write integers from 0 to {INT32}", field)
