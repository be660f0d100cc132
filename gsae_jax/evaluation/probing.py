"""Sparse probes: how well a few features of an SAE tell whether a token has a label.

As of Gurnee et al. (2305.01610) and SAEBench (2503.09532). For each value of each kind of labels there is one task:
tokens with this value against other tokens. The k features are those with the largest difference of their means on the
two classes, in units of the decoder's rows. A logistic regression learns from them on the training documents, and is
judged on other documents. A dense probe, on all activations that the SAE reads, is what they are compared with.

Both classes of a task have as many tokens, drawn at random, in training and in testing. So the score, the fraction of
test tokens that are told right, is the balanced accuracy. Chance is 0.5.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special

from gsae_jax import batching
from gsae_jax.data import labels
from gsae_jax.saes import contract, inference, parameters, trained

KS = (1, 5)  # features of a probe
TEST = 1 / 3  # of the documents
LEAST, MOST = 30, 1000  # tokens of a class, in training and in testing
VALUES = 8  # of a kind of labels, the most frequent ones


class Sample(NamedTuple):
    """Tokens, the same number of both classes.

    Attributes:
        places: [n], where they are.
        has_value: [n].
    """

    places: np.ndarray
    has_value: np.ndarray


class Task(NamedTuple):
    """Telling tokens with one value of a kind of labels from others.

    Attributes:
        kind: of labels.
        value: the label.
        train: tokens of the training documents.
        test: tokens of other documents.
    """

    kind: str
    value: str
    train: Sample
    test: Sample


class Tasks(NamedTuple):
    """All tasks of some rows of text.

    Attributes:
        places: [P], the tokens that are in a sample, as places in rows [R, T] that are flattened.
        each: the tasks; the places of their samples are in `places`.
    """

    places: np.ndarray
    each: list[Task]


class Scores(NamedTuple):
    """What the probes of one SAE reach.

    Attributes:
        scores: [tasks, KS], balanced accuracy.
        features: [tasks, largest k], the features that were chosen, best first.
    """

    scores: np.ndarray
    features: np.ndarray


def tasks(rows: labels.Rows, seed: int = 0) -> Tasks:
    """The tasks of rows of text. A third of the documents are for testing.

    A value has a task if `LEAST` tokens have it and as many have not, in training and in testing, and it is one of the
    `VALUES` most frequent ones of its kind.
    """
    random = np.random.default_rng(seed)
    documents = random.permutation(int(rows.document_R.max(initial=-1)) + 1)
    is_test_R = np.isin(rows.document_R, documents[: round(TEST * len(documents))])
    sides = [np.flatnonzero(rows.mask_RxT & (is_test_R == side)[:, None]) for side in (False, True)]
    found = []
    for kind, values in rows.values.items():
        codes = rows.labels[kind].ravel()
        of_kind = []
        for code, value in enumerate(values):
            has_value = [codes[side] == code for side in sides]
            counts = [min(MOST, int(has.sum()), int((~has).sum())) for has in has_value]
            if min(counts) >= LEAST:
                samples = [
                    Sample(
                        np.concatenate([random.choice(side[which], count, replace=False) for which in (has, ~has)]),
                        np.arange(2 * count) < count,
                    )
                    for side, has, count in zip(sides, has_value, counts, strict=True)
                ]
                of_kind.append((sum(int(has.sum()) for has in has_value), Task(kind, value, *samples)))
        of_kind.sort(key=lambda pair: -pair[0])
        found += [task for _, task in of_kind[:VALUES]]
    every = [sample.places for task in found for sample in (task.train, task.test)]
    places = np.unique(np.concatenate([np.zeros(0, int), *every]))

    def moved(sample: Sample) -> Sample:
        return sample._replace(places=np.searchsorted(places, sample.places))

    return Tasks(places, [task._replace(train=moved(task.train), test=moved(task.test)) for task in found])


def probe(sae: trained.SAE, inputs: contract.Activations, each: Sequence[Task]) -> Scores:
    """The scores of sparse probes.

    Args:
        sae: the SAE.
        inputs: [P, D], what it reads at `Tasks.places`; a tuple of such arrays if it reads several sites.
        each: `Tasks.each`.
    """
    norms_F = np.sqrt(
        sum(
            np.square(np.asarray(sae.params[parameters.decoder(sae.functions, site)], np.float64)).sum(-1)
            for site in range(len(sae.targets))
        )
    )
    differences_CxF = np.abs(_differences_of(sae, inputs, each)) * norms_F
    features = np.argsort(-differences_CxF, axis=1, kind="stable")[:, : max(KS)]
    parts = [
        np.asarray(_columns(sae.architecture, sae.config, sae.params, part, features.ravel()))[:count]
        for part, count, _ in _batches(sae, inputs)
    ]
    f_PxCxK = np.concatenate(parts).reshape(-1, *features.shape)
    scores = [[_score(f_PxCxK[:, number, :k], task) for k in KS] for number, task in enumerate(each)]
    return Scores(np.array(scores), features)


def dense(inputs: contract.Activations, each: Sequence[Task]) -> np.ndarray:
    """The scores [tasks] of probes on all activations; the arguments are those of `probe`."""
    x_PxD = np.concatenate(jax.tree.leaves(inputs), axis=1)
    return np.array([_score(x_PxD, task) for task in each])


def fit(x_NxK: np.ndarray, has_value: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression: (weights [K], intercept) that minimise the sum of the log losses + ||weights||² / 2.

    The weights in the penalty are those of inputs of unit variance.
    """
    x_NxK = np.asarray(x_NxK, np.float64)
    mean, spread = x_NxK.mean(0), x_NxK.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    z_NxL = np.column_stack([(x_NxK - mean) / spread, np.ones(len(x_NxK))])
    z_LxN, sign = np.ascontiguousarray(z_NxL.T), np.where(has_value, 1.0, -1.0)
    penalty = np.append(np.ones(x_NxK.shape[1]), 0.0)

    # `einsum` has one thread. For products as small as these, several threads mostly wait for each other.
    def times(values: np.ndarray) -> np.ndarray:
        return np.einsum("nl,l->n", z_NxL, values)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * times(values)
        total = np.logaddexp(0, -margin).sum() + np.square(penalty * values).sum() / 2
        return float(total), np.einsum("ln,n->l", z_LxN, -sign * special.expit(-margin)) + penalty * values

    def curvature(values: np.ndarray, along: np.ndarray) -> np.ndarray:
        chance = special.expit(times(values))
        return np.einsum("ln,n->l", z_LxN, chance * (1 - chance) * times(along)) + penalty * along

    start = np.zeros(len(penalty))
    found = optimize.minimize(loss, start, jac=True, hessp=curvature, method="trust-ncg").x
    weights = found[:-1] / spread
    return weights, float(found[-1] - mean @ weights)


def _score(x_PxK: np.ndarray, task: Task) -> float:
    """The balanced accuracy, on the test tokens, of a probe of the training tokens."""
    weights, intercept = fit(x_PxK[task.train.places], task.train.has_value)
    said = x_PxK[task.test.places] @ weights + intercept > 0
    return float(np.mean(said == task.test.has_value))


def _differences_of(sae: trained.SAE, inputs: contract.Activations, each: Sequence[Task]) -> np.ndarray:
    """[tasks, F]: the mean of each feature on the training tokens with the value, minus that on the others."""
    weights_PxC = np.zeros((len(jax.tree.leaves(inputs)[0]), len(each)), np.float32)
    for number, task in enumerate(each):
        share = 2 / len(task.train.places)
        weights_PxC[task.train.places, number] = np.where(task.train.has_value, share, -share)
    total = np.zeros((len(each), sae.config.width))
    for part, count, start in _batches(sae, inputs):
        weights = batching.pad(weights_PxC[start : start + count], len(jax.tree.leaves(part)[0]) - count)
        total += np.asarray(_differences(sae.architecture, sae.config, sae.params, part, weights))
    return total


def _batches(sae: trained.SAE, inputs: contract.Activations) -> Iterator[tuple[contract.Activations, int, int]]:
    """(inputs [B, D], how many of these are not padding, the place of the first), in batches of one size."""
    total = len(jax.tree.leaves(inputs)[0])
    size = min(total, inference.tokens_at_once(sae.config.width))
    for start in range(0, total, size):
        count = min(size, total - start)
        yield (
            jax.tree.map(
                lambda x, start=start, count=count: batching.pad(x[start : start + count], size - count), inputs
            ),
            count,
            start,
        )


@partial(jax.jit, static_argnums=(0, 1))
def _differences(
    architecture: str, config: Any, params: contract.Params, inputs: contract.Activations, weights_BxC: jax.Array
) -> jax.Array:
    f_BxF = contract.module_of(architecture).encode(params, inputs, config)
    return jnp.matmul(weights_BxC.T, f_BxF, precision="highest")


@partial(jax.jit, static_argnums=(0, 1))
def _columns(
    architecture: str, config: Any, params: contract.Params, inputs: contract.Activations, features: jax.Array
) -> jax.Array:
    return contract.module_of(architecture).encode(params, inputs, config)[:, features]
