"""STCA: a stack of target attentions, history and candidate through SwiGLU before each (arXiv 2511.06077).

The candidate is the only query: the history never attends to itself, so its cost stays linear in the length.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import weight
from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least


@dataclasses.dataclass
class StcaConfig:
    """Training is one pass, so there is no dropout.

    Attributes:
      layers: M. heads: H. hidden: width of the SwiGLUs over d, at least 2 if tied.
      tied: Wk := Wq, Wv Wo := I at init, every SwiGLU an odd, growing function of each coordinate by itself, and each
        layer reads the candidate alone: events and candidate are compared as they are, and what is read of events can
        be compared with the candidate in turn.
    """

    layers: int = 2
    heads: int = 4
    hidden: int = 2
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "StcaEncoder":
        return StcaEncoder(self, width_in, width, rngs=rngs)


class StcaEncoder(SequenceEncoder):
    """Order-free but for the time gaps, which are in h already: the ranker embeds each event's age.

    X_i = LN(SwiGLU_i(h)); o_i = MHTA_i(q_i, X_i); q_1 = LN(SwiGLU(q)), q_{i+1} = LN(SwiGLU([o_1; ..; o_i; q] Wc_i));
    z = SwiGLU([o_1; ..; o_M; q] Wz), without LN.
    """

    num_tokens = 1

    def __init__(self, config: StcaConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        at_least(1, config, "layers", "heads")
        at_least(2 if config.tied else 1, config, "hidden")
        self.width_in = width_in
        layers, hidden = range(config.layers), config.hidden * width
        self.history = nnx.List([SwiGlu(width, hidden, rngs=rngs) for _ in layers])
        self.history_norm = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in layers])
        self.attention = nnx.List([TargetAttention(width, config.heads, tied=config.tied, rngs=rngs) for _ in layers])
        self.query = nnx.List([SwiGlu(width, hidden, rngs=rngs) for _ in layers])
        self.query_norm = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in layers])
        # Of layer i, over everything that was said before it: [o_1; ..; o_i; q].
        self.fuse = nnx.List([weight(rngs, ((i + 1) * width, width)) for i in layers[1:]])
        self.fuse_last = weight(rngs, ((config.layers + 1) * width, width))
        self.last = SwiGlu(width, hidden, rngs=rngs)
        if config.tied:
            self._tie()

    def _tie(self) -> None:
        """See `tied` of the config."""
        for swiglu in (*self.history, *self.query, self.last):
            swiglu.keep_coordinates()
        identity = jnp.eye(self.last.wu.shape[0])
        for i, fuse in enumerate(self.fuse):
            fuse[...] = jnp.concatenate([jnp.zeros_like(identity)] * (i + 1) + [identity])
        count = len(self.history)
        self.fuse_last[...] = jnp.concatenate([identity / count] * count + [jnp.zeros_like(identity)])

    def precompute(self, history: TokenSource, mask, age):
        h = history.dense()
        return tuple(norm(swiglu(h)) for norm, swiglu in zip(self.history_norm, self.history, strict=True)), mask

    def score(self, ctx, q, side) -> SeqOut:
        history, mask = ctx
        outputs, t = [], q
        for i, x in enumerate(history):
            if i > 0:
                t = jnp.concatenate([*outputs, q], axis=-1) @ self.fuse[i - 1][...]
            t = self.query_norm[i](self.query[i](t))
            outputs.append(self.attention[i](t, x, mask))
        z = self.last(jnp.concatenate([*outputs, q], axis=-1) @ self.fuse_last[...])
        return SeqOut(tokens=z[:, :, None])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        d, hidden = self.last.wu.shape
        once, each = length * self.width_in * d, 3 * d * hidden + self.fuse_last.shape[0] * d
        for attention in self.attention:
            shared, scored = attention.macs(candidates, length, d)
            once += shared + length * 3 * d * hidden
            each += scored + 3 * d * hidden
        return once, each + sum(fuse.shape[0] * d for fuse in self.fuse)


class SwiGlu(nnx.Module):
    """x -> ((x Wu) * swish(x Wv)) Wo over the last axis."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.wu, self.wv = weight(rngs, (width, hidden)), weight(rngs, (width, hidden))
        self.wo = weight(rngs, (hidden, width))

    def keep_coordinates(self) -> None:
        """Makes it x^2 tanh(x / 2): x swish(x) - x swish(-x) = x^2 (sigmoid(x) - sigmoid(-x))."""
        width = self.wu.shape[0]
        identity = jnp.eye(width)
        both, opposite = jnp.concatenate([identity, identity], 1), jnp.concatenate([identity, -identity], 1)
        self.wu[...] = self.wu[...].at[:, : 2 * width].set(both)
        self.wv[...] = self.wv[...].at[:, : 2 * width].set(opposite)
        self.wo[...] = jnp.zeros_like(self.wo[...]).at[: 2 * width].set(both.T)

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x @ self.wu[...]) * jax.nn.silu(x @ self.wv[...])) @ self.wo[...]
