import jax
import jax.numpy as jnp
import numpy as np

from gsae_jax.activations import buffer

B, S, U = 16, 32, 2  # strata, slots, updates per call
ROWS, T = 4, 8  # ROWS * T = U * B


def run(calls, mask=None):
    """Token ids through the buffer as activations of width 1; returns the ids served [steps, B], and written."""
    store = {"site": jnp.zeros((B, S, 1))}
    count = jnp.zeros(B, jnp.int32)
    key, next_id = jax.random.key(0), 1
    arrange = jax.jit(buffer.arrange, static_argnums=1)
    exchange, fill = jax.jit(buffer.exchange), jax.jit(buffer.fill)
    written, served = [], []
    while len(served) < calls * U:
        ids = next_id + np.arange(ROWS * T, dtype=np.float32).reshape(ROWS, T)
        next_id += ROWS * T
        valid = np.ones((ROWS, T), bool) if mask is None else mask(ids)
        key, shift_key, slot_key = jax.random.split(key, 3)
        shift = jax.random.randint(shift_key, (), 0, T)
        fresh, ok = arrange(ids[..., None], U, shift), arrange(valid, U, shift)
        if int(count.min()) < S:
            store, count = fill(store, count, {"site": fresh}, ok)
            continue
        for update, slots in enumerate(jax.random.randint(slot_key, (U, B), 0, S)):
            store, batch = exchange(store, slots, {"site": fresh[update]}, ok[update])
            served.append(np.asarray(batch["site"][:, 0], int))
            written.append(np.asarray(fresh[update, :, 0], int)[np.asarray(ok[update])])
    return np.array(served), written


def test_every_written_activation_is_served_once_and_its_age_is_geometric():
    served, written = run(calls=1500)
    times = {}
    for step, batch in enumerate(served):
        assert len(set(batch.tolist())) == B
        for item in batch.tolist():
            times.setdefault(item, []).append(step)
    assert 0 not in times  # what the store held before it was filled
    ages = []
    for step, batch in enumerate(written[: len(written) - 12 * S]):
        for item in batch.tolist():
            assert len(times.get(item, [])) <= 1
            if item in times:
                ages.append(times[item][0] - step)
    total = sum(len(batch) for batch in written[: len(written) - 12 * S])
    assert len(ages) / total > 0.9999  # (1 - 1/S)^(12 S) = 6e-6 are still inside
    ages = np.array(ages)
    # Geometric with mean S: five standard errors, S / sqrt(n) each.
    assert abs(ages.mean() - S) < 5 * S / np.sqrt(len(ages))
    expected = (1 - 1 / S) ** np.arange(0, 100, 10)
    found = np.array([(ages > age).mean() for age in range(0, 100, 10)])
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(len(ages)))


def test_masked_activations_are_never_served_and_masks_bind_no_stratum():
    """Position 0 of each row is masked (as BOS is), and a tenth of the others."""

    def mask(ids):
        return ((ids - 1) % T != 0) & (ids % 10 != 3)

    served, written = run(calls=600, mask=mask)
    assert mask(served).all()
    assert all(mask(batch).all() for batch in written)
    # Each stratum sees new content at the same rate: the fresh share is 7/8 * 9/10 of its services.
    new = np.array([len(set(served[:, stratum].tolist())) for stratum in range(B)]) / len(served)
    expected = 1 - (1 / T + 0.1 * (1 - 1 / T))
    np.testing.assert_allclose(new, expected, atol=0.05)


def test_neighbours_are_served_at_independent_times():
    """A batch holds as many pairs from one row of text as independent draws would, within five standard errors.

    Independent draws: B of S * B stored items without regard to strata, replaced by the next B tokens.
    """
    served, _ = run(calls=1500)
    rows = (served - 1) // T
    same = np.array([[(batch == row).sum() - 1 for row in batch] for batch in rows]).sum(1) / 2
    rng, independent = np.random.default_rng(0), []
    order = np.concatenate([np.arange(1 + step * B, 1 + (step + 1) * B) for step in range(len(served))])
    store = rng.permutation(order[: S * B])
    for step in range(S, min(len(served), 1500)):
        picks = rng.choice(S * B, B, replace=False)
        drawn = (store[picks] - 1) // T
        independent.append(sum((drawn == row).sum() - 1 for row in drawn) / 2)
        store[picks] = order[step * B : (step + 1) * B]
    error = np.sqrt(np.var(same) / len(same) + np.var(independent) / len(independent))
    assert abs(same.mean() - np.mean(independent)) < 5 * error


def test_arrange_keeps_rows_apart_and_spreads_neighbours():
    x = np.arange(ROWS * T, dtype=np.int32).reshape(ROWS, T)
    spread = np.asarray(buffer.arrange(jnp.array(x), U, jnp.int32(0)))
    assert spread.shape == (U, B)
    assert sorted(spread.ravel().tolist()) == list(range(ROWS * T))
    np.testing.assert_array_equal(spread[0] + 1, spread[1])  # neighbours: same stratum, next update
    np.testing.assert_array_equal(spread[0] // T, np.repeat(np.arange(ROWS), B // ROWS))
