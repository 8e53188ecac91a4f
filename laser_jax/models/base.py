"""What every model of the zoo shares: token sources, the encoder's contract, and the ranker around an encoder.

The embeddings, the projection to tokens, the head and the loss are the same for all models; only the encoder differs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.matches import MatchReadout
from laser_jax.layers.mlp import weight
from laser_jax.layers.rankmixer import RankMixer
from laser_jax.layers.recency import age_bucket
from laser_jax.layers.segment_runs import check_horizons, reaches_of
from laser_jax.layers.tokens import features_of, gather_fields, mean_of_events, rows_at
from laser_jax.shapes import (
    CandidateTokens,
    EncoderTokens,
    HistoryAge,
    HistoryFeatures,
    HistoryMask,
    HistoryTokens,
    Logits,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSource:
    """A history (or candidates) before it becomes tokens: rows of tables, indices into them, and the projection.

    `dense()` is [B, L, d]; an encoder that folds reads `features()` [B, L, f] and `w_in` [f, d] instead, so that the
    d-wide tokens never exist. Unit RMS is taken over the concatenated embeddings, before w_in: a scalar a token folds,
    1/rms(w_in x) would not.
    """

    rows: tuple[jax.Array, ...]  # one [U, D] a field
    indices: tuple[jax.Array, ...]  # one int32 [B, L] a field, into its rows
    w_in: jax.Array  # [f, d], f = sum of D
    # Names of the log's fields, in order of `indices`; what comes after them (the age) is not of the log.
    fields: tuple[str, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    gathered: jax.Array | None = None  # features [B, L, f]; None: gathered by everyone who asks for them

    def gathered_once(self) -> "TokenSource":
        """The same for many readers: their gradients are added up before they go to the rows, and not a row each."""
        return dataclasses.replace(self, gathered=self.features())

    def field(self, name: str) -> jax.Array:
        """Indices [B, L] of the field called `name`, for encoders that compare values."""
        if name not in self.fields:
            raise ValueError(f"there is no field {name!r} in the history, which has {list(self.fields)}")
        return self.indices[self.fields.index(name)]

    def features(self) -> HistoryFeatures:
        """Concatenated embeddings at unit RMS."""
        return features_of(gather_fields(self.rows, self.indices)) if self.gathered is None else self.gathered

    def dense(self) -> HistoryTokens:
        return self.features() @ self.w_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatheredSource:
    """A TokenSource whose rows were gathered elsewhere, as a server does, once for many requests of a user."""

    embeddings: tuple[jax.Array, ...]  # [B, L, D] each, of one field or of several side by side
    w_in: jax.Array  # [f, d]
    indices: dict[str, jax.Array]  # field -> int32 [B, L], of those that are compared

    def field(self, name: str) -> jax.Array:
        """As TokenSource.field, for a field that the encoder says it compares."""
        if name not in self.indices:
            raise ValueError(f"field {name!r} is not among those that are compared, {list(self.indices)}")
        return self.indices[name]

    def features(self) -> HistoryFeatures:
        """Concatenated embeddings at unit RMS."""
        return features_of(self.embeddings)

    def dense(self) -> HistoryTokens:
        return self.features() @ self.w_in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeqOut:
    """What an encoder says of each candidate.

    Attributes:
      tokens: [B, C, P, d], input of the head.
      aux_losses: scalars, added to the loss.
      diag: per-candidate diagnostics; `loudness` [B, C, S] is how loud each segment is.
    """

    tokens: EncoderTokens
    aux_losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    diag: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


class SequenceEncoder(nnx.Module):
    """Base of all encoders: a request's history work once, then the work per candidate."""

    num_tokens: int  # P
    compares: tuple[str, ...] = ()  # fields whose values it compares with the candidate's

    def precompute(self, history: TokenSource | GatheredSource, mask: HistoryMask, age: HistoryAge) -> Any:
        """Work that does not depend on candidates, once a request; a pytree with leading axis B."""
        raise NotImplementedError(f"{type(self).__name__} must define precompute")

    def score(self, ctx: Any, q: CandidateTokens, side: dict[str, jax.Array]) -> SeqOut:
        """Work per candidate. `side`: field -> int32 [B, C], compared with `history.field`; -1 is like no event."""
        raise NotImplementedError(f"{type(self).__name__} must define score")

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        """Multiply-accumulates (once a request, per candidate), forward, without softmax, LayerNorm and biases."""
        raise NotImplementedError(f"{type(self).__name__} must define macs")

    def unused(self, candidates: int) -> list[str]:
        """What the config asks for that does nothing with so many candidates a request, and why; for a warning."""
        return []

    def __call__(self, history: TokenSource | GatheredSource, mask, age, q, side) -> SeqOut:
        return self.score(self.precompute(history, mask, age), q, side)


class EncoderConfig(Protocol):
    """A model's config knows how to build its encoder."""

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> SequenceEncoder: ...


@dataclasses.dataclass
class HeadConfig:
    """The RankMixer head and its inputs, the same for every encoder.

    Attributes:
      tokens: T; width: D, a multiple of T; expansion: hidden width of a token's feed-forward over D; blocks: how many.
      products: whether the head also sees encoder token * candidate token.
      mean: whether the head also sees the mean of all events, taken once a request, as one more encoder token.
      matches: fields of candidates and events; the head also sees how much gate the events have that share the
        candidate's value of each; see layers/matches.py. Empty for none.
      match_gates: gates of an event, for `matches`.
      match_horizons: numbers of newest events over which matches add up, each by itself, besides the whole history;
        empty for none. Those longer than the history are left out; with any, no match is counted beyond the history
        length that the model was built for.
    """

    tokens: int = 8
    width: int = 64
    expansion: int = 2
    blocks: int = 2
    products: bool = True
    mean: bool = False
    matches: tuple[str, ...] = ()
    match_gates: int = 4
    match_horizons: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where each field's embedding comes from: (field, table, width) per side, in order of concatenation.

    Candidate fields must be a leading run of the history fields, so that both share the rows of w_in.
    """

    history: tuple[tuple[str, str, int], ...]
    candidate: tuple[tuple[str, str, int], ...]
    context: tuple[tuple[str, str, int], ...]

    def __post_init__(self):
        if self.history[: len(self.candidate)] != self.candidate:
            raise ValueError(
                f"candidate fields {[c[0] for c in self.candidate]} must come first among the history fields "
                f"{[h[0] for h in self.history]}, in the same order"
            )


class Ranker(nnx.Module):
    """Embedding rows of one batch -> a logit for every candidate.

    Attributes:
      compares: fields whose values encoder or head compare with the candidate's.

    Args:
      width: d, of tokens.
      age_width, age_buckets: the log-spaced age embedding that is concatenated to every event.
      embedding_std: standard deviation of fresh age embeddings. Give that of fresh table rows: a field with larger
        ones drowns the others in the token that all share.
    """

    def __init__(
        self,
        layout: TokenLayout,
        encoder: EncoderConfig,
        head: HeadConfig,
        *,
        width: int,
        history_length: int,
        age_width: int,
        age_buckets: int,
        embedding_std: float,
        rngs: nnx.Rngs,
    ):
        self.layout = layout
        self.products, self.mean = head.products, head.mean
        self.history_length = history_length
        self.age_buckets = age_buckets
        self.candidate_width = sum(size for _, _, size in layout.candidate)
        width_in = sum(size for _, _, size in layout.history) + age_width
        self.age_rows = nnx.Param(nnx.initializers.normal(embedding_std)(rngs.params(), (age_buckets, age_width)))
        self.w_in = weight(rngs, (width_in, width))
        self.encoder = encoder.build(width_in=width_in, width=width, history_length=history_length, rngs=rngs)
        check_horizons("head.match_horizons", head.match_horizons)
        fields = tuple(head.matches)
        reaches = reaches_of(head.match_horizons, history_length) if head.match_horizons else ()
        self.matches = MatchReadout(width_in, width, fields, head.match_gates, reaches, rngs=rngs) if fields else None
        self.compares = tuple(dict.fromkeys((*self.encoder.compares, *head.matches)))
        known = [name for name, _, _ in layout.candidate]
        if unknown := [name for name in self.compares if name not in known]:
            raise ValueError(
                f"encoder.field or head.matches compare events with candidates by {unknown[0]!r}, which these do not "
                f"have: they have {', '.join(known)}"
            )
        context_width = sum(size for _, _, size in layout.context)
        parts = 1 + (self.encoder.num_tokens + head.mean) * (2 if head.products else 1) + bool(head.matches)
        self.head = RankMixer(
            parts * width + context_width,
            tokens=head.tokens,
            width=head.width,
            expansion=head.expansion,
            num_blocks=head.blocks,
            rngs=rngs,
        )

    def __call__(self, rows: dict[str, jax.Array], batch: dict[str, Any]) -> tuple[Logits, SeqOut]:
        """Scores a batch of requests.

        Args:
          rows: unique rows [U, D] of every table, those the batch meets.
          batch: `history`, `candidates`, `context` (field -> int32 indices into the unique rows, [B, L], [B, C], [B]),
            `side` (the candidates' indices to compare with the history's, -1 for a value that training never met),
            `length` [B] (real events, at the right end), `age` [B, L] int32 seconds.
        """
        age = batch["age"]
        fields = self.layout.history
        history = TokenSource(
            rows=(*(rows[table] for _, table, _ in fields), self.age_rows[...]),
            indices=(*(batch["history"][name] for name, _, _ in fields), age_bucket(age, self.age_buckets)),
            w_in=self.w_in[...],
            fields=tuple(name for name, _, _ in fields),
        )
        if self.mean or self.matches is not None:  # the encoder is not the only one that reads it
            history = history.gathered_once()
        fields = self.layout.candidate
        candidates = TokenSource(
            rows=tuple(rows[table] for _, table, _ in fields),
            indices=tuple(batch["candidates"][name] for name, _, _ in fields),
            w_in=self.w_in[...][: self.candidate_width],
        )
        context = [rows_at(rows[table], batch["context"][name]) for name, table, _ in self.layout.context]
        return self._read(history, age, batch["length"], context)(candidates.dense(), batch["side"])

    def logits_gathered(self, batch: dict[str, Any], piece: int = 0) -> Logits:
        """The logits of a batch whose rows were gathered before.

        Args:
          batch: `events` [B, L, fe], `candidates` [B, C, fc] and `context` [B, fx], embeddings of the layout's fields
            side by side; `length` and `age` as above; `compared`, `side`: field -> int32 [B, L] and [B, C], rows of the
            fields that are compared, -1 in `side` for a value that training never met.
          piece: of candidates that are scored at a time, after what is read of the history once for all; C is a
            multiple of it. 0 scores all at once.
        """
        age = batch["age"]
        embeddings = batch["events"], self.age_rows[...][age_bucket(age, self.age_buckets)]
        history = GatheredSource(embeddings, self.w_in[...], batch["compared"])
        q = features_of([batch["candidates"]]) @ self.w_in[...][: self.candidate_width]
        score = self._read(history, age, batch["length"], [batch["context"]])
        if not piece:
            return score(q, batch["side"])[0]
        requests, candidates = q.shape[:2]

        def cut(x):
            pieces = x.reshape(requests, candidates // piece, piece, *x.shape[2:])
            return jnp.moveaxis(pieces, 1, 0)

        logits = jax.lax.map(lambda part: score(*part)[0], jax.tree.map(cut, (q, batch["side"])))
        return jnp.moveaxis(logits, 0, 1).reshape(requests, candidates)

    def _read(self, history, age, length, context) -> Callable[..., tuple[Logits, SeqOut]]:
        """Reads requests' histories; returns what scores candidates: (q, side) -> logits and what the encoder says."""
        mask = jnp.arange(age.shape[1]) >= age.shape[1] - length[:, None]
        read = self.encoder.precompute(history, mask, age)
        mean = mean_of_events(history.features(), mask) @ history.w_in if self.mean else None
        gates = None if self.matches is None else self.matches.gates(history.features(), mask)

        def score(q, side):
            out = self.encoder.score(read, q, side)
            read_by_head = out.tokens.astype(q.dtype)  # softmax weights may have made them float32
            tokens = [q, *(read_by_head[:, :, p] for p in range(read_by_head.shape[2]))]
            if mean is not None:
                tokens.append(jnp.broadcast_to(mean[:, None], q.shape))
            if self.products:
                tokens += [token * q for token in tokens[1:]]
            if self.matches is not None:
                fields = self.matches.fields
                mine, theirs = [history.field(name) for name in fields], [side[name] for name in fields]
                tokens.append(self.matches(gates, mine, theirs))
            for part in context:
                tokens.append(jnp.broadcast_to(part[:, None], (*q.shape[:2], part.shape[-1])))
            return self.head(jnp.concatenate(tokens, axis=-1)), out

        return score

    def macs(self, candidates: int) -> dict[str, int]:
        """Multiply-accumulates of encoder and head: once a request and per candidate."""
        length = self.history_length
        once, each = self.encoder.macs(candidates, length)
        matched, match = (0, 0) if self.matches is None else self.matches.macs(length)
        width_in, width = self.w_in.shape
        mean_macs = length * width_in + width_in * width
        return {
            "encoder_request": once,
            "encoder_candidate": each,
            "head_request": matched + (mean_macs if self.mean else 0),
            "head_candidate": self.head.macs() + match,
        }


def at_least(least: int, config: EncoderConfig, *names: str) -> None:
    """Raises ValueError for a setting that is too small, by its name."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


def residual_scale(num_layers: int) -> float:
    """Scale of the output matrices of residual branches at init."""
    return 1.0 / math.sqrt(2 * num_layers)
