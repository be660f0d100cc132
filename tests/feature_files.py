"""What tests of collected features have in common."""

import json
import math

import numpy as np

from gsae_jax.features import collection, streaming, tables


def assert_kept(db, tokens, f, valid):
    """Everything that is counted and every context equals what NumPy finds.

    Args:
        db: the file.
        tokens: [rows, T], that were looked at.
        f: [rows, T, F], activations; 0 where a token is not valid.
        valid: [rows, T].
    """
    facts = {name: json.loads(value) for name, value in db.execute("SELECT * FROM about")}
    assert facts["tokens"] == valid.sum()
    edges = np.array(facts["bins"])
    magnitude, active = np.abs(f), f != 0
    kept = {}
    for feature, fired, density, strongest, histogram, *_ in db.execute("SELECT * FROM features"):
        on = active[..., feature]
        assert (fired, density) == (on.sum(), fired / valid.sum())
        assert strongest == magnitude[..., feature].max()
        counts = np.histogram(magnitude[..., feature][on], [*edges, math.inf])[0]
        assert json.loads(histogram) == [[int(b), int(counts[b])] for b in np.flatnonzero(counts)]
        kept[feature] = contexts = list(
            db.execute(
                "SELECT quantile, rank, row, position, activation, active, token FROM contexts WHERE feature = ?",
                (feature,),
            )
        )
        # The strongest token of each row, in descending order; of equal ones the first.
        best = magnitude[..., feature].max(1)
        rows = np.lexsort((np.arange(len(tokens)), -best))[: streaming.TOP]
        rows = [row for row in rows if best[row] > 0]
        strongest = sorted((rank, row, at) for q, rank, row, at, *_ in contexts if q == tables.STRONGEST)
        assert strongest == [(n, row, magnitude[row, :, feature].argmax()) for n, row in enumerate(rows)]
        for _, _, row, position, activation, pairs, token in contexts:
            assert token == tokens[row, position]
            assert activation == f[row, position, feature]
            expected = [[int(t), f[row, t, feature]] for t in np.flatnonzero(on[row])]
            assert [[t, np.float32(value)] for t, value in json.loads(pairs)] == expected
    assert {feature for feature, contexts in kept.items() if contexts} == set(np.flatnonzero(active.any((0, 1))))
    rows = facts["sample_rows"]
    assert rows == collection.sample_rows(*tokens.shape).tolist()
    there = f[rows]
    sample = dict(db.execute("SELECT * FROM sample"))
    assert sample.keys() == set(np.flatnonzero(there.any((0, 1))))
    for feature, pairs in sample.items():
        places, values = zip(*json.loads(pairs), strict=True)
        np.testing.assert_array_equal(places, np.flatnonzero(there[..., feature]))
        np.testing.assert_array_equal(np.float32(values), there[..., feature][there[..., feature] != 0])


def write(path, tokens, f, texts, sample_rows, **about):
    """A file of features from activations, without effects and neighbours.

    Args:
        path: of the file.
        tokens: [rows, T].
        f: [rows, T, F], activations, float32.
        texts: the text of each token, by its number.
        sample_rows: numbers of the rows of the sample.
        about: facts of the collection.
    """
    random, magnitude = np.random.default_rng(0), np.abs(f)
    writer = tables.Writer(path.with_suffix(".part"))
    facts = {"sae": "a_0", "width": f.shape[2], "targets": ["blocks.0.hook_mlp_out"], "model": "m", "text": "t"}
    writer.state(
        collection=facts | about,
        tokens=tokens.size,
        bins=streaming.edges().tolist(),
        sample_rows=list(sample_rows),
        format=tables.FORMAT,
    )
    writer.insert("tokens", enumerate(texts))
    lines = (
        (row, str(each), "".join(texts[token] for token in each), None) for row, each in enumerate(tokens.tolist())
    )
    writer.insert("rows", lines)
    for feature in range(f.shape[2]):
        on, size = f[..., feature], magnitude[..., feature]
        fired = int(np.count_nonzero(on))
        writer.insert("features", [(feature, fired, fired / on.size, float(size.max()), "[]", None)])
        best = [row for row in np.argsort(-size.max(1), kind="stable")[: streaming.TOP] if size[row].any()]
        places = [(tables.STRONGEST, rank, row, size[row].argmax()) for rank, row in enumerate(best)]
        there = np.argwhere(on)
        drawn = there[random.permutation(len(there))[: streaming.SAMPLE]]
        drawn = drawn[np.argsort(size[tuple(drawn.T)])]
        for quantile, part in enumerate(np.array_split(drawn, 10)):
            places += [(quantile, rank, *place) for rank, place in enumerate(part[:2])]
        for quantile, rank, row, position in places:
            (active,) = np.nonzero(on[row])
            where = (int(row), int(position), int(tokens[row, position]), float(on[row, position]))
            pairs = tables.pairs(active, on[row][active])
            writer.insert("contexts", [(feature, quantile, rank, *where, pairs)])
        sampled = on[list(sample_rows)].ravel()
        (flat,) = np.nonzero(sampled)
        if len(flat):
            writer.insert("sample", [(feature, tables.pairs(flat, sampled[flat]))])
    writer.finish(path)
    return path
