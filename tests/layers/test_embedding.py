"""Row-sparse Adagrad: the same as dense Adagrad, and untouched rows stay untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laser_jax.layers.embedding import Table, adagrad_rows, gather_rows, init_table
from laser_jax.optim import TABLE_EPS

ROWS, WIDTH, RATE, ACCUMULATOR = 20, 3, 0.3, 0.1


def batches(count):
    """Unique rows, padded upwards from the table's end, and a gradient for each."""
    rng = np.random.default_rng(0)
    for step in range(count):
        met = np.sort(rng.choice(ROWS - 4, size=step % 5, replace=False)).astype(np.int32)  # the last 4 rows: never
        unique = np.r_[met, ROWS + np.arange(6 - len(met))].astype(np.int32)
        yield unique, rng.normal(scale=10.0 ** rng.integers(-6, 3), size=(6, WIDTH)).astype(np.float32)


def test_equals_dense_adagrad():
    table = init_table(jax.random.key(0), ROWS, WIDTH, 0.1, ACCUMULATOR)
    dense = table.rows
    optimizer = optax.adagrad(RATE, initial_accumulator_value=ACCUMULATOR, eps=TABLE_EPS)
    state = optimizer.init(dense)
    first = table
    update = jax.jit(adagrad_rows, static_argnums=(3, 4))
    for unique, gradients in batches(12):
        real = unique < ROWS
        whole = np.zeros((ROWS, WIDTH), np.float32)
        whole[unique[real]] = gradients[real]
        updates, state = optimizer.update(whole, state)
        dense = optax.apply_updates(dense, updates)
        table = update(table, unique, gradients, RATE, TABLE_EPS)
        np.testing.assert_allclose(table.rows, dense, rtol=1e-6, atol=1e-6)
    assert np.abs(table.rows - first.rows).max() > 0.1
    for now, before in ((table.rows, first.rows), (table.accumulator, first.accumulator)):
        np.testing.assert_array_equal(np.asarray(now)[-4:], np.asarray(before)[-4:])


def test_rows_not_met_keep_their_bits():
    # Values that any arithmetic would disturb: negative zero, denormal, NaN.
    odd = np.full((ROWS, WIDTH), -0.0, np.float32)
    odd[1], odd[2] = 1e-42, np.nan
    table = Table(jnp.asarray(odd), jnp.asarray(odd))
    unique = np.array([5, 7, ROWS], np.int32)
    after = adagrad_rows(table, unique, np.ones((3, WIDTH), np.float32), RATE, TABLE_EPS)
    rest = np.setdiff1d(np.arange(ROWS), unique)
    for now, before in ((after.rows, odd), (after.accumulator, odd)):
        np.testing.assert_array_equal(np.asarray(now)[rest].view(np.uint32), before[rest].view(np.uint32))
        assert (np.asarray(now)[[5, 7]].view(np.uint32) != before[[5, 7]].view(np.uint32)).any()


def test_padding_reads_as_zeros():
    table = init_table(jax.random.key(0), ROWS, WIDTH, 0.1, ACCUMULATOR)
    got = np.asarray(gather_rows(table, np.array([0, 19, 20, 21], np.int32)))
    np.testing.assert_array_equal(got[:2], np.asarray(table.rows)[[0, 19]])
    assert (got[2:] == 0).all()


def test_fresh_rows_have_the_asked_spread():
    table = init_table(jax.random.key(0), 5000, 4, 0.25, ACCUMULATOR)
    assert abs(float(jnp.std(table.rows)) - 0.25) < 0.01 and abs(float(jnp.mean(table.rows))) < 0.01
    assert (np.asarray(table.accumulator) == np.float32(ACCUMULATOR)).all()
