"""The pages as HTML: the same templates for the server and for files, with links of either kind."""

import math
from typing import Any
from urllib.parse import quote

from gsae_jax import rendering
from gsae_jax.viewer import library as library_lib
from gsae_jax.viewer.library import Entry, Library
from gsae_jax.web import contexts

ROWS = 100  # of a list that the server writes; the script adds others


class Links:
    """Addresses of pages."""

    def __init__(self, up: int | None = None):
        """`up`: for files, how many folders the page lies below the first one; None for a server."""
        self.is_file = up is not None
        self._root, self._index = ("../" * (up or 0), "/index.html") if self.is_file else ("/", "")

    def home(self) -> str:
        """The list of SAEs."""
        return f"{self._root}index.html" if self.is_file else "/"

    def sae(self, key: str) -> str:
        """The list of features."""
        return f"{self._root}{quote(key)}{self._index or '/'}"

    def feature(self, key: str, number: int) -> str:
        """The page of a feature."""
        return f"{self.features(key)}{number}{self._index}"

    def features(self, key: str) -> str:
        """What the addresses of features begin with."""
        return f"{self._root}{quote(key)}/"

    def compare(self, a: str = "", b: str = "") -> str:
        """Two features, `SAE/NUMBER` each; or the nearest features of two SAEs."""
        if self.is_file and a and b and "/" not in a:
            return f"{self._root}compare/{quote(a)}/{quote(b)}/index.html"
        query = f"?a={quote(a)}&b={quote(b)}" if a or b else ""
        return f"{self._root}compare{self._index}{query}"

    def static(self, name: str) -> str:
        """A file of the package."""
        return f"{self._root}static/{name}"

    def page(self, name: str, query: str = "") -> str:
        """`text` or `steer`, which files do not have."""
        return f"/{name}{query}"


def _number(value: Any, digits: int = 3) -> str:
    """A number for readers; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


ENVIRONMENT = rendering.environment("gsae_jax.viewer", "gsae_jax.web")
ENVIRONMENT.filters |= {
    "number": _number,
    "visible": contexts.visible,
    "token": contexts.visible_token,
}
ENVIRONMENT.globals |= {"about_column": library_lib.about_column, "KINDS": library_lib.KINDS}


class Pages:
    """Writes pages of a library."""

    def __init__(self, library: Library, title: str, can_compute: bool = False):
        """`title`: what the pages are about; `can_compute`: whether there are pages for a text and for steering."""
        self.library, self.title, self.can_compute = library, title, can_compute
        self._lists: dict[str, str] = {}

    def _render(self, template: str, links: Links, **values: Any) -> str:
        pages = {"library": self.library, "title": self.title, "can_compute": self.can_compute, "links": links}
        return ENVIRONMENT.get_template(template).render(pages | values)

    def home(self, links: Links) -> str:
        """The list of SAEs, with the report's frontiers."""
        return self._render("home.html", links)

    def sae(self, links: Links, entry: Entry, kind: str = "", text: str = "") -> str:
        """The list of an SAE's features; with `kind`, of those that are found by `text`.

        Raises:
            UserError: of `Entry.search`.
        """
        found = entry.search(kind, text) if kind and text.strip() else range(len(entry))
        return self._render("sae.html", links, entry=entry, kind=kind, text=text, count=len(found), rows=found[:ROWS])

    def feature(self, links: Links, entry: Entry, number: int) -> str:
        """The page of a feature.

        Raises:
            UserError: there is no feature of this number.
        """
        return self._render("feature.html", links, entry=entry, page=entry.page(number))

    def compare(self, links: Links, a: str = "", b: str = "") -> str:
        """Two features side by side, the nearest features of two SAEs, or the form that asks for them.

        Raises:
            UserError: there is no such SAE or feature, or only one of the two is a feature.
        """
        if not (a and b):
            return self._render("compare.html", links, a=a, b=b, pair=None, both=None)
        places = [library_lib.place(each, self.library) for each in (a, b)]
        (first, number), (second, other) = places
        if number is None and other is None:
            rows = library_lib.pairing(first, second)["columns"]
            return self._render("compare.html", links, a=a, b=b, pair=(first, second, rows), both=None)
        if number is None:  # the nearest feature, where one of the two names an SAE only
            number = second.nearest(first).get(other or 0, (0, 0.0))[0]
        if other is None:
            other = first.nearest(second).get(number, (0, 0.0))[0]
        both = ((first, first.page(number)), (second, second.page(other)))
        return self._render(
            "compare.html", links, a=f"{first.key}/{number}", b=f"{second.key}/{other}", pair=None, both=both
        )

    def text(self, links: Links, key: str) -> str:
        """The page to try a text on; `key`: of the SAE that is chosen at first."""
        return self._render("text.html", links, key=key, example=self.library.entries[key].example())

    def steer(self, links: Links, chosen: list[tuple[Entry, int]]) -> str:
        """The page to steer and ablate with features, of which some are chosen at first."""
        example = chosen[0][0].example(chosen[0][1]) if chosen else next(iter(self.library)).example()
        return self._render("steer.html", links, chosen=chosen, example=example)

    def error(self, links: Links, sentence: str) -> str:
        """A page that says what is wrong."""
        return self._render("error.html", links, sentence=sentence)

    def token(self, links: Links) -> str:
        """The page that asks for the server's token."""
        return self._render("token.html", links)

    def listing(self, entry: Entry) -> str:
        """A script with the list of an SAE's features, written once."""
        if entry.key not in self._lists:
            self._lists[entry.key] = f"LIST = {library_lib.to_json(library_lib.listing(entry))}"
        return self._lists[entry.key]

    def pairing(self, a: Entry, b: Entry) -> str:
        """A script with the nearest features of two SAEs."""
        return f"LIST = {library_lib.to_json(library_lib.pairing(a, b))}"

    def index(self, entry: Entry) -> str:
        """A script with what search looks in, for files."""
        return f"SEARCH = {library_lib.to_json(entry.index())}"
