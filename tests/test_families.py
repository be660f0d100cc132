"""Every family against transformers' torch implementation, through checkpoints made by fixtures/lms/make.py."""

from pathlib import Path

import numpy as np
import pytest

import gsae_jax

FIXTURES = Path(__file__).parent / "fixtures" / "lms"
CASES = sorted(folder.name for folder in FIXTURES.iterdir() if (folder / "config.json").exists())


def check(lm, expected):
    """Logits and every site within 1e-4, where there is no padding."""
    mask = expected["mask"]
    assert mask[0].all()
    assert not mask[1, 0]
    assert not mask[2, -1]
    ours = lm.activations(expected["tokens"], lm.sites, mask) | {"logits": lm.logits(expected["tokens"], mask)}
    assert set(ours) == set(expected) - {"tokens", "mask"}
    for name, x in ours.items():
        np.testing.assert_allclose(np.asarray(x)[mask], expected[name][mask], atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_every_site_are_the_references(case):
    with np.load(FIXTURES / case / "expected.npz") as expected:
        check(gsae_jax.load_lm(FIXTURES / case), dict(expected))
