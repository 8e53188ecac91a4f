"""Names and shapes of the arrays that cross public boundaries.

Letters: B requests, C candidates, L history events (oldest to newest, the newest at L-1), S segments, w events a
segment, H heads, d model width, f width of the concatenated embeddings, P encoder tokens, U unique embedding rows.
A mask is True where an entry is real.
"""

from jaxtyping import Array, Bool, Float, Int

HistoryFeatures = Float[Array, "B L f"]  # concatenated, unit-RMS embeddings of each event
HistoryTokens = Float[Array, "B L d"]
HistoryMask = Bool[Array, "B L"]
HistoryAge = Int[Array, "B L"]  # seconds from the event to the request, clipped
CandidateTokens = Float[Array, "B C d"]
CandidateMask = Bool[Array, "B C"]
EncoderTokens = Float[Array, "B C P d"]
Logits = Float[Array, "B C"]
Labels = Float[Array, "B C"]

__all__ = [name for name in dir() if name[0].isupper() and name not in ("Array", "Bool", "Float", "Int")]
