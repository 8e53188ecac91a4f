"""What a history holds of the candidate's own kind: events with the same item, the same category, the same author.

Attention finds such events by how alike embeddings are, which says little of rare values and takes long to learn. That
two values are the same needs no learning; what an event of the same value is worth does. So gates read events alone,
and a candidate adds up the gates of those that it has a value in common with, among all events and, if asked for, among
the newest ones by themselves.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from laser_jax.layers.mlp import weight
from laser_jax.shapes import HistoryFeatures, HistoryMask


class MatchReadout(nnx.Module):
    """A token of how much gate each kind of match has: log(1 + sum of the gates of the events that match).

    Sigmoid gates, as in STA: an event that says nothing may stay silent, and twice as many events are twice as much.
    They see an event's embeddings and age, so that some can stand for what is new and others for what was bought.

    Args:
      fields: values of these are compared, each by itself. gates: G, of an event. width: d, of the token.
      reaches: ascending numbers of newest events, each of which is summed over; empty for one sum over all.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        fields: tuple[str, ...],
        gates: int,
        reaches: tuple[int, ...] = (),
        *,
        rngs: nnx.Rngs,
    ):
        if gates < 1:
            raise ValueError(f"match_gates={gates} must be at least 1")
        self.fields, self.reaches = fields, reaches
        self.w_gate = weight(rngs, (width_in, gates))
        self.b_gate = nnx.Param(jnp.zeros((gates,)))
        self.w_mass = weight(rngs, (len(fields) * max(len(reaches), 1) * gates, width))

    def gates(self, x: HistoryFeatures, mask: HistoryMask) -> Float[jax.Array, "B L G"]:
        """The gates of events with features x; of what is no event, 0."""
        return jnp.where(mask[..., None], jax.nn.sigmoid(x @ self.w_gate[...] + self.b_gate[...]), 0.0)

    def __call__(
        self,
        gates: Float[jax.Array, "B L G"],
        history: list[Int[jax.Array, "B L"]],
        side: list[Int[jax.Array, "B C"]],
    ) -> Float[jax.Array, "B C d"]:
        """
        Args:
          gates: of the events.
          history, side: for each field, numbers of events' and candidates' values; equal numbers are equal values. A
            candidate's value that training never met is like no event's: all of these share a row, and are not alike.
        """
        masses, length = [], gates.shape[1]
        for mine, theirs in zip(history, side, strict=True):
            total, end = 0.0, length
            # A reach is what the one before holds and some older events: every event is read once.
            for begin in [max(length - reach, 0) for reach in self.reaches] or [0]:
                same = (theirs[:, :, None] == mine[:, None, begin:end]).astype(gates.dtype)
                total, end = total + same @ gates[:, begin:end], begin
                masses.append(total)
        return jnp.log1p(jnp.concatenate(masses, axis=-1)) @ self.w_mass[...]

    def macs(self, length: int) -> tuple[int, int]:
        """Multiply-accumulates once a request, and per candidate."""
        features, gates = self.w_gate.shape
        return length * features * gates, length * len(self.fields) * gates + self.w_mass.size
