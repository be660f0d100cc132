"""Text -> rows of tokens of one length -> an endless, shuffled, resumable stream of batches (Grain).

The tokens of a split lie in one flat file beside the TFDS data, written once per corpus and tokenizer, so that any
row can be read at random: which row stands where in which batch depends on the seed and the step alone, and a
position is one integer.

Every document is followed by the tokenizer's EOS (BOS where it has no EOS); rows are cut from the stream without
regard to documents, so several may share a row and see each other. With `data.prepend_bos` each row starts with BOS,
as language models expect of position 0.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from gsae_jax import config as config_lib
from gsae_jax import plugins
from gsae_jax.config import ConfigError

FORMAT = 1  # part of the cache's key: raise it when the tokens of a text change


class TokenRows:
    """A random-access source of rows [T] of int32 over a flat array of tokens."""

    def __init__(self, tokens: np.ndarray, context_length: int, bos: int | None, limit: int | None = None):
        """`limit`: use only the rows that the first so many tokens give."""
        self._tokens, self._bos = tokens, bos
        self._stride = context_length - (bos is not None)
        self._rows = (len(tokens) if limit is None else min(limit, len(tokens))) // self._stride

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> np.ndarray:
        row = range(self._rows)[row]
        body = self._tokens[row * self._stride : (row + 1) * self._stride].astype(np.int32)
        return body if self._bos is None else np.concatenate([np.array([self._bos], np.int32), body])


def open_rows(config: config_lib.Data, split: str, tokenizer: Any, limit: int) -> TokenRows:
    """The rows of `split` ("train" or "test"), from at most the first `limit` tokens; prepares what is not on disk yet.

    Raises:
        ConfigError: an unknown corpus or split, unusable text, or a tokenizer without the special tokens that rows
        need.
    """
    separator = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if separator is None:
        raise ConfigError(
            "lm.path", "the tokenizer has neither EOS nor BOS to put between documents; add one to its special tokens"
        )
    if config.prepend_bos and tokenizer.bos_token_id is None:
        raise ConfigError("data.prepend_bos", "is True, but the tokenizer has no BOS; write False")
    split_name = config.train_split if split == "train" else config.test_split
    corpus = plugins.load("data.corpora", config.corpus, having="open_corpus", field="data.corpus")
    builder, feature = corpus.open_corpus(config)
    # Builders print their progress and paths; a run has its own progress to show.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    try:
        source = builder.as_data_source(split=split_name)
    except ValueError as error:
        raise ConfigError(
            f"data.{split}_split", f"{split_name!r}: {error}; the corpus has: {', '.join(builder.info.splits)}"
        ) from error
    key = config_lib.fingerprint(
        FORMAT, str(builder.data_path), split_name, feature, separator, tokenizer.backend_tokenizer.to_str()
    )
    tokens = _cached_tokens(Path(builder.data_path) / f"tokens-{key}", source, feature, tokenizer, separator, limit)
    return TokenRows(tokens, config.context_length, tokenizer.bos_token_id if config.prepend_bos else None, limit)


def batches(
    rows: TokenRows, rows_per_batch: int, seed: int, process: int = 0, processes: int = 1
) -> grain.DatasetIterator:
    """Endless batches [rows_per_batch / processes, T]: this process's contiguous part of each global batch.

    Every epoch has its own order. `get_state()` and `set_state()` of the iterator save and restore the position.

    Raises:
        ConfigError: the corpus has fewer tokens than one batch.
    """
    if len(rows) < rows_per_batch:
        raise ConfigError(
            "data",
            f"the corpus gives {len(rows)} rows of tokens, fewer than one batch of {rows_per_batch}; "
            "add text, or lower activations.rows_per_forward",
        )
    share = rows_per_batch // processes
    return iter(
        grain.MapDataset.source(rows)
        .seed(seed)
        .shuffle()
        .repeat()
        .batch(rows_per_batch)
        .map(lambda batch: batch[process * share : (process + 1) * share])
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8))
    )


def in_order(rows: TokenRows, rows_per_batch: int, count: int) -> Iterator[np.ndarray]:
    """The first `count` rows once, in order, in batches [rows_per_batch, T]; what does not fill a batch is left out."""
    for start in range(0, min(count, len(rows)) - rows_per_batch + 1, rows_per_batch):
        yield np.stack([rows[row] for row in range(start, start + rows_per_batch)])


def _cached_tokens(folder: Path, source: Any, feature: str, tokenizer: Any, separator: int, limit: int) -> np.ndarray:
    """The first `limit` tokens of the source (all, where it has fewer), tokenized unless the folder has as many."""
    meta = folder / "meta.json"
    known = json.loads(meta.read_text()) if meta.exists() else {"tokens": -1, "complete": False}
    if not known["complete"] and known["tokens"] < limit:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
            count, complete = _tokenize(scratch / "tokens.bin", dtype, source, feature, tokenizer, separator, limit)
            known = {"tokens": count, "complete": complete, "dtype": dtype.name}
            (scratch / "meta.json").write_text(json.dumps(known))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)  # whole or not at all
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if not known["tokens"]:
        return np.zeros(0, np.uint16)
    return np.memmap(
        folder / "tokens.bin", dtype=np.dtype(str(known["dtype"])), mode="r", shape=(int(known["tokens"]),)
    )


def _tokenize(
    path: Path, dtype: np.dtype, source: Any, feature: str, tokenizer: Any, separator: int, limit: int
) -> tuple[int, bool]:
    """Write tokens until `limit`; returns their count, and whether the source ended."""
    count, chunk = 0, 256
    with open(path, "wb") as file:
        for start in range(0, len(source), chunk):
            examples = source.__getitems__(range(start, min(start + chunk, len(source))))
            texts = [
                text.decode() if isinstance(text, bytes) else text
                for text in (example[feature] for example in examples)
            ]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            tokens = np.concatenate([np.array([*ids, separator], dtype) for ids in encoded])
            tokens.tofile(file)
            count += len(tokens)
            if count >= limit:
                return count, start + chunk >= len(source)
    return count, True
