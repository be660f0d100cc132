"""What the pages show: SAEs, lists of their features, and one feature, from collected files and a run's report."""

import dataclasses
import functools
import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gsae_jax.errors import UserError
from gsae_jax.features import Feature, Features
from gsae_jax.viewer import figures
from gsae_jax.web import histograms
from gsae_jax.web.contexts import Shown, shown

RESERVED = ("compare", "static", "steer", "text")  # first parts of addresses that are no SAEs
KINDS = {
    "token": "active on token",
    "context": "text of a context",
    "promotes": "promotes token",
    "number": "number",
}  # of search
ABOUT = {
    "feature": ("feature", "number of the feature"),
    "density": ("density %", "percentage of tokens on which the feature is active"),
    "fired": ("tokens", "number of tokens on which the feature is active"),
    "strongest": ("strongest", "largest |activation|"),
    "divergence": ("ablation KL", "mean KL divergence of the next-token predictions when the feature is ablated, nats"),
    "threshold": ("threshold", "of the SAE's JumpReLU form: |activation| exceeds it where the feature is active"),
    "r_mag": ("r_mag", "log of the ratio of the magnitude's and the gate's encoder weights"),
    "cosine": ("cosine", "of the decoder rows"),
}
EXACT = ("feature", "other", "fired")  # integers
QUANTILES = 10
EXAMPLE = 12  # tokens


@dataclasses.dataclass(frozen=True)
class Page:
    """One feature as its page shows it.

    Attributes:
        key: of its SAE.
        feature: what was collected.
        strongest: contexts, in descending order.
        quantiles: (what they are, contexts) of a random sample, from the highest.
        bars: its histogram.
    """

    key: str
    feature: Feature
    strongest: list[Shown]
    quantiles: list[tuple[str, list[Shown]]]
    bars: histograms.Histogram | None

    @property
    def number(self) -> int:
        """Of the feature."""
        return self.feature.number


class Entry:
    """An SAE of the library.

    Attributes:
        key: its name in addresses.
        name: the SAE's own name.
        features: what was collected.
        about: facts of the SAE and of the collection.
        records: those of a run's report that are about it; of several sites, one each.
    """

    def __init__(self, key: str, features: Features, records: Sequence[Mapping[str, Any]]):
        """`records`: of the report of its run, where there is one."""
        self.key, self.name, self.features = key, features.sae, features
        self.about: Mapping[str, Any] = features.about["collection"]
        self.records = list(records)
        self._lock = threading.Lock()  # threads of a server share one connection

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Numbers of all features, as of `Features.columns`, with the density in percent."""
        with self._lock:
            columns = self.features.columns()
        return columns | {"density": 100 * columns["density"]}

    @functools.cached_property
    def words(self) -> tuple[list[str | None], list[tuple[str, ...]]]:
        """As of `Features.words`."""
        with self._lock:
            return self.features.words()

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Numbers of the whole SAE on the collected tokens, and of the report where there is one."""
        fired = self.columns["fired"]
        record = self.records[0] if self.records else {}
        return {
            "l0": float(self.columns["density"].sum() / 100),
            "loss_recovered": record.get("loss_recovered"),
            "alive": float((fired > 0).mean()),
            "dense": float((self.columns["density"] > 10).mean()),
        }

    def page(self, number: int) -> Page:
        """What the page of a feature shows.

        Raises:
            UserError: there is no feature of this number.
        """
        with self._lock:
            feature = self.features[number]
        most = feature.numbers["strongest"] or 1.0
        strongest = [shown(context, most) for context in feature.contexts if context.quantile is None]
        quantiles = []
        for quantile in range(QUANTILES - 1, -1, -1):
            contexts = [shown(context, most) for context in feature.contexts if context.quantile == quantile]
            if contexts:
                size = 100 // QUANTILES
                quantiles.append((f"{size * quantile}–{size * (quantile + 1)}%", contexts))
        bars = histograms.histogram(self.features.bins, feature.histogram)
        return Page(self.key, feature, strongest, quantiles, bars)

    def example(self, number: int | None = None) -> str:
        """Text up to the token on which a feature is strongest; without a number, one of any feature."""
        number = int(np.argmax(self.columns["fired"])) if number is None else number
        with self._lock:
            contexts = self.features[number].contexts
        if not contexts:
            return ""
        tokens, end = contexts[0].tokens, contexts[0].position + 1
        # Texts in a row are often divided by the token that it begins with.
        first = max((at + 1 for at in range(end - 1) if tokens[at] == tokens[0]), default=0)
        return "".join(tokens[max(first, end - EXAMPLE) : end])

    def search(self, kind: str, text: str) -> list[int]:
        """Features by what is written into the search field.

        Raises:
            UserError: an unknown kind, or numbers that are none.
        """
        if kind not in KINDS:
            raise UserError(f"is {kind!r}; write one of {', '.join(KINDS)}", "kind")
        if kind == "number":
            return [number for number in numbers(text) if number < len(self)]
        looks = {
            "token": self.features.active_on,
            "context": self.features.with_context,
            "promotes": self.features.promoting,
        }
        with self._lock:
            return looks[kind](text)

    def nearest(self, other: "Entry") -> dict[int, tuple[int, float]]:
        """(feature, cosine) of another SAE that is nearest to each feature; empty if it was not collected."""
        with self._lock:
            found = self.features.nearest(other.name)
        return {feature: (alike.feature, alike.score) for feature, alike in found.items()}

    def index(self) -> dict[str, Any]:
        """As of `Features.index`."""
        with self._lock:
            return self.features.index()


class Library:
    """All SAEs that pages show."""

    def __init__(self, features: Mapping[str, Features], report: Mapping[str, Any] | None = None):
        """`features`: as of `gsae_jax.features.load`; `report`: the contents of a `report.json`."""
        self.records = [_finite(record) for record in (report or {}).get("saes", ()) if not record.get("ito")]
        self.entries: dict[str, Entry] = {}
        for each in features.values():
            key = each.path.name.rpartition(".")[0]
            while key in self.entries or key in RESERVED:
                key += "_"
            mine = [record for record in self.records if record["name"].partition("@")[0] == each.sae]
            self.entries[key] = Entry(key, each, mine)
        self._keys = {entry.name: key for key, entry in self.entries.items()}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def key_of(self, name: str) -> str | None:
        """The key of an SAE, or of one of its records."""
        return self._keys.get(name) or self._keys.get(name.partition("@")[0])

    @functools.cached_property
    def frontiers(self) -> list[figures.Frontier]:
        """Of each site of the report."""
        return figures.frontiers(self.records)


def listing(entry: Entry) -> dict[str, Any]:
    """The list of an SAE's features, by columns, for JSON. Kinds of columns are numbers, percentages, links, words."""
    on, promotes = entry.words
    columns = [_column("feature", entry.columns["feature"], kind="feature", sae=entry.key)]
    columns.append({"name": "on", "label": "strongest on", "about": "token on which it is strongest", "kind": "token"})
    columns[-1]["values"] = on
    columns += [_column(name, values) for name, values in entry.columns.items() if name != "feature"]
    words = {"name": "promotes", "label": "promotes", "about": "tokens whose logits it raises most, directly"}
    columns.append({**words, "kind": "tokens", "values": promotes})
    return {"columns": columns}


def pairing(a: Entry, b: Entry) -> dict[str, Any]:
    """The features of an SAE with the nearest of another one, in the form of `listing`, by descending cosine."""
    nearest = sorted(a.nearest(b).items(), key=lambda pair: -pair[1][1])
    mine = np.array([feature for feature, _ in nearest], int)
    theirs = np.array([other for _, (other, _) in nearest], int)
    columns = [_column("feature", mine, kind="feature", sae=a.key, label=a.name)]
    columns.append(_column("other", theirs, kind="feature", sae=b.key, label=b.name))
    columns.append(_column("cosine", np.array([cosine for _, (_, cosine) in nearest]), kind="pair"))
    for entry, numbers_of in ((a, mine), (b, theirs)):
        on = [entry.words[0][number] for number in numbers_of]
        label = {"label": f"{entry.name} on", "about": f"token on which the feature of {entry.name} is strongest"}
        columns.append({"name": f"on_{len(columns)}", **label, "kind": "token", "values": on})
    for entry, numbers_of in ((a, mine), (b, theirs)):
        density = entry.columns["density"][numbers_of]
        head = f"{entry.name} density %"
        columns.append(_column(f"density_{len(columns)}", density, label=head, about=ABOUT["density"][1]))
    return {"columns": columns}


def about_column(name: str) -> tuple[str, str]:
    """The label of a column, and what it is."""
    if name.startswith("score of "):
        return name, "how well the rater's explanation predicts where the feature is active: balanced accuracy"
    return ABOUT.get(name, (name, ""))


def _column(name: str, values: np.ndarray, label: str = "", about: str = "", **more: str) -> dict[str, Any]:
    known = about_column(name)
    head = {"name": name, "label": label or known[0], "about": about or known[1], "kind": "number", **more}
    if name in EXACT:
        return head | {"values": values.tolist()}
    # Four digits, as a list is for looking at; the page of a feature has all that were collected.
    return head | {"values": [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]}


def numbers(text: str) -> list[int]:
    """The numbers in `3, 17 20`, each once, in their order.

    Raises:
        UserError: something else is written.
    """
    words = text.replace(",", " ").split()
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise UserError(f"is {text!r}; write numbers of features, such as 3, 17", "number")
    return list(dict.fromkeys(map(int, words)))


def place(text: str, library: Library) -> tuple[Entry, int | None]:
    """The SAE, and the number of a feature if there is one, of an address `SAE` or `SAE/NUMBER`.

    Raises:
        UserError: there is no such SAE or feature.
    """
    key, _, number = text.strip().partition("/")
    entry = library.entries.get(key)
    if entry is None:
        raise UserError(f"{key!r} is not an SAE; known: {', '.join(library.entries)}", "SAE")
    if not number:
        return entry, None
    if not (number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(entry)):
        raise UserError(f"is {number!r}; {key} has features 0 to {len(entry) - 1}", "feature")
    return entry, int(number)


def to_json(value: Any) -> str:
    """JSON in which every number is finite."""
    return json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of a report, with NaN for numbers that it has none of."""
    needed = ("l0", "loss_recovered")
    return {**record, **{name: math.nan if record.get(name) is None else record[name] for name in needed}}
