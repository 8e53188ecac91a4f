"""The encoders once more as float64 loops over requests, candidates and events."""

import numpy as np

from tests.layers import naive
from tests.models import naive_attention, naive_retrieval


def encode(encoder, x, mask, age, q):
    """Tokens [B, C, P, d] of a harness.Encoder."""
    x = np.asarray(x, np.float64)
    h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) @ np.asarray(encoder.params["w_in"], np.float64)
    return FORMS[encoder.name](encoder.module, h, mask, age, np.asarray(q, np.float64))


def _mean(module, h, mask, age, q):
    out = np.zeros((*q.shape[:2], 1, q.shape[2]))
    for b in range(len(h)):
        for i in np.flatnonzero(mask[b]):
            out[b, :, 0] += h[b, i] / mask[b].sum()
    return out


def _ta(module, h, mask, age, q):
    attention = module.attention
    out = _attend(attention, q, h, mask)[:, :, None]
    if module.w_mass is None:
        return out
    _, mass = naive.target_attention(q, h, mask, attention.wq[...], attention.wk[...], attention.wv[...])
    events = mask.sum(axis=1)[:, None, None] * np.ones((1, q.shape[1], 1))
    mass = np.where(events > 0, mass - np.log(module.history_length), 0)
    facts = np.concatenate([mass, np.log(np.maximum(events, 1) / module.history_length)], axis=-1)
    return np.concatenate([out, (facts @ np.asarray(module.w_mass[...], np.float64))[:, :, None]], axis=2)


def _attend(attention, q, h, mask, offset=None):
    weights = (attention.wq[...], attention.wk[...], attention.wv[...])
    bias = None if attention.gate_bias is None else attention.gate_bias[...]
    heads, _ = naive.target_attention(q, h, mask, *weights, offset, bias)
    return heads.reshape(*q.shape[:2], -1) @ np.asarray(attention.wo[...], np.float64)


def _din(module, h, mask, age, q):
    w1, b1, w2 = (np.asarray(p[...], np.float64) for p in (module.w1, module.b1, module.w2))
    b2 = 0.0 if module.b2 is None else float(module.b2[...])
    out = np.zeros((*q.shape[:2], 1, q.shape[2]))
    for b in range(len(h)):
        for c in range(q.shape[1]):
            t, real = q[b, c], h[b][mask[b]]
            x = [np.concatenate([t, e, t - e, t * e]) for e in real]
            a = np.array([(np.maximum(v @ w1 + b1, 0) @ w2).item() + b2 for v in x])
            if module.softmax and len(a):
                a = np.exp(a - a.max()) / np.exp(a - a.max()).sum()
            out[b, c, 0] = sum((weight * e for weight, e in zip(a, real, strict=True)), np.zeros(q.shape[2]))
    return out


def _laser(module, h, mask, age, q):
    config = module.config
    post = config.norm == "post"
    cut = naive.segments(h.shape[1], config.segment, config.horizons)
    s, log_mass = naive.segment_attention(
        q,
        h,
        mask,
        module.wq[...],
        module.wk[...],
        module.wv[...],
        0.0 * module.wq[0, :, 0] if module.gate_bias is None else module.gate_bias[...],
        config.segment,
        config.gate,
        config.horizons,
    )
    if config.joined == "sum":
        s = s.reshape(*s.shape[:3], config.heads, -1).sum(axis=3)
    alive = np.array([[any(mask[b, i] for i in places) for places in cut] for b in range(len(h))])
    s = s + _feed_forward(module.ffn, s if post else _norm(module.norm, s))
    s = _norm(module.norm, s) if post else s
    for n, places in enumerate(cut if module.recency is not None else ()):
        for b in range(len(h)):
            s[b, :, n] += _recency(
                module.recency, min((age[b, i] for i in places if mask[b, i]), default=0), len(cut) - 1 - n
            )
    out = np.zeros((*q.shape[:2], module.num_tokens, q.shape[2]))
    for b in range(len(h)):
        for c in range(q.shape[1]):
            t = q[b, c][None, None]
            for layer in module.gsta:
                offset = log_mass[b, c][None, None] if config.mass_logit else None
                query = t if post else _norm(layer.norm_attention, t)
                t = t + _attend(layer.attention, query, s[b, c][None], alive[b][None], offset)
                t = _norm(layer.norm_attention, t) if post else t
                t = t + _feed_forward(layer.ffn, t if post else _norm(layer.norm_ffn, t))
                t = _norm(layer.norm_ffn, t) if post else t
            tokens = [t[0, 0] if post else t[0, 0] - q[b, c]] if config.layers else []
            real = s[b, c][alive[b]]
            if config.pool:
                tokens.append(real.max(0) if len(real) else np.zeros(q.shape[2]))
            for back in range(config.recent):
                n = len(cut) - 1 - back
                tokens.append(s[b, c, n] if n >= 0 and alive[b, n] else np.zeros(q.shape[2]))
            tokens = [*tokens, *_horizons(module, h[b], mask[b], q[b, c])]
            out[b, c] = np.sum(tokens, axis=0) if config.fusion == "sum" else tokens
    return out


def _horizons(module, h, mask, q):
    """Each horizon attended on its own, over events and not over segments."""
    if module.horizons is None:
        return []
    wq, wk, wv = (np.asarray(p[...], np.float64) for p in (module.wq, module.wk, module.wv))
    tokens, masses = [], []
    for size in module.horizons.reaches:
        newest = [i for i in range(len(h)) if mask[i] and i >= len(h) - size]
        token = []
        for head in range(wq.shape[1]):
            scores = [(q @ wq[:, head]) @ (h[i] @ wk[:, head]) / np.sqrt(wq.shape[2]) for i in newest]
            if module.config.gate == "softmax":
                loud = [np.exp(score) for score in scores]
            else:
                loud = [1 / (1 + np.exp(-score - float(module.gate_bias[head]))) for score in scores]
            mean = sum((g * (h[i] @ wv[:, head]) for g, i in zip(loud, newest, strict=True)), np.zeros(wv.shape[2]))
            token.append(mean / max(sum(loud), 1e-20))
            masses.append(np.log(sum(loud) / size) if newest else 0.0)
        tokens.append(np.concatenate(token))
        masses.append(np.log(max(len(newest), 1) / size))
    return [*tokens, np.asarray(masses) @ np.asarray(module.horizons.w_mass[...], np.float64)]


def _norm(module, x):
    return x if module is None else naive.layer_norm(x, module.scale[...], module.bias[...])


def _feed_forward(module, x):
    if module is None:
        return 0.0
    w1, w2 = (np.asarray(p[...], np.float64) for p in (module.w1, module.w2))
    return naive.gelu(x @ w1 + np.asarray(module.b1[...])) @ w2 + np.asarray(module.b2[...])


def _recency(module, age, back):
    bucket = np.log1p(age / 60) * (module.num_buckets - 1) / np.log1p(4 * 365 * 86400 / 60)
    of_age = 0.0 if module.age is None else np.asarray(module.age[...])[min(int(bucket), module.num_buckets - 1)]
    return of_age if module.position is None else of_age + np.asarray(module.position[...])[back]


FORMS = {
    "mean": _mean,
    "ta": _ta,
    "din": _din,
    "laser": _laser,
    "laser_plus": _laser,
    **naive_retrieval.FORMS,
    **naive_attention.FORMS,
}
