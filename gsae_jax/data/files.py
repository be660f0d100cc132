"""Files of text: which ones a path means, and the documents in them, read one at a time.

The ending of a file's name, in upper or lower case, says what the file is: one of `KINDS`, followed by one of `PACKED`
if it is packed. A text file is one document, or several with a separator between them. A line of JSON, an item of a
JSON array and a row of a table are one document each.
"""

import bz2
import collections
import contextlib
import dataclasses
import glob
import gzip
import io
import json
import lzma
import os
import re
import shlex
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import fsspec
from etils import epath
from fsspec.utils import glob_translate

from gsae_jax.data import chat as chat_lib
from gsae_jax.errors import UserError
from gsae_jax.storage import paths

KINDS = (".txt", ".md", ".json", ".jsonl", ".ndjson", ".parquet")
PLAIN = (".txt", ".md")
READABLE = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
CHUNK = 2**20  # characters or bytes that are read at once
LONGEST = 10_000_000  # characters after which a text file without a separator begins another document
LARGEST_ITEM = 2**26  # characters of one item of a JSON array
# A packed file may unpack to at most RATIO times its size and SMALL bytes more. Text packs to a third or a tenth.
RATIO, SMALL = 100, 2**26
SKIP = 'data.on_bad_row="skip" leaves such rows out and counts them'
BOM = "\ufeff"  # the byte order mark, which some editors write in front of a text


def _zstd(packed: BinaryIO) -> Any:
    import pyarrow  # slow to import, and needed by few files only

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")


PACKED: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files that a path means.

    Attributes:
        stamps: for every file, sorted by name, its size in bytes and a number that changes when it is written again.
        left_out: how many files are not read, by their kind.
    """

    stamps: dict[str, tuple[int, int]]
    left_out: dict[str, int]


def kind_of(name: str) -> tuple[str, str]:
    """The kind of a file and how it is packed, (".jsonl", ".gz"); of another file, its ending and ""."""
    name = os.path.basename(name).lower()
    packing = next((ending for ending in PACKED if name.endswith(ending)), "")
    kind = Path(name.removesuffix(packing)).suffix
    return (kind, packing) if kind in KINDS else (kind + packing, "")


def find(path: str, every_link: bool = False) -> Listing:
    """The text files that `path` means: a file, a folder searched through, or a glob; on disk or gs://.

    Args:
        path: the name of what exists; if nothing has this very name, a glob.
        every_link: read a file once for every link that leads to it, as earlier versions did.

    Raises:
        UserError: there are none, or one has a name that is not UTF-8.
    """
    if not path:
        raise UserError("is empty; write a text file, a folder of them or a glob", "data.path")
    stamps: dict[str, tuple[int, int]] = {}
    left_out: collections.Counter[str] = collections.Counter()
    for file, stamp in (_on_disk if paths.of(path).local else _in_bucket)(path, every_link):
        if stamp is None:
            left_out[file] += 1
            continue
        kind, _ = kind_of(file)
        if kind not in KINDS:
            left_out[kind or "without an ending"] += 1
            continue
        try:
            file.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{file!r} has a name that is not UTF-8; rename the file", "data.path") from error
        stamps[file] = stamp
    if not stamps:
        listing = f"the files there are of other kinds: {counted(left_out)}" if left_out else "nothing is there"
        raise UserError(
            f"no {READABLE} file matches {path!r}, with or without compression ({', '.join(PACKED)}); {listing}; write "
            "a file, a folder or a glob with such files",
            "data.path",
        )
    return Listing(dict(sorted(stamps.items())), dict(left_out))


def counted(kinds: dict[str, int]) -> str:
    """`3 .csv, 1 .png`: the most frequent first."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


# What both of the following give: (file, stamp), or (what stands there instead of a readable file, None).
Listed = Iterator[tuple[str, tuple[int, int] | None]]


def _on_disk(path: str, every_link: bool) -> Listed:
    path = os.path.expanduser(path)
    seen: set[tuple[int, int]] = set()

    def is_new(status: os.stat_result) -> bool:
        key = status.st_dev, status.st_ino
        new = every_link or key not in seen
        seen.add(key)
        return new

    names: Iterable[str]
    if os.path.isdir(path):
        names = _below(path, is_new)
    elif os.path.exists(path):
        names = [path]
    else:
        names = glob.glob(path, recursive=True) if every_link else _matching(path, is_new)
    for name in sorted(set(names)):
        if os.path.basename(name).startswith(".") and os.path.isdir(path):
            yield "hidden", None
            continue
        try:
            status = os.stat(name)
        except OSError:
            yield "broken links", None
            continue
        if stat.S_ISREG(status.st_mode):
            if is_new(status):
                yield os.path.abspath(name), (status.st_size, status.st_mtime_ns)
            else:
                yield "links to a file that is read already", None
        elif not stat.S_ISDIR(status.st_mode):
            yield "pipes or devices", None
        elif os.path.isdir(path):
            yield "folders that cannot be read", None


def _below(folder: str, is_new: Callable[[os.stat_result], bool], hidden_too: bool = False) -> Iterator[str]:
    """The files in a folder and in the folders below it, each once; also the folders that are not searched."""
    is_new(os.stat(folder))
    errors: list[OSError] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=errors.append):
        hidden = [name for name in folders if name.startswith(".") and not hidden_too]
        folders[:] = [name for name in sorted({*folders} - {*hidden}) if is_new(os.stat(os.path.join(parent, name)))]
        yield from (os.path.join(parent, name) for name in [*hidden, *names])
    yield from (error.filename for error in errors)


def _matching(pattern: str, is_new: Callable[[os.stat_result], bool]) -> Iterator[str]:
    """The files that a glob means. Python's own glob follows links in circles, with two of them nearly for ever."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        yield from glob.glob(pattern)
        return
    at = parts.index("**")
    asked = [part for part in parts[at:] if part.startswith(".")]
    try:
        matches = re.compile(glob_translate("/".join(parts[at:]))).fullmatch
    except (ValueError, re.error) as error:
        raise UserError(
            f"is {pattern!r}, which is not a valid glob ({error}); write one like 'a/**/*.txt'", "data.path"
        ) from error
    for root in glob.glob(os.sep.join(parts[:at]) + os.sep) if at else ["."]:
        for name in _below(root, is_new, bool(asked)):
            below = os.path.relpath(name, root)
            is_hidden = any(part.startswith(".") and part not in asked for part in below.split(os.sep))
            if matches(below) and not is_hidden:
                yield name


def _in_bucket(path: str, every_link: bool) -> Listed:
    # epath knows no **; fsspec, on which it stands, does.
    system, pattern = fsspec.url_to_fs(path)
    try:
        if system.isdir(pattern):
            entries = system.find(pattern, detail=True)
        elif system.exists(pattern):
            entries = {pattern: system.info(pattern)}
        else:
            entries = system.glob(pattern, detail=True)
    except FileNotFoundError:  # no such bucket
        return
    for name, info in entries.items():
        if info["type"] != "file":
            continue
        # Hidden files are passed over unless they are asked for, as on a disk.
        if any(part.startswith(".") for part in {*name.split("/")} - {*pattern.split("/")}):
            yield "hidden", None
        else:
            yield f"gs://{name}", (info["size"], int(info["generation"]))


class _BadRowError(ValueError):
    """A row without text: an error for the user, or one row more that is counted and skipped."""

    def __init__(self, problem: str, advice: str, field: str):
        super().__init__(problem)
        self.advice, self.field = advice, field


@dataclasses.dataclass
class Reader:
    """Reads documents, and counts what it leaves out.

    Attributes:
        field: where a row has its text; a dotted name reaches nested text: `message.content`, `turns.0.text`.
        separator: what stands between documents of a text file; "" = a file is one document.
        skip_bad_rows: leave rows without text out, instead of refusing them.
        as_before: keep byte order marks, and blank documents except those of text files, as earlier versions did.
        chat: a row has messages; its text is these, as JSON.
        where: the file and the row of the current document.
        roles: of all messages that were read.
        blank, bad_rows: how many documents were blank, and how many rows had no text.
        first_bad_row: what was wrong with the first such row.
        position: gives how many bytes of the current file were read; always 0 for .parquet, as `int()` is.
    """

    field: str
    separator: str
    skip_bad_rows: bool = False
    as_before: bool = False
    chat: bool = False
    where: str = ""
    roles: set[str] = dataclasses.field(default_factory=set)
    blank: int = 0
    bad_rows: int = 0
    first_bad_row: str = ""
    position: Callable[[], int] = int

    def documents(self, file: str) -> Iterator[str]:
        """The documents of one file.

        Raises:
            UserError: the file is not what its ending says, or a row has no text; the message names the file, the
                row and what is there.
        """
        kind, _ = kind_of(file)
        is_plain = kind in PLAIN
        for text in self._texts(file):
            if self.as_before:
                if not is_plain or text.strip():
                    yield text
                continue
            text = text.removeprefix(BOM)
            if is_blank(text):
                self.blank += 1
            else:
                yield text

    def _texts(self, file: str) -> Iterator[str]:
        kind, packing = kind_of(file)
        try:
            with _opened(file, kind, packing) as (binary, self.position):
                if kind == ".parquet":
                    rows = self._table_rows(file, binary)
                else:
                    text = io.TextIOWrapper(binary, encoding="utf-8")
                    if kind in PLAIN:
                        yield from _split(text, self.separator)
                        return
                    rows = _items(file, text) if kind == ".json" else _lines(file, kind, text)
                for where, row in rows:
                    self.where = where
                    try:
                        text_of_row = self._text_of(row, where)
                    except _BadRowError as error:
                        if not self.skip_bad_rows:
                            raise UserError(f"{error}; {error.advice}", error.field) from error
                        self.first_bad_row = self.first_bad_row or str(error)
                        self.bad_rows += 1
                        continue
                    yield text_of_row
        except UserError:
            raise
        except (OSError, ValueError, NotImplementedError, MemoryError, EOFError, zlib.error, lzma.LZMAError) as error:
            # Not UTF-8, not JSON, not Parquet, not packed: errors of pyarrow and of unpacking are of all these kinds.
            how = f"{error}; write it again, or leave it out"
            if isinstance(error, UnicodeDecodeError):
                how = _not_utf8(error, file, packing)
            raise UserError(f"{file} cannot be read as {kind}{packing}: {how}", "data.path") from error

    def _text_of(self, row: Any, where: str) -> str:
        if isinstance(row, _BadRowError):
            raise row
        if not isinstance(row, dict if self.chat else str | dict):
            raise _BadRowError(
                f"{where} is not a JSON object but {_described(row)}",
                f"write rows that have their {'messages' if self.chat else 'text'} under {self.field!r}; {SKIP}",
                "data.path",
            )
        try:
            text = row if isinstance(row, str) and not self.chat else _reached(row, self.field)
        except LookupError as error:
            names = ", ".join(_names(row)) or "none"
            what = "messages" if self.chat else "text"
            raise _BadRowError(
                f"{where} has no {what} under {self.field!r}",
                f"its fields: {names}; {SKIP}",
                "data.chat" if self.chat else "data.field",
            ) from error
        if self.chat:
            text = self._messages(text, where)
        if not isinstance(text, str):
            nested = [name for name in _names(row) if name.startswith(f"{self.field}.")]
            how = f"data.field={nested[0]!r} reaches into it" if nested else "write the field that has the text"
            what = f"{where} has {_described(text)} under {self.field!r}, not text"
            raise _BadRowError(what, f"{how}; {SKIP}", "data.field")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a pair
            what = f"{where} has a character that UTF-8 cannot encode ({error})"
            raise _BadRowError(what, f"take it out; {SKIP}", "data.path") from error
        return text

    def _messages(self, value: Any, where: str) -> str:
        """Messages as JSON; "" for those that say nothing."""
        try:
            messages = chat_lib.messages_of(value)
        except ValueError as error:
            how = f'write messages such as {{"role": "user", "content": "Hello"}}; {SKIP}'
            raise _BadRowError(f"{where} has {error} under {self.field!r}", how, "data.chat") from error
        if chat_lib.says_nothing(messages):
            return ""
        self.roles |= {message["role"] for message in messages}
        return json.dumps(messages, ensure_ascii=False)

    def _table_rows(self, file: str, binary: Any) -> Iterator[tuple[str, Any]]:
        import pyarrow.parquet  # slow to import, and needed by this format only

        table = pyarrow.parquet.ParquetFile(binary)
        names, top = table.schema_arrow.names, self.field.partition(".")[0]
        leaves = [table.schema.column(index).path for index in range(len(table.schema))]
        # Only the text is read. Other columns may hold images.
        columns = [leaf for leaf in leaves if leaf == self.field or leaf.startswith(f"{self.field}.")]
        if not columns and top not in names:
            has = f"its columns: {', '.join(map(str, names))}"
            field = "data.chat" if self.chat else "data.field"
            missing = _BadRowError(f"{file} has no column {self.field!r}", has, field)
            yield from (("", missing) for _ in range(table.metadata.num_rows))
            return
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns or [top]):
            for row in batch.to_pylist():
                number += 1
                yield f"{file} row {number}", row


def _not_utf8(error: UnicodeDecodeError, file: str, packing: str) -> str:
    """What a file is that is not UTF-8, as far as the bytes around the error tell, and what to do with it."""
    part, encoding = error.object, "LATIN1"
    if error.start == 0 and part.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "UTF-16"
    elif re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", part):
        return "it does not seem to be a text file; leave it out"
    unpack = "unpack it and " if packing else ""
    name = shlex.quote(file.removesuffix(packing))
    return f"{error}; {unpack}write it again in UTF-8 (`iconv -f {encoding} -t UTF-8 {name}`), or leave it out"


def is_blank(text: str) -> bool:
    """Whether a text has only spaces, of all kinds, and characters without a width, such as U+200B."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def _split(text: TextIO, separator: str) -> Iterator[str]:
    """The documents of a text file, which need not fit into memory."""
    rest = ""
    while chunk := text.read(CHUNK):
        rest += chunk
        if separator:
            *whole, rest = rest.split(separator)
            yield from whole
        while len(rest) >= LONGEST + len(separator):  # part of a separator may stand at the end
            yield rest[:LONGEST]
            rest = rest[LONGEST:]
    yield rest


def _lines(file: str, kind: str, text: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        line = line.removeprefix(BOM)
        if not line.strip():
            continue
        row: Any
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            # The parser counts lines as well, from 1 in each line of the file.
            what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            why = f"{file} cannot be read as {kind}: line {number} is not JSON ({what})"
            row = _BadRowError(why, f"write the line again; {SKIP}", "data.path")
        yield f"{file} line {number}", row


def _items(file: str, text: TextIO) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, or JSON values that follow one another, each as soon as it is read."""
    decode, not_space = json.JSONDecoder().raw_decode, re.compile(r"[^ \t\r\n]")
    buffer, at, number = text.read(CHUNK).removeprefix(BOM), 0, 0

    def read_on() -> bool:
        nonlocal buffer, at
        if len(buffer) - at > LARGEST_ITEM:
            raise ValueError(f"item {number + 1} is longer than {LARGEST_ITEM:,} characters, or is not JSON")
        chunk = text.read(max(CHUNK, len(buffer) - at))  # twice as much, so that long items are not read again often
        buffer, at = buffer[at:] + chunk, 0
        return bool(chunk)

    def skip_space() -> str:
        """The next character that is not a space; "" at the end."""
        nonlocal at
        while not (match := not_space.search(buffer, at)):
            at = len(buffer)
            if not read_on():
                return ""
        at = match.start()
        return match.group()

    is_array = skip_space() == "["
    at += is_array
    while (first := skip_space()) and not (is_array and first == "]"):
        if is_array and number:
            if first != ",":
                raise ValueError(f"there is no comma after item {number}")
            at += 1
            skip_space()
        while True:
            try:
                value, end = decode(buffer, at)
                # The end of what was read so far may be the middle of a number.
                if end < len(buffer) or not read_on():
                    break
            except (ValueError, RecursionError) as error:
                if not read_on():
                    raise ValueError(f"item {number + 1} is not JSON ({getattr(error, 'msg', error)})") from error
        at, number = min(end, len(buffer)), number + 1  # at the end, read_on has dropped what is before the item
        yield f"{file} item {number}", value
    if is_array and not first:
        raise ValueError("its array does not end")
    at += is_array
    if is_array and skip_space():
        raise ValueError("there is more after its array")


def _reached(row: Any, field: str) -> Any:
    """The value that a row has under a name or a dotted name; raises `LookupError` if it has none."""
    if field in row:
        return row[field]
    for name in field.split("."):
        if isinstance(row, list) and name.isdecimal():
            row = row[int(name)]
        elif isinstance(row, dict):
            row = row[name]
        else:
            raise LookupError(name)
    return row


def _names(row: Any, above: str = "") -> list[str]:
    """The names of a row's fields, and dotted names of nested ones; no more than a message can hold."""
    names = []
    items = row.items() if isinstance(row, dict) else enumerate(row[:1]) if isinstance(row, list) else ()
    for name, value in items:
        names += [f"{above}{name}", *(_names(value, f"{above}{name}.") if above.count(".") < 2 else [])]
    return [name for name in names if len(name) < 100][:20]


def _described(value: Any) -> str:
    """What a row has instead of text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"the number {value:g}" if abs(value) < 1e300 else "a number"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return "the text itself" if isinstance(value, str) else f"a value of type {type(value).__name__}"


class _Unpacked(io.RawIOBase):
    """A stream that unpacks as it is read, up to a bound: a small file may unpack to more than any disk holds.

    Raises:
        UserError: it unpacks to more bytes than the bound.
    """

    def __init__(self, file: str, stream: Any, bound: int):
        self._file, self._stream, self._bound, self._count = file, stream, bound, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        self._count += len(content)
        if self._count > self._bound:
            raise UserError(
                f"{self._file} unpacks to more than {self._bound:,} bytes, {RATIO} times its size; if all of that is "
                "text, unpack it and write the path of what it holds",
                "data.path",
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextlib.contextmanager
def _opened(file: str, kind: str, packing: str) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The bytes of a file, unpacked, and how many of them were read before they were unpacked."""
    with contextlib.ExitStack() as stack:
        binary: Any = stack.enter_context(epath.Path(file).open("rb"))
        position = int if kind == ".parquet" else binary.tell  # a table is not read from its beginning to its end
        if packing:
            bound = SMALL + RATIO * paths.of(file).size()
            raw = stack.enter_context(_Unpacked(file, PACKED[packing](binary), bound))
            binary = io.BufferedReader(raw, CHUNK)
            if kind == ".parquet":  # which is read from its end
                unpacked = stack.enter_context(tempfile.TemporaryFile())
                while content := binary.read(CHUNK):
                    unpacked.write(content)
                unpacked.seek(0)
                binary = unpacked
        yield binary, position
