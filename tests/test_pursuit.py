"""Gradient pursuit, against NumPy and on codes that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsae_jax.saes import linalg, pursuit


def reference(W_dec, x_BxD, k, signed=False):
    """One input at a time, in float64; dense codes [B, F]."""
    size, lowest = (abs, -np.inf) if signed else (float, 0)
    codes = np.zeros((len(x_BxD), len(W_dec)))
    for x, alpha in zip(np.asarray(x_BxD, np.float64), codes, strict=True):
        support = []
        for _ in range(k):
            residual = x - alpha @ W_dec
            correlation = W_dec @ residual
            left = [atom for atom in range(len(W_dec)) if atom not in support]
            best = max(left, key=lambda atom: size(correlation[atom]))
            if size(correlation[best]) > 0:
                support.append(best)
            if not support:
                continue
            gradient = correlation[support]
            direction = gradient @ W_dec[support]
            step = gradient * (direction @ residual) / (direction @ direction)
            alpha[support] = np.maximum(lowest, alpha[support] + step)
    return codes


def dense(W_dec, x_BxD, k, signed=False):
    [(index, alpha, x_hat)] = pursuit.pursue(W_dec, x_BxD, (k,), signed)
    np.testing.assert_allclose(x_hat, np.einsum("bk,bkd->bd", alpha, np.asarray(W_dec)[index]), rtol=1e-5, atol=1e-5)
    rows = jnp.arange(len(x_BxD))[:, None]
    return np.asarray(jnp.zeros((len(x_BxD), len(W_dec))).at[rows, index].add(alpha))


@pytest.mark.parametrize("signed", [False, True])
def test_equals_numpy(signed):
    W_dec = linalg.unit_rows(jax.random.key(0), 96, 24)
    x = jax.random.normal(jax.random.key(1), (50, 24))
    ks = (1, 3, 8)
    for k, several in zip(ks, pursuit.pursue(W_dec, x, ks, signed), strict=True):
        codes = dense(W_dec, x, k, signed)
        np.testing.assert_allclose(codes, reference(np.asarray(W_dec, np.float64), x, k, signed), atol=1e-5)
        assert (codes < 0).any() == signed
        np.testing.assert_allclose(np.take_along_axis(codes, np.asarray(several.indices), 1), several.alpha, atol=1e-6)


def test_an_atom_is_chosen_once():
    """Though after two rounds the first atom correlates with the residual again, and no other does."""
    W_dec, x = jnp.array([[1.0, 0.0], [-0.6, 0.8], [0.0, -1.0]]), jnp.array([[1.0, 1.0]])
    np.testing.assert_allclose(dense(W_dec, x, 3), reference(np.asarray(W_dec, np.float64), x, 3), atol=1e-6)
    [codes] = pursuit.pursue(W_dec, x, (3,))
    assert sorted(codes.indices[codes.alpha > 0].tolist()) == [0, 1]


def test_recovers_a_known_support():
    """Five of 256 atoms, in 128 dimensions, with coefficients from 1 to 2."""
    keys = jax.random.split(jax.random.key(0), 3)
    W_dec = linalg.unit_rows(keys[0], 256, 128)
    support = jax.vmap(lambda key: jax.random.permutation(key, 256)[:5])(jax.random.split(keys[1], 1000))
    truth = (
        jnp.zeros((1000, 256)).at[jnp.arange(1000)[:, None], support].set(jax.random.uniform(keys[2], (1000, 5)) + 1)
    )
    found = dense(W_dec, truth @ W_dec, 5)
    assert np.mean((found > 0)[np.asarray(truth) > 0]) > 0.99
    assert (found > 0).sum(-1).max() <= 5


def test_nothing_to_find():
    """Where no atom points along the input, codes are zero; zero inputs included."""
    W_dec = jnp.eye(4)
    np.testing.assert_array_equal(dense(W_dec, jnp.array([[-1.0, -1, -1, -1], [0, 0, 0, 0]]), 3), 0)
    np.testing.assert_allclose(dense(W_dec, jnp.array([[2.0, -1, 0, 0]]), 3), [[2, 0, 0, 0]])
    np.testing.assert_allclose(dense(W_dec, jnp.array([[2.0, -1, 0, 0]]), 3, signed=True), [[2, -1, 0, 0]], atol=0.1)


def test_nan_is_never_hidden():
    """Of an input it is in that input's codes, of an atom in all codes."""
    W_dec = linalg.unit_rows(jax.random.key(0), 96, 24)
    x = jax.random.normal(jax.random.key(1), (5, 24))

    def codes(W_dec, x):
        return pursuit.pursue(W_dec, x, (4,))[0].alpha

    signed = pursuit.pursue(W_dec, x.at[2, 3].set(jnp.nan), (4,), True)[0].alpha
    assert np.isnan(signed).any(1).tolist() == [False, False, True, False, False]
    broken = codes(W_dec, x.at[2, 3].set(jnp.nan))
    assert np.isnan(broken[2]).all()
    np.testing.assert_array_equal(np.delete(broken, 2, 0), np.delete(codes(W_dec, x), 2, 0))
    assert np.isnan(codes(W_dec.at[7, 0].set(jnp.nan), x)).any(-1).all()
