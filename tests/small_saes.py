"""Small SAEs and activations for tests of their functions."""

import jax
import numpy as np

D, F, B = 12, 40, 64


def away_from_init(module, config, seed=0):
    """Parameters with every array in play: random biases, r_mag, and an encoder that is not the decoder's transpose."""
    params = module.init(jax.random.key(seed), config)
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: p + 0.3 * jax.random.normal(key, p.shape) for key, (name, p) in zip(keys, params.items(), strict=True)
    }


def inputs(seed=5):
    return jax.random.normal(jax.random.key(seed), (B, D)) + 0.5


def assert_close(ours, reference, tolerance=1e-5):
    scale = np.abs(reference).max() + 1e-12
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * scale)
