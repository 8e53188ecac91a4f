"""The core of STA as one kernel forward and one backward, for GPU (Pallas on Triton) and TPU (Pallas on Mosaic).

A grid cell owns some segments of one user and up to 8 queries. It walks through the w events of its segments in step,
one event of each at a time, [segments, f]: an event is read once, and neither scores nor gates ever leave the cell (the
softmax is the running one). Backward computes the gates anew from the events.

Scores and sums are multiplies and reductions in float32, not matrix products. K is too small for one (a tensor core
wants 16 rows, 12 of them zeros at K = 4); as a product with the segments' membership a sum over w would cost
segments x K f and not K f; w needs no padding; no pass in TF32 or bfloat16 rounds anything.

The two platforms want other blocks of the same arrays. Triton sees pointers: one event of each segment is a strided
load of [B, S, w, f] as it lies, but values must have sizes that are powers of two, and what reaches past an array must
be masked by hand. Mosaic clips blocks by itself, but tiles the last two dimensions of an array, which must then be
segments and features: XLA moves w and K before S.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from laser_jax.layers.segment_sums import NO_MASS, segment_sums_bwd, segment_sums_fwd

QUERIES = 8  # of a grid cell, at most: each has its sums in registers
GPU_NUMBERS = 4096  # queries x segments x features of a grid cell, at most: 100 to 170 registers a thread
TPU_BYTES = 4 << 20  # of the blocks of a grid cell, two of which are in VMEM at a time
COMPILER = {
    "gpu": plgpu.CompilerParams(num_warps=4),
    "tpu": pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
}
LOW = -3e38  # below any score, yet finite: LOW - LOW is 0


def segment_sums_kernel(x, u, bias, mask, gate: str, interpret: bool | str = False):
    """The same function as `segment_sums`, for GPU and TPU; a program that runs on a CPU has `segment_sums` instead.

    Args:
      x: [B, S, w, f] float32 or bfloat16; what stands where mask is False counts for nothing.
      u: [B, K, f] float32 or bfloat16. bias: [K]. mask: [B, S, w] bool.
      gate: "sigmoid" or "softmax".
      interpret: on any platform, slowly, what a "gpu" (or True) or a "tpu" would run.

    Returns:
      z [B, S, K, f] and log mass [B, S, K], float32.
    """
    return _kernel(x, u, bias, mask, gate, "gpu" if interpret is True else interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _kernel(x, u, bias, mask, gate, interpret):
    return _kernel_fwd(x, u, bias, mask, gate, interpret)[0]


def _kernel_fwd(x, u, bias, mask, gate, interpret):
    z, log_mass = _on_platform(_forward, _forward_xla, gate, interpret, x, u, bias, mask)
    # Only a softmax asks for z again; whatever follows keeps it anyway (it meets Wv).
    return (z, log_mass), (x, u, bias, mask, log_mass, z if gate == "softmax" else None)


def _kernel_bwd(gate, interpret, saved, cotangents):
    return *_on_platform(_backward, _backward_xla, gate, interpret, *saved, *cotangents), None


_kernel.defvjp(_kernel_fwd, _kernel_bwd)


def _on_platform(run, run_xla, gate, interpret, *arrays):
    if interpret:
        return run(*arrays, gate=gate, on=interpret, interpret=True)
    gpu, tpu = (functools.partial(run, gate=gate, on=on, interpret=False) for on in ("gpu", "tpu"))
    # Chosen when it is lowered, so that a program can be exported for any of them.
    return jax.lax.platform_dependent(*arrays, tpu=tpu, cpu=functools.partial(run_xla, gate=gate), default=gpu)


def _forward_xla(x, u, bias, mask, *, gate):
    return segment_sums_fwd(x, u, bias, mask, gate)[0]


def _backward_xla(x, u, bias, mask, log_mass, z, dz, dlog_mass, *, gate):
    _, saved = segment_sums_fwd(x, u, bias, mask, gate)  # the gates anew
    dx, du, dbias, _ = segment_sums_bwd(gate, saved, (dz, dlog_mass))
    return dx, du, dbias.astype(bias.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call.

    Attributes:
      on: "gpu" or "tpu". gate: see segment_sums_kernel.
      segments, width, queries, features: S, w, K, f.
      cut, tile: segments and queries of a grid cell; blocks, tiles: how many of these hold all.
      lanes: f, as long as a block has it.
    """

    on: str
    gate: str
    segments: int
    width: int
    queries: int
    features: int
    cut: int
    tile: int
    blocks: int
    tiles: int
    lanes: int

    def lay(self, a):
        """[..., S, n, f] for n = w or K, as the platform wants it; and back."""
        return a if self.on == "gpu" else jnp.swapaxes(a, -3, -2)

    def at(self, ref, n):
        """Of a block of such an array, [cut, lanes] at place n of w or K."""
        n = jnp.int32(n)  # interpreted, a masked store takes no Python integer
        return ref.at[:, n] if self.on == "gpu" else ref.at[n]

    def spec(self, axis, n, lead="b"):
        """Of a block of such an array, n long over w or K, which grid axis `axis` goes along."""
        axes, block = (f"s{axis}", (self.cut, n)) if self.on == "gpu" else (f"{axis}s", (n, self.cut))
        return _spec(f"{lead}{axes}-", *(None for _ in lead), *block, self.lanes)


def _plan(on, gate, x, u):
    (_, s, w, f), k = x.shape, u.shape[1]
    tile = min(k, QUERIES)
    if on == "gpu":
        lanes = pl.next_power_of_2(f)
        tile = min(tile, max(GPU_NUMBERS // lanes, 1))
        cut = min(max(GPU_NUMBERS // (pl.next_power_of_2(tile) * lanes), 1), 32, pl.next_power_of_2(s))
    else:
        lanes = f
        step = 32 // x.dtype.itemsize  # rows of one of Mosaic's tiles of events
        cut = TPU_BYTES // ((2 * w + tile + 1) * pl.cdiv(f, 128) * 128 * 4)
        cut = min(max(cut // step * step, step), 64, s)
    return _Plan(on, gate, s, w, k, f, cut, tile, pl.cdiv(s, cut), pl.cdiv(k, tile), lanes)


def _spec(axes, *shape):
    """A block's shape, and what counts the blocks of each dimension: grid axis b, s or q (see _call), or nothing."""
    return pl.BlockSpec(shape, lambda *cell: tuple(0 if axis == "-" else cell["bsq".index(axis)] for axis in axes))


def _inside(plan, lanes, limit, query=0):
    """Of a [cut, lanes] block over segments, at a query of the tile, what its array has."""
    shape = (plan.cut, lanes)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + pl.program_id(1) * plan.cut
    query = jnp.full(shape, pl.program_id(2) * plan.tile + query, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (row < plan.segments) & (lane < limit) & (query < plan.queries)


def _read(plan, ref, inside):
    """Float32, zero outside: there Triton would read other memory, and Mosaic reads what lay in VMEM."""
    a = plgpu.load(ref, mask=inside, other=0) if plan.on == "gpu" else jnp.where(inside, ref[...], 0)
    return a.astype(jnp.float32)


def _write(plan, ref, a, inside):
    if plan.on == "gpu":
        plgpu.store(ref, a.astype(ref.dtype), mask=inside)
    else:
        ref[...] = a.astype(ref.dtype)


def _column(facts, n):
    """[cut, 1]: neither platform slices a value, and Mosaic no lane of a ref at a place not known before."""
    lane = jax.lax.broadcasted_iota(jnp.int32, facts.shape, 1)
    return jnp.sum(jnp.where(lane == n, facts, 0.0), axis=1, keepdims=True)


def _rows(plan, ref):
    return [ref[k : k + 1, :].astype(jnp.float32) for k in range(plan.tile)]


def _forward_kernel(x_ref, u_ref, bias_ref, facts_ref, z_ref, mass_ref, *, plan):
    inside = _inside(plan, plan.lanes, plan.features)
    facts = _read(plan, facts_ref, _inside(plan, facts_ref.shape[1], plan.width))
    u, bias = _rows(plan, u_ref), _rows(plan, bias_ref)

    def add(j, sums):
        real = _column(facts, j) > 0
        x = jnp.where(real, _read(plan, plan.at(x_ref, j), inside), 0.0)
        added = []
        for (z, mass, top), u_k, bias_k in zip(sums, u, bias, strict=True):
            score = jnp.sum(x * u_k, axis=1, keepdims=True) + bias_k
            if plan.gate == "sigmoid":
                gate = jnp.where(real, jax.nn.sigmoid(score), 0.0)
                added.append((z + gate * x, mass + gate, top))
            else:
                higher = jnp.where(real, jnp.maximum(top, score), top)
                shrink, e = jnp.exp(top - higher), jnp.where(real, jnp.exp(score - higher), 0.0)
                added.append((z * shrink + e * x, mass * shrink + e, higher))
        return tuple(added)

    nothing = jnp.zeros((plan.cut, 1), jnp.float32)
    start = (jnp.zeros((plan.cut, plan.lanes), jnp.float32), nothing, nothing + LOW)
    for k, (z, mass, top) in enumerate(jax.lax.fori_loop(0, plan.width, add, (start,) * plan.tile)):
        if plan.gate == "sigmoid":
            log_mass = jnp.log(jnp.maximum(mass, math.exp(NO_MASS)))
        else:
            log_mass = jnp.where(mass > 0, jnp.log(jnp.maximum(mass, 1e-20)) + top, NO_MASS)
            z = z / jnp.maximum(mass, 1e-20)
        _write(plan, plan.at(z_ref, k), z, _inside(plan, plan.lanes, plan.features, k))
        _write(plan, mass_ref.at[:, k : k + 1], log_mass, _inside(plan, 1, 1))


def _backward_kernel(x_ref, u_ref, bias_ref, facts_ref, dz_ref, dx_ref, du_ref, dbias_ref, *, plan):
    inside = _inside(plan, plan.lanes, plan.features)
    facts = _read(plan, facts_ref, _inside(plan, facts_ref.shape[1], plan.width + 2 * plan.tile))
    log_mass, push = ([_column(facts, plan.width + n * plan.tile + k) for k in range(plan.tile)] for n in (0, 1))
    dz = [_read(plan, plan.at(dz_ref, k), _inside(plan, plan.lanes, plan.features, k)) for k in range(plan.tile)]
    u, bias = _rows(plan, u_ref), _rows(plan, bias_ref)

    def add(j, sums):
        real = _column(facts, j) > 0
        x = jnp.where(real, _read(plan, plan.at(x_ref, j), inside), 0.0)
        dx = jnp.zeros_like(x)
        added = []
        for k, (du, dbias) in enumerate(sums):
            score = jnp.sum(x * u[k], axis=1, keepdims=True) + bias[k]
            gate = jax.nn.sigmoid(score) if plan.gate == "sigmoid" else jnp.exp(score - log_mass[k])
            gate = jnp.where(real, gate, 0.0)
            slope = gate * (1.0 - gate) if plan.gate == "sigmoid" else gate
            dscore = slope * (jnp.sum(x * dz[k], axis=1, keepdims=True) + push[k])
            dx += gate * dz[k] + dscore * u[k]
            added.append((du + dscore * x, dbias + dscore))
        _write(plan, plan.at(dx_ref, j), dx, inside)
        return tuple(added)

    start = (jnp.zeros((plan.cut, plan.lanes), jnp.float32), jnp.zeros((plan.cut, 1), jnp.float32))
    for k, (du, dbias) in enumerate(jax.lax.fori_loop(0, plan.width, add, (start,) * plan.tile)):
        du_ref[k : k + 1, :] = jnp.sum(du, axis=0, keepdims=True)
        dbias_ref[k : k + 1, :] = jnp.sum(dbias, axis=0, keepdims=True)


def _call(kernel, plan, interpret, inputs, specs, outputs):
    """inputs: x, u, bias, facts, ...; outputs: (spec, shape, dtype) of each."""
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        # Users, blocks of segments, tiles of queries: from one tile to the next the events stay in VMEM or cache.
        grid=(len(inputs[0]), plan.blocks, plan.tiles),
        in_specs=specs,
        out_specs=[spec for spec, _, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        compiler_params=COMPILER[plan.on],
        interpret=interpret,
    )(*inputs)


def _inputs(plan, x, u, bias, facts):
    """What both kernels read; facts: [B, 1 or tiles, S, n], of which the first w are the mask."""
    missing, (_, tiles, _, n) = plan.tiles * plan.tile - plan.queries, facts.shape
    u = jnp.pad(u, ((0, 0), (0, missing), (0, plan.lanes - plan.features)))
    bias = jnp.pad(bias.astype(jnp.float32), (0, missing))[:, None]
    specs = [
        plan.spec("-", plan.width),
        _spec("bq-", None, plan.tile, plan.lanes),
        _spec("q-", plan.tile, 1),
        _spec("bqs-" if tiles > 1 else "b-s-", None, None, plan.cut, pl.next_power_of_2(n) if plan.on == "gpu" else n),
    ]
    return [plan.lay(x), u, bias, facts], specs


def _forward(x, u, bias, mask, *, gate, on, interpret):
    plan = _plan(on, gate, x, u)
    b, s, k, f = len(x), plan.segments, plan.queries, plan.features
    inputs, specs = _inputs(plan, x, u, bias, mask[:, None].astype(jnp.float32))
    outputs = [
        (plan.spec("q", plan.tile), (b, s, k, f) if on == "gpu" else (b, k, s, f), jnp.float32),
        (_spec("bqs-", None, None, plan.cut, plan.tile), (b, plan.tiles, s, plan.tile), jnp.float32),
    ]
    z, log_mass = _call(_forward_kernel, plan, interpret, inputs, specs, outputs)
    return plan.lay(z), jnp.moveaxis(log_mass, 1, 2).reshape(b, s, -1)[..., :k]


def _backward(x, u, bias, mask, log_mass, z, dz, dlog_mass, *, gate, on, interpret):
    # What all events of a segment get alike: of its mass, and for a softmax the mean of its gates' gradients,
    # sum_w gate (x . dz) = z . dz.
    if gate == "sigmoid":
        push = jnp.where(log_mass > NO_MASS, dlog_mass * jnp.exp(-log_mass), 0.0)
    else:
        push = dlog_mass - jnp.sum(z * dz, axis=-1)
    plan = _plan(on, gate, x, u)
    b, s, tiles, rows = len(x), plan.segments, plan.tiles, plan.tiles * plan.tile
    # All facts of a segment side by side, for on a TPU even one number fills a row of 128.
    facts = jnp.pad(jnp.stack([log_mass, push], axis=2), ((0, 0), (0, 0), (0, 0), (0, rows - plan.queries)))
    facts = jnp.moveaxis(facts.reshape(b, s, 2, tiles, plan.tile), 3, 1).reshape(b, tiles, s, -1)
    mask = jnp.broadcast_to(mask[:, None].astype(jnp.float32), (b, tiles, *mask.shape[1:]))
    inputs, specs = _inputs(plan, x, u, bias, jnp.concatenate([mask, facts], axis=-1))
    inputs, specs = [*inputs, plan.lay(dz)], [*specs, plan.spec("q", plan.tile)]
    # What many cells add to is written once a cell and summed here: on a GPU cells run in no order.
    outputs = [
        (plan.spec("-", plan.width, "qb"), (tiles, *inputs[0].shape), x.dtype if tiles == 1 else jnp.float32),
        (_spec("bsq-", None, None, plan.tile, plan.lanes), (b, plan.blocks, rows, plan.lanes), jnp.float32),
        (_spec("bsq-", None, None, plan.tile, 1), (b, plan.blocks, rows, 1), jnp.float32),
    ]
    dx, du, dbias = _call(_backward_kernel, plan, interpret, inputs, specs, outputs)
    du = du.sum(axis=1)[:, : plan.queries, : plan.features]
    dbias = dbias.sum(axis=(0, 1))[: plan.queries, 0]
    return plan.lay(dx.sum(axis=0)).astype(x.dtype), du.astype(u.dtype), dbias.astype(bias.dtype)
