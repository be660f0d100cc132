"""The Python standard library's own source: a corpus that is wherever Python is.

Held out by file, chosen by a hash of the path, so that a file is on the same side under every Python version.
"""

import contextlib
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from gsae_jax import config as config_lib
from gsae_jax.data import labels

READS: tuple[str, ...] = ()  # of `config.Data`, those that only some corpora read


@functools.cache
def _files_of(root: Path) -> list[Path]:
    """Without packages that are installed, of which there may be a hundred thousand files."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "site-packages"]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


class StdlibSource(tfds.core.GeneratorBasedBuilder):
    """One example per `.py` file: its text, and its path below the standard library's folder."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs: Any):
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = _files_of(self._root)
        content = config_lib.fingerprint(
            [(str(path.relative_to(self._root)), path.stat().st_size) for path in self._files]
        )
        name = f"python-{sysconfig.get_python_version()}-{content}"
        super().__init__(config=tfds.core.BuilderConfig(name=name, description="this interpreter's library"), **kwargs)

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "path": tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(test=False), "test": self._generate_examples(test=True)}

    def _generate_examples(self, test: bool) -> Iterator[tuple[str, dict[str, str]]]:
        for path in self._files:
            name = path.relative_to(self._root).as_posix()
            if (hashlib.sha256(name.encode()).digest()[0] < 13) != test:  # 13/256: about 5% of the files
                continue
            # The library tests Python's own handling of broken encodings with a few files that are not UTF-8.
            with contextlib.suppress(UnicodeDecodeError):
                yield name, {"text": path.read_text("utf-8"), "path": name}


def open_corpus(config: config_lib.Data) -> tuple[tfds.core.DatasetBuilder, str]:
    """The TFDS builder, and the name of its text feature, of the running interpreter's standard library."""
    return StdlibSource(data_dir=config.data_dir or None, file_format="array_record"), "text"


def labelled(example: Mapping[str, Any]) -> labels.Document | None:
    """An example with `labels.of_python`; its module is the package or the file below the library's folder."""
    text, path = (each.decode() if isinstance(each, bytes) else each for each in (example["text"], example["path"]))
    return labels.of_python(text, path.partition("/")[0].removesuffix(".py"))
