"""What tests of text have in common."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet

from gsae_jax import config as config_lib
from gsae_jax import config_trees
from gsae_jax.data import files as files_lib
from gsae_jax.data.corpora import text as text_corpus

ALL = 2**40


def data_config(tmp_path, **changes):
    config = {"corpus": "text", "data_dir": str(tmp_path / "tfds"), "context_length": 8}
    return config_trees.from_dict(config_lib.Data, config | changes)


def texts_of(config, split):
    builder, feature = text_corpus.open_corpus(config)
    builder.download_and_prepare()
    return sorted(example[feature].decode() for example in builder.as_data_source(split=split))


def write(file, documents):
    """Documents as a file of the kind that its name says; those of text files are separated by <sep>."""
    kind, packing = files_lib.kind_of(str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".parquet":
        table = pyarrow.table({"body": documents, "id": range(len(documents))})
        pyarrow.parquet.write_table(table, file)
        content = file.read_bytes()
    else:
        rows = [{"id": 1, "body": text} for text in documents]
        if kind in (".txt", ".md"):
            content = "<sep>".join(documents)
        elif kind == ".json":
            content = json.dumps(rows, indent=1, ensure_ascii=False)
        else:
            content = "\n".join(map(json.dumps, rows))
        content = content.encode()
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
    }
    file.write_bytes(pack[packing](content))
    return file


NAMES = [f"a{kind}" for kind in files_lib.KINDS] + ["a.TXT", "a.JSONL"]
