"""SDIM (arXiv 2205.10249): events that hash like the candidate are summed; nothing is searched, nothing attended."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.tokens import summed_in
from laser_jax.models.base import TokenSource, at_least
from laser_jax.models.retrieval import LongShortEncoder, event_planes, hyperplanes, pick, sides

NORMALISE = ("l2", "sum", "mean")
MOST_BITS = 16  # a sum for each of 2^bits buckets, of every table and request


@dataclasses.dataclass
class SdimConfig:
    """Hash tables.

    Attributes:
      tables: T. bits: tau of each; an event at angle theta counts (1 - theta / pi)^tau in expectation.
      normalise: "l2" brings each table's sum to unit RMS, as loud as a token; "sum" is the paper's equation, louder the
        longer the history, which the head pays for in its one pass; "mean" divides by the user's number of events, most
        of which are in other buckets: a whisper.
      seed: of the hyperplanes, which are the same at every step and in serving.
      recent: newest events of the short branch. heads: H of its attention. tied: Wk := Wq, Wv Wo := I there at init.
    """

    tables: int = 32
    bits: int = 4
    normalise: str = "l2"
    seed: int = 0
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "SdimEncoder":
        return SdimEncoder(self, width_in, width, rngs=rngs)


def bucket_ids(x: jax.Array, planes: jax.Array, tables: int) -> jax.Array:
    """x [..., f], planes [f, T * tau] -> int32 [..., T]."""
    bits = sides(x, planes).reshape(*x.shape[:-1], tables, -1)
    return jnp.sum(bits << jnp.arange(bits.shape[-1]), axis=-1, dtype=jnp.int32)


def sum_by_matches(x: jax.Array, buckets: jax.Array, query_buckets: jax.Array) -> jax.Array:
    """(1/T) sum over tables and over the events in the candidate's bucket.

    Args:
      x: [B, L, f], zero where masked; buckets: [B, L, T]; query_buckets: [B, C, T].

    Returns:
      [B, C, f].
    """
    share = jnp.mean(buckets[:, None] == query_buckets[:, :, None], axis=-1, dtype=jnp.float32)
    return jnp.einsum("bcl,blf->bcf", share, x)


def sum_by_tables(x: jax.Array, buckets: jax.Array, query_buckets: jax.Array, bits: int, change=lambda u: u):
    """The same, every bucket summed once a request and looked up per candidate; `change` is applied to each sum.

    To those of all buckets or to what candidates looked up, whichever are fewer.
    """
    summed, few = summed_in(x), query_buckets.shape[1] < 2**bits

    # A table at a time: [B, L, T, f] would not fit.
    def add(total, table):
        ids, query_ids = table
        sums = jax.vmap(lambda rows, places: jax.ops.segment_sum(rows, places, 2**bits))(x.astype(summed), ids)
        sums = sums.astype(x.dtype)
        return total + (change(pick(sums, query_ids)) if few else pick(change(sums), query_ids)), None

    tables = (jnp.moveaxis(buckets, 2, 0), jnp.moveaxis(query_buckets, 2, 0))
    width = jax.eval_shape(change, jax.ShapeDtypeStruct((x.shape[0], 2**bits, x.shape[2]), x.dtype)).shape[-1]
    total, _ = jax.lax.scan(add, jnp.zeros((*query_buckets.shape[:2], width)), tables)
    return total / buckets.shape[-1]


class SdimEncoder(LongShortEncoder):
    """Tokens [long, short]; the long branch is order-free."""

    def __init__(self, config: SdimConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        if config.normalise not in NORMALISE:
            raise ValueError(f"normalise={config.normalise!r} is not one of {NORMALISE}")
        at_least(1, config, "tables", "bits", "recent", "heads")
        if config.bits > MOST_BITS:
            raise ValueError(f"bits={config.bits}: a table has 2^bits buckets, give at most {MOST_BITS}")
        super().__init__(width_in, width, recent=config.recent, heads=config.heads, tied=config.tied, rngs=rngs)
        self.config = config

    def prepare(self, history: TokenSource, x, mask):
        return bucket_ids(x, event_planes(history.w_in, self._planes()), self.config.tables)

    def long_tokens(self, ctx, q, side):
        config, w_in = self.config, ctx.w_in
        x = jnp.where(ctx.mask[..., None], ctx.x, 0.0)
        query_buckets = bucket_ids(q, self._planes(), config.tables)
        if config.normalise == "l2":
            return [sum_by_tables(x, ctx.prepared, query_buckets, config.bits, lambda u: unit_rms(u @ w_in))]
        if self._use_tables(q.shape[1]):
            long = sum_by_tables(x, ctx.prepared, query_buckets, config.bits)
        else:
            long = sum_by_matches(x, ctx.prepared, query_buckets)
        if config.normalise == "mean":
            long = long / jnp.maximum(ctx.mask.sum(axis=1), 1)[:, None, None]
        return [long @ w_in]

    def _planes(self):
        return hyperplanes(self.config.seed, self.width, self.config.tables * self.config.bits)

    def _use_tables(self, candidates: int) -> bool:
        """Whether T additions an event, once, are fewer than T compares and an addition an event for each candidate."""
        config, f = self.config, self.width_in
        return 2**config.bits <= 64 and config.tables * f < candidates * (config.tables + f)

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        """Compares are not counted; a table's additions are."""
        config, d, f = self.config, self.width, self.width_in
        planes = config.tables * config.bits
        once, each = length * f * planes, d * planes
        if config.normalise == "l2":
            once, changed = once + config.tables * length * f, config.tables * f * d
            each += config.tables * d
            few = candidates < 2**config.bits
            return (once, each + changed) if few else (once + 2**config.bits * changed, each)
        if self._use_tables(candidates):
            return once + config.tables * length * f, each + config.tables * f + f * d
        return once, each + length * f + f * d


def unit_rms(u: jax.Array) -> jax.Array:
    """u over its RMS along the last axis; zeros stay zeros."""
    return u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + 1e-6)
