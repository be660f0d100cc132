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
