"""HSTU as a ranker: pointwise SiLU attention with relative bias, candidates as rows of the sequence (arXiv 2402.17152).

The research block of the paper's code. Candidates are rows after the history that see every event and themselves; no
event sees a candidate, so the history's rows run once and leave keys and values for the candidates behind.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.blockwise_attention import (
    TIME_BUCKETS,
    blockwise_silu_attention,
    pairs_computed,
    relative_bias,
)
from laser_jax.layers.mlp import weight
from laser_jax.layers.self_attention import counted_from_newest
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least, residual_scale

OWN_BIAS = -10.0  # of a row's score with itself, at init if tied


@dataclasses.dataclass
class HstuConfig:
    """The research block. Training is one pass, so there is no dropout.

    Attributes:
      layers: M. heads: H; keys and values have width d / H each.
      tied: at init Wk := Wq, Wu := Wv := I and Wo in proportion to it: scores start as similarities, values as the
        events themselves, and the gate as the candidate itself, so that their product tells what both have.
      block: events that attend at a time; only memory depends on it.
    """

    layers: int = 2
    heads: int = 2
    tied: bool = True
    block: int = 128

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "HstuEncoder":
        return HstuEncoder(self, width_in, width, history_length, rngs=rngs)


class HstuEncoder(SequenceEncoder):
    """One token: what the layers added to a candidate's row, which the head sees already.

    Events are at their ages, candidates at age 0, one place on.
    Weights are divided by N = history_length, a constant: the length of what comes in would rescale them with padding.
    """

    num_tokens = 1

    def __init__(self, config: HstuConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        at_least(1, config, "layers", "heads", "block")
        if width % config.heads:
            raise ValueError(f"width={width} is not a multiple of heads={config.heads}")
        self.config, self.width_in = config, width_in
        # Events say what the user did with the item; of candidates nobody knows yet.
        self.unknown_action = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
        self.layers = nnx.List([HstuLayer(config, width, history_length, rngs=rngs) for _ in range(config.layers)])

    def precompute(self, history: TokenSource, mask, age):
        x = jnp.where(mask[..., None], history.dense(), 0.0)
        states = []
        for i, layer in enumerate(self.layers):
            k, v = layer.keys_values(x)
            states.append((k, v))
            if i + 1 < len(self.layers):  # what events say after the last layer nobody hears
                x = jnp.where(mask[..., None], layer.events(x, k, v, mask, age, self.config.block), 0.0)
        return tuple(states), mask, age

    def score(self, ctx, q, side) -> SeqOut:
        states, mask, age = ctx
        start = x = q + self.unknown_action[...]
        for layer, (k, v) in zip(self.layers, states, strict=True):
            x = layer.candidates(x, k, v, mask, age)
        return SeqOut(tokens=(x - start)[:, :, None])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        d = self.unknown_action.shape[0]
        layers = self.config.layers
        once = length * self.width_in * d + layers * 2 * length * d * d
        pairs = pairs_computed(length, length, causal=True, block=self.config.block)
        once += (layers - 1) * (3 * length * d * d + 2 * pairs * d)
        return once, layers * (5 * d * d + 2 * (length + 1) * d)


class HstuLayer(nnx.Module):
    """U, V, Q, K = SiLU(LN(X) W); A = seen * SiLU(Q K + bias) / N; Y = X + (U * LN(A V)) Wo, both LN without affine."""

    def __init__(self, config: HstuConfig, width: int, history_length: int, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        shape = (width, config.heads, width // config.heads)
        # Not the paper's N(0, .02): at these widths one pass does not bring what it makes of the history, a few
        # hundredths of the row it is added to, to where the head could see it.
        self.wu, self.wv, self.wq = (weight(rngs, shape) for _ in range(3))
        self.wk = weight(rngs, shape)
        scale = residual_scale(config.layers)
        self.wo = weight(rngs, (width, width), scale)
        if config.tied:
            self.wk[...] = self.wq[...]
            self.wu[...] = self.wv[...] = jnp.eye(width).reshape(shape)
            self.wo[...] = scale * jnp.eye(width)
        # Distances 0 (a row to itself) to N (a candidate to the oldest event).
        self.by_distance = nnx.Param(normal(rngs.params(), (history_length + 1,)))
        if config.tied:
            # Where scores are similarities, nothing is as similar to a row as itself: it would drown what the history
            # says, by which candidates differ.
            self.by_distance[...] = self.by_distance[...].at[0].set(OWN_BIAS)
        self.by_gap = nnx.Param(normal(rngs.params(), (TIME_BUCKETS,)))
        self.norm = nnx.LayerNorm(width, use_bias=False, use_scale=False, rngs=rngs)

    def _project(self, x, w):
        return jax.nn.silu(jnp.einsum("...d,dhk->...hk", self.norm(x), w[...]))

    def keys_values(self, x):
        """[..., d] -> two of [..., H, d / H]."""
        return self._project(x, self.wk), self._project(x, self.wv)

    def events(self, x, k, v, mask, age, block):
        """History rows over their past: x [B, L, d], k, v [B, L, H, d / H], mask, age [B, L] -> [B, L, d]."""
        q, by_distance, by_gap = self._project(x, self.wq), self.by_distance[...], self.by_gap[...]
        return self._update(x, blockwise_silu_attention(q, k, v, mask, age, by_distance, by_gap, block=block))

    def candidates(self, x, k, v, mask, age):
        """Candidate rows over all events and themselves: x [B, C, d], the rest as in `events` -> [B, C, d]."""
        by_distance, by_gap = self.by_distance[...], self.by_gap[...]
        distance = counted_from_newest(jnp.arange(1, len(by_distance)), k.shape[1])
        q, (own_k, own_v) = self._project(x, self.wq), self.keys_values(x)
        bias = relative_bias(by_distance, by_gap, distance, age)[:, None, None]
        scores = jnp.einsum("bchk,blhk->bchl", q, k, preferred_element_type=jnp.float32) + bias
        weights = jnp.where(mask[:, None, None], jax.nn.silu(scores), 0.0).astype(v.dtype)
        own = jnp.sum((q * own_k).astype(jnp.float32), axis=-1, keepdims=True) + by_distance[0] + by_gap[0]
        own = jax.nn.silu(own).astype(v.dtype)
        return self._update(x, jnp.einsum("bchl,blhv->bchv", weights, v) + own * own_v)

    def _update(self, x, attended):
        history_length = self.by_distance.shape[0] - 1
        gate = self._project(x, self.wu).reshape(x.shape)
        return x + (gate * self.norm(attended.reshape(x.shape) / history_length)) @ self.wo[...]
