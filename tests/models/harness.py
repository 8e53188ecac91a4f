"""Encoders small enough to run by the dozen, called the way the ranker calls them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from laser_jax.models import ENCODERS, encoder_config
from laser_jax.models.base import TokenSource

FEATURES, WIDTH, LONGEST = 6, 8, 24
SEGMENT = 4
BRANDS = 3
SMALL = {
    "laser": dict(segment=SEGMENT, key_width=3, layers=2, segment_ffn=2),
    "laser_plus": dict(segment=SEGMENT, key_width=3, horizons=(5, 9)),
    "ta": dict(heads=2),
    "din": dict(hidden=5),
    "mean": {},
    "sim_soft": dict(top=3, recent=4, heads=2),
    "sim_hard": dict(field="brand", top=2, recent=4, heads=2),
    "eta": dict(bits=5, top=3, recent=4, heads=2),
    "sdim": dict(tables=3, bits=2, recent=4, heads=2),
    "twin": dict(top=3, recent=4, heads=2),
    "twin_v2": dict(segment=SEGMENT, top=2, recent=4, heads=2),
    "mirrn": dict(bits=5, top=5, summarised=3, blocks=2, recent=4, heads=2),
    "transformer": dict(layers=2, heads=2, ffn=2, block=4),
    "hstu": dict(layers=3, heads=2, block=4),
    "stca": dict(layers=3, heads=2),
    "longer": dict(group=SEGMENT, newest=2, width_token=6, layers=3, heads=2, ffn=2),
}
NAMES = tuple(ENCODERS)


class Encoder:
    """An encoder with every parameter moved off its initial value, and its compiled calls.

    A history is given as the embeddings [B, L, f] of its events, each in a row of its own, so that a gradient with
    respect to them is a gradient with respect to h.
    """

    def __init__(self, name: str, **overrides):
        self.name = name
        config = encoder_config(name, **{**SMALL[name], **overrides})
        self.module = config.build(width_in=FEATURES, width=WIDTH, history_length=LONGEST, rngs=nnx.Rngs(0))
        graph, params = nnx.split(self.module, nnx.Param)
        rng = np.random.default_rng(0)
        leaves, structure = jax.tree.flatten(params)
        leaves = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
        self.params = {"encoder": jax.tree.unflatten(structure, leaves), "w_in": normal(rng, FEATURES, WIDTH)}
        self.module = nnx.merge(graph, self.params["encoder"])

        def tokens(params, x, mask, age, q):
            return nnx.merge(graph, params["encoder"])(source(x, params["w_in"], age), mask, age, q, side(q)).tokens

        def loss(params, x, mask, age, q, weights):
            out = tokens(params, x, mask, age, q)
            return jnp.sum(out * weights), out

        self.eager = tokens
        self.tokens = jax.jit(tokens)
        self.gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 4), has_aux=True))

    def __call__(self, x, mask, age, q) -> np.ndarray:
        return np.asarray(self.tokens(self.params, x, mask, age, q))


@functools.cache
def encoder(name: str) -> Encoder:
    return Encoder(name)


def source(x, w_in, age=0) -> TokenSource:
    """Events with a field of no width besides, which only hard search looks at; it follows the age."""
    b, length, width = x.shape
    event = jnp.arange(b * length).reshape(b, length)
    rows = (x.reshape(-1, width), jnp.zeros((BRANDS, 0)))
    indices = (event, brand_of_events(age + 0 * event))
    return TokenSource(rows=rows, indices=indices, w_in=w_in, fields=("event", "brand"))


def side(q) -> dict[str, jax.Array]:
    return {"brand": brand_of_candidates(q)}


def brand_of_events(age):
    return age % BRANDS


def brand_of_candidates(q):
    return (q[..., 0] > 0) * 1 + (q[..., 1] > 0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def histories(b=3, c=4, length=10, seed=0):
    """x, mask (newest right; full, partly filled, and one of a single event), age, q."""
    rng = np.random.default_rng(seed)
    held = np.array([length, length // 2, 1])[:b]
    mask = np.arange(length) >= length - held[:, None]
    age = np.sort(rng.integers(0, 10**8, (b, length)), axis=1)[:, ::-1].astype(np.int32)
    return normal(rng, b, length, FEATURES), mask, np.where(mask, age, 0).astype(np.int32), normal(rng, b, c, WIDTH)
