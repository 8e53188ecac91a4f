"""Segmented target attention: every exact form against the one that builds keys and values, forward and backward.

  python -m experiments.bench.attention

Four comparisons in one interleaved run, medians of rounds, B=128, L=1000, d=128, H=2, d_q=16, w=10, C=1 unless said:
  core     h given, gradients to h, q and all weights: folded against naive;
  gather   events are rows of tables (128 k ids a batch), gradients to the rows: chunked and folded against naive;
  ragged   the same with Zipf lengths: packed and chunked against folded over padded histories;
  laser_plus   the whole encoder as it is by default, forward, one request: 50 candidates against one.
Naive builds keys and values, as the paper's equation reads. The last line is one JSON object. Runs with huge pages for
large allocations (GLIBC_TUNABLES; set it to nothing to see all without).
"""

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.bench.timing import interleave, use_huge_pages
from laser_jax.layers import segment_attention as sta
from laser_jax.layers.packed_segments import live_segments
from laser_jax.layers.tokens import features_of, gather_fields
from laser_jax.models import encoder_config
from laser_jax.models.base import TokenSource

#: Rows and width of each table: items, categories, authors, and what says when and how.
TABLES = ((42_000, 64), (500, 24), (30_000, 24), (64, 16))


def forward_and_pull(form: Callable, arrays: Any, cotangent: jax.Array) -> Callable[[], Any]:
    """Compiled: form(*arrays) and the gradient of <form, cotangent> with respect to `arrays`."""

    def run(arrays, cotangent):
        out, pull = jax.vjp(lambda arrays: form(*arrays), arrays)
        return out, pull(cotangent)

    compiled = jax.jit(run).lower(arrays, cotangent).compile()

    def call():
        return jax.block_until_ready(compiled(arrays, cotangent))

    call.temporaries = compiled.memory_analysis().temp_size_in_bytes
    return call


def furthest_apart(found: dict[str, Any]) -> tuple[float, float]:
    """Largest absolute error of values and largest relative one of gradients, against the first form."""
    (want, want_gradients), *others = found.values()
    values = gradients = 0.0
    for got, got_gradients in others:
        values = max(values, float(jnp.max(jnp.abs(got - want))))
        pairs = zip(jax.tree.leaves(want_gradients), jax.tree.leaves(got_gradients), strict=True)
        gradients = max(gradients, *(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) for a, b in pairs))
    return values, gradients


class Sizes:
    """Arguments and random arrays of one run."""

    def __init__(self, a: argparse.Namespace):
        self.a = a
        rng = np.random.default_rng(0)

        def normal(*shape, scale=1.0):
            return jnp.asarray(rng.normal(size=shape, scale=scale).astype(np.float32))

        self.q = normal(a.B, a.C, a.d)
        self.h = normal(a.B, a.L, a.d)
        self.weights = tuple(normal(a.d, a.H, k, scale=a.d**-0.5) for k in (a.dq, a.dq, a.d // a.H))
        rows = sum(width for _, width in TABLES)  # keys and values of events as they come from tables
        self.of_rows = self.weights[0], *(normal(rows, a.H, k, scale=rows**-0.5) for k in (a.dq, a.d // a.H))
        self.bias = jnp.full((a.H,), -2.2)
        self.cotangent = normal(a.B, a.C, -(-a.L // a.w), a.d)
        self.rows = tuple(normal(*table) for table in TABLES)
        popular = [np.minimum(rng.zipf(1.2, (a.B, a.L)), size) - 1 for size, _ in TABLES]
        self.indices = tuple(jnp.asarray(found, jnp.int32) for found in popular)
        lengths = np.minimum(rng.zipf(1.35, a.B * 4) * 25, a.L)[: a.B]
        self.lengths = lengths
        self.ragged = jnp.asarray(np.arange(a.L) >= a.L - lengths[:, None])
        self.whole = jnp.ones((a.B, a.L), bool)
        self.settings = dict(width=a.w, gate=a.gate)


def core(s: Sizes) -> dict[str, Callable]:
    forms = {"naive": sta.segment_attention_reference, "folded": sta.segment_attention_folded}
    arrays = (s.q, s.h, *s.weights, s.bias)
    return {
        name: forward_and_pull(
            lambda q, h, *weights, form=form: form(q, h, s.whole, *weights, **s.settings)[0], arrays, s.cotangent
        )
        for name, form in forms.items()
    }


def gather(s: Sizes, mask: jax.Array, names: tuple[str, ...]) -> dict[str, Callable]:
    def dense(form):
        def run(q, rows, *weights):
            return form(q, features_of(gather_fields(rows, s.indices)), mask, *weights, **s.settings)[0]

        return run

    def chunked(q, rows, *weights):
        return sta.segment_attention_chunked(q, rows, s.indices, mask, *weights, **s.settings)[0]

    positions = jnp.asarray(live_segments(np.asarray(mask.sum(axis=1)), s.a.L, s.a.w))

    def packed(q, rows, *weights):
        return sta.segment_attention_packed(q, rows, s.indices, mask, positions, *weights, **s.settings)[0]

    forms = {
        "naive": dense(sta.segment_attention_reference),
        "folded": dense(sta.segment_attention_folded),
        "chunked": chunked,
        "packed": packed,
    }
    arrays = (s.q, s.rows, *s.of_rows, s.bias)
    return {name: forward_and_pull(forms[name], arrays, s.cotangent) for name in names}


def candidates(s: Sizes, counts: tuple[int, ...]) -> dict[str, Callable]:
    """The encoder of laser_plus for one request with so many candidates, forward."""
    a = s.a
    rows = sum(size for _, size in TABLES)
    module = encoder_config("laser_plus").build(width_in=rows, width=a.d, history_length=a.L, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)
    rng = np.random.default_rng(1)
    w_in = jnp.asarray(rng.normal(size=(rows, a.d), scale=rows**-0.5).astype(np.float32))
    indices = tuple(index[:1] for index in s.indices)
    age = jnp.asarray(np.sort(rng.integers(0, 10**7, (1, a.L)))[:, ::-1].astype(np.int32))

    def run(params, rows, q):
        source = TokenSource(rows=rows, indices=indices, w_in=w_in)
        return nnx.merge(graph, params)(source, s.whole[:1], age, q, {}).tokens

    found = {}
    for count in counts:
        q = jnp.asarray(rng.normal(size=(1, count, a.d)).astype(np.float32))
        compiled = jax.jit(run).lower(params, s.rows, q).compile()
        found[str(count)] = lambda compiled=compiled, q=q: jax.block_until_ready(compiled(params, s.rows, q))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"B": 128, "L": 1000, "d": 128, "H": 2, "dq": 16, "w": 10, "C": 1, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gate", default="sigmoid", choices=("sigmoid", "softmax"))
    s = Sizes(parser.parse_args())
    blocks = {
        "core": core(s),
        "gather": gather(s, s.whole, ("naive", "folded", "chunked")),
        "ragged": gather(s, s.ragged, ("folded", "chunked", "packed")),
        "laser_plus": candidates(s, (1, 10, 50)),
    }
    errors = {
        name: furthest_apart({k: run() for k, run in blocks[name].items()}) for name in blocks if name != "laser_plus"
    }
    flat = {(block, name): run for block, runs in blocks.items() for name, run in runs.items()}
    times = interleave(flat, s.a.rounds)
    print("| | form | ms | temporaries MB |\n|---|---|---|---|")
    for (block, name), seconds in times.items():
        temporaries = getattr(flat[block, name], "temporaries", None)
        size = "" if temporaries is None else f"{temporaries / 1e6:.0f}"
        print(f"| {block} | {name} | {1e3 * seconds:.2f} | {size} |")

    def ratio(block: str, slow: str, fast: str) -> float:
        return round(times[block, slow] / times[block, fast], 3)

    result = {
        "fold_vs_naive_fwd_bwd": ratio("core", "naive", "folded"),
        "chunked_vs_naive_fwd_bwd": ratio("gather", "naive", "chunked"),
        "gather_fold_vs_naive_fwd_bwd": ratio("gather", "naive", "folded"),
        "packed_vs_padded_fwd_bwd": ratio("ragged", "folded", "packed"),
        "packed_vs_chunked_fwd_bwd": ratio("ragged", "chunked", "packed"),
        "fill": round(float(s.lengths.mean()) / s.a.L, 3),
        "candidates50_vs_1_per_candidate": round(times["laser_plus", "50"] / 50 / times["laser_plus", "1"], 3),
        "candidates10_vs_1_per_candidate": round(times["laser_plus", "10"] / 10 / times["laser_plus", "1"], 3),
        "max_abs_err": {name: values for name, (values, _) in errors.items()},
        "max_rel_grad_err": {name: gradients for name, (_, gradients) in errors.items()},
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    use_huge_pages("experiments.bench.attention")
    main()
