"""InfLLM v2 as its definition reads: a loop over rows, heads and queries in float64, independent of the library."""

import math

import torch


def naive_sparse_attention(
    q,
    k,
    v,
    *,
    kernel_size,
    kernel_stride,
    block_size,
    init_blocks,
    window_size,
    topk,
    lse_approx=True,
    scale=None,
    kv_start=None,
):
    """Same arguments and results as `sparse_attention`, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    batch, query_heads, num_queries, dim = q.shape
    heads, num_keys = k.shape[1:3]
    group = query_heads // heads
    scale = dim**-0.5 if scale is None else scale
    local = window_size // block_size
    budget = topk + local
    out = torch.zeros_like(q)
    picked = torch.full((batch, heads, num_queries, budget), -1, dtype=torch.int32)

    def windows(keys, factor):
        size, stride = factor * kernel_size, factor * kernel_stride
        spans = [(s, s + size) for s in range(0, len(keys) - size + 1, stride)]
        means = [keys[a:e].mean(0) for a, e in spans]
        return spans, torch.stack(means) if means else keys[:0]

    def choose(rows, i, fine, coarse):
        own = i // block_size
        if own + 1 <= budget:
            return list(range(own + 1))
        spans = [span for span in fine[0] if span[1] <= i + 1]
        num_coarse = sum(span[1] <= i + 1 for span in coarse[0])
        scores = rows @ fine[1][: len(spans)].T * scale  # [G, visible windows]
        others = rows @ coarse[1][:num_coarse].T * scale if lse_approx and num_coarse else scores
        weights = (scores - others.logsumexp(1, keepdim=True)).exp().sum(0).tolist()
        total = [0.0] * (own + 1)
        for weight, (a, e) in zip(weights, spans):
            for n in range(a // block_size, (e - 1) // block_size + 1):
                total[n] = max(total[n], weight)
        for n in range(own + 1):
            if n < init_blocks or n >= own - local:
                total[n] = math.inf
        return sorted(sorted(range(own + 1), key=lambda n: (-total[n], n))[:budget])

    for b in range(batch):
        start = 0 if kv_start is None else int(kv_start[b])
        for h in range(heads):
            keys, values = k[b, h, start:], v[b, h, start:]
            fine, coarse = windows(keys, 1), windows(keys, 4)
            for t in range(num_queries):
                i = num_keys - num_queries + t - start  # position of the query in its row
                if i < 0:
                    continue
                rows = q[b, h * group : (h + 1) * group, t]  # [G, D]
                blocks = choose(rows, i, fine, coarse)
                picked[b, h, t, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                tokens = [j for n in blocks for j in range(n * block_size, min((n + 1) * block_size, i + 1))]
                weights = (rows @ keys[tokens].T * scale).softmax(-1)
                out[b, h * group : (h + 1) * group, t] = weights @ values[tokens]
    return out, picked
