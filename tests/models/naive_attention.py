"""The models that attend within the history, once more as float64 loops, written from their papers' equations.

They take one request and one row at a time; HSTU runs events and candidates as the one sequence it is defined on.
"""

import math

import numpy as np

from tests.layers import naive


def transformer(module, h, mask, age, q):
    """x = h + position from the newest; pre-norm layers over the real events; target attention over LN(x)."""
    x = h + _array(module.position)[: h.shape[1]][::-1]
    for b in range(len(x)):
        real = np.flatnonzero(mask[b])
        for layer in module.layers:
            before = x[b].copy()
            for i in real:
                x[b, i] = layer_row(layer, before[i], [before[j] for j in real if j <= i or not module.config.causal])
    return target_attention(module.attention, q, _norm(module.norm, x), mask)[:, :, None]


def layer_row(layer, x, seen, bias=None):
    """x += MHA(LN x over the LN of what it sees), x += FFN(LN x); heads as softmax by hand.

    bias: of heads by what is seen, added to the scores.
    """
    wq, wk, wv = _array(layer.wq), _array(layer.wk), _array(layer.wv)
    query, keys = _norm(layer.norm_attention, x), [_norm(layer.norm_attention, row) for row in seen]
    heads = []
    for g in range(wq.shape[1]):
        scores = np.array([(query @ wq[:, g]) @ (key @ wk[:, g]) / math.sqrt(wq.shape[2]) for key in keys])
        scores = scores if bias is None else scores + bias[g]
        e = np.exp(scores - scores.max())
        heads.append(sum(weight * (key @ wv[:, g]) for weight, key in zip(e / e.sum(), keys, strict=True)))
    x = x + np.concatenate(heads) @ _array(layer.wo)
    hidden = naive.gelu(_norm(layer.norm_ffn, x) @ _array(layer.ffn.w1) + _array(layer.ffn.b1))
    return x + hidden @ _array(layer.ffn.w2) + _array(layer.ffn.b2)


def hstu(module, h, mask, age, q):
    """One sequence [events; candidates]: an event sees the past, a candidate all real events and itself.

    Of a candidate's row, what the layers added to it.
    """
    length, candidates = h.shape[1], q.shape[1]
    longest = len(module.layers[0].by_distance[...]) - 1
    place = [*range(length), *[length] * candidates]
    out = np.zeros((*q.shape[:2], 1, q.shape[2]))
    for b in range(len(h)):
        x = start = np.concatenate([h[b], q[b] + _array(module.unknown_action)])
        time = [*(-int(seconds) for seconds in age[b]), *[0] * candidates]
        for layer in module.layers:
            rows = [_hstu_projections(layer, row) for row in x]
            y = x.copy()
            for i in range(len(x)):
                seen = [j for j in range(min(i + 1, length)) if mask[b, j]] + [i] * (i >= length)
                u, _, query, _ = rows[i]
                attended = np.zeros_like(u)
                for j in seen:
                    bias = hstu_bias(layer, place[i] - place[j], time[i] - time[j])
                    _, value, _, key = rows[j]
                    for g in range(len(u)):
                        attended[g] += _silu(query[g] @ key[g] + bias) / longest * value[g]
                y[i] += (u.reshape(-1) * _standard(attended.reshape(-1))) @ _array(layer.wo)
            x = y
        out[b, :, 0] = (x - start)[length:]
    return out


def hstu_bias(layer, distance, gap):
    bucket = min(max(math.floor(math.log(max(1, abs(int(gap)))) / 0.301), 0), 128)
    return _array(layer.by_distance)[distance] + _array(layer.by_gap)[bucket]


def _hstu_projections(layer, row):
    return [_silu(np.einsum("d,dhk->hk", _standard(row), _array(w))) for w in (layer.wu, layer.wv, layer.wq, layer.wk)]


def stca(module, h, mask, age, q):
    """q_i asks LN(SwiGLU_i(h)); each next query and the result are fused from all answers and q."""
    said, query = [], q
    for i, attention in enumerate(module.attention):
        if i > 0:
            query = np.concatenate([*said, q], axis=-1) @ _array(module.fuse[i - 1])
        query = _norm(module.query_norm[i], _swiglu(module.query[i], query))
        events = _norm(module.history_norm[i], _swiglu(module.history[i], h))
        said.append(target_attention(attention, query, events, mask))
    z = _swiglu(module.last, np.concatenate([*said, q], axis=-1) @ _array(module.fuse_last))
    return z[:, :, None]


def _swiglu(module, x):
    return ((x @ _array(module.wu)) * _silu(x @ _array(module.wv))) @ _array(module.wo)


def longer(module, h, mask, age, q):
    """Groups cut from the newest, each seeing itself and the past; globals see each other and every group.

    The candidate goes through the events' MLP, without its bias; the result is what the layers added to the globals.
    """
    config, length = module.config, h.shape[1]
    width = module.w_event.shape[1]
    event = naive.gelu(h) @ _array(module.w_event) + _array(module.b_event)
    event = event + _array(module.position)[:length][::-1]
    out = np.zeros((*q.shape[:2], 2, q.shape[2]))
    for b in range(len(h)):
        groups = {}  # place -> token, real ones only; the newest group's place is -1
        for back in range(1, -(-length // config.group) + 1):
            slots = range(length - back * config.group, length - (back - 1) * config.group)
            real = [i for i in slots if i >= 0 and mask[b, i]]
            inside = [event[b, i] for i in real]
            if real and config.inner:
                inside = [layer_row(module.inner, row, inside) for row in inside]
            if real:
                rows = dict(zip(real, inside, strict=True))
                groups[-back] = np.concatenate([rows.get(i, np.zeros(width)) for i in slots])
        globals_ = [[naive.gelu(row) @ _array(module.w_candidate), _array(module.cls)] for row in q[b]]
        start = np.array(globals_)
        for layer, own_bias in zip(module.layers, _array(module.own_bias), strict=True):
            own_bias = [[value] + [0.0] * (1 + len(groups)) for value in own_bias]  # [H, seen]
            globals_ = [
                [layer_row(layer, g, [g, other, *groups.values()], np.array(own_bias)) for g, other in (own, own[::-1])]
                for own in globals_
            ]
            newest = [place for place in groups if place >= -config.newest]
            groups = {i: layer_row(layer, groups[i], [groups[j] for j in groups if j <= i]) for i in newest}
        out[b] = (np.array(globals_) - start) @ _array(module.w_out)
    return out


def target_attention(attention, q, x, mask):
    heads, _ = naive.target_attention(q, x, mask, attention.wq[...], attention.wk[...], attention.wv[...])
    return heads.reshape(q.shape) @ _array(attention.wo)


def _array(param):
    return np.asarray(param[...], np.float64)


def _norm(module, x):
    return naive.layer_norm(x, module.scale[...], module.bias[...])


def _standard(x):
    return naive.layer_norm(x, 1.0, 0.0)


def _silu(x):
    return x / (1 + np.exp(-x))


FORMS = {"transformer": transformer, "hstu": hstu, "stca": stca, "longer": longer}
