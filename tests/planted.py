"""A small file of features whose rule is known."""

import numpy as np

from tests import feature_files

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
    return feature_files.write(path, tokens, f, WORDS, range(0, rows, 2), sae="planted")
