"""The layers once more as float64 loops, written from the equations of the papers and from nothing else."""

import math

import numpy as np


def target_attention(q, x, mask, wq, wk, wv, offset=None, gate_bias=None):
    """Attention of every candidate over the real events: heads [B, C, H, dv] and log mass [B, C, H].

    Softmax attention; with a bias a head, gates are sigmoids.
    """
    q, x, wq, wk, wv = (np.asarray(a, np.float64) for a in (q, x, wq, wk, wv))
    heads = wq.shape[1]
    out = np.zeros((*q.shape[:2], heads, wv.shape[2]))
    mass = np.zeros(out.shape[:3])
    for b in range(q.shape[0]):
        for c in range(q.shape[1]):
            for h in range(heads):
                terms = []
                for i in np.flatnonzero(mask[b]):
                    score = (q[b, c] @ wq[:, h]) @ (x[b, i] @ wk[:, h]) / math.sqrt(wq.shape[2])
                    if offset is not None:
                        score += float(offset[b, c, h, i])
                    terms.append((score, x[b, i] @ wv[:, h]))
                if terms and gate_bias is not None:
                    out[b, c, h] = sum(v / (1 + math.exp(-s - float(gate_bias[h]))) for s, v in terms)
                elif terms:
                    weights = np.exp(np.array([s for s, _ in terms]) - max(s for s, _ in terms))
                    out[b, c, h] = sum(w * v for w, (_, v) in zip(weights / weights.sum(), terms, strict=True))
                    mass[b, c, h] = math.log(sum(math.exp(s) for s, _ in terms))
    return out, mass


def segments(length, width, horizons=()):
    """Places of each segment's events, cut from the newest event backwards and at horizons, oldest segment first."""
    cut = []
    end = length
    while end > 0:
        begin = max(end - width, 0, *(length - events for events in horizons if length - events < end))
        cut.append(range(begin, end))
        end = begin
    return cut[::-1]


def segment_attention(q, x, mask, wq, wk, wv, bias, width, gate, horizons=()):
    """The paper, one gate after the other: tokens [B, C, S, H * dv], log mass [B, C, H, S] (-inf where nothing is)."""
    q, x, wq, wk, wv, bias = (np.asarray(a, np.float64) for a in (q, x, wq, wk, wv, bias))
    heads, value = wq.shape[1], wv.shape[2]
    cut = segments(x.shape[1], width, horizons)
    tokens = np.zeros((*q.shape[:2], len(cut), heads * value))
    log_mass = np.full((*q.shape[:2], heads, len(cut)), -np.inf)
    for b in range(q.shape[0]):
        for c in range(q.shape[1]):
            for n, places in enumerate(cut):
                real = [i for i in places if mask[b, i]]
                for h in range(heads):
                    if not real:
                        continue
                    query = q[b, c] @ wq[:, h]
                    scores = np.array([query @ (x[b, i] @ wk[:, h]) for i in real])
                    scores = scores / math.sqrt(wq.shape[2]) + bias[h]
                    if gate == "sigmoid":
                        gates = 1 / (1 + np.exp(-scores))
                        log_mass[b, c, h, n] = math.log(gates.sum())
                    else:
                        gates = np.exp(scores - scores.max())
                        log_mass[b, c, h, n] = math.log(gates.sum()) + scores.max()
                        gates = gates / gates.sum()
                    token = sum(g * (x[b, i] @ wv[:, h]) for g, i in zip(gates, real, strict=True))
                    tokens[b, c, n, h * value : (h + 1) * value] = token
    return tokens, log_mass


def layer_norm(x, scale, bias, eps=1e-6):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * np.asarray(scale) + np.asarray(bias)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
