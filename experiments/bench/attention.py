"""Segmented target attention: folded against naive, forward and backward, and how exact the fold is.

  python -m experiments.bench.attention

The STA core alone: h given, gradients to h, q and all weights, C=1, B=128, L=1000, d=128, H=2, d_q=16, w=10. Naive
builds keys and values, as the paper's equation reads. Medians of one interleaved run; the last line is one JSON object.
Runs with huge pages for large allocations (GLIBC_TUNABLES; set it to nothing to see both without).
"""

import argparse
import json
import os

import jax
import jax.numpy as jnp

from experiments.bench.timing import interleave, use_huge_pages
from laser_jax.layers.segment_attention import segment_attention_folded, segment_attention_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"B": 128, "L": 1000, "d": 128, "H": 2, "dq": 16, "w": 10, "C": 1, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--gate", default="sigmoid", choices=("sigmoid", "softmax"))
    a = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 7)
    normal = jax.random.normal
    args = (
        normal(keys[0], (a.B, a.C, a.d)),
        normal(keys[1], (a.B, a.L, a.d)),
        normal(keys[2], (a.d, a.H, a.dq)) * a.d**-0.5,
        normal(keys[3], (a.d, a.H, a.dq)) * a.d**-0.5,
        normal(keys[4], (a.d, a.H, a.d // a.H)) * a.d**-0.5,
        jnp.full((a.H,), -2.2),
    )
    mask = jnp.ones((a.B, a.L), bool)
    cotangent = normal(keys[5], (a.B, a.C, -(-a.L // a.w), a.d))
    forms = {"naive": segment_attention_reference, "fold": segment_attention_folded}

    def forward(form):
        return jax.jit(lambda q, h, *weights: form(q, h, mask, *weights, width=a.w, gate=a.gate)[0])

    def backward(form):
        def run(cotangent, *args):
            def tokens(q, h, *weights):
                return form(q, h, mask, *weights, width=a.w, gate=a.gate)[0]

            out, pull = jax.vjp(tokens, *args)
            return out, pull(cotangent)

        return jax.jit(run)

    fwd = {name: forward(form) for name, form in forms.items()}
    both = {name: backward(form) for name, form in forms.items()}
    compiled = {name: run.lower(cotangent, *args).compile() for name, run in both.items()}
    temporaries = {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}
    out = {name: run(cotangent, *args) for name, run in both.items()}
    values = [out[name][0] for name in ("naive", "fold")]
    gradients = list(zip(out["naive"][1], out["fold"][1], strict=True))
    max_abs_err = float(jnp.max(jnp.abs(values[0] - values[1])))
    max_rel_grad_err = max(float(jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(x))) for x, y in gradients)
    times = interleave(
        {
            f"{name} {what}": (lambda run=run, extra=extra: jax.block_until_ready(run(*extra, *args)))
            for what, runs, extra in (("forward", fwd, ()), ("forward+backward", both, (cotangent,)))
            for name, run in runs.items()
        },
        a.rounds,
    )
    print("| STA core | forward ms | forward+backward ms | temporaries MB |\n|---|---|---|---|")
    for name in forms:
        print(
            f"| {name} | {1e3 * times[f'{name} forward']:.1f} | {1e3 * times[f'{name} forward+backward']:.1f} "
            f"| {temporaries[name] / 1e6:.0f} |"
        )
    print(
        json.dumps(
            {
                "fold_vs_naive_fwd_bwd": round(times["naive forward+backward"] / times["fold forward+backward"], 3),
                "fold_vs_naive_fwd": round(times["naive forward"] / times["fold forward"], 3),
                "max_abs_err": max_abs_err,
                "max_rel_grad_err": max_rel_grad_err,
                "device": jax.devices()[0].device_kind,
                "cpus": os.cpu_count(),
                "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
            }
        )
    )


if __name__ == "__main__":
    use_huge_pages("experiments.bench.attention")
    main()
