"""Bring your own text: `.txt`, `.md`, `.jsonl` or `.parquet` files, from a folder, a glob or one path, local or gs://.

A text file is one document, or several where `data.separator` stands between them; a line of JSON or a row of a table
is one document. Long documents are cut into pieces, and every twentieth piece is held out.
"""

import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import tensorflow_datasets as tfds
from etils import epath

from gsae_jax import config as config_lib
from gsae_jax.buckets import is_bucket
from gsae_jax.config import ConfigError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
TEST_EVERY = 20


class TextFiles(tfds.core.GeneratorBasedBuilder):
    """One example per piece of a document, with the file it came from."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, config: config_lib.Data, **kwargs: Any):
        self._files = find_files(config.path)
        self._field, self._separator = config.field, config.separator
        # A piece must be short enough that a twentieth of the pieces is some text even in a small corpus.
        self._piece_chars = min(100_000, max(2_000, sum(size for size, _ in self._files.values()) // (4 * TEST_EVERY)))
        stamps = [(file, *stamp) for file, stamp in self._files.items()]
        name = config_lib.fingerprint(stamps, config.field, config.separator)
        super().__init__(config=tfds.core.BuilderConfig(name=name, description=config.path), **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[int, dict[str, str]]]:
        index = -1
        for index, (file, piece) in enumerate(self._pieces()):
            if (index % TEST_EVERY == TEST_EVERY - 1) == test:
                yield index, {"text": piece, "path": file}
        if index + 1 < TEST_EVERY:
            raise ConfigError(
                "data.path",
                f"gives {index + 1} pieces of text; add text: {TEST_EVERY} are needed to hold one of them out",
            )

    def _pieces(self) -> Iterator[tuple[str, str]]:
        for file in self._files:
            for document in read_documents(file, self._field, self._separator):
                for start in range(0, len(document), self._piece_chars):
                    yield file, document[start : start + self._piece_chars]


def find_files(path: str) -> dict[str, tuple[int, int]]:
    """The text files that `path` (a file, a folder searched through, or a glob) means, sorted.

    Returns:
        For each its size in bytes and a number that changes when it is written again.

    Raises:
        ConfigError: there are none.
    """
    if not path:
        raise ConfigError("data.path", "is empty; write a text file, a folder of them or a glob")
    files = dict(sorted((_in_bucket if is_bucket(path) else _on_disk)(path)))
    if not files:
        raise ConfigError(
            "data.path", f"no {', '.join(SUFFIXES)} file matches {path!r}; write a file, a folder or a glob that exists"
        )
    return files


def _on_disk(path: str) -> Iterator[tuple[str, tuple[int, int]]]:
    pattern = os.path.expanduser(path)
    pattern = os.path.join(pattern, "**", "*") if os.path.isdir(pattern) else pattern
    for file in glob.glob(pattern, recursive=True):
        if Path(file).suffix in SUFFIXES and os.path.isfile(file):
            yield os.path.abspath(file), (os.path.getsize(file), os.stat(file).st_mtime_ns)


def _in_bucket(path: str) -> Iterator[tuple[str, tuple[int, int]]]:
    # epath knows no **; fsspec, on which it stands, does.
    system, pattern = fsspec.url_to_fs(path)
    pattern = f"{pattern}/**" if system.isdir(pattern) else pattern
    try:
        found = system.glob(pattern, detail=True)
    except FileNotFoundError:  # no such bucket
        return
    for name, info in found.items():
        # Hidden files are passed over unless they are asked for, as on a disk.
        hidden = any(part.startswith(".") for part in {*name.split("/")} - {*pattern.split("/")})
        if info["type"] == "file" and Path(name).suffix in SUFFIXES and not hidden:
            yield f"gs://{name}", (info["size"], int(info["generation"]))


def read_documents(file: str, field: str, separator: str) -> Iterator[str]:
    """The documents of one file.

    Raises:
        ConfigError: the file is not what its ending says, or lacks the field; the message names file, line and what
        is there.
    """

    def text_of(row: object, where: str) -> str:
        if not isinstance(row, dict):
            raise ConfigError(
                "data.path", f"{where} is not a JSON object; each line must be one, with the text under {field!r}"
            )
        if not isinstance(row.get(field), str):
            raise ConfigError(
                "data.field", f"{where} has no text under {field!r}; its fields: {', '.join(map(str, row))}"
            )
        try:
            row[field].encode()
        except UnicodeEncodeError as error:  # JSON can write half of a pair
            raise ConfigError(
                "data.path", f"{where} has a character that UTF-8 lacks ({error}); take it out"
            ) from error
        return row[field]

    suffix = Path(file).suffix
    try:
        if suffix == ".parquet":
            import pyarrow.parquet  # slow to import, and needed by this format only

            with epath.Path(file).open("rb") as binary:
                table = pyarrow.parquet.ParquetFile(binary)
                if field not in table.schema_arrow.names:
                    names = ", ".join(table.schema_arrow.names)
                    raise ConfigError("data.field", f"{file} has no column {field!r}; its columns: {names}")
                for batch in table.iter_batches(batch_size=1024, columns=[field]):
                    for row in batch.to_pylist():
                        yield text_of(row, file)
        elif suffix == ".jsonl":
            with _text(file) as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise ValueError(f"line {number} is not JSON ({error})") from error
                    yield text_of(row, f"{file} line {number}")
        else:
            with _text(file) as whole:
                text = whole.read()
            yield from filter(str.strip, text.split(separator) if separator else [text])
    except ConfigError:
        raise
    except (OSError, ValueError, NotImplementedError, MemoryError) as error:
        # Not UTF-8, not JSON, not Parquet: pyarrow's errors are of all these kinds.
        raise ConfigError(
            "data.path", f"{file} cannot be read as {suffix}: {error}; write it again in UTF-8, or leave it out"
        ) from error


def _text(file: str) -> io.TextIOWrapper:
    binary: Any = epath.Path(file).open("rb")
    return io.TextIOWrapper(binary, encoding="utf-8")


def open_corpus(config: config_lib.Data) -> tuple[tfds.core.DatasetBuilder, str]:
    """The TFDS builder, and the name of its text feature, of the files that `data.path` means."""
    return TextFiles(config, data_dir=config.data_dir or None, file_format="array_record"), "text"
