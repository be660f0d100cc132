"""A small file of features whose rule is known."""

import numpy as np

from gsae_jax.features import streaming, tables

WORDS = [
    "<|endoftext|>",
    " cat",
    " dog",
    " the",
    " a",
    " sat",
    " on",
    " mat",
    "\n",
    " red",
    " blue",
    " ran",
    " to",
    " <",
]
CAT = 1
RULE, RANDOM, DEAD, DENSE, SIGNED = range(5)


def write(path, rows=160, length=24, seed=0):
    """Features: active on " cat"; at random; never; everywhere; and on " cat" below zero, on " dog" above.

    A row begins with BOS. A third of the rows have one to three cats and dogs, the others have none.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, len(WORDS), (rows, length)).astype(np.int32)
    tokens[:, 0] = 0
    for row in range(0, rows, 3):
        tokens[row, rng.choice(np.arange(1, length), rng.integers(1, 4), replace=False)] = CAT
        tokens[row, rng.choice(np.flatnonzero(tokens[row] > 2))] = 2
    f = np.zeros((rows, length, 5), np.float32)
    size = rng.uniform(1, 9, (rows, length))
    f[..., RULE] = (tokens == CAT) * size
    f[..., RANDOM] = ((rng.random((rows, length)) < 0.03) & (tokens > 0)) * size
    f[..., DENSE] = (tokens > 0) * size
    f[..., SIGNED] = ((tokens == 2) * 1.0 - (tokens == CAT)) * size
    writer = tables.Writer(path.with_suffix(".part"))
    writer.state(
        collection={"sae": "planted", "width": 5, "targets": ["blocks.0.hook_mlp_out"], "model": "m", "text": "t"},
        tokens=tokens.size,
        bins=streaming.edges().tolist(),
        sample_rows=list(range(0, rows, 2)),
        format=tables.FORMAT,
    )
    writer.insert("tokens", enumerate(WORDS))
    lines = ((row, str(tokens[row].tolist()), "".join(WORDS[token] for token in tokens[row])) for row in range(rows))
    writer.insert("rows", lines)
    for feature in range(5):
        on = f[..., feature]
        magnitude, fired = np.abs(on), int(np.count_nonzero(on))
        writer.insert("features", [(feature, fired, fired / on.size, float(magnitude.max()), "[]", None)])
        best = [row for row in np.argsort(-magnitude.max(1), kind="stable")[: streaming.TOP] if magnitude[row].any()]
        places = [(tables.STRONGEST, rank, row, magnitude[row].argmax()) for rank, row in enumerate(best)]
        there = np.argwhere(on)
        drawn = there[rng.permutation(len(there))[: streaming.SAMPLE]]
        drawn = drawn[np.argsort(magnitude[tuple(drawn.T)])]
        for quantile, part in enumerate(np.array_split(drawn, 10)):
            places += [(quantile, rank, *place) for rank, place in enumerate(part[:2])]
        for quantile, rank, row, position in places:
            (active,) = np.nonzero(on[row])
            where = (int(row), int(position), int(tokens[row, position]), float(on[row, position]))
            writer.insert(
                "contexts",
                [(feature, quantile, rank, *where, tables.pairs(active, on[row][active].astype(np.float32)))],
            )
        (flat,) = np.nonzero(on[::2].ravel())
        if len(flat):
            writer.insert("sample", [(feature, tables.pairs(flat, on[::2].ravel()[flat]))])
    writer.finish(path)
    return path
