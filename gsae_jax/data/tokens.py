"""The tokens of a split in one flat file beside the TFDS data, written once per text and tokenizer.

Where the TFDS data is in a bucket, or can only be read, the machine has a copy of the file. With `data.roles`, a token
that SAEs are not to see is `~token`, a negative number.
"""

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from etils import epy

from gsae_jax.data import chat as chat_lib
from gsae_jax.data import progress
from gsae_jax.errors import TrainingError, UserError
from gsae_jax.storage import paths, reading, writing

with epy.lazy_imports():  # who trains on tokens of their own does not need it
    import tensorflow_datasets as tfds

logger = logging.getLogger(__name__)

RETRIES = (1, 5, 25)  # seconds after which a file that cannot be read is tried again
PATIENCE = 0.5  # seconds of waiting for another process, after which the user is warned
FORMAT = 1  # part of the cache's key: raise it when the tokens of a text change
STARTS = "starts.bin"  # where conversations begin, which separators do not say, as a turn may end with one


class TokenFile:
    """A flat file of tokens, sliced like an array; it is not mapped, as a file that shrinks would then end the process.

    Raises:
        TrainingError: it cannot be read, also not after a while.
    """

    def __init__(self, path: Path, known: dict[str, Any]):
        """`known`: what `_tokenize` says of the file.

        Sets `starts`, the places where conversations begin; empty if the text has other documents.
        """
        self.known = known
        self._path, self._dtype, self._count = path, np.dtype(known["dtype"]), known["tokens"]
        starts = path.with_name(STARTS)
        self.starts = np.fromfile(starts, np.int64) if starts.exists() else np.zeros(0, np.int64)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._count)
        if step != 1:
            return np.concatenate([self._read(at, 1) for at in range(start, stop, step)])
        return self._read(start, stop - start)

    def _read(self, start: int, count: int) -> np.ndarray:
        size, reason = self._dtype.itemsize, None
        for pause in (0, *RETRIES):
            if pause:  # even a sleep of 0 lets every other thread run first
                time.sleep(pause)
            try:
                content = os.pread(self._file, count * size, start * size)
                if len(content) == count * size:
                    return np.frombuffer(content, self._dtype)
                reason = OSError(f"it has fewer than the {self._count} tokens that it had")
            except OSError as error:
                reason = error
        raise TrainingError(
            f"{self._path} cannot be read any more ({reason}); remove its folder and run the same command, which "
            "prepares the text again and continues"
        ) from reason


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents, and how they become tokens.

    Attributes:
        source: the documents.
        feature: the name of their text.
        tokenizer: of the language model.
        separator: the token that follows each document.
        width: tokens of each document to take, if it has as many; None to take all tokens of every document.
        d_vocab: how many tokens the language model has embeddings for, if it is known.
        chat: what makes tokens of the documents if they are conversations, else None.
    """

    source: Any
    feature: str
    tokenizer: Any
    separator: int
    width: int | None
    d_vocab: int | None
    chat: chat_lib.Chat | None = None

    def ids(self, examples: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The tokens of documents, each with its separator."""
        texts = [_text(example[self.feature]) for example in examples]
        if self.chat is not None:
            return self.chat.tokens(texts, [_text(example["path"]) for example in examples])
        return [[*ids, self.separator] for ids in _ids(self.tokenizer, texts)]


def cached(shared: paths.Path, text: Text, limit: int) -> TokenFile:
    """The first `limit` tokens of the text (all, where it has fewer), tokenized unless the folder has as many."""
    folder = _on_disk(shared, limit)
    known = _known_tokens(folder, limit)
    if known is None:
        with alone(folder):
            known = _known_tokens(folder, limit)
            if known is None and not shared.local:
                known = _download_tokens(shared, folder, limit)
            if known is None:
                known = _write_tokens(folder, text, limit)
                if not shared.local:
                    paths.copy_files(folder, shared, last="meta.json")  # there are as many tokens as it says
    tokens = TokenFile(folder / "tokens.bin", known)
    # They may have been kept for another language model, which has this tokenizer and more embeddings.
    if text.d_vocab is not None and known.get("largest", np.inf) >= text.d_vocab:
        _check_kept(tokens, text, text.d_vocab)
    return tokens


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Held while a folder is written, so that of several processes one does the work and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=PATIENCE)
    except filelock.Timeout:
        logger.warning(f"another process is preparing this text; waiting until it releases {lock.lock_file}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _on_disk(shared: paths.Path, limit: int) -> Path:
    """The folder itself; for one in a bucket, or one that can only be read, the folder of this machine's copy."""
    elsewhere = (paths.of(tfds.core.constants.DATA_DIR).local or Path(tempfile.gettempdir())) / shared.name
    folder = shared.local
    if folder is None:
        return elsewhere
    if os.access(folder.parent, os.W_OK) or _known_tokens(folder, limit):
        return folder
    if _known_tokens(elsewhere, limit) is None:
        logger.info(f"{folder.parent} cannot be written; the tokens of this text are kept in {elsewhere}")
    return elsewhere


def _known_tokens(folder: Path | paths.Path, limit: int) -> dict[str, Any] | None:
    """What the folder holds, if that is enough and whole; otherwise it is made again."""
    try:
        known = reading.load_json(folder / "meta.json")
        enough = known["complete"] or known["tokens"] >= limit
        size = known["tokens"] * np.dtype(known["dtype"]).itemsize
        # In a bucket, another machine may have put fewer tokens there since one wrote its meta.json.
        return known if enough and paths.of(folder / "tokens.bin").size() >= size else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _download_tokens(shared: paths.Path, folder: Path, limit: int) -> dict[str, Any] | None:
    """What the bucket's folder holds, if that is enough; the machine has a copy then."""
    known = _known_tokens(shared, limit)
    if known is None:
        return None
    with writing.whole_folder(folder) as scratch:
        for name in ("tokens.bin", *([STARTS] if (shared / STARTS).exists() else [])):
            (shared / name).copy(scratch / name)
        (scratch / "meta.json").write_text(json.dumps(known))
    return known


def _write_tokens(folder: Path, text: Text, limit: int) -> dict[str, Any]:
    logger.info(f"tokenizing {len(text.source):,} texts; the tokens go to {folder}")
    with writing.whole_folder(folder) as scratch:
        largest = max(text.separator, *text.tokenizer.get_vocab().values())
        unsigned = np.uint16 if largest < 2**16 else np.uint32
        dtype = np.dtype(np.int32 if text.chat is not None else unsigned)
        known = _tokenize(scratch / "tokens.bin", dtype, text, limit)
        (scratch / "meta.json").write_text(json.dumps(known))
        return known


def _tokenize(path: Path, dtype: np.dtype, text: Text, limit: int) -> dict[str, Any]:
    """Write tokens until there are `limit`, and return what `meta.json` says of them.

    Returns:
        tokens: how many are in the file.
        complete: whether they are from all documents.
        dtype: of the file.
        largest: the largest token.
        documents: how many documents were tokenized.
        read: how many tokens they have, with separators. There are fewer in the file if it has beginnings only.
        seen: how many tokens of the file SAEs may see.
    """
    count, read, seen, documents, largest = 0, 0, 0, 0, text.separator
    starts = []
    texts, chunk = len(text.source), 256
    with open(path, "wb") as file, progress.bar("tokenizing the text", None, " tokens") as bar:
        for start in range(0, texts, chunk):
            documents = min(start + chunk, texts)
            examples = text.source.__getitems__(range(start, documents))
            parts = []
            for example, ids in zip(examples, text.ids(examples), strict=True):
                read += len(ids)
                if text.width:
                    ids = ids[: text.width] if len(ids) >= text.width else []
                part = np.array(ids, np.int64)
                most = int(_plain(part).max(initial=0))
                if text.d_vocab is not None and most >= text.d_vocab and most != text.separator:
                    raise _no_embedding(text.tokenizer, most, text.d_vocab, _where(example, text.feature))
                largest = max(largest, most)
                starts.append(count)
                count, seen = count + len(part), seen + int((part >= 0).sum())
                parts.append(part.astype(dtype))
            np.concatenate(parts).tofile(file)
            bar.total = min(limit, count * texts // documents)
            bar.update(count - bar.n)
            if count >= limit:
                break
    if text.chat is not None:
        np.array(starts, np.int64).tofile(path.with_name(STARTS))
    return {
        "tokens": count,
        "complete": documents == texts,
        "dtype": dtype.name,
        "largest": largest,
        "documents": documents,
        "read": read,
        "seen": seen,
    }


def _check_kept(tokens: TokenFile, text: Text, d_vocab: int) -> None:
    """Raises `UserError` for a token without an embedding, with the document that has it."""
    separators, many = 0, 2**20
    for start in range(0, len(tokens), many):
        part = _plain(tokens[start : start + many])
        if part.max() >= d_vocab:
            first = int(np.argmax(part >= d_vocab))
            token = int(part[first])
            last = min(separators + int((part[:first] == text.separator).sum()), len(text.source) - 1)
            # The text of a document may have separators as well, so the token may be in an earlier one. Beginnings of
            # documents have no separators: then the first document that has the token is named.
            whole = text.width or text.chat is not None  # conversations may have separators of their own
            numbers = range(len(text.source)) if whole else range(last, -1, -1)
            examples = map(text.source.__getitem__, numbers)
            example = next(each for each in examples if token in _plain(np.array(text.ids([each])[0], np.int64)))
            raise _no_embedding(text.tokenizer, token, d_vocab, _where(example, text.feature))
        separators += int((part == text.separator).sum())


def _plain(tokens: np.ndarray) -> np.ndarray:
    """Tokens without what says that SAEs are not to see them."""
    return np.where(tokens < 0, ~tokens, tokens) if tokens.dtype.kind == "i" else tokens


def _no_embedding(tokenizer: Any, token: int, d_vocab: int, where: str) -> UserError:
    return UserError(
        f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(token)!r} with id {token}, which {where}, but "
        f"this language model has embeddings for ids 0 to {d_vocab - 1}; take it out of the tokenizer or of the text",
        "lm.path",
    )


def _where(example: dict[str, Any], feature: str) -> str:
    """Which document an example is, for a sentence about a token in it."""
    text = _text(example[feature])
    path = f" of {_text(example['path'])}" if "path" in example else ""
    return f"is in a document{path} that begins {text[:40]!r}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    try:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    except Exception as error:  # tokenizers has no errors of its own kind
        raise UserError(f"the tokenizer cannot read the text: {error}", "lm.path") from error
