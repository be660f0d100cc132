"""Text -> rows of tokens of one length -> an endless, shuffled, resumable stream of batches (Grain).

The tokens of a split are one flat file (`data.tokens`), so that any row can be read at random. The rows of a batch
depend only on the seed and the step, and a position in the stream is one integer.

Every document is followed by the tokenizer's EOS (BOS where it has no EOS). Rows are cut from this stream by
`data.pack`:

- "stream": one row begins where the row before ends, mostly in the middle of a document. All text is used.
  Documents of one row see each other behind an EOS, as in the training of most language models.
- "documents": each row is the beginning of one document, for language models that were trained on one document at a
  time. The rest of the document is left out, and so are documents that are shorter than a row. So rows have no
  padding: no compute is spent on it, and no metric has to leave it out. `data.context_length` decides how much is
  used; a run says how many documents are too short.

With `data.prepend_bos` each row starts with BOS, as language models expect of position 0.

With `data.chat` a document is a conversation, as the chat template of the tokenizer makes it. If it ends with EOS, none
follows. A BOS at its beginning is left out where rows start with BOS, so that no row has two. With `data.roles`, a
token that SAEs are not to see is `~token` in rows, a negative number (`activations.masking` reads it).
"""

import contextlib
import copy
import dataclasses
import io
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging as absl_logging
from etils import epy

from gsae_jax import config as config_lib
from gsae_jax import errors, plugins
from gsae_jax.data import chat as chat_lib
from gsae_jax.data import progress
from gsae_jax.data import tokens as tokens_lib
from gsae_jax.errors import UserError
from gsae_jax.storage import paths

with epy.lazy_imports():  # who trains on tokens of their own needs neither
    import grain
    import tensorflow_datasets as tfds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much text a split has, also beyond the tokens that a run needs.

    Attributes:
        texts: how many its data set has. The corpus `text` divides long documents into several, by what is held out.
        documents: how many documents all splits come from, where the corpus has counted them.
        bytes: of the split on disk; 0 where TFDS does not know it.
        tokens: of all its texts, with separators; None where earlier versions did not count what this needs.
        rows: how many rows all its texts give; also None then.
        is_estimate: tokens and rows are estimated from the texts that were tokenized.
    """

    texts: int
    documents: int | None
    bytes: int
    tokens: int | None
    rows: int | None
    is_estimate: bool


class TokenRows:
    """A random-access source of rows [T] of int32 over a flat array of tokens; negative ones are `~token`."""

    def __init__(
        self,
        tokens: tokens_lib.TokenFile,
        context_length: int,
        bos: int | None,
        limit: int | None,
        source: Any,
        split: str,
        are_documents: bool = False,
    ):
        """Rows of the first `limit` tokens, which are from the texts of `source`, a TFDS split of this name.

        `are_documents`: each row begins a document, and documents that are shorter than a row are left out.
        """
        self._are_documents = are_documents
        self._tokens, self._bos, self._source, self._split = tokens, bos, source, split
        self._stride = context_length - (bos is not None)
        self._rows = (len(tokens) if limit is None else min(limit, len(tokens))) // self._stride

    def documents(self, rows: int) -> np.ndarray:
        """The number of the conversation in which each of the first `rows` rows begins."""
        return np.searchsorted(self._tokens.starts, np.arange(rows) * self._stride, "right") - 1

    def limited(self, tokens: int) -> "TokenRows":
        """Only the rows that the first so many tokens give."""
        rows = copy.copy(self)
        rows._rows = min(tokens, len(self._tokens)) // self._stride
        return rows

    def __len__(self) -> int:
        return self._rows

    @property
    def why_few(self) -> str:
        """`: N of M documents are shorter than a row ...`, where this is why there are few rows; else empty."""
        texts, rows = len(self._source), len(self._tokens) // self._stride
        if not self._are_documents or not self._tokens.known["complete"] or rows >= texts:
            return ""
        length = self._stride + (self._bos is not None)
        return (
            f": with data.pack='documents', {texts - rows:,} of {texts:,} documents are too short for a row of "
            f"data.context_length={length}; lower data.context_length"
        )

    def shares_text(self, other: "TokenRows") -> bool:
        """Whether the splits of the two, of one data set, have an example in common."""
        ours, theirs = (each._source.dataset_info.splits[each._split].file_instructions for each in (self, other))
        return any(
            a.filename == b.filename and a.skip < b.skip + b.take and b.skip < a.skip + a.take
            for a in ours
            for b in theirs
        )

    @property
    def fingerprint(self) -> str:
        """A name for the rows: their number, their layout and a sample of their tokens."""
        sample = self._tokens[: self._rows * self._stride : max(1, self._rows * self._stride // 2**16)]
        return config_lib.fingerprint(self._rows, self._stride, self._bos, np.asarray(sample).tolist())

    @property
    def extent(self) -> Extent:
        """How much text the whole split has."""
        known, info, texts = self._tokens.known, self._source.dataset_info, len(self._source)
        tokenized = texts if known["complete"] else known.get("documents")
        times = max(texts, 1) / max(tokenized, 1) if tokenized is not None else None
        return Extent(
            texts=texts,
            documents=(info.metadata or {}).get("documents"),
            bytes=info.splits[self._split].num_bytes,
            tokens=None if times is None else round(times * known.get("read", known["tokens"])),
            rows=None if times is None else round(times * (known["tokens"] // self._stride)),
            is_estimate=not known["complete"],
        )

    def __getitem__(self, row: int) -> np.ndarray:
        row = range(self._rows)[row]
        body = self._tokens[row * self._stride : (row + 1) * self._stride].astype(np.int32)
        return body if self._bos is None else np.concatenate([np.array([self._bos], np.int32), body])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS' warnings from notebooks, which would show them. They are about what is intended here."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(min(before, absl_logging.ERROR))  # a lower number is quieter
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


def corpus(config: config_lib.Data) -> Any:
    """The file of the corpus; raises `UserError` where there is none."""
    with errors.about("data.corpus"):
        return plugins.load("data.corpora", config.corpus, having="open_corpus")


def check_new(data: config_lib.Data) -> None:
    """Raises `UserError` for a field that the corpus does not read; for new runs.

    A corpus lists in `READS` what it reads of the fields that only some corpora read. Of one without it nothing is
    known.
    """
    module, readers = corpus(data), plugins.known("data.corpora", having="READS")
    changed = config_lib.changed(data)
    for field in dict.fromkeys(field for reader in readers.values() for field in reader.READS):
        if field in changed and field not in getattr(module, "READS", (field,)):
            others = " or ".join(repr(name) for name, reader in readers.items() if field in reader.READS)
            default = getattr(config_lib.Data(), field)
            raise UserError(
                f"is {changed[field]!r}, which data.corpus={data.corpus!r} does not read; write data.corpus={others}, "
                f"or data.{field}={default!r}",
                f"data.{field}",
            )


def check_apart(train: TokenRows, test: TokenRows) -> None:
    """Raises `UserError` for rows to measure on that have text of those to train on; for new runs."""
    if train.shares_text(test):
        raise UserError(
            "has text of data.train_split, so that SAEs would be measured on what they were trained on; write another "
            "split, such as data.train_split='train[:90%]' and data.test_split='train[90%:]'",
            "data.test_split",
        )


@_quiet()
def open_texts(config: config_lib.Data, split: str) -> tuple[Any, str]:
    """The documents of `split` ("train" or "test") as a random-access source, and the name of their text feature.

    Raises:
        UserError: an unknown corpus or split, unusable text, or a bucket that cannot be used.
    """
    where = config.data_dir or tfds.core.constants.DATA_DIR
    with errors.about("data.path"):
        paths.check_readable(config.path)
    with errors.about("data.data_dir"):
        paths.check_readable(where)
    builder, feature = corpus(config).open_corpus(config)
    tfds.disable_progress_bar()
    prepared = False
    with _writable(config):
        if not builder.is_prepared():
            folder = paths.of(builder.data_dir).local
            if folder is None:
                raise UserError(
                    f"{builder.data_dir} is not there, and TFDS cannot prepare array_record files in a bucket; leave "
                    "data.data_dir empty, for a copy on each machine, or prepare in a local data.data_dir first and "
                    f"run `gcloud storage cp --recursive DATA_DIR/* {where}`",
                    "data.data_dir",
                )
            with tokens_lib.alone(folder):
                builder, feature = corpus(config).open_corpus(config)  # another process may have prepared it meanwhile
                if not builder.is_prepared():
                    _prepare(builder, folder)
            prepared = True
    if prepared or split == "train":
        for remark in getattr(builder, "remarks", list)():
            logger.info(remark)
    name = config.train_split if split == "train" else config.test_split
    try:
        return builder.as_data_source(split=name), feature
    except ValueError as error:
        raise UserError(
            f"{name!r}: {error}; the corpus has: {', '.join(builder.info.splits)}", f"data.{split}_split"
        ) from error


def _prepare(builder: Any, folder: Path) -> None:
    """Write the data set, with a bar if that takes long."""
    size = getattr(builder, "file_bytes", None)
    what = f"preparing the text{f' ({_megabytes(size)} of files)' if size else ''} in {folder}"
    logger.info(f"{what}. Later runs on this text reuse it.")
    with progress.bar("preparing the text", getattr(builder, "bytes_to_read", None), "B") as bar:
        if hasattr(builder, "on_bytes_read"):
            builder.on_bytes_read = bar.update
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its paths
            builder.download_and_prepare()


def open_rows(config: config_lib.Data, split: str, tokenizer: Any, limit: int, d_vocab: int | None = None) -> TokenRows:
    """The rows of `split` ("train" or "test"), from at most the first `limit` tokens; prepares what is not on disk yet.

    Args:
        config: which text, and the rows' layout.
        split: which part of it.
        tokenizer: of the language model.
        limit: the number of tokens.
        d_vocab: how many tokens the language model has embeddings for, if it is known.

    Raises:
        UserError: what `open_texts` refuses, a tokenizer without the special tokens or the chat template that rows
            need, a token of the text that has no embedding, a role that the text does not have, or a conversation that
            the template refuses.
    """
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if separator is None:
        raise UserError(
            "the tokenizer has neither EOS nor BOS to put between documents; name one in tokenizer_config.json",
            "lm.path",
        )
    if config.prepend_bos and tokenizer.bos_token_id is None:
        raise UserError("is True, but the tokenizer has no BOS with an embedding; write False", "data.prepend_bos")
    chat = chat_lib.Chat(config, tokenizer, separator) if config.chat else None
    source, feature = open_texts(config, split)
    _check_roles(config.roles, source)
    folder = paths.of(source.dataset_info.data_dir)
    name = config.train_split if split == "train" else config.test_split
    width = config.context_length - config.prepend_bos if config.pack == "documents" else None
    layout: tuple[Any, ...] = () if width is None else (width,)
    if chat is not None:
        layout += (chat.key, config.prepend_bos)
    key = config_lib.fingerprint(
        tokens_lib.FORMAT, str(folder), name, feature, separator, tokenizer.backend_tokenizer.to_str(), *layout
    )
    text = tokens_lib.Text(source, feature, tokenizer, separator, width, d_vocab, chat)
    with _writable(config), contextlib.nullcontext() if chat is None else chat.open():
        tokens = tokens_lib.cached(folder / f"tokens-{key}", text, limit)
    if width and not len(tokens):
        raise UserError(
            f"is {config.context_length}, but no document of {name!r} has that many tokens; lower it, or write "
            "data.pack='stream'",
            "data.context_length",
        )
    if config.roles and not tokens.known["seen"]:
        raise UserError(f"is {config.roles}, but the chat template shows nothing of such messages", "data.roles")
    bos = tokenizer.bos_token_id if config.prepend_bos else None
    if bos is not None and config.roles:
        bos = ~bos
    return TokenRows(tokens, config.context_length, bos, limit, source, name, width is not None)


def _check_roles(roles: Sequence[str], source: Any) -> None:
    known = (source.dataset_info.metadata or {}).get("roles", ())
    for role in roles:
        if role not in known:
            shown = ", ".join(known[:20])
            raise UserError(
                f"has {role!r}, a role that no message of this text has; write some of {shown}", "data.roles"
            )


def batches(
    rows: TokenRows,
    rows_per_batch: int,
    seed: int,
    local: Sequence[int] | np.ndarray | None = None,
    parts: Sequence[int] = (),
) -> "grain.DatasetIterator":
    """Endless batches [rows_per_batch, T]; or of each only the rows numbered `local`, and only those are read.

    Every epoch has its own order. A run that was given more steps may take rows beyond those that it began with.
    `parts` are the numbers of rows that it has had so far: each part is shuffled by itself and follows the one before,
    so that what was read so far keeps its place. `get_state()` and `set_state()` of the iterator save and restore the
    position, which does not depend on `local`.

    Raises:
        UserError: the corpus has fewer tokens than one batch.
    """
    if len(rows) < rows_per_batch:
        raise UserError(
            f"the corpus gives {len(rows)} rows of tokens, fewer than one batch of {rows_per_batch}"
            f"{rows.why_few or '; add text'}, or take fewer rows at once",
            "data",
        )
    endless = shuffled(rows, seed, parts)
    batched = _Batches(endless, rows_per_batch, range(rows_per_batch) if local is None else local)
    return iter(
        grain.MapDataset.source(batched).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    )


def shuffled(rows: TokenRows, seed: int, parts: Sequence[int] = ()) -> Any:
    """The endless order in which `batches` gives rows; an element is one row."""
    ends = sorted({*parts, len(rows)} - {0})
    each = [
        grain.MapDataset.source(_Part(rows, start, end)).seed(seed).shuffle()
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return (each[0] if len(each) == 1 else grain.MapDataset.concatenate(each)).repeat()


class _Part:
    """The rows from `start` to `end`."""

    def __init__(self, rows: TokenRows, start: int, end: int):
        self._rows, self._start, self._end = rows, start, end

    def __len__(self) -> int:
        return self._end - self._start

    def __getitem__(self, row: int) -> np.ndarray:
        return self._rows[self._start + range(len(self))[row]]


class _Batches:
    """Batches of `per_batch` elements of an endless data set. A batch has the elements numbered `local`, stacked.

    Grain's own `batch` computes its length in floating point, which overflows for one row a batch.
    """

    def __init__(self, dataset: Any, per_batch: int, local: Sequence[int] | np.ndarray):
        self._dataset, self._per_batch, self._local = dataset, per_batch, local

    def __len__(self) -> int:
        return len(self._dataset) // self._per_batch

    def __getitem__(self, batch: int) -> np.ndarray:
        return np.stack([self._dataset[batch * self._per_batch + int(row)] for row in self._local])


def in_order(rows: TokenRows, rows_per_batch: int) -> Iterator[np.ndarray]:
    """Every row once, in order, in batches [rows_per_batch, T]; what does not fill the last one is left out."""
    for start in range(0, len(rows) - rows_per_batch + 1, rows_per_batch):
        yield np.stack([rows[row] for row in range(start, start + rows_per_batch)])


def held_out(
    config: config_lib.Experiment | config_lib.HeldOut, tokenizer: Any, tokens: int, d_vocab: int | None = None
) -> Iterator[np.ndarray]:
    """Batches of held-out rows of about so many tokens, one batch at the least; warns where there are fewer.

    `d_vocab`: how many tokens the language model has embeddings for, if it is known.

    Raises:
        UserError: what `open_rows` refuses, or less text than one batch.
    """
    rows, per_batch = held_out_rows(config, tokenizer, tokens, d_vocab), config.evaluation.rows_per_forward
    batches = held_out_tokens(config, tokens) // (per_batch * config.data.context_length)
    return itertools.islice(in_order(rows, per_batch), batches)


def documents(config: config_lib.Data, tokenizer: Any, rows: TokenRows, tokens_RxT: np.ndarray) -> np.ndarray:
    """The number of the document, or of the conversation, in which each row [R] begins.

    Args:
        config: the text.
        tokenizer: of the language model.
        rows: that the tokens are of.
        tokens_RxT: the first rows.
    """
    if config.pack == "documents":
        return np.arange(len(tokens_RxT))
    if config.chat:
        return rows.documents(len(tokens_RxT))
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = (tokens_RxT[:, int(config.prepend_bos) :] == separator).sum(1)
    return np.cumsum(ends) - ends


def held_out_rows(
    config: config_lib.Experiment | config_lib.HeldOut, tokenizer: Any, tokens: int, d_vocab: int | None = None
) -> TokenRows:
    """The rows that `held_out` gives batches of; warns and raises as it does."""
    per_batch, T = config.evaluation.rows_per_forward, config.data.context_length
    limit = held_out_tokens(config, tokens)
    rows = open_rows(config.data, "test", tokenizer, limit, d_vocab)
    if len(rows) < per_batch:
        raise UserError(
            f"is {per_batch}, but the held-out text has {len(rows)} rows{rows.why_few or '; add text'}, or lower it",
            "evaluation.rows_per_forward",
        )
    if len(rows) * T < limit:
        measured = len(rows) // per_batch * per_batch * T
        logger.warning(
            f"evaluation.tokens: you asked for {tokens:,} tokens. The held-out text gives {measured:,} in whole "
            "batches."
        )
    return rows


def held_out_tokens(config: config_lib.Experiment | config_lib.HeldOut, tokens: int) -> int:
    """The number of tokens nearest to `tokens` that is one of whole batches, at least one."""
    batch = config.evaluation.rows_per_forward * config.data.context_length
    return max(1, round(tokens / batch)) * batch


@contextlib.contextmanager
def _writable(config: config_lib.Data) -> Iterator[None]:
    """Names the field behind a data directory that cannot be written."""
    try:
        yield
    except OSError as error:
        where = config.data_dir or tfds.core.constants.DATA_DIR
        raise UserError(
            f"{where} cannot hold prepared data ({error}); write a writable directory. If data.data_dir is read-only, "
            "set TFDS_DATA_DIR to a writable directory, where tokens are then kept",
            "data.data_dir",
        ) from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
