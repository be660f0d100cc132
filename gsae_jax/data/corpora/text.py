"""Bring your own text: files of text, JSON or Parquet, packed or not; a folder, a glob or one path, local or gs://.

A hash of the text decides what is held out. So held-out text stays held out when text is added, and copies of a
document are on the same side. A long document is cut into pieces, of which each has its own hash; neighbouring pieces
on the same side are joined again. With `data.pack="documents"` nothing is cut, as a part would not begin where its
document does: the hash of a document's first piece decides for all of it. There, spaces and line breaks around a
document are left out, as separators often stand on lines of their own. With `data.chat` a conversation is a document,
which is not cut either. The hash of all of it decides, as many conversations begin with the same message.
"""

import array
import collections
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from gsae_jax import config as config_lib
from gsae_jax.data import files
from gsae_jax.errors import UserError

READS = ("path", "field", "separator", "held_out", "on_bad_row")
PIECE = 2_000  # characters of a long document that are held out, or not, together; a divisor of files.LONGEST
HELD_OUT = 20  # one piece in this many is held out, and there must be at least this many
BEFORE = (".txt", ".md", ".jsonl", ".parquet")  # what earlier versions read


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One example per document, or per part of a long one, with the file it came from."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, config: config_lib.Data, **kwargs: Any):
        self._before = config.held_out == "position"
        listing = files.find(config.path, every_link=self._before)
        self._files, self._left_out = listing.stamps, listing.left_out
        if self._before:
            self._files = {file: stamp for file, stamp in self._files.items() if Path(file).suffix in BEFORE}
        self._chat = bool(config.chat)
        if self._chat:
            self._leave_out_plain(config.path)
        self._piece = None if config.pack == "documents" or self._chat else PIECE
        self._reader = files.Reader(
            config.chat or config.field, config.separator, config.on_bad_row == "skip", self._before, self._chat
        )
        self.file_bytes = sum(size for size, _ in self._files.values())
        self.bytes_to_read = self.file_bytes * (2 if self._before else 3)  # the survey, and each side
        self.on_bytes_read: Callable[[int], Any] = lambda count: None
        self._limit = 2**64 // HELD_OUT  # text with a lower hash is held out
        stamps = [(file, *stamp) for file, stamp in self._files.items()]
        new = () if self._before and config.on_bad_row == "error" else (config.held_out, config.on_bad_row)
        whole = ("chat", config.chat) if self._chat else () if self._piece else (config.pack,)
        name = config_lib.fingerprint(stamps, config.field, config.separator, *new, *whole)
        super().__init__(config=tfds.core.BuilderConfig(name=name, description=config.path), **kwargs)

    def _leave_out_plain(self, path: str) -> None:
        """Text files have no messages."""
        kinds = {file: files.kind_of(file)[0] for file in self._files}
        plain = collections.Counter(kind for kind in kinds.values() if kind in files.PLAIN)
        self._left_out = dict(plain + collections.Counter(self._left_out))
        self._files = {file: stamp for file, stamp in self._files.items() if kinds[file] not in files.PLAIN}
        if not self._files:
            kinds_with_rows = ", ".join(kind for kind in files.KINDS if kind not in files.PLAIN)
            raise UserError(
                f"{path!r} has only {files.counted(plain)}, which have no messages; write {kinds_with_rows}, or "
                "data.chat=''",
                "data.path",
            )

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        if self._before:
            return {"train": self._every_twentieth(test=False), "test": self._every_twentieth(test=True)}
        self.info.metadata.update(self._survey())
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _survey(self) -> dict[str, Any]:
        """Count the documents, and choose the limit such that some text is on each side."""
        documents = array.array("Q")
        pieces, lowest, highest = 0, 2**64, 0
        for _, document in self._documents():
            documents.append(_hash(document.strip()))
            for index, piece in enumerate(_pieces(document, self._piece)):
                mark = self._mark(index, piece)
                pieces, lowest, highest = pieces + 1, min(lowest, mark), max(highest, mark)
        counts = {
            "documents": len(documents),
            "copies": len(documents) - len(np.unique(np.array(documents))),
            "blank": self._reader.blank,
            "bad_rows": self._reader.bad_rows,
            "first_bad_row": self._reader.first_bad_row,
        }
        if self._chat:
            counts["roles"] = sorted(self._reader.roles)
        if pieces < HELD_OUT or lowest == highest:
            same = ", all the same" if pieces > 1 and lowest == highest else ""
            what = "pieces of text" if self._piece else "documents"
            raise UserError(
                f"gives {pieces} {what}{same}; add text: {HELD_OUT} are needed to hold one of them out "
                f"({_about(counts)})",
                "data.path",
            )
        # By chance, all pieces of a short text may fall on one side.
        self._limit = min(max(self._limit, lowest + 1), highest)
        return counts

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, str]]]:
        key = 0
        for file, document in self._documents():
            pieces = enumerate(_pieces(document, self._piece))
            for is_held_out, part in itertools.groupby(pieces, lambda piece: self._mark(*piece) < self._limit):
                if is_held_out == test:
                    text = "".join(piece for _, piece in part)
                    path = self._reader.where if self._chat else file
                    yield key, {"text": text if self._piece else text.strip(), "path": path}
                    key += 1

    def _mark(self, index: int, piece: str) -> int:
        """The number, below 2**64, that decides the side of a document's piece."""
        return _hash(piece if self._chat else f"{index}\0{piece[:PIECE].strip()}")

    def _every_twentieth(self, test: bool) -> Iterator[tuple[int, dict[str, str]]]:
        """The split of earlier versions: by position, in pieces whose length depends on the files' sizes."""
        characters = min(100_000, max(2_000, self.file_bytes // (4 * HELD_OUT)))
        pieces = ((file, piece) for file, document in self._documents() for piece in _pieces(document, characters))
        index = -1
        for index, (file, piece) in enumerate(pieces):
            if (index % HELD_OUT == HELD_OUT - 1) == test:
                yield index, {"text": piece, "path": file}
        if index + 1 < HELD_OUT:
            raise UserError(
                f"gives {index + 1} pieces of text; add text: {HELD_OUT} are needed to hold one of them out",
                "data.path",
            )

    def _documents(self) -> Iterator[tuple[str, str]]:
        for file, (size, _) in self._files.items():
            before = 0
            for document in self._reader.documents(file):
                position = self._reader.position()
                self.on_bytes_read(position - before)
                before = position
                yield file, document
            self.on_bytes_read(size - before)

    def remarks(self) -> list[str]:
        """Sentences about the prepared text: which files were read, and what was left out."""
        remarks = []
        if self._left_out:
            total = len(self._files) + sum(self._left_out.values())
            remarks.append(
                f"text: {len(self._files):,} of {total:,} files are read; left out: {files.counted(self._left_out)}"
            )
        counts = dict(self.info.metadata or {})
        if any(counts.get(name) for name in ("copies", "blank", "bad_rows")):
            remarks.append(f"text: {_about(counts)}")
        return remarks


def _about(counts: dict[str, Any]) -> str:
    text = f"{_number(counts['documents'], 'document')} ({_number(counts['copies'], 'copy', 'copies')})"
    left_out = []
    if counts["blank"]:
        left_out.append(_number(counts["blank"], "blank document"))
    if counts["bad_rows"]:
        left_out.append(f"{_number(counts['bad_rows'], 'bad row')} (the first: {counts['first_bad_row']})")
    return f"{text}. Left out: {', '.join(left_out)}" if left_out else text


def _number(count: int, one: str, several: str = "") -> str:
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def _pieces(document: str, characters: int | None) -> Iterator[str]:
    """Pieces of so many characters; the whole document where that is None."""
    characters = characters or len(document)
    return (document[start : start + characters] for start in range(0, len(document), characters))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def open_corpus(config: config_lib.Data) -> tuple[tfds.core.DatasetBuilder, str]:
    """The TFDS builder, and the name of its text feature, of the files that `data.path` means."""
    return TextFiles(config, data_dir=config.data_dir or None, file_format="array_record"), "text"
