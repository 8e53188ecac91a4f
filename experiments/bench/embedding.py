"""Row-sparse tables against dense ones, by the size of the table.

  python -m experiments.bench.embedding

A step: 256 k ids (Zipf) are made unique on the host, their rows gathered, a loss of all 256 k embeddings
differentiated, and the rows updated in place by Adagrad; against `jax.grad` with respect to the whole table and
`optax.adagrad`. All tables that fit are timed in one interleaved run. Prints a table and, as the last line, one JSON:
step_10m_over_1m_rows, dense_optax_over_sparse_4m (the host's part counts for ours), temp_bytes_over_unique_rows (of the
update compiled alone), largest_difference_to_optax.
"""

import argparse
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench.timing import interleave, use_huge_pages
from laser_jax.layers.embedding import Table, gather_rows, init_table, update_rows
from laser_jax.layers.row_optimizers import adagrad
from laser_jax.row_placement import Wanted, bucket_size, padded_rows, unique_keys

IDS, WIDTH, RATE, ACCUMULATOR, EPS = 256_000, 64, 0.1, 0.1, 1e-7
OPTIMIZER = adagrad(RATE, ACCUMULATOR, EPS)
LEAST = 1024


def draw(num_rows: int, count: int) -> list[np.ndarray]:
    """Rows of `count` steps: some 42 k distinct ones each, however large the table."""
    rng = np.random.default_rng(0)
    met = min(num_rows, 1_000_000)
    rank = rng.zipf(1.2, (count, IDS)) % met
    return [(ranks * (num_rows // met)).astype(np.int32) for ranks in rank]


def host(rows: np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the pipeline's threads do: unique rows [U] and positions among them."""
    unique, (positions,) = unique_keys([rows])
    wanted, rank = Wanted.of(unique, num_rows, 1)
    local, slots = wanted.buckets(bucket_size(len(unique), num_rows, LEAST), padded_rows(num_rows))
    return local[0], slots[rank][positions]


def loss(embeddings: jax.Array, weights: jax.Array) -> jax.Array:
    """Of [N, D]; summed."""
    return jnp.sum(jax.nn.softplus(embeddings @ weights))


@functools.partial(jax.jit, donate_argnums=0)
def sparse_step(table: Table, unique: jax.Array, positions: jax.Array, weights: jax.Array, step: jax.Array) -> Table:
    rows = gather_rows(table, unique)
    gradients = jax.grad(lambda rows: loss(rows[positions], weights))(rows)
    return update_rows(table, unique, gradients, OPTIMIZER, step)


def dense_optimizer() -> optax.GradientTransformation:
    return optax.adagrad(RATE, initial_accumulator_value=ACCUMULATOR, eps=EPS)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def dense_step(rows: jax.Array, state: optax.OptState, ids: jax.Array, weights: jax.Array):
    gradients = jax.grad(lambda rows: loss(rows[ids], weights))(rows)
    updates, state = dense_optimizer().update(gradients, state)
    return optax.apply_updates(rows, updates), state


def difference_to_optax(num_rows: int = 100_000, steps: int = 5) -> float:
    """Largest difference of a row after some steps on the same ids."""
    weights = jax.random.normal(jax.random.key(1), (WIDTH,))
    table = init_table(jax.random.key(0), padded_rows(num_rows), WIDTH, 0.1, OPTIMIZER)
    dense = jnp.array(table.rows)
    state = dense_optimizer().init(dense)
    rng = np.random.default_rng(0)
    for step in range(steps):
        rows = (rng.zipf(1.25, 20_000) % num_rows).astype(np.int32)
        unique, positions = host(rows, num_rows)
        places = unique[positions]
        table = sparse_step(table, unique, positions, weights, jnp.int32(step + 1))
        dense, state = dense_step(dense, state, places, weights)
    return float(jnp.max(jnp.abs(table.rows - dense)))


def temporary_bytes(num_rows: int, size: int) -> tuple[int, int]:
    """Of the update compiled alone: its temporaries, and the bytes of the unique rows."""
    table = jax.eval_shape(lambda: init_table(jax.random.key(0), num_rows, WIDTH, 0.1, OPTIMIZER))
    unique, gradients = jax.ShapeDtypeStruct((size,), jnp.int32), jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)
    update = jax.jit(functools.partial(update_rows, optimizer=OPTIMIZER), donate_argnums=0)
    compiled = update.lower(table, unique, gradients, step=jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes, size * WIDTH * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1000000,4000000,10000000", help="sizes of the row-sparse tables")
    parser.add_argument("--dense", type=int, default=4_000_000, help="rows of the dense table")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    weights = jax.random.normal(jax.random.key(1), (WIDTH,))
    contenders, sizes = {}, {}

    def sparse(num_rows: int):
        draws = draw(num_rows, args.rounds + 1)
        table = [init_table(jax.random.key(0), padded_rows(num_rows), WIDTH, 0.1, OPTIMIZER)]
        turn = [0]

        def run():
            unique, positions = host(draws[turn[0]], num_rows)
            sizes[num_rows] = int((unique < padded_rows(num_rows)).sum())
            table[0] = sparse_step(table[0], unique, positions, weights, jnp.int32(1))
            jax.block_until_ready(table[0])
            turn[0] += 1

        return run

    for num_rows in map(int, args.rows.split(",")):
        contenders[f"row-sparse, {num_rows / 1e6:g} M rows"] = sparse(num_rows)
    ids = draw(args.dense, args.rounds + 1)
    dense = [0.1 * jax.random.normal(jax.random.key(0), (args.dense, WIDTH))]
    dense.append(dense_optimizer().init(dense[0]))
    turn = [0]

    def run_dense():
        dense[:] = dense_step(dense[0], dense[1], ids[turn[0]], weights)
        jax.block_until_ready(dense)
        turn[0] += 1

    contenders[f"optax.adagrad, {args.dense / 1e6:g} M rows"] = run_dense
    hosts = draw(1_000_000, 1)[0]
    contenders["of it: unique on the host"] = lambda: host(hosts, 1_000_000)
    seconds = interleave(contenders, args.rounds)
    print("| step of 256 k ids, D=64 | ms |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1e3 * value:.1f} |")
    size = bucket_size(max(sizes.values()), 10**9, LEAST)
    temporaries, unique_bytes = temporary_bytes(10_000_000, size)
    print(f"\nunique rows a step, by size of the table: {sizes}")
    print(f"the update alone: {temporaries / 1e6:.1f} MB of temporaries for {unique_bytes / 1e6:.1f} MB of rows")
    print(
        json.dumps(
            {
                "step_10m_over_1m_rows": _ratio(seconds, "row-sparse, 10 M rows", "row-sparse, 1 M rows"),
                "dense_optax_over_sparse_4m": _ratio(seconds, "optax.adagrad, 4 M rows", "row-sparse, 4 M rows"),
                "temp_bytes_over_unique_rows": round(temporaries / unique_bytes, 3),
                "largest_difference_to_optax": difference_to_optax(),
                "cpus": os.cpu_count(),
            }
        )
    )


def _ratio(seconds: dict[str, float], over: str, under: str) -> float | None:
    """None where one of them was not asked for."""
    if over not in seconds or under not in seconds:
        return None
    return round(seconds[over] / seconds[under], 3)


if __name__ == "__main__":
    use_huge_pages("experiments.bench.embedding")
    main()
