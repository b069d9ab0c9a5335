"""InfLLM v2 as its definition reads, in float64 and independent of the library: as loops, and many queries at once."""

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


def make_inputs(batch, num_keys, heads, group, dim, *, num_queries=None, dtype=torch.float64, seed=0):
    """Random `q [B, HQ, TQ, D]`, `k` and `v [B, H, TK, D]`; the keys are twice as long, so that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    num_queries = num_keys if num_queries is None else num_queries
    q = torch.randn(batch, heads * group, num_queries, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, heads, num_keys, dim, generator=generator, dtype=torch.float64) * 2
    v = torch.randn(batch, heads, num_keys, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def block_mask(block_indices, num_queries, num_keys, block_size, kv_start=None):
    """Bool `[B, H, TQ, TK]` from block numbers: what a query may attend to, causal edge included."""
    starts = torch.zeros(len(block_indices), dtype=torch.int64) if kv_start is None else kv_start.to(torch.int64)
    row_keys = torch.arange(num_keys) - starts[:, None]  # [B, TK], positions in the row
    listed = block_indices.long().clamp(min=-1) + 1  # slot 0 takes the padding of the lists
    picked = torch.zeros(*block_indices.shape[:3], (num_keys - 1) // block_size + 2, dtype=torch.bool)
    picked = picked.scatter(-1, listed, True)[..., 1:]
    blocks = row_keys.clamp(min=0).div(block_size, rounding_mode="floor")[:, None, None]
    mask = picked.gather(-1, blocks.expand(*picked.shape[:3], -1)) & (row_keys >= 0)[:, None, None]
    return mask & causal_mask(num_queries, num_keys)


def causal_mask(num_queries, num_keys, sliding_window=0, kv_start=None):
    """Bool `[TQ, TK]`, or `[B, 1, TQ, TK]` with `kv_start`: the keys that each of the last queries sees."""
    keys, queries = torch.arange(num_keys), torch.arange(num_keys - num_queries, num_keys)[:, None]
    mask = keys <= queries
    if sliding_window:
        mask = mask & (keys > queries - sliding_window)
    return mask if kv_start is None else mask & (keys >= kv_start[:, None, None, None])


def masked_attention(q, k, v, mask, scale=None):
    """Plain attention under a bool mask `[B, H or 1, TQ, TK]` in the inputs' dtype; 0 for queries without keys."""
    batch, heads, num_keys, dim = k.shape
    scale = dim**-0.5 if scale is None else scale
    hidden = ~mask.broadcast_to(batch, heads, q.shape[2], num_keys).unsqueeze(2)
    unseen = hidden.squeeze(2).all(2).unsqueeze(-1)  # [B, H, TK, 1]; may hold NaN
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    grouped = q.unflatten(1, (heads, -1))
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)) * scale
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def rank_blocks(
    q,
    k,
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
    compressed=None,
):
    """The selection as its definition reads, all queries at once, in float64.

    Args:
        compressed: both streams of pooled keys, counted from each row's `kv_start`; the exact means where None.

    Returns:
        Block scores `[B, H, TQ, NB]` (infinite for forced blocks, -1 for those a query does not see) and the picked
        blocks as a bool mask of that shape; blocks count from each row's `kv_start`.
    """
    batch, heads, num_keys, dim = k.shape
    num_queries = q.shape[2]
    scale = dim**-0.5 if scale is None else scale
    local, num_blocks = window_size // block_size, (num_keys - 1) // block_size + 1
    budget = topk + local
    ranked = torch.full((batch, heads, num_queries, num_blocks), -1.0, dtype=torch.float64)
    for b in range(batch):
        start = 0 if kv_start is None else int(kv_start[b])
        positions = torch.arange(num_keys - num_queries, num_keys) - start  # below 0 before the row's first key
        grouped = q[b].double().unflatten(0, (heads, -1))  # [H, G, TQ, D]
        scores = []
        for i, factor in enumerate((1, 4)):
            size, stride = factor * kernel_size, factor * kernel_stride
            count = max((num_keys - start - size) // stride + 1, 0)
            if compressed is not None:
                means = compressed[i][b, :, :count].double()
            elif count:
                means = k[b, :, start:].double().unfold(1, size, stride).mean(-1)
            else:
                means = k.new_zeros(heads, 0, dim, dtype=torch.float64)
            hidden = torch.arange(count) * stride + size > positions[:, None] + 1
            scores.append((grouped @ means.unsqueeze(1).mT * scale).masked_fill_(hidden, -torch.inf))
        fine, coarse = scores
        lse = fine.logsumexp(-1)
        if lse_approx:
            lse = torch.where(positions + 1 >= 4 * kernel_size, coarse.logsumexp(-1), lse)
        weights = (fine - lse.unsqueeze(-1)).exp().nan_to_num(0).sum(1)  # NaN: a query that sees no window
        own = positions.div(block_size, rounding_mode="floor")
        for n in range(num_blocks):
            first = max((n * block_size - kernel_size) // kernel_stride + 1, 0)
            last = ((n + 1) * block_size - 1) // kernel_stride
            touching = weights[:, :, first : last + 1]
            score = touching.amax(-1) if touching.shape[-1] else torch.zeros_like(ranked[b, :, :, n])
            score = score.masked_fill((n >= own - local) | torch.tensor(n < init_blocks), torch.inf)
            ranked[b, :, :, n] = score.masked_fill(n > own, -1.0)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return ranked, torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True) & (ranked >= 0)


def list_to_mask(block_indices, num_blocks):
    """Bool `[..., NB]` from block numbers padded with -1."""
    mask = torch.zeros(*block_indices.shape[:-1], num_blocks + 1, dtype=torch.bool)
    return mask.scatter_(-1, block_indices.long() + 1, True)[..., 1:]


def largest_error(got, exact):
    """The largest difference as a float; infinite where `got` is not finite."""
    error = (got.double() - exact.double()).abs().max().item() if got.numel() else 0.0
    return error if error == error else float("inf")


def check_rounding(got, exact, plain):
    """Assert that `got` errs at most twice as much as `plain`, the same maths in its dtype, and a few steps more.

    The mean error is held to the same rule: one key too many or too few hides below the largest one. What may be added
    is a few float32 steps, and a part of one of the dtype's for the cases where `plain` happens to be exact.
    """
    eps, float32_eps = torch.finfo(got.dtype).eps, torch.finfo(torch.float32).eps
    size = exact.abs().max().item() if exact.numel() else 0.0
    assert got.dtype == plain.dtype and got.shape == exact.shape
    assert largest_error(got, exact) <= 2 * largest_error(plain, exact) + (16 * float32_eps + eps / 2) * size
    mean, plain_mean = ((t.double() - exact).abs().mean().item() for t in (got, plain))
    assert mean <= 2 * plain_mean + (4 * float32_eps + eps / 8) * size


def rounding(dtype):
    """`rtol` and `atol` between two orders of the same sums, kept in float32 and rounded to `dtype` once."""
    limit = max(2 * torch.finfo(dtype).eps, 32 * torch.finfo(torch.float32).eps)
    return {"rtol": limit, "atol": limit}


def check_selection(block_indices, ranked, picked, rtol):
    """Assert that the listed blocks are the picked ones, or others whose score is the threshold's within `rtol`.

    Every list must be ascending, padded with -1, and as long as the number of picked blocks.
    """
    width, num_blocks = block_indices.shape[-1], ranked.shape[-1]
    got = list_to_mask(block_indices, num_blocks)
    count = got.sum(-1, keepdim=True)
    slots = torch.arange(width)
    assert torch.equal(block_indices >= 0, (slots < count).expand_as(block_indices))
    assert (block_indices.diff(dim=-1)[block_indices[..., 1:] >= 0] > 0).all()
    assert torch.equal(count, picked.sum(-1, keepdim=True))
    differs = got != picked
    if differs.any():
        threshold = ranked.topk(width).values.amin(-1, keepdim=True)
        assert ((ranked - threshold).abs() <= rtol * threshold)[differs].all(), f"{int(differs.sum())} blocks differ"


def check_sparse_parity(operation, pool_streams, q, k, v, **options):
    """Check an operation's blocks against the float64 choice, and its output against float64 over those blocks.

    Args:
        operation: `sparse_attention` with a backend.
        pool_streams: gives both streams of pooled keys for `(k, kv_start, kernel_size, kernel_stride)`. Rounded to 8
            or 11 bits they rank differently from the exact means, which is not the operation's doing.
        options: all of the operation's settings, and `scale`, `kv_start`, `lse_approx` where wanted.

    Returns:
        What the operation returned.
    """
    kv_start, scale = options.get("kv_start"), options.get("scale")
    out, blocks = operation(q, k, v, **options)
    compressed = None
    if q.dtype != torch.float32:
        compressed = pool_streams(k, kv_start, options["kernel_size"], options["kernel_stride"])
    ranked, picked = rank_blocks(q, k, **options, compressed=compressed)
    check_selection(blocks, ranked, picked, rtol=1e-5 if q.dtype == torch.float32 else 1e-3)
    mask = block_mask(blocks, q.shape[2], k.shape[2], options["block_size"], kv_start)
    exact = masked_attention(q.double(), k.double(), v.double(), mask, scale)
    check_rounding(out, exact, masked_attention(q, k, v, mask, scale))
    return out, blocks
