"""The two-stage rivals once more as float64 loops, written from the equations of the papers and from nothing else."""

import numpy as np

from tests.layers import naive
from tests.models.harness import brand_of_candidates, brand_of_events


def attend(attention, q, events):
    """Target attention of one candidate q [d] over its events [n, d]."""
    wq, wk, wv = attention.wq[...], attention.wk[...], attention.wv[...]
    heads, _ = naive.target_attention(q[None, None], events[None], np.ones((1, len(events)), bool), wq, wk, wv)
    return heads.reshape(-1) @ np.asarray(attention.wo[...], np.float64)


def per_candidate(long_tokens):
    """Loops over requests and candidates: `long_tokens(module, h, age, q)` of real events only, then the short token.

    What is lost with the masked events is how far from the end the others lie: `long_tokens` gets that as `place`.
    """

    def form(module, h, mask, age, q):
        out = np.zeros((*q.shape[:2], module.num_tokens, q.shape[2]))
        for b in range(len(h)):
            place = np.flatnonzero(mask[b])
            real = h[b, place]
            for c in range(q.shape[1]):
                long = long_tokens(module, real, age[b, place], place - h.shape[1], q[b, c])
                out[b, c] = [*long, attend(module.short, q[b, c], real[-module.recent :])]
        return out

    return form


def best(scores, number):
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")[:number]


def sim_soft(module, h, age, place, q):
    wa, wb = (np.asarray(p[...], np.float64) for p in (module.wa, module.wb))
    scores = np.array([(q @ wa) @ (event @ wb) for event in h]) / np.sqrt(len(q))
    pooled = sum((s * event for s, event in zip(scores, h, strict=True)), np.zeros(len(q))) / max(len(h), 1)
    return attend(module.long, q, h[best(scores, module.config.top)]), pooled


def sim_hard(module, h, age, place, q):
    same = np.flatnonzero(brand_of_events(age) == brand_of_candidates(q))
    return [attend(module.long, q, h[same[-module.config.top :]])]


def code(config, bits, x):
    planes = np.random.RandomState(config.seed).normal(size=(x.shape[-1], bits))
    return x @ planes > 0


def nearest(config, h, query):
    """Places of the K events of least Hamming distance, the newest first among equals."""
    query = code(config, config.bits, query)
    distances = [(query != code(config, config.bits, event)).sum() for event in h]
    return sorted(range(len(h)), key=lambda i: (distances[i], -i))[: config.top]


def eta(module, h, age, place, q):
    return [attend(module.long, q, h[nearest(module.config, h, q)])]


def sdim(module, h, age, place, q):
    config = module.config
    mine = code(config, config.tables * config.bits, q).reshape(config.tables, -1)
    total = np.zeros(len(q))
    for t in range(config.tables):
        in_bucket = np.zeros(len(q))
        for event in h:
            if (code(config, config.tables * config.bits, event).reshape(config.tables, -1)[t] == mine[t]).all():
                in_bucket += event
        total += in_bucket / np.sqrt((in_bucket**2).mean() + 1e-6) if config.normalise == "l2" else in_bucket
    return [total / config.tables / (max(len(h), 1) if config.normalise == "mean" else 1)]


def twin(module, h, age, place, q):
    return [search_and_attend(module, h, np.ones(len(h)), q)]


def twin_v2(module, h, age, place, q):
    # Cluster 0 ends at the newest place, whatever stands there.
    cluster = (-1 - place) // module.config.segment
    names = sorted(set(cluster), reverse=True)
    tokens = np.array([h[cluster == name].mean(0) for name in names]).reshape(len(names), len(q))
    return [search_and_attend(module, tokens, np.array([(cluster == name).sum() for name in names]), q)]


def search_and_attend(module, tokens, sizes, q):
    """Both stages by one score, which knows the sizes of the clusters."""
    wq, wk, wv, wo = (np.asarray(getattr(module.long, name)[...], np.float64) for name in ("wq", "wk", "wv", "wo"))
    heads = range(wq.shape[1])
    scores = np.zeros((wq.shape[1], len(tokens)))
    for g in heads:
        for i, token in enumerate(tokens):
            scores[g, i] = (q @ wq[:, g]) @ (token @ wk[:, g]) / np.sqrt(wq.shape[2])
            scores[g, i] += getattr(module.config, "size_coef", 0.0) * np.log(sizes[i])
    out = np.zeros((wq.shape[1], wv.shape[2]))
    for g in heads:
        found = best(scores[g] if module.config.topk_per_head else scores.sum(0), module.config.top)
        weights = np.exp(scores[g, found] - scores[g, found].max(initial=0))
        for weight, i in zip(weights, found, strict=True):
            out[g] += weight / weights.sum() * (tokens[i] @ wv[:, g])
    return out.reshape(-1) @ wo


def mirrn(module, h, age, place, q):
    config = module.config
    if not len(h):
        return [np.zeros(len(q))]
    position = np.asarray(module.position[...], np.float64)
    tokens = []
    for mixer, query in zip(module.mixers, (q, h[-config.summarised :].mean(0), h.mean(0)), strict=True):
        found = sorted(nearest(config, h, query))
        x = np.zeros((config.top, len(q)))
        for slot, i in enumerate(found, config.top - len(found)):
            x[slot] = h[i] + 0.02 * position[-1 - place[i]]
        y = naive.layer_norm(x + spectral_filter(mixer, x), mixer.norm.scale[...], mixer.norm.bias[...])
        tokens.append(y[config.top - len(found) :].mean(0))
    return [attend(module.long, q, np.array(tokens))]


def spectral_filter(mixer, x):
    """a x + b Hilbert(x), Hilbert's kernel summed from its sines; channels are mixed in groups where W is a matrix."""
    number, width = x.shape
    a, b = (np.asarray(p[...], np.float64) for p in (mixer.real, mixer.imaginary))
    kernel = np.zeros(number)
    for n in range(number):
        kernel[n] = -2 / number * sum(np.sin(2 * np.pi * k * n / number) for k in range(1, (number + 1) // 2))
    hilbert = np.zeros_like(x)
    for n in range(number):
        for m in range(number):
            hilbert[n] += kernel[(n - m) % number] * x[m]
    if a.ndim == 1:
        return a * x + b * hilbert
    out = np.zeros_like(x)
    for group, channels in enumerate(np.split(np.arange(width), len(a))):
        out[:, channels] = x[:, channels] @ a[group] + hilbert[:, channels] @ b[group]
    return out


FORMS = {
    name: per_candidate(form)
    for name, form in {
        "sim_soft": sim_soft,
        "sim_hard": sim_hard,
        "eta": eta,
        "sdim": sdim,
        "twin": twin,
        "twin_v2": twin_v2,
        "mirrn": mirrn,
    }.items()
}
