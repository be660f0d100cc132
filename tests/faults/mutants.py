"""Damaged and hostile versions of files and of trees, drawn from a seed."""

import bz2
import copy
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}

DEEP: Any = 0
for _ in range(100):
    DEEP = [DEEP]
# What may stand where something else was expected.
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2.5,
    2**31,
    2**63,
    10**30,
    -1e308,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "1",
    "../../etc/passwd",
    "/dev/zero",
    "<script>alert(1)</script>",
    "a\0b",
    "a\nb",
    "\x1b[31mred",
    "\ud800",
    "é" * 5000,
    [],
    {},
    [None],
    [1, 2, 3],
    {"a": 1},
    {"": {}},
    DEEP,
)


def paths(tree: Any, path: tuple = ()) -> list[tuple]:
    """The path of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [found for key, value in items for found in [(*path, key), *paths(value, (*path, key))]]


def tree(random: random.Random, original: Any) -> Any:
    """A copy of nested dicts and lists in which one to three nodes are gone, doubled, moved or something else."""
    mutant = copy.deepcopy(original)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        found = paths(mutant)
        if not found:
            return random.choice(VALUES)
        # Every depth has its chance, however many nodes lie there.
        depth = random.choice(sorted({len(path) for path in found}))
        *above, key = random.choice([path for path in found if len(path) == depth])
        parent = mutant
        for step in above:
            parent = parent[step]
        if isinstance(parent, tuple):
            continue
        kind = random.randrange(10)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[random.choice((f"{key}x", "", "\0", "num_labels", "auto_map"))] = parent[key]
        elif kind == 2:
            parent[key] = [parent[key]] * random.choice((1, 2, 100))
        elif kind == 3:
            parent[key] = mutant if random.random() < 0.1 else {"a": parent[key]}
            mutant = copy.deepcopy(mutant) if parent[key] is not mutant else {"a": original}
        elif kind == 4 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * random.choice((-1, 0, 2, 0.5, 1000, 10**9))
        else:
            parent[key] = copy.deepcopy(random.choice(VALUES))
    return mutant


def json_file(random: random.Random, content: bytes) -> bytes:
    """Usually another tree; now and then a name that stands twice, or bytes that are no JSON."""
    kind = random.randrange(10)
    if kind == 0:
        return file(random, content)
    if kind == 1:
        more = (
            b'"model_type": 3, "model_type": "gelu"',
            b'"deep": ' + b"[" * 900 + b"]" * 900,
            b'"num_labels": 1000000000',
        )
        return content.replace(b"{", b"{" + random.choice(more) + b", ", 1)
    if kind == 2:
        return random.choice((b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b"[]", b"null", b"NaN", b'"x"'))
    return json.dumps(tree(random, json.loads(content))).encode()


def file(random: random.Random, content: bytes) -> bytes:
    """Cut, empty, changed in some bits, with bytes put in or taken out, or with a part of it twice."""
    mutant = bytearray(content)
    kind = random.randrange(8)
    at = random.randrange(len(mutant) + 1) if random.random() < 0.5 else random.randrange(min(200, len(mutant)) + 1)
    if kind == 0:
        return bytes(mutant[:at])
    if kind == 1:
        return random.choice(
            (b"", b"\0" * 100, b"\xff" * 100, b"\xef\xbb\xbf" + content, content.decode("latin1").encode("utf-16"))
        )
    if kind == 2:
        return bytes(mutant[:at] + random.randbytes(random.randrange(1, 20)) + mutant[at:])
    if kind == 3:
        return bytes(mutant[:at] + mutant[at + random.randrange(1, 20) :])
    if kind == 4:
        return bytes(mutant + mutant[at:])
    for _ in range(random.choice((1, 3, 30))):
        if mutant:
            where = random.randrange(len(mutant)) if random.random() < 0.5 else random.randrange(min(200, len(mutant)))
            mutant[where] = random.choice((0, 0xFF, mutant[where] ^ 1 << random.randrange(8)))
    return bytes(mutant)


def name(random: random.Random) -> str:
    """Of a file or a folder, as file systems allow it."""
    names = ("a", "b", "[1]", "[", "]", "*", "?", "**", "a b", "\\", "~", "-", "é", ".hidden", "x" * 200, "\n", "$HOME")
    return random.choice((*names, os.fsdecode(b"\xff"), "%", "'", "gs:"))


def safetensors_file(random: random.Random, content: bytes) -> bytes:
    """Mostly another header before the same data."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = random.randrange(7)
    if kind == 0:
        return file(random, content)
    if kind == 1:
        lengths = (0, 1, length - 1, length + 1, len(content), 2**31, 2**60, 2**63, 2**64 - 1)
        return random.choice(lengths).to_bytes(8, "little") + header + data
    if kind == 2:
        parsed = json.loads(header)
        name = random.choice([name for name in parsed if name != "__metadata__"])
        begin, end = parsed[name]["data_offsets"]
        far = random.choice((0, 1, len(data), 2**40, 2**63, 2**64 - 1, -1))
        parsed[name] |= random.choice(
            (
                {"data_offsets": [begin, far]},
                {"data_offsets": [far, end]},
                {"data_offsets": [end, begin]},
                {"data_offsets": [0, end - begin]},
                {"shape": [2**32, 2**32]},
                {"shape": [2**64, 0]},
                {"shape": [2**61, 8]},
                {"shape": []},
                {"shape": [*parsed[name]["shape"], 1]},
                {"shape": [-1, *parsed[name]["shape"][1:]]},
                {"dtype": random.choice(("F64", "BOOL", "I8", "F8_E4M3", "U64", "", "F33"))},
            )
        )
        header = json.dumps(parsed).encode()
    elif kind == 3:
        first = header[: header.index(b"}") + 1]
        header = first + b"," + header[1:]  # the first tensor twice
    elif kind == 4:  # what the format allows
        header = json.dumps({"__metadata__": {"a": "é" * random.randrange(100)}} | json.loads(header)).encode() + b"  "
    else:
        header = json_file(random, header)
    return len(header).to_bytes(8, "little") + header + data


def csv_file(random: random.Random, content: bytes) -> bytes:
    """Another cell, or other bytes."""
    if random.randrange(3) == 0:
        return file(random, content)
    lines = [line.split(",") for line in content.decode().splitlines()]
    for _ in range(random.choice((1, 3))):
        row = random.choice(lines)
        row[random.randrange(len(row))] = str(
            random.choice((*VALUES[:-1], "$\\frac{", "$x$", "$\\frac{$", '"', "1e999", "-0.5", "nan"))
        )
    return "\n".join(",".join(row) for row in lines).encode("utf-8", "replace")


def parameters(random: random.Random, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of an SAE as divergence leaves them: one or two with numbers that are not finite, huge, or zero."""
    mutant = {name: np.array(value) for name, value in params.items()}
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(sorted(mutant))
        value = mutant[name]
        kind = random.randrange(6)
        if kind == 0:  # all features off
            for bias in {"b_gate", "b_enc"} & set(mutant):
                mutant[bias][...] = -1e6
        elif kind == 1:  # what a decoder's rows become where their norm overflows
            mutant["W_dec"][random.randrange(len(mutant["W_dec"])) :] = 0
        elif kind == 2 and "r_mag" in mutant:
            mutant["r_mag"][: random.randrange(1, len(mutant["r_mag"]) + 1)] = random.choice((89, 1000, -1000, 1e30))
        else:
            number = random.choice((np.nan, np.inf, -np.inf, 1e30, -1e30, 3e38, 1e-38, 0))
            where = random.choice((..., (..., random.randrange(value.shape[-1])), (0,) * value.ndim))
            value[where] = number
    return mutant
