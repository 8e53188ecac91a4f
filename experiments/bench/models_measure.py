"""One size of the models' benchmark: its batch, every model's steps compiled, their times, and why one is missing."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.bench.attention import TABLES
from laser_jax.layers.recency import age_bucket
from laser_jax.models import encoder_config
from laser_jax.models.base import EncoderConfig, TokenSource
from laser_jax.optim import OptimConfig, dense_optimizer

KINDS = ("forward", "train")
FIELDS = ("item", "category", "author", "age")  # of TABLES
WIDTH_IN = sum(width for _, width in TABLES)
#: What is assumed of a model before it was ever timed: multiply-accumulates a second, and those of a training step
#: over those of its forward pass (backward costs twice as much, blockwise attention runs forward once more).
MACS_A_SECOND, TRAIN_MACS = 3e10, 4


@dataclasses.dataclass(frozen=True)
class Size:
    """Of one batch: requests B, events a history L, candidates a request C, width d."""

    requests: int
    length: int
    candidates: int
    width: int

    @property
    def samples(self) -> int:
        return self.requests * self.candidates


@dataclasses.dataclass
class Timing:
    """Of one kind of step of one model.

    Attributes:
      seconds: median of `rounds`, None where not measured; temporaries: bytes; skipped: why not measured.
    """

    seconds: float | None = None
    rounds: int = 0
    temporaries: int | None = None
    skipped: str = ""


@dataclasses.dataclass
class Row:
    """What is known of one model at one size; MACs are (once a request, per candidate)."""

    model: str
    size: Size
    macs: tuple[int, int]
    parameters: int
    timings: dict[str, Timing]

    def step_macs(self, kind: str) -> float:
        """Multiply-accumulates of a step, as estimated."""
        once, each = self.macs
        forward = self.size.requests * (once + self.size.candidates * each)
        return max(forward, 1) * (TRAIN_MACS if kind == "train" else 1)

    def sample_us(self, kind: str) -> float | None:
        """Microseconds a sample."""
        seconds = self.timings[kind].seconds
        return None if seconds is None else 1e6 * seconds / self.size.samples


def make_batch(size: Size, histories: str) -> dict[str, Any]:
    """Random inputs of a step: the rows a batch of popular ids meets, indices into them, mask, ages, q and side."""
    rng = np.random.default_rng(0)
    shape = (size.requests, size.length)
    held = np.full(size.requests, size.length)
    if histories == "zipf":
        held = np.minimum(rng.zipf(1.35, size.requests) * 25, size.length)
    mask = np.arange(size.length) >= size.length - held[:, None]
    age = np.where(mask, np.sort(rng.integers(0, 10**7, shape))[:, ::-1], 0).astype(np.int32)
    rows, indices = [], []
    for name, (number, width) in zip(FIELDS, TABLES, strict=True):
        ids = age_bucket(age, number) if name == "age" else np.minimum(rng.zipf(1.2, shape), number) - 1
        unique, places = np.unique(np.where(mask, ids, 0), return_inverse=True)
        rows.append(rng.normal(size=(len(unique), width)).astype(np.float32))
        indices.append(places.reshape(shape).astype(np.int32))
    categories = indices[FIELDS.index("category")]
    pairs = (size.requests, size.candidates)
    q = rng.normal(size=(*pairs, size.width)).astype(np.float32)
    # A candidate's category is that of some event of the batch, hence popular ones are popular here too.
    side = {"category": categories.reshape(-1)[rng.integers(0, categories.size, pairs)]}
    return jax.device_put(dict(rows=tuple(rows), indices=tuple(indices), mask=mask, age=age, q=q, side=side))


#: Where a model is not timed by its defaults: cheaper forms, which the study's search has too.
FORMS: dict[str, dict[str, Any]] = {
    "transformer": {"ffn": 1},
    "longer": {"group": 8, "heads": 8, "width_token": 32},
}


def configured(name: str) -> EncoderConfig:
    """The model's config: the zoo's defaults, but for FORMS."""
    return encoder_config(name, **FORMS.get(name, {}))


class Model:
    """An encoder with fresh parameters at one size, and its steps.

    Every model takes as many requests at a time as a training step does (OptimConfig.parts): on a CPU a few, so that
    what is computed of them fits its caches.
    """

    def __init__(self, name: str, size: Size, optim: OptimConfig):
        module = configured(name).build(
            width_in=WIDTH_IN, width=size.width, history_length=size.length, rngs=nnx.Rngs(0)
        )
        self._parts = optim.parts(size.requests, size.length)
        self.macs = module.macs(size.candidates, size.length)
        self._graph, encoder = nnx.split(module, nnx.Param)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(encoder))
        w_in = jax.random.normal(jax.random.key(0), (WIDTH_IN, size.width)) * WIDTH_IN**-0.5
        self._dense = {"encoder": encoder, "w_in": w_in}
        self._optimizer = dense_optimizer(optim)

    def compile(self, kind: str, batch: dict[str, Any]) -> tuple[Callable[[], Any], int]:
        """A call that runs one step on the batch to its end, and the bytes of temporaries of it."""
        rest = {name: batch[name] for name in ("indices", "mask", "age", "side")}
        data = (batch["rows"], batch["q"], rest)
        if kind == "forward":
            compiled = jax.jit(self._forward).lower(self._dense, *data).compile()

            def call():
                jax.block_until_ready(compiled(self._dense, *data))
        else:
            dense = jax.tree.map(jnp.copy, self._dense)  # a step takes its buffers
            state = [(dense, self._optimizer.init(dense))]
            compiled = jax.jit(self._train, donate_argnums=0).lower(state[0], *data).compile()

            def call():
                state[0], *found = compiled(state[0], *data)
                jax.block_until_ready((state[0], found))

        return call, compiled.memory_analysis().temp_size_in_bytes

    def _encode(self, dense, rows, q, rest):
        source = TokenSource(rows=rows, indices=rest["indices"], w_in=dense["w_in"], fields=FIELDS)
        return nnx.merge(self._graph, dense["encoder"])(source, rest["mask"], rest["age"], q, rest["side"])

    def _forward(self, dense, rows, q, rest):
        """Tokens of all requests."""
        return _joined(jax.lax.map(lambda part: self._encode(dense, rows, *part).tokens, self._cut((q, rest))))

    def _train(self, state, rows, q, rest):
        """State after a step, loss, and the gradients that go on to the tables and into what made q."""
        samples = q.shape[0] * q.shape[1]

        def loss(dense, rows, q, rest):
            out = self._encode(dense, rows, q, rest)
            return jnp.sum(jnp.square(out.tokens)) / samples + sum(out.aux_losses.values(), jnp.zeros(())) / self._parts

        def add(sums, part):
            value, (*shared, of_q) = jax.value_and_grad(loss, argnums=(0, 1, 2))(dense, rows, *part)
            return jax.tree.map(jnp.add, sums, (value, *shared)), of_q

        dense, adam = state
        zeros = jnp.zeros(()), *jax.tree.map(jnp.zeros_like, (dense, rows))
        (value, gradients, of_rows), of_q = jax.lax.scan(add, zeros, self._cut((q, rest)))
        updates, adam = self._optimizer.update(gradients, adam, dense)
        return (optax.apply_updates(dense, updates), adam), value, of_rows, _joined(of_q)

    def _cut(self, requests):
        """Arrays with an entry a request, in parts along a new first axis."""
        return jax.tree.map(lambda x: x.reshape(self._parts, x.shape[0] // self._parts, *x.shape[1:]), requests)


def _joined(parts: jax.Array) -> jax.Array:
    return parts.reshape(-1, *parts.shape[2:])


def plan_rounds(first: dict[Any, float], seconds: float, most: int) -> dict[Any, int]:
    """Rounds of each contender, 1 to `most`, that take about so many seconds in all.

    Args:
      first: seconds of one call. Fast contenders get what they ask for; what they leave is for slow ones.
    """
    counts = {}
    for left, key in zip(range(len(first), 0, -1), sorted(first, key=first.get), strict=True):
        counts[key] = min(max(int(seconds / left / first[key]), 1), most)
        seconds = max(seconds - counts[key] * first[key], 0.0)
    return counts


def interleave_unevenly(
    calls: dict[Any, Callable[[], Any]], counts: dict[Any, int], after_turn: Callable[[int, int], None]
) -> dict[Any, float]:
    """Median seconds of each contender, each so many times; those of few rounds have them spread over all turns."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    turns = max(counts.values(), default=0)
    for turn in range(turns):
        for key, call in calls.items():
            if (turn + 1) * counts[key] // turns > turn * counts[key] // turns:
                seconds[key].append(_seconds(call))
        after_turn(turn + 1, turns)
    return {key: float(np.median(taken)) for key, taken in seconds.items()}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclasses.dataclass
class Limits:
    """What a step may cost.

    Attributes:
      seconds: of one step. temporaries: bytes. rounds: at most. deadline: by time.monotonic(), of everything.
      pace: seconds a multiply-accumulate of (model, kind), the best so far.
    """

    seconds: float
    temporaries: float
    rounds: int
    deadline: float
    pace: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)

    def estimate(self, row: Row, kind: str) -> float:
        """Seconds of a step by its multiply-accumulates."""
        return row.step_macs(kind) * self.pace.get((row.model, kind), 1 / MACS_A_SECOND)

    def remember(self, row: Row, kind: str, seconds: float) -> None:
        """Keeps the best pace: an estimate too low costs one call, one too high a figure that could have been had."""
        pace = seconds / row.step_macs(kind)
        self.pace[row.model, kind] = min(self.pace.get((row.model, kind), pace), pace)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


def measure(
    names: list[str],
    size: Size,
    histories: str,
    optim: OptimConfig,
    limits: Limits,
    seconds: float,
    progress: Callable[[str, float], None],
) -> list[Row]:
    """Times all models at one size in one interleaved run.

    Args:
      optim: says how many requests come at a time.
      seconds: that compiling and running should take; at least one round is timed after the first call.
      progress: called with what was done and which share of the size that is.
    """
    end = time.monotonic() + seconds
    batch = make_batch(size, histories)
    rows, calls, first = [], {}, {}
    for number, name in enumerate(names):
        model = Model(name, size, optim)
        row = Row(name, size, model.macs, model.parameters, {kind: Timing() for kind in KINDS})
        rows.append(row)
        for kind, timing in row.timings.items():
            call = _prepare(model, row, kind, batch, limits)
            if call is not None:
                taken = _first_call(call, timing, limits)
                if taken is not None:
                    limits.remember(row, kind, taken)
                if not timing.skipped:
                    calls[name, kind], first[name, kind] = call, taken
        notes = [f"{kind} skipped ({timing.skipped})" for kind, timing in row.timings.items() if timing.skipped]
        progress("; ".join([f"{name} compiled", *notes]), 0.6 * (number + 1) / len(names))
    counts = plan_rounds(first, min(end - time.monotonic(), limits.left), limits.rounds)
    times = interleave_unevenly(
        calls, counts, lambda turn, turns: progress(f"round {turn} of {turns}", 0.6 + 0.4 * turn / turns)
    )
    for row in rows:
        for kind, timing in row.timings.items():
            if (row.model, kind) in times:
                timing.seconds, timing.rounds = times[row.model, kind], counts[row.model, kind]
                limits.remember(row, kind, timing.seconds)
    return rows


def _prepare(model: Model, row: Row, kind: str, batch: dict[str, Any], limits: Limits) -> Callable[[], Any] | None:
    """The compiled step, unless something forbids it, which is then noted."""
    timing = row.timings[kind]
    estimate = limits.estimate(row, kind)
    if limits.left <= 0:
        timing.skipped = "no time left"
    elif estimate > limits.seconds:
        timing.skipped = f"about {estimate:.0f} s a step"
    else:
        call, timing.temporaries = model.compile(kind, batch)
        if timing.temporaries <= limits.temporaries:
            return call
        timing.skipped = f"{timing.temporaries / 1e9:.1f} GB of temporaries"
    return None


def _first_call(call: Callable[[], Any], timing: Timing, limits: Limits) -> float | None:
    """Seconds of a first call, a warm-up that no median counts; notes where it forbids further ones."""
    try:
        taken = _seconds(call)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        timing.skipped = "out of memory"
        return None
    if taken > limits.seconds:
        timing.skipped = f"{taken:.0f} s a step"
    return taken
