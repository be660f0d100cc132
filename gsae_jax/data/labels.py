"""Text with labels: documents of which parts have a label of some kind, and rows of tokens that have these labels.

A kind of labels, such as `keyword`, has values, such as `import`. A character has at most one value of each kind. A
token has the value of its first character that is not a space; a token of spaces alone, of its first character.
"""

import io
import json
import keyword
import os
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gsae_jax.errors import UserError

DEEPEST = 4  # level of indentation; deeper ones count as this one
PER_DOCUMENT = 1024  # tokens, so that a few long documents are not all of the text
KEYWORDS = {
    "definition": ("def", "class", "lambda"),
    "condition": ("if", "elif", "else"),
    "loop": ("for", "while", "break", "continue"),
    "exception": ("try", "except", "finally", "raise", "assert"),
    "result": ("return", "yield"),
    "import": ("import", "from", "as"),
    "operator": ("and", "or", "not", "in", "is"),
    "constant": ("None", "True", "False"),
}
CLASS_OF = {word: name for name, words in KEYWORDS.items() for word in words}


class Document(NamedTuple):
    """A text with labels.

    Attributes:
        text: the text.
        spans: by the kind of labels, (start, end, value) of parts of the text, as Python slices them.
    """

    text: str
    spans: Mapping[str, Sequence[tuple[int, int, str]]]


class Rows(NamedTuple):
    """Rows of tokens. Each is of one document.

    Attributes:
        tokens_RxT: token ids, int32; 0 at padding, which is on the right.
        mask_RxT: False at padding, and at the BOS that begins a row.
        document_R: the number of each row's document.
        values: by the kind of labels, its values.
        labels: by the kind of labels, [R, T], the place of a token's label in `values`; -1 if it has none.
    """

    tokens_RxT: np.ndarray
    mask_RxT: np.ndarray
    document_R: np.ndarray
    values: dict[str, list[str]]
    labels: dict[str, np.ndarray]


def of_python(text: str, module: str) -> Document | None:
    """A Python file with labels by Python's own tokenizer; None for a file that it refuses.

    The kinds are `module`; `indentation`, the level of a statement; `string` and `comment`, of which both have one
    value; `keyword`, the class of a keyword (`KEYWORDS`, or `other`); and `identifier`, the role of a name. Names
    inside of f-strings are parts of a string.
    """
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the text
            tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    if any(token.type == tokenize.ERRORTOKEN for token in tokens):  # before Python 3.12, in place of an error
        return None

    def place(position: tuple[int, int]) -> int:
        row, column = position
        return min(starts[min(row, len(starts)) - 1] + column, len(text))

    spans: dict[str, list[tuple[int, int, str]]] = {"module": [(0, len(text), module)]}

    def add(kind: str, start: int, end: int, value: str) -> None:
        spans.setdefault(kind, []).append((start, end, value))

    depth, done = 0, 0
    for token in tokens:
        start, end = place(token.start), place(token.end)
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
            continue
        if token.type == tokenize.COMMENT:
            add("comment", start, end, "comment")
        if end > done:
            add("indentation", done, end, f"{DEEPEST} or more" if depth >= DEEPEST else str(depth))
            done = end
    skipped = (tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.NL)
    solid = [token for token in tokens if token.type not in skipped]
    opened: list[int] = []  # where strings begin that have parts, as f-strings do since Python 3.12
    brackets = 0
    for before, token, after in zip([None, *solid], solid, [*solid[1:], None], strict=False):
        start, end, name = place(token.start), place(token.end), tokenize.tok_name[token.type]
        if name.endswith("STRING_START"):
            opened.append(start)
        elif name.endswith("STRING_END"):
            first = opened.pop()
            if not opened:
                add("string", first, end, "string")
        elif opened:
            continue
        elif token.type == tokenize.STRING:
            add("string", start, end, "string")
        elif token.type == tokenize.OP:
            brackets += (token.string in ("(", "[", "{")) - (token.string in (")", "]", "}"))
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
            add("keyword", start, end, CLASS_OF.get(token.string, "other"))
        elif token.type == tokenize.NAME:
            words = [each.string if each else "" for each in (before, after)]
            add("identifier", start, end, _role(words[0], words[1], brackets > 0))
    return Document(text, spans)


def _role(before: str, after: str, in_brackets: bool) -> str:
    """What a name is, by the tokens around it."""
    if before in ("def", "class"):
        return "function definition" if before == "def" else "class definition"
    if before == ".":
        return "method call" if after == "(" else "attribute"
    if after == "(":
        return "call"
    return "argument name" if in_brackets and after == "=" else "other name"


def read(path: str) -> Iterator[Document]:
    """The documents of a file of JSON lines: {"text": "...", "labels": {"kind": [[start, end, "value"], ...], ...}}.

    Raises:
        UserError: the file cannot be read, or a line is none of this form.
    """
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _document(line, f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write a file of JSON lines in UTF-8") from error


def _document(line: str, where: str) -> Document:
    form = '{"text": "a b", "labels": {"part of speech": [[0, 1, "article"]]}}'
    try:
        tree = json.loads(line)
        text, labels = tree["text"], tree["labels"]
        spans = {kind: [(start, end, value) for start, end, value in parts] for kind, parts in labels.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} has no text with labels ({error!r}); write lines such as {form}") from error
    if not isinstance(text, str):
        raise UserError(f"{where} has a text that is no string; write lines such as {form}")
    for kind, parts in spans.items():
        for start, end, value in parts:
            if not (type(start) is type(end) is int and 0 <= start < end <= len(text) and isinstance(value, str)):
                part = json.dumps([start, end, value])
                why = f"{where} has the label {part} of {kind!r}, and the text has {len(text)} characters"
                raise UserError(f"{why}; write [start, end, value] with 0 <= start < end, and a value in quotes")
    return Document(text, spans)


def rows(documents: Iterable[Document], tokenizer: Any, length: int, bos: int | None, limit: int) -> Rows:
    """Rows of `length` tokens of documents, until there are about `limit` tokens, with the labels of each token.

    Of a long document, rows at even distances are taken, with `PER_DOCUMENT` tokens or one row.

    Args:
        documents: the documents.
        tokenizer: of the language model.
        length: of a row.
        bos: the token that begins each row, if there is one.
        limit: the number of tokens.

    Raises:
        UserError: the tokenizer does not say which characters a token has.
    """
    body, most = length - (bos is not None), max(1, PER_DOCUMENT // length)
    ids: list[np.ndarray] = []
    numbers: list[int] = []
    values: dict[str, list[str]] = {}
    codes: list[dict[str, np.ndarray]] = []
    count = 0
    for number, document in enumerate(documents):
        if count >= limit:
            break
        tokens, places = _tokens(document.text, tokenizer)
        labels = {kind: _codes(document, kind, values.setdefault(kind, []))[places] for kind in document.spans}
        starts = np.arange(0, len(tokens), body)
        for start in starts[np.unique(np.linspace(0, len(starts) - 1, min(most, len(starts))).round().astype(int))]:
            part = slice(start, start + body)
            ids.append(tokens[part])
            codes.append({kind: each[part] for kind, each in labels.items()})
            numbers.append(number)
            count += len(ids[-1])
    first = length - body

    def filled(parts: Sequence[np.ndarray | None], value: int) -> np.ndarray:
        whole = np.full((len(parts), length), value, np.int32)
        for row, part in zip(whole, parts, strict=True):
            if part is not None:
                row[first : first + len(part)] = part
        return whole

    tokens_RxT, mask_RxT = filled(ids, 0), filled([np.ones_like(part) for part in ids], 0) > 0
    if bos is not None:
        tokens_RxT[:, 0] = bos
    of_kind = {kind: filled([each.get(kind) for each in codes], -1) for kind in values}
    return Rows(tokens_RxT, mask_RxT, np.array(numbers, int), values, of_kind)


def _tokens(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens [n], the character that decides the label of each)."""
    try:
        made = tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
    except NotImplementedError as error:
        why = f"the tokenizer does not say which characters a token has ({error})"
        raise UserError(f"{why}; write a model with tokenizer.json", "lm.path") from error
    start, end = np.array(made["offset_mapping"], int).reshape(-1, 2).T
    solid = np.array([not char.isspace() for char in text] + [True])
    following = np.where(solid, np.arange(len(solid)), len(text))
    following = np.minimum.accumulate(following[::-1])[::-1]  # the next character that is not a space
    place = np.where(following[start] < end, following[start], start)
    return np.array(made["input_ids"], np.int32), place


def _codes(document: Document, kind: str, values: list[str]) -> np.ndarray:
    """The place in `values` of each character's label, which new values are added to; -1 where there is none."""
    codes = np.full(len(document.text) + 1, -1, np.int32)
    for start, end, value in document.spans[kind]:
        if value not in values:
            values.append(value)
        codes[start:end] = values.index(value)
    return codes
