"""Files that anyone may have written: JSON objects within limits, and what git leaves where a file was not fetched."""

import contextlib
import json
import os
from typing import Any

from etils import epath

from gsae_jax.errors import UserError
from gsae_jax.storage import paths

LARGEST = 2**28  # bytes of a JSON file; the largest tokenizers have a tenth
LFS = b"version https://git-lfs.github.com/spec/"


def parse_json(text: str, strict: bool = False) -> dict[str, Any]:
    """A JSON object that anyone may have written.

    Args:
        text: the object.
        strict: refuse also what could not be written again: numbers that are not finite, and half characters.

    Raises:
        ValueError: it is no JSON object, is nested too deeply, or has a name twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return tree

    try:
        tree = json.loads(text, object_pairs_hook=once)
        if strict:
            json.dumps(tree, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(tree, dict):
        raise ValueError(f"it is of type {type(tree).__name__}")
    return tree


def load_json(path: epath.PathLike, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file, for who knows what to do without it.

    Raises:
        ValueError: what `parse_json` refuses, text that is not UTF-8, what is not a file, and a file above `LARGEST`.
        OSError: there is no file, or it cannot be read. Libraries for buckets have errors of other kinds, too.
    """
    file = paths.of(path)
    if file.exists() and not file.is_file():
        raise ValueError("it is not a file")
    if (size := file.size()) > LARGEST:
        raise ValueError(f"it has {size:,} bytes, more than {LARGEST:,}")
    return parse_json(file.read_bytes().decode(), strict)


def read_json(path: epath.PathLike, strict: bool = False, advice: str = "copy it again") -> dict[str, Any]:
    """The JSON object in a file that a user gave.

    Args:
        path: of the file.
        strict: as of `parse_json`.
        advice: what to do about a file that cannot be used.

    Raises:
        UserError: what `load_json` refuses.
    """
    try:
        return load_json(path, strict)
    except (OSError, ValueError) as error:
        check_fetched(path)
        raise UserError(f"{path} is not a JSON object ({error}); {advice}") from error


def check_fetched(path: epath.PathLike) -> None:
    """Raises `UserError` for the pointer that git leaves where a large file was not fetched."""
    pointer = False
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                pointer = file.read(len(LFS)) == LFS
    if pointer:
        folder = os.path.dirname(os.path.abspath(path))
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in {folder}")
