"""Dense layers with the initialisation every model of the zoo shares."""

import jax
import jax.numpy as jnp
from flax import nnx

xavier = nnx.initializers.xavier_uniform()


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float = 1.0) -> nnx.Param:
    """A Xavier-uniform matrix, read as [first axis, all other axes], times `scale`.

    Per-head projections are stored as [d, H, d_head]; they must be initialised like the matrix [d, H * d_head], not
    like H separate small ones.
    """
    fan_out = 1
    for size in shape[1:]:
        fan_out *= size
    return nnx.Param(scale * xavier(rngs.params(), (shape[0], fan_out), jnp.float32).reshape(shape))


class FeedForward(nnx.Module):
    """x -> GELU(x W1 + b1) W2 + b2 over the last axis; `out_scale` shrinks W2 (0 makes the branch silent at init)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, out_scale: float = 1.0):
        self.w1 = weight(rngs, (width, hidden))
        self.b1 = nnx.Param(jnp.zeros((hidden,)))
        self.w2 = weight(rngs, (hidden, width), out_scale)
        self.b2 = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ self.w1[...] + self.b1[...]) @ self.w2[...] + self.b2[...]

    @staticmethod
    def macs(width: int, hidden: int) -> int:
        """Multiply-accumulates a row."""
        return 2 * width * hidden
