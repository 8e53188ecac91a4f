"""LONGER: adjacent events merge into wide tokens, global tokens read them (arXiv 2505.04421).

Events never see the candidate, so their keys and values are built once a request; what runs per candidate are the m
global tokens: the candidate itself and a learned one (CLS).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.blockwise_attention import blockwise_softmax_attention
from laser_jax.layers.mlp import weight
from laser_jax.layers.segment_sums import cut_segments
from laser_jax.layers.self_attention import TransformerLayer, counted_from_newest
from laser_jax.layers.target_attention import masked_softmax
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least, residual_scale

OWN_BIAS = -10.0  # of a global's score with itself, at init if tied


@dataclasses.dataclass
class LongerConfig:
    """Sizes; layers, heads and norm are unpublished. Training is one pass, so there is no dropout.

    Attributes:
      group: Kg, adjacent events merged into one token, cut from the newest.
      newest: k, newest groups that attend and are attended to after the first layer, which reads all groups.
      width_token: width of an event before merging, None for that of the other models, d. Groups are Kg times as wide;
        the global tokens are projected back to d.
      layers: N. heads: H; as many as a group has events, each starts with a place of its own (see `tied`). ffn: hidden
        width of the feed-forwards over theirs.
      inner: whether a small Transformer layer runs inside each group before merging.
      tied: at init the candidate is a group of copies of what it would be as an event, and what globals read comes back
        to d the way it went; scores are similarities of events at the same place of their groups (Wk := Wq, the same
        for every place), and values the groups themselves (Wv := I, Wo in proportion to it), which are nothing but
        their events, side by side, as long as the inner layer is silent.
    """

    group: int = 4
    newest: int = 100
    width_token: int | None = None
    layers: int = 2
    heads: int = 4
    ffn: int = 4
    inner: bool = True
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "LongerEncoder":
        return LongerEncoder(self, width_in, width, history_length, rngs=rngs)


class LongerEncoder(SequenceEncoder):
    """Two tokens, what the layers added to the candidate's, which the head sees already, and to CLS.

    Globals see each other (of one candidate) and every group; a group sees groups at or before itself and no global.
    """

    num_tokens = 2

    def __init__(self, config: LongerConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        at_least(1, config, "group", "newest", "layers", "heads", "ffn")
        self.config, self.width_in = config, width_in
        if config.width_token is not None:
            at_least(1, config, "width_token")
        event = width if config.width_token is None else config.width_token
        merged = config.group * event
        for setting, size in (("group * width_token", merged), *([("width_token", event)] if config.inner else [])):
            if size % config.heads:
                raise ValueError(
                    f"{setting}={size} is not a multiple of heads={config.heads} (a token's width is "
                    f"width_token={config.width_token}, which None makes the model's, {width})"
                )
        init = nnx.initializers.normal(0.02)
        self.w_event = weight(rngs, (width, event))
        self.b_event = nnx.Param(jnp.zeros((event,)))
        self.position = nnx.Param(init(rngs.params(), (history_length, event)))

        def layer(width, scale):
            return TransformerLayer(width, config.heads, config.ffn * width, out_scale=scale, rngs=rngs)

        self.inner = layer(event, 0.0 if config.tied else residual_scale(1)) if config.inner else None
        self.w_candidate = weight(rngs, (width, merged))
        self.cls = nnx.Param(init(rngs.params(), (merged,)))
        scale = residual_scale(config.layers)
        self.layers = nnx.List([layer(merged, scale) for _ in range(config.layers)])
        # A softmax has one first place. Where scores are similarities, nothing is as similar to a candidate as itself:
        # it would hear itself only.
        self.own_bias = nnx.Param(jnp.full((config.layers, config.heads), OWN_BIAS if config.tied else 0.0))
        self.w_out = weight(rngs, (merged, width))
        if config.tied:
            self._tie(scale, rngs)

    def _tie(self, scale: float, rngs: nnx.Rngs) -> None:
        """See `tied` of the config; `scale`: of what layers add."""
        group, (width, event) = self.config.group, self.w_event.shape
        self.w_event[...] = jnp.eye(width, event)
        self.w_candidate[...] = jnp.tile(self.w_event[...], (1, group))
        self.w_out[...] = jnp.tile(self.w_event[...].T, (group, 1)) / math.sqrt(group)
        for layer in self.layers:
            places = jnp.kron(jnp.eye(group), weight(rngs, (event, event))[...])
            layer.wq[...] = layer.wk[...] = places.reshape(layer.wq.shape)
            layer.wv[...] = jnp.eye(group * event).reshape(layer.wv.shape)
            layer.wo[...] = scale * jnp.eye(group * event)

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
        candidate = jax.nn.gelu(q) @ self.w_candidate[...]
        start = x = jnp.stack([candidate, jnp.broadcast_to(self.cls[...], candidate.shape)], axis=2)  # [B, C, m, D]
        for layer, own_bias, (k, v, alive) in zip(self.layers, self.own_bias[...], ctx, strict=True):
            x = layer.update(x, _read(layer.queries(x), *layer.keys_values(x), own_bias, k, v, alive))
        return SeqOut(tokens=(x - start) @ self.w_out[...])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        config, m, (d, event) = self.config, self.num_tokens, self.w_event.shape
        merged = config.group * event
        n = -(-length // config.group)
        newest = min(config.newest, n)
        once = length * d * (self.width_in + event)
        if self.inner is not None:
            once += self.inner.macs(n * config.group, n * config.group, n * config.group**2)
        each = d * merged + m * merged * d
        for i, layer in enumerate(self.layers):
            seen = n if i == 0 else newest
            rows = newest if i + 1 < config.layers else 0
            once += layer.macs(rows, seen, rows * seen)
            each += layer.macs(m, m, m * (m + seen))
        return once, each


def _read(q, own_k, own_v, own_bias, k, v, alive):
    """Each candidate's globals over each other and the groups.

    Args:
      q, own_k, own_v: [B, C, m, H, D / H], of the globals, q scaled; own_bias: [H], of their scores with themselves.
      k, v: [B, n, H, D / H]; alive: [B, n].

    Returns:
      [B, C, m, H, D / H].
    """
    m = q.shape[2]
    own = jnp.einsum("bcmhk,bcohk->bcmho", q, own_k, preferred_element_type=jnp.float32)
    own = own + own_bias[:, None] * jnp.eye(m)[:, None]
    scores = [own, jnp.einsum("bcmhk,bnhk->bcmhn", q, k, preferred_element_type=jnp.float32)]
    seen = jnp.pad(alive, ((0, 0), (m, 0)), constant_values=True)[:, None, None, None]
    p = masked_softmax(jnp.concatenate(scores, axis=-1), seen)
    return jnp.einsum("bcmho,bcohv->bcmhv", p[..., :m], own_v) + jnp.einsum("bcmhn,bnhv->bcmhv", p[..., m:], v)
