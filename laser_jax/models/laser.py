"""LASER: segmented target attention, global segmented target attention, multi-resolution fusion (arXiv 2602.11562).

`laser()` is the paper's form as far as it is known; `laser_plus()` is the form we found better on the same data. Both
are configs of one module, in which what the paper leaves open is a field.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from flax import nnx

from laser_jax.layers import segment_attention as sta
from laser_jax.layers.horizons import HorizonReadout
from laser_jax.layers.mlp import FeedForward, weight
from laser_jax.layers.recency import SegmentRecency
from laser_jax.layers.segment_runs import (
    Run,
    check_horizons,
    newest_segments,
    num_segments,
    over_segments,
    reaches_of,
    segment_runs,
    split,
)
from laser_jax.layers.segment_sums import GATES, loudest_value
from laser_jax.layers.target_attention import TargetAttention, masked_softmax
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least, residual_scale

COMPUTE = ("float32", "bfloat16")
JOINED = ("concat", "sum")
FUSION = ("tokens", "sum")


@dataclasses.dataclass
class LaserConfig:
    """Sizes and the points that the paper (arXiv 2602.11562) leaves open.

    Attributes:
      segment: w, events a segment; where a horizon ends one is cut short. heads: H of STA and GSTA. key_width: d_q of a
        head in STA.
      layers: M, GSTA layers (0: none). segment_ffn: hidden width of the segment feed-forward over d (0: none).
      gsta_ffn: the same for the target's feed-forward in GSTA.
      gate: "sigmoid" (may stay silent) or "softmax" inside a segment.
      joined: how heads make a segment token: "concat", each a share of d, or "sum", each as wide as d.
      gate_bias: added to every sigmoid gate's score; None is -ln(w - 1): a full segment's gates sum to about 1 at init.
      gsta_gate: "softmax" over the segments, or "sigmoid", a gate for each, with a bias a head that is learned.
      mass_logit: whether a segment's log gate mass is added to its GSTA score; with softmax gates the model then
        contains exact target attention over all events.
      norm: "post" (the paper: LN after every residual), "pre" or "none" (an ablation).
      recency: "age", "position", "both" or "none", added to segment tokens. age_buckets: log-spaced buckets.
      recent: r, newest segment tokens handed to the head. pool: whether the max over segment tokens is.
      fusion: what the head gets of these and of horizons: "tokens", each by itself, or "sum", one token.
      horizons: numbers of newest events over which the head also gets the attention and its mass, besides the whole
        history; empty for none. Those longer than the history are left out. With any, no event is read beyond the
        history length that the encoder was built for.
      tied: Wk := Wq and value projections := I at init (without it one pass does not align gates and values).
      compute: "float32" or "bfloat16", of the events in STA; what is added up stays float32. Events that come in
        bfloat16 stay so.
      kernel: what sums where folding pays and nothing is chunked: "xla", or "pallas" (on GPU and TPU one fused kernel
        forward and one backward, layers/segment_kernel.py; on a CPU XLA); "pallas_interpret" runs it anywhere, slowly.
      chunk: users at a time, at most, whose rows are gathered where folding pays, so that the batch's [B, L, f] never
        exists here (a head with a mean or matches still gathers it); 0 gathers all at once. The result is the same:
        8 is faster on a CPU that is given a large batch at once, 0 elsewhere, on sharded batches and in training, which
        gives a CPU a few requests at a time (OptimConfig.parts).
    """

    segment: int = 10
    heads: int = 2
    key_width: int = 16
    layers: int = 2
    segment_ffn: int = 4
    gsta_ffn: int = 1
    gate: str = "sigmoid"
    joined: str = "concat"
    gate_bias: float | None = None
    gsta_gate: str = "softmax"
    mass_logit: bool = False
    norm: str = "post"
    recency: str = "both"
    age_buckets: int = 32
    recent: int = 3
    pool: bool = True
    fusion: str = "tokens"
    horizons: tuple[int, ...] = ()
    tied: bool = True
    compute: str = "float32"
    kernel: str = "xla"
    chunk: int = 0

    def runs(self, length: int) -> tuple[Run, ...]:
        """How a history of so many events is cut into segments."""
        return segment_runs(reaches_of(self.horizons, length), self.segment)

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "LaserEncoder":
        return LaserEncoder(self, width_in, width, history_length, rngs=rngs)


def laser(**overrides) -> LaserConfig:
    """The faithful form: sigmoid gates, 4x segment feed-forward, post-LN, recency on segment tokens."""
    return LaserConfig(**overrides)


def laser_plus(**overrides) -> LaserConfig:
    """Target attention over several horizons for the price of one: softmax gates in a segment, and its log-sum-exp.

    That is all that attention over any run of whole segments needs: how wide they are changes what it costs, and not
    what comes out. With these, GSTA layers, the loudest values, newest segment tokens and feed-forwards on segment
    tokens, most of what `laser` costs a candidate, gain nothing.
    """
    settings = dict(gate="softmax", norm="pre", heads=4, segment=200, segment_ffn=0, recency="none", recent=0)
    settings |= dict(mass_logit=True, layers=0, pool=False, horizons=(20, 50, 200, 1000))
    return LaserConfig(**{**settings, **overrides})


class LaserEncoder(SequenceEncoder):
    """History -> segment tokens per candidate (STA) -> refined target (GSTA) -> tokens for the head.

    In this order: global, loudest, recent, horizons; each where the config asks for it. With fusion="sum", their sum.
    """

    def __init__(self, config: LaserConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        choices = dict(compute=COMPUTE, kernel=sta.KERNELS, gate=GATES, joined=JOINED, gsta_gate=GATES, fusion=FUSION)
        for name, known in choices.items():
            if getattr(config, name) not in known:
                raise ValueError(f"{name}={getattr(config, name)!r} is not one of {known}")
        if config.joined == "sum" and config.horizons:
            raise ValueError(f"joined='sum': horizons={config.horizons} read heads one by one, use joined='concat'")
        if config.chunk and config.kernel != "xla":
            raise ValueError(f"kernel={config.kernel!r} sums whole batches: set chunk=0 (it is {config.chunk})")
        if config.chunk < 0:
            raise ValueError(f"chunk={config.chunk}: give a number of users, or 0 for all of the batch")
        if config.norm not in ("pre", "post", "none"):
            raise ValueError(f"norm={config.norm!r} is not 'pre', 'post' or 'none'")
        at_least(1, config, "segment", "heads", "key_width", "age_buckets")
        at_least(0, config, "layers", "segment_ffn", "gsta_ffn")
        check_horizons("horizons", config.horizons)
        if width % config.heads:
            raise ValueError(f"width={width} is not a multiple of heads={config.heads}")
        self.config, self.width_in = config, width_in
        self.history_length, self.num_segments = history_length, num_segments(config.runs(history_length))
        if not 0 <= config.recent <= self.num_segments:
            raise ValueError(f"recent={config.recent} is not within the {self.num_segments} segments of the history")
        reaches = reaches_of(config.horizons, history_length) if config.horizons else ()
        newest = newest_segments(reaches, config.segment)
        self.horizons = (
            HorizonReadout(width, config.heads, reaches, newest, config.gate, rngs=rngs) if reaches else None
        )
        self.num_tokens = int(config.layers > 0) + int(config.pool) + config.recent
        self.num_tokens += self.horizons.num_tokens if self.horizons is not None else 0
        if not self.num_tokens:
            raise ValueError("layers=0, pool=False, recent=0 and no horizons leave no token for the head")
        if config.fusion == "sum":
            self.num_tokens = 1
        # Horizons read the sums as they are; what refines segment tokens is there for those who read tokens.
        reads_tokens = config.layers or config.pool or config.recent
        for name, off in (("segment_ffn", 0), ("recency", "none")):
            if not reads_tokens and getattr(config, name) != off:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} refines segment tokens, which nobody reads with layers=0, "
                    f"pool=False and recent=0: set it to {off!r}"
                )
        if config.gate == "softmax" and config.gate_bias is not None:
            raise ValueError(
                f"gate_bias={config.gate_bias}: a softmax does not feel what is added to all of its scores; leave it "
                "None, or take gate='sigmoid'"
            )
        if config.gsta_gate != "softmax" and not config.layers:
            raise ValueError(f"gsta_gate={config.gsta_gate!r} is of GSTA layers, of which there are none: layers=0")
        shape = (width, config.heads, config.key_width)
        self.wq = weight(rngs, shape)
        self.wk = nnx.Param(self.wq[...]) if config.tied else weight(rngs, shape)
        if config.joined == "concat":
            values, same = (width, config.heads, width // config.heads), jnp.eye(width)
        else:
            values, same = (width, config.heads, width), jnp.tile(jnp.eye(width) / config.heads, config.heads)
        self.wv = nnx.Param(same.reshape(values)) if config.tied else weight(rngs, values)
        bias = -math.log(max(config.segment - 1, 1)) if config.gate_bias is None else config.gate_bias
        self.gate_bias = nnx.Param(jnp.full((config.heads,), bias, jnp.float32)) if config.gate == "sigmoid" else None
        self.gsta = nnx.List([GlobalLayer(config, width, self.num_segments, rngs=rngs) for _ in range(config.layers)])
        scale = residual_scale(1) if config.norm == "pre" else 1.0
        self.ffn = (
            FeedForward(width, config.segment_ffn * width, rngs=rngs, out_scale=scale)
            if reads_tokens and config.segment_ffn
            else None
        )
        norms = config.norm == "post" or config.norm == "pre" and self.ffn is not None
        self.norm = nnx.LayerNorm(width, rngs=rngs) if reads_tokens and norms else None
        self.recency = (
            SegmentRecency(config.recency, self.num_segments, width, config.age_buckets, rngs=rngs)
            if reads_tokens and config.recency != "none"
            else None
        )

    def precompute(self, history: TokenSource, mask, age):
        config, runs = self.config, self._runs(mask)
        num_events = over_segments(mask, runs, lambda real: real.sum(axis=-1))
        # The least age of a segment's real events: right for any mask, not only where the newest event is real.
        never = jnp.iinfo(jnp.int32).max
        newest_age = never - over_segments(
            jnp.where(mask, never - jnp.maximum(age, 0), 0), runs, lambda left: left.max(axis=-1)
        )
        recency = None if self.recency is None else self.recency(newest_age)
        events = history if config.chunk else history.features()
        return events, history.w_in, mask, num_events, recency

    def _runs(self, mask) -> tuple[Run, ...]:
        """Of these histories; the last horizon is as long as the encoder was built for, nothing beyond it is read."""
        length = mask.shape[1]
        return self.config.runs(min(length, self.history_length) if self.config.horizons else length)

    def score(self, ctx, q, side) -> SeqOut:
        events, w_in, mask, num_events, recency = ctx
        config, alive = self.config, num_events > 0
        wk = jnp.einsum("fd,dhk->fhk", w_in, self.wk[...])
        wv = jnp.einsum("fd,dhv->fhv", w_in, self.wv[...])
        bias = jnp.zeros((config.heads,)) if self.gate_bias is None else self.gate_bias[...]
        segments, masses = zip(*self._attend(q, events, mask, (self.wq[...], wk, wv, bias)), strict=True)
        s, log_mass = jnp.concatenate(segments, axis=2), jnp.concatenate(masses, axis=3)
        if config.joined == "sum":
            s = s.reshape(*s.shape[:3], config.heads, -1).sum(axis=3)
        sums, s, tokens = s, self._refine(s, recency), []
        if config.layers:
            t = q
            for layer in self.gsta:
                t = layer(t, s, alive, log_mass if config.mass_logit else None)
            tokens.append((t if config.norm == "post" else t - q)[:, :, None])
        real = alive[:, None, :, None]
        if config.pool:
            loudest = loudest_value(jnp.where(real, s, -jnp.inf))[:, :, None]
            tokens.append(jnp.where(alive.any(axis=1)[:, None, None, None], loudest, 0.0))
        if config.recent:
            # A history shorter than the one built for may have fewer segments than `recent`.
            missing = max(config.recent - s.shape[2], 0)
            newest = jnp.pad(jnp.where(real, s, 0.0), ((0, 0), (0, 0), (missing, 0), (0, 0)))
            tokens.append(newest[:, :, : -1 - config.recent : -1])
        if self.horizons is not None:
            tokens.append(self.horizons(sums, log_mass, alive, num_events))
        tokens = jnp.concatenate(tokens, axis=2)
        if config.fusion == "sum":
            tokens = tokens.sum(axis=2, keepdims=True)
        return SeqOut(tokens=tokens, diag={"loudness": self._loudness(log_mass, num_events)})

    def _attend(self, q, events, mask, weights):
        """Gated sums and log mass of the segments of each run."""
        config, runs, fold = self.config, self._runs(mask), self._fold(q.shape[1])
        masks = split(mask, runs)
        forms = [dict(width=run.width, gate=config.gate) for run in runs]
        # Events are never made wider than they came.
        compute = "bfloat16" if q.dtype == jnp.bfloat16 else config.compute
        if config.chunk and fold:
            indices = zip(*(split(index, runs) for index in events.indices), strict=True)
            return [
                sta.segment_attention_chunked(
                    q, events.rows, index, mask, *weights, **form, chunk=config.chunk, compute=compute
                )
                for index, mask, form in zip(indices, masks, forms, strict=True)
            ]
        attend = sta.segment_attention_shared
        if fold:
            attend = functools.partial(sta.segment_attention_folded, kernel=config.kernel)
        x = (events.features() if config.chunk else events).astype(compute)
        return [
            attend(q, x, mask, *weights, **form) for x, mask, form in zip(split(x, runs), masks, forms, strict=True)
        ]

    def _refine(self, s, recency):
        """Gated sums [B, C, S, d] -> segment tokens."""
        if self.ffn is not None:
            s = s + self.ffn(self.norm(s) if self.config.norm == "pre" else s)
        if self.config.norm == "post" and self.norm is not None:
            s = self.norm(s)
        return s if recency is None else s + recency[:, None]

    def _loudness(self, log_mass, num_events):
        """[B, C, S]: mean gate of a segment's events; with softmax gates the attention that an event of it gets."""
        alive = (num_events > 0)[:, None]
        if self.config.gate == "sigmoid":
            mass = jnp.where(alive, jnp.mean(jnp.exp(log_mass), axis=2), 0.0)
        else:
            mass = jnp.mean(masked_softmax(log_mass, alive[:, :, None]), axis=2)
        return mass / jnp.maximum(num_events, 1)[:, None]

    def _fold(self, candidates: int) -> bool:
        _, heads, key = self.wk.shape
        events = self.history_length // self.num_segments
        return sta.use_fold(candidates, self.width_in, heads, key, self.wv.shape[2], max(events, 1))

    def unused(self, candidates: int) -> list[str]:
        config, told = self.config, {}
        if not self._fold(candidates):
            why = f"of {candidates} candidates a request, keys and values built once for all cost less than folding"
            told |= {f"kernel={config.kernel!r}": why} if config.kernel != "xla" else {}
            told |= {f"chunk={config.chunk}": why} if config.chunk else {}
        if not config.layers:
            why = "it is of GSTA layers, of which there are none"
            told |= {f"gsta_ffn={config.gsta_ffn}": why} if config.gsta_ffn > 1 else {}
            if self.horizons is not None and not config.mass_logit:
                told["mass_logit=False"] = f"{why}, and horizons have their log mass whatever it says"
            if not config.pool and not config.recent and config.norm != "pre":
                told[f"norm={config.norm!r}"] = "horizons read segments as they are"
        if config.recency in ("none", "position") and config.age_buckets != LaserConfig.age_buckets:
            told[f"age_buckets={config.age_buckets}"] = f"recency={config.recency!r} knows no age"
        return [f"encoder.{setting} does nothing: {why}" for setting, why in told.items()]

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        config = self.config
        d, heads, key = self.wk.shape
        values = heads * self.wv.shape[2]
        segments = num_segments(config.runs(length))
        if self._fold(candidates):
            once = 0
            each = d * heads * key + self.width_in * heads * (key + 2 * length) + segments * self.width_in * values
        else:
            once = length * self.width_in * (heads * key + values)
            each = d * heads * key + length * (heads * key + values)
        if self.ffn is not None:
            each += segments * FeedForward.macs(d, config.segment_ffn * d)
        if self.horizons is not None:
            each += self.horizons.macs(segments)
        each += sum(layer.macs(segments) for layer in self.gsta)
        return once, each


class GlobalLayer(nnx.Module):
    """One GSTA layer: the target attends over the segment tokens; only the target is updated."""

    def __init__(self, config: LaserConfig, width: int, num_segments: int, *, rngs: nnx.Rngs):
        self.norm = config.norm
        # As in STA: the gates of all segments sum to about 1 at init.
        bias = -math.log(max(num_segments - 1, 1)) if config.gsta_gate == "sigmoid" else None
        self.attention = TargetAttention(width, config.heads, tied=config.tied, gate_bias=bias, rngs=rngs)
        scale = residual_scale(config.layers) if self.norm == "pre" else 1.0
        self.ffn = FeedForward(width, config.gsta_ffn * width, rngs=rngs, out_scale=scale) if config.gsta_ffn else None
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs) if self.norm != "none" else None
        self.norm_ffn = nnx.LayerNorm(width, rngs=rngs) if self.norm != "none" and self.ffn is not None else None

    def __call__(self, t, s, alive, log_mass):
        """t [B, C, d], s [B, C, S, d], alive [B, S], log_mass [B, C, H, S] or None -> [B, C, d]."""
        b, c, segments, d = s.shape
        # Segment tokens differ by candidate, so every (request, candidate) pair is a request of one candidate here.
        query = (self.norm_attention(t) if self.norm == "pre" else t).reshape(b * c, 1, d)
        mask = jnp.repeat(alive, c, axis=0)
        offset = None if log_mass is None else log_mass.reshape(b * c, 1, -1, segments)
        out = self.attention(query, s.reshape(b * c, segments, d), mask, offset=offset).reshape(b, c, d)
        t = t + out
        if self.norm == "post":
            t = self.norm_attention(t)
        if self.ffn is not None:
            t = t + self.ffn(self.norm_ffn(t) if self.norm == "pre" else t)
            t = self.norm_ffn(t) if self.norm == "post" else t
        return t

    def macs(self, segments: int) -> int:
        d = self.attention.wq.shape[0]
        ffn = 0 if self.ffn is None else FeedForward.macs(d, self.ffn.w1.shape[1])
        return sum(self.attention.macs(1, segments, d)) + ffn
