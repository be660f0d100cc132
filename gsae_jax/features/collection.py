"""Collecting what is known of every feature of some SAEs, one file each.

The text is read twice. The first time, `streaming` finds where each feature is strongest and a random sample of where
it is active. The second time, the rows with these places give the features' activations around them. Both go on where
they were stopped.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from gsae_jax import batching
from gsae_jax import mesh as mesh_lib
from gsae_jax.activations import masking
from gsae_jax.features import effects, neighbours, streaming, tables
from gsae_jax.lms import sites as sites_lib
from gsae_jax.lms import tokenizer as tokenizer_lib
from gsae_jax.lms.loading import LM, check_tokens
from gsae_jax.saes import contract, trained

logger = logging.getLogger(__name__)

QUANTILES, PER_QUANTILE = 10, 2  # contexts of the sample that are kept
# How many features are listed as like one: by decoder rows in its own SAE and in each other one, and by firing.
ALIKE, ALIKE_ELSEWHERE, COFIRING = 10, 3, 10
SAMPLE_TOKENS = 2**14  # of which all activations are kept, at most
ROWS = 32  # on each device in one forward pass
PAIRS = 2**15  # of a row and a feature, whose activations are read at once
SAVE_EVERY = 60.0  # seconds
STREAM = ".streaming.safetensors"  # the state of the first pass


class Rows(Protocol):
    """Rows of tokens of one length, as `activations.masking` reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Collection:
    """What is collected, and from what.

    Attributes:
        lm: the whole language model, on `mesh`.
        mesh: of one process.
        saes: by name; with the language model's names for sites.
        compared: the SAEs in which similar features are looked for; those of `saes` and others.
        rows: of held-out text.
        special_tokens: on which features are not looked at.
        about: facts for the file of each SAE, by name. Two collections that agree in them are the same.
        made_with: versions of what computes.
        others: other language models, on `mesh`, by the names after the @ of their sites.
    """

    lm: LM
    mesh: Mesh
    saes: Mapping[str, trained.SAE]
    compared: Mapping[str, trained.SAE]
    rows: Rows
    special_tokens: tuple[int, ...]
    about: Mapping[str, Mapping[str, Any]]
    made_with: Mapping[str, Any]
    others: Mapping[str, LM] = dataclasses.field(default_factory=dict)

    @property
    def lms(self) -> dict[str, LM]:
        """All language models by name; "" is the name of `lm`."""
        return {"": self.lm, **self.others}

    @property
    def per_batch(self) -> int:
        """Rows of a forward pass. Each device has the same number of them whatever the mesh, so that bits agree."""
        return ROWS * int(self.mesh.shape["data"])

    def tokens(self, row: int) -> np.ndarray:
        """The tokens [T] of a row."""
        return masking.tokens_of(self.rows[row])

    def batches(self, numbers: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, Any, list[jax.Array]]]:
        """For rows in parts of `per_batch`: (their numbers, activations by site, which tokens each SAE sees)."""
        sites = sorted({site for sae in self.saes.values() for site in (*sae.sites, *sae.targets)})
        limits = tuple(tuple(sae.norm_limits.items()) for sae in self.saes.values())
        for start in range(0, len(numbers), self.per_batch):
            part = np.asarray(numbers[start : start + self.per_batch])
            rows_RxT = np.stack([self.rows[int(row)] for row in part])
            tokens_RxT = masking.tokens_of(rows_RxT)
            for lm in self.lms.values():
                check_tokens(tokens_RxT, lm.config.d_vocab, "data")
            extra = self.per_batch - len(part)
            allowed_RxT = batching.pad(masking.allowed(rows_RxT, self.special_tokens), extra)
            placed = [
                mesh_lib.place_rows(self.mesh, array, self.per_batch)
                for array in (batching.pad(tokens_RxT, extra), allowed_RxT)
            ]
            modules = tuple((name, lm.module) for name, lm in self.lms.items())
            params = {name: lm.params for name, lm in self.lms.items()}
            yield part, *streaming.read(modules, tuple(sites), limits, params, *placed)


def collect(collection: Collection, folder: Path, progress: Callable[[str, int, int], Any] = lambda *_: None) -> None:
    """Write `NAME.sqlite` for each SAE into a folder, in place of a file of other facts. One of the same facts stays.

    Args:
        collection: what is collected.
        folder: it exists. An unfinished collection of the same facts is continued. One of other facts is dropped.
        progress: called with the name of a stage, the steps that are done, and the number of all of its steps.

    Raises:
        UserError: a file that is there cannot be read.
    """
    missing = {
        name: sae
        for name, sae in collection.saes.items()
        if tables.known(place(folder, name)) != collection.about[name]
    }
    if not missing:
        return
    some = dataclasses.replace(collection, saes=missing)
    states = _stream(some, folder, progress)
    writers = {name: _writer(folder, name, sae, collection.about[name]) for name, sae in missing.items()}
    try:
        _contexts(some, states, writers, progress)
        sample, texts = _sample(some), Texts(collection.lm.tokenizer)
        for number, (name, sae) in enumerate(missing.items()):
            writer = writers[name]
            _features(sae, states[name], writer)
            for done in _effects(collection, sae, writer):
                progress("effects", number * sae.config.width + done, len(missing) * sae.config.width)
            _alike(collection, sae, sample[name], writer)
            _write_sample(collection, sample[name], writer, texts)
            _texts(texts, writer)
            numbers = {"tokens": int(states[name].tokens), "bins": streaming.edges().tolist()}
            made_with = dict(collection.made_with)
            writer.state(collection=dict(collection.about[name]), made_with=made_with, **numbers, format=tables.FORMAT)
            writer.finish(place(folder, name))
    finally:
        for writer in writers.values():
            writer.close()
    (folder / STREAM).unlink(missing_ok=True)


def place(folder: Path, name: str) -> Path:
    """The file of an SAE."""
    return folder / f"{name.replace('/', '-')}{tables.SUFFIX}"


def _writer(folder: Path, name: str, sae: trained.SAE, about: Mapping[str, Any]) -> tables.Writer:
    """The unfinished file of an SAE, as it was left if it is of the same facts."""
    path = folder / f".{place(folder, name).name}"
    facts = tuple(contract.feature_facts(sae.functions, sae.params, sae.config))
    if path.exists() and tables.begun(path, facts) != about:
        path.unlink()
    writer = tables.Writer(path, facts)
    if writer.about():
        return writer
    writer.state(collection=dict(about), next_row=0)
    writer.commit()
    return writer


def _stream(
    collection: Collection, folder: Path, progress: Callable[[str, int, int], Any]
) -> dict[str, streaming.State]:
    """The first pass: the state of each SAE after all rows, on the host."""
    mesh, saes, total = collection.mesh, collection.saes, len(collection.rows)
    about = {name: collection.about[name] for name in saes}
    done, states = _saved(folder / STREAM, about, saes)
    params = {name: streaming.params_on(mesh, sae) for name, sae in saes.items()}
    on_mesh = {name: streaming.state_on(mesh, sae, states[name]) for name, sae in saes.items()}
    saved = time.monotonic()
    for part, activations, valid in collection.batches(range(done, total)):
        for (name, sae), valid_RxT in zip(saes.items(), valid, strict=True):
            inputs = sae_inputs(sae, activations)
            dictionary = streaming.Dictionary.of(mesh, sae)
            on_mesh[name] = streaming.update(dictionary, on_mesh[name], params[name], inputs, valid_RxT, part[0])
        if time.monotonic() - saved > SAVE_EVERY or part[-1] + 1 == total:
            _save(folder / STREAM, about, int(part[-1]) + 1, on_mesh)
            saved = time.monotonic()
        progress("activations", int(part[-1]) + 1, total)
    return {name: jax.tree.map(np.asarray, state) for name, state in on_mesh.items()}


def sae_inputs(sae: trained.SAE, activations: Mapping[str, jax.Array]) -> contract.Activations:
    """What an SAE reads, of activations by site."""
    inputs = tuple(activations[site] for site in sae.sites)
    return inputs if isinstance(sae.config.d_in, tuple) else inputs[0]


def _save(path: Path, about: Mapping[str, Any], done: int, states: Mapping[str, streaming.State]) -> None:
    """Write the states after so many rows, whole or not at all."""
    tensors = {
        f"{number}.{field}": np.asarray(value)
        for number, state in enumerate(states.values())
        for field, value in state._asdict().items()
    }
    scratch = path.with_name(f"{path.name}.new")
    safetensors.numpy.save_file(tensors, scratch, {"about": json.dumps(about), "done": str(done)})
    scratch.replace(path)


def _saved(
    path: Path, about: Mapping[str, Any], saes: Mapping[str, trained.SAE]
) -> tuple[int, dict[str, streaming.State]]:
    """(Rows that are done, the states after them) of a collection of these SAEs and others; else the empty ones."""
    states = {name: streaming.empty(sae.config.width) for name, sae in saes.items()}
    if not path.exists():
        return 0, states
    try:
        with safetensors.safe_open(path, "np") as file:
            saved = json.loads(file.metadata()["about"])
            if any(saved.get(name) != facts for name, facts in about.items()):
                logger.info(f"{path.parent} has an unfinished collection with other settings; it begins anew")
                return 0, states
            numbers = {name: number for number, name in enumerate(saved)}
            for name in saes:
                tensors = (file.get_tensor(f"{numbers[name]}.{field}") for field in streaming.State._fields)
                states[name] = streaming.State(*tensors)
            return int(file.metadata()["done"]), states
    except (OSError, safetensors.SafetensorError) as error:
        logger.warning(f"{path} cannot be read ({error}); the collection begins anew")
        return 0, {name: streaming.empty(sae.config.width) for name, sae in saes.items()}


class _Places(NamedTuple):
    """Contexts of one SAE, [P] each, by ascending row."""

    row: np.ndarray
    feature: np.ndarray
    quantile: np.ndarray
    rank: np.ndarray
    position: np.ndarray


def chosen(state: streaming.State) -> _Places:
    """The contexts that are kept: the strongest, and some of each quantile of the random sample.

    The sample is sorted by activation and divided into QUANTILES parts of equal size. Rows of the strongest contexts
    are not taken again.
    """
    places = []
    for feature, rank in zip(*np.nonzero(state.top_value > 0), strict=True):
        row, position = state.top_row[feature, rank], state.top_position[feature, rank]
        places.append((row, feature, tables.STRONGEST, rank, position))
    for feature in range(len(state.fired)):
        count = int((state.sample_priority[feature] != streaming.EMPTY).sum())
        strongest = set(state.top_row[feature][state.top_value[feature] > 0].tolist())
        order = np.argsort(state.sample_value[feature, :count], kind="stable")
        for quantile, part in enumerate(np.array_split(order, QUANTILES)):
            rows, positions = state.sample_row[feature], state.sample_position[feature]
            others = [n for n in sorted(part.tolist()) if int(rows[n]) not in strongest]
            for rank, n in enumerate(others[:PER_QUANTILE]):
                places.append((rows[n], feature, quantile, rank, positions[n]))
    columns = np.array(sorted(places), np.int64).reshape(-1, 5).T
    return _Places(*columns)


def _contexts(
    collection: Collection,
    states: Mapping[str, streaming.State],
    writers: Mapping[str, tables.Writer],
    progress: Callable[[str, int, int], Any],
) -> None:
    """The second pass: write each feature's contexts, with its activations in their rows."""
    places = {name: chosen(state) for name, state in states.items()}
    needed = np.unique(np.concatenate([each.row for each in places.values()]))
    params = {name: streaming.params_on(collection.mesh, sae) for name, sae in collection.saes.items()}
    texts = Texts(collection.lm.tokenizer)
    # A number of a row and not of rows, as an earlier call may have needed others for other SAEs.
    begin = int(np.searchsorted(needed, min(writer.about()["next_row"] for writer in writers.values())))
    for part, activations, valid in collection.batches(needed[begin:]):
        tokens = {int(row): collection.tokens(int(row)) for row in part}
        for (name, sae), valid_RxT in zip(collection.saes.items(), valid, strict=True):
            of = places[name]
            here = slice(*np.searchsorted(of.row, [part[0], part[-1] + 1]))
            wanted = _Places(*(column[here] for column in of))
            inputs = params[name], sae_inputs(sae, activations), valid_RxT
            row = np.searchsorted(part, wanted.row)
            along = _along_rows(streaming.Dictionary.of(collection.mesh, sae), inputs, row, wanted.feature)
            writers[name].insert("contexts", _with_activations(wanted, tokens, along))
            mine = {row: tokens[row] for row in np.unique(wanted.row).tolist()}
            writers[name].insert("rows", _text_rows(mine, texts))
        begin += len(part)
        for writer in writers.values():
            writer.state(next_row=int(part[-1]) + 1)
            writer.commit()
        progress("contexts", begin, len(needed))


def _along_rows(
    dictionary: streaming.Dictionary, inputs: tuple[Any, ...], row: np.ndarray, feature: np.ndarray
) -> np.ndarray:
    """The activations [P, T] of features in rows of a batch, which ascend; `inputs` as of `streaming.along_rows`."""
    shards = int(dictionary.mesh.shape["data"])
    shard = row // ROWS
    counts = np.bincount(shard, minlength=shards)
    slot = np.arange(len(row)) - (np.cumsum(counts) - counts)[shard]  # rows ascend, and so do shards
    size = batching.padded_size(int(counts.max(initial=1)))
    rows, features = np.zeros((shards, size), np.int32), np.zeros((shards, size), np.int32)
    rows[shard, slot], features[shard, slot] = row % ROWS, feature
    return np.asarray(streaming.along_rows(dictionary, *inputs, rows, features))[shard, slot]


def _with_activations(
    places: _Places, tokens: Mapping[int, np.ndarray], along: np.ndarray
) -> Iterator[tuple[Any, ...]]:
    """Rows of the table `contexts`.

    Args:
        places: of the contexts.
        tokens: of each row, by its number.
        along: [places, T], the feature's activations in the row.
    """
    for feature, quantile, rank, row, position, f_T in zip(
        *(places.feature.tolist(), places.quantile.tolist(), places.rank.tolist()),
        *(places.row.tolist(), places.position.tolist(), along),
        strict=True,
    ):
        (active,) = np.nonzero(f_T)
        pairs, token = tables.pairs(active, f_T[active]), int(tokens[row][position])
        yield feature, quantile, rank, row, position, token, float(f_T[position]), pairs


class Texts:
    """Texts of tokens, each decoded once."""

    def __init__(self, tokenizer: Any):
        """`tokenizer`: of the language model."""
        self._tokenizer, self._known = tokenizer, dict[int, str]()

    def each(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token."""
        new = sorted({*tokens} - self._known.keys())
        self._known |= dict(zip(new, tokenizer_lib.token_texts(self._tokenizer, new), strict=True))
        return [self._known[token] for token in tokens]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text of a row in parts, one for each token (`tokenizer.pieces`)."""
        return tokenizer_lib.pieces(self._tokenizer, tokens, self.each(tokens))


def sample_rows(rows: int, length: int) -> np.ndarray:
    """The numbers of the rows of which all activations are kept: evenly spread over so many of this length."""
    count = min(rows, max(1, SAMPLE_TOKENS // length))
    return np.arange(count) * rows // count


class _Active(NamedTuple):
    """Everything that is active on the sample of rows, [A] each, by ascending feature and token.

    Attributes:
        token: place of the row in the sample, times the length of a row, plus the position.
        feature: the feature.
        activation: its activation.
    """

    token: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


def _sample(collection: Collection) -> dict[str, _Active]:
    """What is active on the sample of rows, of each SAE."""
    length = len(collection.rows[0])
    params = {name: streaming.params_on(collection.mesh, sae) for name, sae in collection.saes.items()}
    nothing = _Active(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    parts = {name: [nothing] for name in collection.saes}
    done = 0
    for part, activations, valid in collection.batches(sample_rows(len(collection.rows), length)):
        for (name, sae), valid_RxT in zip(collection.saes.items(), valid, strict=True):
            inputs = params[name], sae_inputs(sae, activations), valid_RxT
            dictionary = streaming.Dictionary.of(collection.mesh, sae)
            on = streaming.active(dictionary, *inputs)[: len(part)]
            row, feature = np.nonzero(on.any(1))
            for start in range(0, len(row), PAIRS):
                some = slice(start, start + PAIRS)
                along = _along_rows(dictionary, inputs, row[some], feature[some])
                pair, position = np.nonzero(along)
                token = (done + row[some][pair]) * length + position
                parts[name].append(_Active(token, feature[some][pair], along[pair, position]))
        done += len(part)
    sample = {}
    for name, each in parts.items():
        whole = _Active(*map(np.concatenate, zip(*each, strict=True)))
        order = np.lexsort((whole.token, whole.feature))
        sample[name] = _Active(*(column[order] for column in whole))
    return sample


def _write_sample(collection: Collection, active: _Active, writer: tables.Writer, texts: Texts) -> None:
    """Write the table `sample`, and its rows of text."""
    numbers = sample_rows(len(collection.rows), len(collection.rows[0])).tolist()
    writer.state(sample_rows=numbers)
    writer.insert("rows", _text_rows({row: collection.tokens(row) for row in numbers}, texts))
    starts = np.flatnonzero(np.diff(active.feature, prepend=-1))
    for start, end in itertools.pairwise([*starts.tolist(), len(active.feature)]):
        some = slice(start, end)
        pairs = tables.pairs(active.token[some], active.activation[some])
        writer.insert("sample", [(int(active.feature[start]), pairs)])


def _text_rows(tokens: Mapping[int, np.ndarray], texts: Texts) -> Iterator[tuple[int, str, str, str | None]]:
    """Rows of the table `rows`."""
    for row, each in tokens.items():
        ids = each.tolist()
        pieces = texts.pieces(ids)
        ends = None if pieces == texts.each(ids) else json.dumps([*itertools.accumulate(map(len, pieces))])
        yield row, json.dumps(ids), "".join(pieces), ends


def _features(sae: trained.SAE, state: streaming.State, writer: tables.Writer) -> None:
    """Write the table `features`."""
    tokens = max(1, int(state.tokens))
    facts = contract.feature_facts(sae.functions, sae.params, sae.config)
    columns = [np.asarray(value).tolist() for value in facts.values()]
    rows = []
    for feature, fired in enumerate(state.fired.tolist()):
        (bins,) = np.nonzero(state.histogram[feature])
        histogram = tables.pairs(bins, state.histogram[feature, bins])
        strongest = float(state.top_value[feature, 0])
        more = [column[feature] for column in columns]
        rows.append((feature, fired, fired / tokens, strongest, histogram, None, *more))
    writer.insert("features", rows)


def _effects(collection: Collection, sae: trained.SAE, writer: tables.Writer) -> Iterator[int]:
    """Write the table `effects`; yields how many features are done."""
    lm, mesh = collection.lms[sites_lib.parts(effects.place(sae)[0])[1]], collection.mesh

    def rows(kind: str, each: effects.Effects) -> Iterator[tuple[Any, ...]]:
        for rank, (token, effect) in enumerate(zip(each.tokens.tolist(), each.effects.tolist(), strict=True)):
            yield each.feature, kind, rank, token, effect

    for each in effects.direct(lm, sae):
        writer.insert("effects", rows("direct", each))
    strongest = f"FROM contexts WHERE quantile = {tables.STRONGEST} AND rank < {effects.CONTEXTS}"
    finished = {feature for (feature,) in writer.execute("SELECT feature FROM features WHERE divergence IS NOT NULL")}
    lengths = writer.execute(f"SELECT feature, max(position) + 1 {strongest} GROUP BY feature ORDER BY 2, 1")
    lengths = [(feature, length) for feature, length in lengths if feature not in finished]
    done = sae.config.width - len(lengths)
    W_FxD = np.asarray(effects.place(sae)[1])
    for T, group in effects.groups(lengths, len(collection.rows[0]), int(mesh.shape["data"])):
        contexts = []
        for feature in group:
            found = writer.execute(f"SELECT row, position, active {strongest} AND feature = ? ORDER BY rank", feature)
            contexts.append(
                [effects.Context(collection.tokens(row), at, json.loads(active)) for row, at, active in found]
            )
        for each in effects.ablated(lm, mesh, sae, T, [(f, W_FxD[f], c) for f, c in zip(group, contexts, strict=True)]):
            writer.insert("effects", rows("ablation", each))
            writer.execute("UPDATE features SET divergence = ? WHERE feature = ?", each.divergence, each.feature)
        writer.commit()
        done += len(group)
        yield done


def _alike(collection: Collection, sae: trained.SAE, sample: _Active, writer: tables.Writer) -> None:
    """Write the tables `neighbours` and `cofiring`."""
    rows_FxD = neighbours.unit_rows(sae)
    for name, other in collection.compared.items():
        if other.targets != sae.targets:
            continue
        count = ALIKE if name == sae.name else ALIKE_ELSEWHERE
        for each in neighbours.nearest(rows_FxD, neighbours.unit_rows(other), count, name == sae.name):
            pairs = zip(each.others.tolist(), each.scores.tolist(), strict=True)
            writer.insert("neighbours", ((each.feature, name, rank, *pair) for rank, pair in enumerate(pairs)))
    for each in neighbours.cofiring(sample.token, sample.feature, sae.config.width, COFIRING):
        assert each.counts is not None
        columns = zip(each.others.tolist(), each.counts.tolist(), each.scores.tolist(), strict=True)
        writer.insert("cofiring", ((each.feature, rank, *column) for rank, column in enumerate(columns)))


def _texts(texts: Texts, writer: tables.Writer) -> None:
    """Write the table `tokens`: those of all rows and effects."""
    of_rows = "SELECT DISTINCT json_each.value FROM rows, json_each(rows.tokens)"
    tokens = [token for (token,) in writer.execute(f"{of_rows} UNION SELECT token FROM effects ORDER BY 1")]
    writer.insert("tokens", zip(tokens, texts.each(tokens), strict=True))
