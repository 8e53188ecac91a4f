"""Row-sparse optimizers: the same as their dense forms, and untouched rows stay untouched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laser_jax.layers.embedding import Table, gather_rows, init_table, renew_rows, update_rows
from laser_jax.layers.row_optimizers import adagrad, adagrad_rowwise, adam, ftrl

ROWS, WIDTH, RATE, ACCUMULATOR, EPS = 20, 3, 0.3, 0.1, 1e-7
OPTIMIZERS = {
    "adagrad": adagrad(RATE, ACCUMULATOR, EPS),
    "adagrad_rowwise": adagrad_rowwise(RATE, ACCUMULATOR, EPS),
    "adam": adam(RATE, 0.9, 0.99),
    "ftrl": ftrl(RATE, ACCUMULATOR, 0.05, 0.1),
}


def batches(count):
    """Unique rows, padded upwards from the table's end, and a gradient for each."""
    rng = np.random.default_rng(0)
    for step in range(count):
        met = np.sort(rng.choice(ROWS - 4, size=step % 5, replace=False)).astype(np.int32)  # the last 4 rows: never
        unique = np.r_[met, ROWS + np.arange(6 - len(met))].astype(np.int32)
        yield unique, rng.normal(scale=10.0 ** rng.integers(-6, 3), size=(6, WIDTH)).astype(np.float32)


def walk(optimizer, count=12):
    """The first table, and after each batch: what it met, its dense gradient, the table then."""
    first = table = init_table(jax.random.key(0), ROWS, WIDTH, 0.1, optimizer)
    update = jax.jit(functools.partial(update_rows, optimizer=optimizer))
    steps = []
    for number, (unique, gradients) in enumerate(batches(count)):
        real = unique < ROWS
        whole = np.zeros((ROWS, WIDTH), np.float32)
        whole[unique[real]] = gradients[real]
        table = update(table, unique, gradients, step=jnp.int32(number + 1))
        steps.append((unique[real], whole, table))
    return first, steps


def test_adagrad_equals_dense_adagrad():
    first, steps = walk(OPTIMIZERS["adagrad"])
    optimizer = optax.adagrad(RATE, initial_accumulator_value=ACCUMULATOR, eps=EPS)
    dense, state = first.rows, optimizer.init(first.rows)
    for _, gradients, table in steps:
        updates, state = optimizer.update(gradients, state)
        dense = optax.apply_updates(dense, updates)
        np.testing.assert_allclose(table.rows, dense, rtol=1e-6, atol=1e-6)
    assert np.abs(table.rows - first.rows).max() > 0.1


def test_rowwise_adagrad_has_one_accumulator_a_row():
    first, steps = walk(OPTIMIZERS["adagrad_rowwise"])
    assert first.slots["squares"].shape == (ROWS,)
    rows, squares = np.asarray(first.rows, np.float64), np.full(ROWS, ACCUMULATOR)
    for met, gradients, table in steps:
        squares[met] += np.mean(gradients[met].astype(np.float64) ** 2, axis=1)
        rows[met] -= RATE * gradients[met] / np.sqrt(squares[met] + EPS)[:, None]
        np.testing.assert_allclose(table.rows, rows, rtol=1e-5, atol=1e-6)


def test_adam_equals_dense_adam_where_every_row_is_met():
    optimizer = OPTIMIZERS["adam"]
    table = init_table(jax.random.key(0), ROWS, WIDTH, 0.1, optimizer)
    dense, reference = table.rows, optax.adam(RATE, 0.9, 0.99)
    state = reference.init(dense)
    rng = np.random.default_rng(0)
    for step in range(1, 8):
        gradients = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        table = update_rows(table, jnp.arange(ROWS), gradients, optimizer, jnp.int32(step))
        updates, state = reference.update(gradients, state)
        dense = optax.apply_updates(dense, updates)
        np.testing.assert_allclose(table.rows, dense, rtol=2e-5, atol=1e-5)


def test_adam_leaves_the_moments_of_rows_that_are_not_met():
    _, steps = walk(OPTIMIZERS["adam"])
    mean, squares = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, WIDTH))
    for met, gradients, table in steps:
        g = gradients[met].astype(np.float64)
        mean[met], squares[met] = 0.9 * mean[met] + 0.1 * g, 0.99 * squares[met] + 0.01 * g * g
        np.testing.assert_allclose(table.slots["mean"], mean, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(table.slots["squares"], squares, rtol=1e-5, atol=1e-9)


def test_ftrl_equals_its_definition():
    """Each row minimises g . w + the proximal terms of all steps + l1 |w| + l2/2 w^2 (McMahan et al. 2013, eq. 1)."""
    first, steps = walk(OPTIMIZERS["ftrl"])
    start = np.asarray(first.rows, np.float64)
    squares = np.full((ROWS, WIDTH), ACCUMULATOR)
    # The row before any step: the minimum of a proximal term at itself, weighted by the initial accumulator, and l2.
    linear = -start * (np.sqrt(squares) / RATE + 0.1)
    rows = start.copy()
    zeros = 0
    for met, gradients, table in steps:
        g = gradients.astype(np.float64)
        before = np.sqrt(squares)
        squares = squares + g * g
        sigma = (np.sqrt(squares) - before) / RATE
        linear = linear + g - sigma * rows
        solved = np.where(
            np.abs(linear) <= 0.05, 0.0, -(linear - np.sign(linear) * 0.05) / (np.sqrt(squares) / RATE + 0.1)
        )
        rows[met] = solved[met]
        zeros += (rows == 0).sum()
        np.testing.assert_allclose(table.rows, rows, rtol=2e-4, atol=2e-5)
    assert zeros > 0 and np.abs(rows - start).max() > 0.1


def test_ftrl_without_penalties_walks_like_adagrad():
    _, ours = walk(ftrl(RATE, ACCUMULATOR, 0.0, 0.0))
    _, adagrads = walk(adagrad(RATE, ACCUMULATOR, 0.0))
    for (_, _, a), (_, _, b) in zip(ours, adagrads, strict=True):
        np.testing.assert_allclose(a.rows, b.rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_not_met_keep_their_bits(name):
    # Values that any arithmetic would disturb: negative zero, denormal, NaN.
    odd = np.full((ROWS, WIDTH), -0.0, np.float32)
    odd[1], odd[2] = 1e-42, np.nan
    slots = {key: odd[:, 0] if slot.ndim == 1 else odd for key, slot in OPTIMIZERS[name].init(jnp.asarray(odd)).items()}
    unique = np.array([5, 7, ROWS], np.int32)
    table = Table(jnp.asarray(odd), jax.tree.map(jnp.asarray, slots))
    after = update_rows(table, unique, np.ones((3, WIDTH), np.float32), OPTIMIZERS[name], jnp.int32(1))
    rest = np.setdiff1d(np.arange(ROWS), unique)
    for now, before in zip(jax.tree.leaves(after), jax.tree.leaves(Table(odd, slots)), strict=True):
        np.testing.assert_array_equal(np.asarray(now)[rest].view(np.uint32), before[rest].view(np.uint32))
        assert (np.asarray(now)[[5, 7]].view(np.uint32) != before[[5, 7]].view(np.uint32)).any()


def test_bfloat16_rows_are_rounded_at_random_and_right_on_average():
    """A step of 1e-3 of bfloat16's spacing is never seen by rounding to nearest; at random it arrives on average."""
    optimizer = adagrad(1e-3, 1.0, 0.0)
    many = 20_000
    table = init_table(jax.random.key(0), many, WIDTH, 0.0, optimizer, jnp.bfloat16)
    table = Table(jnp.ones_like(table.rows), {"squares": jnp.full((many, WIDTH), 1e6, jnp.float32)})
    update = jax.jit(functools.partial(update_rows, optimizer=optimizer))
    gradients = np.full((many, WIDTH), -1000.0, np.float32)
    steps = 5
    after = table
    for step in range(1, steps + 1):
        after = update(after, jnp.arange(many), gradients, step=jnp.int32(step))
    assert after.rows.dtype == jnp.bfloat16
    moved = np.asarray(after.rows, np.float64) - 1
    want = sum(1e-3 * 1000 / np.sqrt(1e6 + 1e6 * k) for k in range(1, steps + 1))
    spread = np.std(moved) / np.sqrt(moved.size)
    assert abs(moved.mean() - want) < 4 * spread and len(np.unique(moved)) > 1
    # Part of a larger table, rows are rounded as they are there.
    half = Table(table.rows[many // 2 :], jax.tree.map(lambda slot: slot[many // 2 :], table.slots))
    part = update(half, jnp.arange(many // 2), gradients[many // 2 :], step=jnp.int32(1), first_row=many // 2)
    whole = update(table, jnp.arange(many), gradients, step=jnp.int32(1))
    np.testing.assert_array_equal(np.asarray(part.rows, np.float32), np.asarray(whole.rows[many // 2 :], np.float32))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_renewed_rows_are_as_if_never_used(name):
    many, std = 4000, 0.2
    optimizer = OPTIMIZERS[name]
    table = init_table(jax.random.key(0), many, WIDTH, 0.1, optimizer)
    table = Table(table.rows + 5, jax.tree.map(lambda slot: slot + 7, table.slots))
    rows = np.r_[np.arange(0, many, 2), 0, many, many + 3].astype(np.int32)  # a repeat, and padding
    fresh = np.r_[np.arange(many // 2) % 4 != 1, True, True, True]
    after = renew_rows(table, rows, fresh, optimizer, std, jnp.int32(3))
    changed = np.isin(np.arange(many), rows[fresh])
    values = np.asarray(after.rows)
    np.testing.assert_array_equal(values[~changed], np.asarray(table.rows)[~changed])
    assert abs(values[changed].std() - std) < 0.01 and abs(values[changed].mean()) < 0.01
    assert np.abs(values[changed]).max() <= std * 3**0.5
    for slot, init in zip(jax.tree.leaves(after.slots), jax.tree.leaves(optimizer.init(after.rows)), strict=True):
        np.testing.assert_allclose(np.asarray(slot)[changed], np.asarray(init)[changed], rtol=1e-6)
    again = renew_rows(table, rows, fresh, optimizer, std, jnp.int32(4))
    assert (np.asarray(again.rows)[changed] != values[changed]).mean() > 0.99  # another step draws other values


def test_padding_reads_as_zeros():
    table = init_table(jax.random.key(0), ROWS, WIDTH, 0.1, OPTIMIZERS["adagrad"])
    got = np.asarray(gather_rows(table, np.array([0, 19, 20, 21], np.int32)))
    np.testing.assert_array_equal(got[:2], np.asarray(table.rows)[[0, 19]])
    assert (got[2:] == 0).all()


def test_fresh_rows_have_the_asked_spread():
    table = init_table(jax.random.key(0), 5000, 4, 0.25, OPTIMIZERS["adagrad"])
    assert abs(float(jnp.std(table.rows)) - 0.25) < 0.01 and abs(float(jnp.mean(table.rows))) < 0.01
    assert (np.asarray(table.slots["squares"]) == np.float32(ACCUMULATOR)).all()
