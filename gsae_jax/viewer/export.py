"""The pages as files, which a browser opens from a disk and any web host serves."""

import importlib.resources
import shutil
from pathlib import Path

import tqdm

from gsae_jax import processes
from gsae_jax.viewer.pages import Links, Pages


def write(pages: Pages, folder: Path) -> None:
    """Write all pages into an empty folder. Each has an address of its own: folders with `index.html` in them."""
    static = importlib.resources.files("gsae_jax.web") / "static"
    with importlib.resources.as_file(static) as source:
        shutil.copytree(source, folder / "static")
    _put(folder / "index.html", pages.home(Links(0)))
    _put(folder / "compare" / "index.html", pages.compare(Links(1)))
    entries = list(pages.library)
    total = sum(map(len, entries))
    with tqdm.tqdm(total=total, desc="pages", unit="page", disable=None if processes.first() else True) as bar:
        for entry in entries:
            _put(folder / entry.key / "index.html", pages.sae(Links(1), entry))
            _put(folder / entry.key / "list.js", pages.listing(entry))
            _put(folder / entry.key / "search.js", pages.index(entry))
            for other in entries:
                if other is not entry:
                    place = folder / "compare" / entry.key / other.key
                    _put(place / "index.html", pages.compare(Links(3), entry.key, other.key))
                    _put(place / "list.js", pages.pairing(entry, other))
            for number in range(len(entry)):
                _put(folder / entry.key / str(number) / "index.html", pages.feature(Links(2), entry, number))
                bar.update()


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
