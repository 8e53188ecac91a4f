"""The fused kernel of segmented target attention on a GPU or TPU: against XLA's fold, keys and values built, and flash.

  python -m experiments.bench.kernel

Every row of the table is one request's history of L=1000 events met by C candidates, B requests at a time, d=128, H=2,
w=10, forward and with the gradients to events, candidates and weights, float32 (without TF32) and bfloat16:
  naive          keys and values built, as the paper's equation reads;
  fold           `segment_attention_folded` by XLA;
  kernel         the same by `segment_kernel`;
  flash          softmax gates, a segment a sequence of w keys, by cuDNN's flash attention (bfloat16, GPU);
  flash_history  another function: one softmax over the whole history, by the same;
  flash_self     another function: the attention of one Transformer layer over the history, by the same.
Keys and queries of flash are as wide as its values, as it asks. One interleaved run, medians; a round is many calls
that wait for nothing but the last. `share` is the part of the measured bandwidth of a copy that a form would need if it
read events once forward, and once more and wrote their gradient backward, and did nothing else: 1 is the floor.
Temporaries are what the compiler asks for without inputs and results. The last line is one JSON object; `kernel_apart`
in it is how far the kernel's values, or values and gradients, lie from naive's, relative to their norm.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.timing import interleave
from laser_jax.layers import segment_attention as sta

L, D, H, DQ, W = 1000, 128, 2, 16, 10
FLASH = ("flash", "flash_history", "flash_self")


def flash_segments(q, x, wq, wk, wv):
    """Each segment a sequence of its own: [B, C, S, H * dv] of softmax gates."""
    b, s, c = len(x), x.shape[1] // W, q.shape[1]
    query = jnp.repeat(_queries(q, wq, x.dtype), s, axis=0)
    keys, values = (a.reshape(b * s, W, *a.shape[2:]) for a in _keys_and_values(x, wk, wv))
    out = jax.nn.dot_product_attention(query, keys, values, implementation="cudnn")[:, :c]
    return jnp.moveaxis(out.reshape(b, s, c, -1), 1, 2)


def flash_history(q, x, wq, wk, wv):
    """[B, C, H, dv]."""
    query = _queries(q, wq, x.dtype)
    return jax.nn.dot_product_attention(query, *_keys_and_values(x, wk, wv), implementation="cudnn")[:, : q.shape[1]]


def flash_self(q, x, wq, wk, wv):
    """[B, L, H, dv]."""
    del q
    query = jnp.einsum("blf,fhk->blhk", x, wq.astype(x.dtype))
    return jax.nn.dot_product_attention(query, *_keys_and_values(x, wk, wv), implementation="cudnn")


def _queries(q, wq, dtype):
    """An even number of them, for cuDNN has no gradient of an odd one."""
    query = jnp.einsum("bcd,dhk->bchk", q.astype(dtype), wq.astype(dtype))
    return jnp.pad(query, ((0, 0), (0, -q.shape[1] % 2), (0, 0), (0, 0)))


def _keys_and_values(x, wk, wv):
    return (jnp.einsum("blf,fhk->blhk", x, weight.astype(x.dtype)) for weight in (wk, wv))


def forms() -> dict[str, Callable]:
    """name -> f(q, x, wq, wk, wv) of each."""

    def segments(form, **how):
        def run(q, x, *weights):
            mask = jnp.ones(x.shape[:2], bool)
            return form(q, x, mask, *weights, jnp.full((H,), -2.2), width=W, **how)[0]

        return run

    return {
        "naive": segments(sta.segment_attention_reference),
        "fold": segments(sta.segment_attention_folded),
        "kernel": segments(sta.segment_attention_folded, kernel="pallas"),
        "flash": flash_segments,
        "flash_history": flash_history,
        "flash_self": flash_self,
    }


def draw(b: int, c: int, dtype: Any, key_width: int) -> tuple[jax.Array, ...]:
    """q, x, wq, wk, wv."""
    shapes = (b, c, D), (b, L, D), (D, H, key_width), (D, H, key_width), (D, H, D // H)
    keys = jax.random.split(jax.random.key(b + c), len(shapes))
    q, x, *weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return q, x.astype(dtype), *(weight * D**-0.5 for weight in weights)


def compiled(form: Callable, arrays: tuple, backward: bool) -> Callable:
    """One call of the form, with its gradients of a random cotangent where `backward`."""
    if not backward:
        run, arguments = (lambda arrays: form(*arrays)), (arrays,)
    else:
        shape = jax.eval_shape(form, *arrays)
        cotangent = jax.random.normal(jax.random.key(1), shape.shape).astype(shape.dtype)

        def run(arrays, cotangent):
            out, pull = jax.vjp(form, *arrays)
            return out, pull(cotangent)

        arguments = arrays, cotangent
    program = jax.jit(run).lower(*arguments).compile()
    call = functools.partial(program, *arguments)
    call.temporaries = program.memory_analysis().temp_size_in_bytes
    return call


def repeated(call: Callable, times: int) -> Callable[[], None]:
    def run():
        for _ in range(times):
            out = call()
        jax.block_until_ready(out)

    return run


@jax.jit
def apart(got: Any, want: Any) -> jax.Array:
    """Largest ||got - want|| / ||want|| of the leaves."""

    def one(a, b):
        a, b = (n.astype(jnp.float32) for n in (a, b))
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(one, got, want))))


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second of a large copy, read and written."""
    numbers = jnp.ones(2**28, jnp.float32)
    copy = jax.jit(lambda a: a + 1.0).lower(numbers).compile()
    seconds = interleave({"copy": repeated(lambda: copy(numbers), 10)}, rounds)["copy"] / 10
    return 2 * numbers.nbytes / seconds


def measure(b: int, c: int, dtype: Any, backward: bool, rounds: int, calls: int, bandwidth: float) -> dict[str, float]:
    """Prints a row a form; returns the ratios."""
    flash = FLASH if dtype == jnp.bfloat16 and jax.default_backend() == "gpu" else ()
    kind, found = f"{'fwd_bwd' if backward else 'fwd'}_{jnp.dtype(dtype).name}_c{c}", forms()
    programs = {
        name: compiled(found[name], draw(b, c, dtype, D // H if name in FLASH else DQ), backward)
        for name in ("naive", "fold", "kernel", *flash)
    }
    far = float(apart(programs["kernel"](), programs["naive"]()))
    seconds = interleave({name: repeated(call, calls) for name, call in programs.items()}, rounds)
    seconds = {name: total / calls for name, total in seconds.items()}
    floor = b * L * D * jnp.dtype(dtype).itemsize * (3 if backward else 1) / bandwidth
    for name, call in programs.items():
        share = f"{floor / seconds[name]:.2f}" if name not in FLASH[1:] else ""
        cells = kind, name, f"{1e3 * seconds[name]:.3f}", share, f"{call.temporaries / 1e6:.0f}"
        print(f"| {' | '.join(cells)} |", flush=True)
    others = [name for name in seconds if name != "kernel"]
    figures = {f"{name}_over_kernel": round(seconds[name] / seconds["kernel"], 2) for name in others}
    figures |= {"kernel_share_of_bandwidth": round(floor / seconds["kernel"], 2), "kernel_apart": far}
    return {f"{name}_{kind}": value for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"B": 512, "rounds": 9, "calls": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--candidates", default="1,4", help="C, comma-separated")
    a = parser.parse_args()
    if jax.default_backend() == "cpu":
        raise SystemExit("the kernel is for GPU and TPU, and jax finds neither here")
    jax.config.update("jax_default_matmul_precision", "highest")
    bandwidth = copy_bandwidth(a.rounds)
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "copy_gb_s": round(bandwidth / 1e9)}
    print("| | form | ms | share of bandwidth | temporaries MB |\n|---|---|---|---|---|")
    for c in (int(count) for count in a.candidates.split(",")):
        for dtype in (jnp.float32, jnp.bfloat16):
            for backward in (False, True):
                result |= measure(a.B, c, dtype, backward, a.rounds, a.calls, bandwidth)
    print(json.dumps({**result, "B": a.B, "cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
