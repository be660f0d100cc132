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
        f: [rows, T, F], activations.
        texts: the text of each token, by its number.
        sample_rows: numbers of the rows of the sample.
        about: facts of the collection.
    """
    writer = tables.Writer(path.with_suffix(".begun"))
    F = f.shape[2]
    strongest, at = f.max(1), f.argmax(1)  # [rows, F]
    shown = set(sample_rows)
    for feature in range(F):
        fired = int((f[..., feature] > 0).sum())
        histogram = "[]" if not fired else json.dumps([[0, fired]])
        values = (feature, fired, fired / tokens.size, float(strongest[:, feature].max()), histogram, None)
        writer.insert("features", [values])
        rows = np.lexsort((np.arange(len(f)), -strongest[:, feature]))
        rows = [int(row) for row in rows if strongest[row, feature] > 0]
        spread = rows[:: max(1, len(rows) // 20)][:20]
        chosen = [(tables.STRONGEST, rank, row) for rank, row in enumerate(rows[:20])]
        chosen += [(9 - place // 2, place % 2, row) for place, row in enumerate(spread)]
        shown |= {row for _, _, row in chosen}
        for quantile, rank, row in chosen:
            position = int(at[row, feature])
            (on,) = np.nonzero(f[row, :, feature])
            active = tables.pairs(on, f[row, on, feature])
            place = (row, position, int(tokens[row, position]), float(f[row, position, feature]))
            writer.insert("contexts", [(feature, quantile, rank, *place, active)])
        there = f[sample_rows][..., feature].ravel()
        if there.any():
            (on,) = np.nonzero(there)
            writer.insert("sample", [(feature, tables.pairs(on, there[on]))])
    rows = ((row, json.dumps(tokens[row].tolist()), "".join(texts[t] for t in tokens[row])) for row in sorted(shown))
    writer.insert("rows", rows)
    writer.insert("tokens", [(int(token), texts[token]) for token in np.unique(tokens)])
    facts = {"sae": "a_0", "width": F, "targets": ["blocks.0.hook_mlp_out"], "sites": ["blocks.0.hook_mlp_out"]}
    writer.state(format=tables.FORMAT, tokens=tokens.size, bins=[0.0], sample_rows=list(sample_rows), made_with={})
    writer.state(collection=facts | {"model": "a model", "architecture": "gated", "l1_coefficient": None} | about)
    writer.commit()
    writer.finish(path)
