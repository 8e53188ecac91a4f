"""LONGER: adjacent events merge into wide tokens, global tokens read them (arXiv 2505.04421).

Events never see the candidate, so their keys and values are built once a request; what runs per candidate are the m
global tokens: the candidate itself and a learned one (CLS).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import weight
from laser_jax.layers.segment_sums import cut_segments
from laser_jax.layers.self_attention import TransformerLayer, blockwise_softmax_attention, counted_from_newest
from laser_jax.layers.target_attention import masked_softmax
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, residual_scale


@dataclasses.dataclass
class LongerConfig:
    """Sizes; layers, heads and norm are unpublished. Training is one pass, so there is no dropout.

    Attributes:
      group: Kg, adjacent events merged into one token, cut from the newest.
      newest: k, newest groups that attend and are attended to after the first layer, which reads all groups.
      width_token: width of an event before merging. Groups are Kg times as wide whatever the width d of the other
        models is, so match cost, not width; the global tokens are projected back to d.
      layers: N. heads: H. ffn: hidden width of the feed-forwards over theirs.
      inner: whether a small Transformer layer runs inside each group before merging.
      tied: at init Wk := Wq where groups are read, and the candidate begins as a group of its own copies: scores start
        as similarities, summed over a group's events.
    """

    group: int = 8
    newest: int = 100
    width_token: int = 32
    layers: int = 2
    heads: int = 4
    ffn: int = 4
    inner: bool = True
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "LongerEncoder":
        return LongerEncoder(self, width_in, width, history_length, rngs=rngs)


class LongerEncoder(SequenceEncoder):
    """Two tokens, the candidate's and CLS's.

    Globals see each other (of one candidate) and every group; a group sees groups at or before itself and no global.
    """

    num_tokens = 2

    def __init__(self, config: LongerConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        if config.layers < 1 or config.newest < 1:
            raise ValueError(f"layers={config.layers} and newest={config.newest} must be at least 1")
        self.config, self.width_in = config, width_in
        event, merged = config.width_token, config.group * config.width_token
        init = nnx.initializers.normal(0.02)
        self.w_event = weight(rngs, (width, event))
        self.b_event = nnx.Param(jnp.zeros((event,)))
        self.position = nnx.Param(init(rngs.params(), (history_length, event)))

        def layer(width, num_layers, tied=False):
            scale = residual_scale(num_layers)
            return TransformerLayer(width, config.heads, config.ffn * width, out_scale=scale, tied=tied, rngs=rngs)

        self.inner = layer(event, 1) if config.inner else None
        self.w_candidate = weight(rngs, (width, merged))
        if config.tied:
            self.w_candidate = nnx.Param(jnp.tile(self.w_event[...], (1, config.group)))
        self.cls = nnx.Param(init(rngs.params(), (merged,)))
        self.layers = nnx.List([layer(merged, config.layers, config.tied) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(merged, rngs=rngs)
        self.w_out = weight(rngs, (merged, width))

    def precompute(self, history: TokenSource, mask, age):
        x, alive = self.groups(history, mask)
        newest = min(self.config.newest, x.shape[1])
        states = []
        for i, layer in enumerate(self.layers):
            k, v = layer.keys_values(x)
            states.append((k, v, alive))
            if i + 1 < len(self.layers):  # what groups say after the last layer nobody hears
                rows, alive_rows = x[:, -newest:], alive[:, -newest:]
                # At most k rows: one block.
                heads = blockwise_softmax_attention(layer.queries(rows), k, v, alive, causal=True, block=newest)
                x, alive = jnp.where(alive_rows[..., None], layer.update(rows, heads), 0.0), alive_rows
        return tuple(states)

    def groups(self, history: TokenSource, mask):
        """Group tokens [B, n, D], oldest to newest, and which hold an event, [B, n]."""
        group, h = self.config.group, history.dense()
        # With w_in, which made h of each event's embeddings and time gap, this is an MLP of one hidden layer.
        x = jax.nn.gelu(h) @ self.w_event[...] + self.b_event[...]
        x = x + counted_from_newest(self.position[...], h.shape[1])
        x, mask = cut_segments(jnp.where(mask[..., None], x, 0.0), group), cut_segments(mask, group)
        b, n, _, event = x.shape
        if self.inner is not None:
            inside = x.reshape(b * n, group, event), mask.reshape(b * n, group)
            x = self.inner(*inside, causal=False, block=group)
        return x.reshape(b, n, group * event), mask.any(axis=-1)

    def score(self, ctx, q, side) -> SeqOut:
        candidate = q @ self.w_candidate[...]
        x = jnp.stack([candidate, jnp.broadcast_to(self.cls[...], candidate.shape)], axis=2)  # [B, C, m, D]
        for layer, (k, v, alive) in zip(self.layers, ctx, strict=True):
            x = layer.update(x, _read(layer.queries(x), *layer.keys_values(x), k, v, alive))
        return SeqOut(tokens=self.norm(x) @ self.w_out[...])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        config, d = self.config, self.w_event.shape[0]
        event, merged, m = config.width_token, config.group * config.width_token, self.num_tokens
        n = -(-length // config.group)
        newest = min(config.newest, n)
        once = length * d * (self.width_in + event)
        if self.inner is not None:
            once += self.inner.macs(n * config.group, n * config.group, config.group)
        each = d * merged + m * merged * d
        for i, layer in enumerate(self.layers):
            seen = n if i == 0 else newest
            once += layer.macs(newest if i + 1 < config.layers else 0, seen, seen)
            each += layer.macs(m, m, m + seen)
        return once, each


def _read(q, own_k, own_v, k, v, alive):
    """Each candidate's globals over each other and the groups.

    Args:
      q, own_k, own_v: [B, C, m, H, D / H], of the globals, q scaled; k, v: [B, n, H, D / H]; alive: [B, n].

    Returns:
      [B, C, m, H, D / H].
    """
    m = q.shape[2]
    scores = [jnp.einsum("bcmhk,bcohk->bcmho", q, own_k), jnp.einsum("bcmhk,bnhk->bcmhn", q, k)]
    seen = jnp.pad(alive, ((0, 0), (m, 0)), constant_values=True)[:, None, None, None]
    p = masked_softmax(jnp.concatenate(scores, axis=-1), seen)
    return jnp.einsum("bcmho,bcohv->bcmhv", p[..., :m], own_v) + jnp.einsum("bcmhn,bnhv->bcmhv", p[..., m:], v)
