"""InfLLM v2 block-sparse attention in plain PyTorch: pool keys, score blocks, select blocks, attend to them.

This is the definition that every kernel is measured against, and the path that runs where no kernel does: any device,
any floating dtype, differentiable (the gradient flows through the attention, never through the selection). It travels
with a checkpoint (`save_pretrained` copies it), so it imports torch only.

Shapes: B batch, HQ query heads, H key/value heads, G = HQ // H, TQ queries, TK keys, D head size, N pooled keys, NB
blocks, S selected blocks. The queries are the last TQ of the TK positions.

Source: InfLLM-V2 (arXiv:2509.24663) and MiniCPM4 (arXiv:2506.07900) for the method; OpenBMB/infllmv2_cuda_impl at
f908e73 and the official `modeling_minicpm.py` for what the papers leave open.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# K2, from which the log-sum-exp is estimated, is pooled four times as coarsely as K1: 128/64 for 32/16.
COARSE = 4
# Scores are kept in base 2: exp2 is several times faster than exp on a CPU, above all where results underflow.
_LOG2_E = 1.4426950408889634
# 2 ** 115 times a query group still fits float32: the estimated log-sum-exp can lie far below a true score.
_MAX_EXPONENT = 115.0
# Queries scored at a time, and queries that share one gather of the union of their blocks: few, so that the union is
# small, or many where a graph is recorded and each chunk costs a backward pass of its own.
_SCORE_CHUNK = 128
_ATTEND_CHUNK = 32
_RECORDED_CHUNK = 128


def count_pooled(num_tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """How many pooled keys `num_tokens` keys give: windows that do not fill up are dropped."""
    return max((num_tokens - kernel_size) // kernel_stride + 1, 0)


def pool_keys(k: torch.Tensor, kernel_size: int, kernel_stride: int) -> torch.Tensor:
    """Mean of each window of `kernel_size` consecutive keys, one every `kernel_stride`.

    Args:
        k: `[B, H, TK, D]`; `kernel_size` must be a multiple of `kernel_stride`.

    Returns:
        `[B, H, N, D]` in `k`'s dtype, summed in float32 at least; entry j covers tokens `j * kernel_stride` to
        `j * kernel_stride + kernel_size - 1`. Each entry is the same whether pooled alone or with others.

    Source: official `modeling_minicpm.py`, `CompressK` (an unweighted mean of rotated keys, no values).
    """
    batch, heads, num_tokens, dim = k.shape
    count = count_pooled(num_tokens, kernel_size, kernel_stride)
    if count == 0:
        return k.new_empty(batch, heads, 0, dim)
    per_kernel = kernel_size // kernel_stride
    k = k[:, :, : (count - 1 + per_kernel) * kernel_stride].unflatten(2, (-1, kernel_stride))
    segments = k.sum(3, dtype=torch.promote_types(k.dtype, torch.float32))  # [B, H, N + per_kernel - 1, D]
    pooled = segments[:, :, :count].clone()
    for i in range(1, per_kernel):
        pooled += segments[:, :, i : i + count]
    return (pooled / kernel_size).to(k.dtype)


def _pooled_scores(q: torch.Tensor, k_cmp: torch.Tensor, positions: torch.Tensor, kernel_size: int, stride: int):
    """Scores `[B, H, G, TQ, N]` of already scaled queries `[B, H, G, TQ, D]`, -inf where a kernel is not visible."""
    scores = (q.flatten(2, 3) @ k_cmp.to(q.dtype).transpose(-1, -2)).unflatten(2, q.shape[2:4])
    num_visible = (positions + 1 - kernel_size).div(stride, rounding_mode="floor") + 1  # [TQ], ascending
    edge = min(max(int(num_visible[0]), 0), k_cmp.shape[2])  # kernels before it are visible to every query
    hidden = torch.arange(edge, k_cmp.shape[2], device=q.device) >= num_visible[:, None]
    scores[..., edge:].masked_fill_(hidden, -torch.inf)
    return scores


def _log2_sum_exp2(scores: torch.Tensor) -> torch.Tensor:
    """Base-2 log-sum-exp over the last dimension; NaN where all scores are -inf."""
    largest = scores.amax(-1, keepdim=True)
    return (scores - largest).exp2_().sum(-1).log2_() + largest.squeeze(-1)


def score_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    k_coarse: torch.Tensor,
    positions: torch.Tensor,
    num_blocks: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float,
    lse_approx: bool,
) -> torch.Tensor:
    """Score each key block for each query, summed over the query group.

    A pooled key's weight is `exp(q . k_cmp * scale - lse)`; a block's score is the largest weight among the pooled
    keys whose window touches the block. `lse` is the log-sum-exp over the coarse keys (`lse_approx`), or over `k_cmp`
    where a query sees no coarse key or the exact one is asked for. As upstream, the estimate gets no correction for
    there being four times fewer coarse keys. A pooled key is visible to a query once all its tokens are at or before
    it; upstream hides one legal kernel when the length is 15 modulo 16 (63 modulo 64 for the coarse keys): not here.

    Args:
        q: `[B, HQ, TQ, D]`.
        k_cmp: `[B, H, N, D]` from `pool_keys(k, kernel_size, kernel_stride)`.
        k_coarse: `[B, H, N2, D]`, the same with both numbers times `COARSE`.
        positions: `[TQ]` int64, position of each query among the keys.

    Returns:
        `[B, H, TQ, num_blocks]` float32 (float64 for float64 input), at least 0; 0 where no visible kernel touches.

    Source: infllmv2_cuda_impl `flash_fwd_kernel.h` (two-pass score), `max_pooling_1d.cuh` (pooling to blocks).
    """
    batch, _, num_queries, dim = q.shape
    heads, count = k_cmp.shape[1], k_cmp.shape[2]
    if count == 0:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return torch.zeros(batch, heads, num_queries, num_blocks, dtype=dtype, device=q.device)
    q = q.to(torch.promote_types(q.dtype, torch.float32)).reshape(batch, heads, -1, num_queries, dim)
    q = q * (scale * _LOG2_E)
    scores = _pooled_scores(q, k_cmp, positions, kernel_size, kernel_stride)
    sees_coarse = (
        positions + 1 >= COARSE * kernel_size if lse_approx else torch.zeros_like(positions, dtype=torch.bool)
    )
    if sees_coarse.all():
        lse = _log2_sum_exp2(_pooled_scores(q, k_coarse, positions, COARSE * kernel_size, COARSE * kernel_stride))
    else:
        lse = _log2_sum_exp2(scores)  # [B, H, G, TQ]
        if sees_coarse.any():
            coarse = _pooled_scores(q, k_coarse, positions, COARSE * kernel_size, COARSE * kernel_stride)
            lse = torch.where(sees_coarse, _log2_sum_exp2(coarse), lse)
    lse.masked_fill_(positions + 1 < kernel_size, 0.0)  # these queries see no kernel: all weights become 0
    weights = scores.sub_(lse.unsqueeze(-1)).clamp_(max=_MAX_EXPONENT).exp2_().sum(2)  # [B, H, TQ, N]

    per_block, per_kernel = block_size // kernel_stride, kernel_size // kernel_stride
    # Block b is touched by kernels b * per_block - (per_kernel - 1) .. b * per_block + per_block - 1.
    padded = F.pad(weights, (per_kernel - 1, num_blocks * per_block - count))
    pooled = F.max_pool1d(padded.flatten(0, 2).unsqueeze(1), per_block + per_kernel - 1, per_block)
    return pooled.view(batch, heads, num_queries, num_blocks)


def select_blocks(
    scores: torch.Tensor | None,
    positions: torch.Tensor,
    num_blocks: int,
    *,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
) -> torch.Tensor:
    """Pick the key blocks each query attends to, at most `topk + window_size // block_size` of them.

    Always kept: the first `init_blocks` blocks, and those from `window_size // block_size` blocks before the query's
    own up to its own (33 at the default 2048 / 64). The rest of the budget goes by score, ties to the lower index. A
    query with no more visible blocks than the budget gets all of them.

    Args:
        scores: `[B, H, TQ, NB]`, at least 0; None only where no query has to choose (`num_blocks` within the budget).
        positions: `[TQ]` int64, position of each query among the keys.

    Returns:
        Bool mask `[B, H, TQ, NB]` (`[1, 1, TQ, NB]` without scores).
    """
    blocks = torch.arange(num_blocks, device=positions.device)
    query_block = positions.div(block_size, rounding_mode="floor")[:, None]
    visible = blocks <= query_block  # [TQ, NB]
    if scores is None:
        return visible[None, None]
    budget = topk + window_size // block_size
    forced = (blocks < init_blocks) | (blocks >= query_block - window_size // block_size)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill_(~visible, -1.0)
    threshold = ranked.topk(budget, sorted=False).values.amin(-1, keepdim=True)
    above, tied = ranked > threshold, ranked == threshold
    room = budget - above.sum(-1, keepdim=True)
    return (above | (tied & (tied.cumsum(-1) <= room))) & visible


def list_blocks(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """Turn a bool mask `[..., NB]` into its block numbers `[..., width]`, int32, ascending, padded with -1."""
    numbers = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand(chosen.shape)
    slots = (chosen.cumsum(-1) - 1).masked_fill_(~chosen, width)  # blocks not chosen go to a slot that is cut off
    listed = torch.full((*chosen.shape[:-1], width + 1), -1, dtype=torch.int32, device=chosen.device)
    return listed.scatter_(-1, slots, numbers)[..., :width]


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: torch.Tensor,
    positions: torch.Tensor,
    *,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of each query over its chosen blocks.

    The blocks that any of these queries chose are gathered once, and each query sees its own share of them: pass
    neighbouring queries together, and few enough of them.

    Args:
        q: `[B, HQ, TQ, D]`.
        k, v: `[B, H, TK, D]`.
        chosen: bool `[B, H, TQ, NB]`; every query must have its own block.
        positions: `[TQ]` int64, position of each query among the keys.

    Returns:
        `[B, HQ, TQ, D]` in `q`'s dtype.
    """
    batch, query_heads, num_queries, dim = q.shape
    heads, num_keys = k.shape[1], k.shape[2]
    chosen = chosen.expand(batch, heads, -1, -1)
    union = chosen.any(2)  # [B, H, NB]
    width = int(union.sum(-1).max())
    recorded = _needs_graph(q, k, v)
    # A gather costs more than keys that are masked, all the more backwards.
    if width == union.shape[-1] or (recorded and 2 * width >= union.shape[-1]):
        key_positions = torch.arange(min(union.shape[-1] * block_size, num_keys), device=q.device)
        mask = chosen.repeat_interleave(block_size, -1)[..., : len(key_positions)]
        k, v = k[:, :, : len(key_positions)], v[:, :, : len(key_positions)]
    else:
        # The union's blocks in ascending order; a shorter union is filled up with blocks that nobody chose.
        order = torch.sort(union, dim=-1, descending=True, stable=True).indices[..., :width]
        mask = chosen.gather(-1, order.unsqueeze(2).expand(-1, -1, num_queries, -1)).repeat_interleave(block_size, -1)
        key_positions = (order.unsqueeze(-1) * block_size + torch.arange(block_size, device=q.device)).flatten(2)
        rows = torch.arange(batch, device=q.device)[:, None, None], torch.arange(heads, device=q.device)[:, None]
        index = (*rows, key_positions.clamp(max=num_keys - 1))
        k, v = k[index], v[index]  # [B, H, width * BS, D]
        key_positions = key_positions.unsqueeze(2)
    mask = mask & (key_positions <= positions[:, None])  # [B, H, TQ, keys]
    group = query_heads // heads
    # Added to the scores, not a bool mask: SDPA would turn that into one for every head of the group.
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)
    q = q.reshape(batch, heads, group * num_queries, dim)
    if recorded:
        out = _attend_by_products(q, k, v, bias, scale)
    else:
        bias = bias.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, query_heads, num_queries, dim)


def _needs_graph(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attend_by_products(q, k, v, bias, scale: float) -> torch.Tensor:
    """Attention as two matrix products, of which CPUs compute the gradient three times as fast as SDPA's with a bias.

    Args:
        q: `[B, H, G * TQ, D]`.
        k, v: `[B, H, keys, D]`.
        bias: `[B, H, TQ, keys]`, the same for each query of a group.
    """
    # Autocast would have the softmax in float32 and twice the memory; the softmax sums in float32 by itself.
    with torch.autocast(q.device.type, enabled=False):
        scores = (q * scale) @ k.transpose(-1, -2)
        weights = (scores.unflatten(2, (-1, bias.shape[2])) + bias.unsqueeze(2)).softmax(-1)
        return weights.flatten(2, 3) @ v


def _attend_aligned(q, k, v, q_select, compressed, settings, scale, lse_approx):
    """`sparse_attention` for rows that all begin at key 0."""
    num_queries, num_keys, block_size = q.shape[2], k.shape[2], settings["block_size"]
    kernels = {name: settings[name] for name in ("kernel_size", "kernel_stride", "block_size")}
    choice = {name: settings[name] for name in ("block_size", "init_blocks", "window_size", "topk")}
    budget = settings["topk"] + settings["window_size"] // block_size
    if compressed is None:
        size, stride = settings["kernel_size"], settings["kernel_stride"]
        with torch.no_grad():
            compressed = pool_keys(k, size, stride), pool_keys(k, COARSE * size, COARSE * stride)
    offset = num_keys - num_queries
    # Written in place where no graph is recorded: small results kept between large temporaries splinter the heap.
    needs_graph = _needs_graph(q, k, v)
    attend, attend_chunk = attend_blocks, _ATTEND_CHUNK
    if needs_graph:  # the weights are computed again backwards: kept, they grow with TQ * TK, and are no faster
        attend_chunk = _RECORDED_CHUNK
        attend = partial(checkpoint, attend_blocks, use_reentrant=False, preserve_rng_state=False)
    pieces, out = [], q.new_empty(0 if needs_graph else q.shape)
    blocks = torch.empty(*k.shape[:2], num_queries, budget, dtype=torch.int32, device=q.device)
    # Chunks end at multiples of the chunk size among the keys, so that each shares one local window.
    for begin in range(offset - offset % _SCORE_CHUNK, num_keys, _SCORE_CHUNK):
        begin, end = max(begin, offset), min(begin + _SCORE_CHUNK, num_keys)
        rows = slice(begin - offset, end - offset)
        positions = torch.arange(begin, end, device=q.device)
        num_blocks = (end - 1) // block_size + 1
        with torch.no_grad():
            scores = None
            if num_blocks > budget:
                n_fine = count_pooled(end, settings["kernel_size"], settings["kernel_stride"])
                n_coarse = count_pooled(end, COARSE * settings["kernel_size"], COARSE * settings["kernel_stride"])
                scores = score_blocks(
                    (q if q_select is None else q_select)[:, :, rows],
                    compressed[0][:, :, :n_fine],
                    compressed[1][:, :, :n_coarse],
                    positions,
                    num_blocks,
                    scale=scale,
                    lse_approx=lse_approx,
                    **kernels,
                )
            chosen = select_blocks(scores, positions, num_blocks, **choice)
            blocks[:, :, rows] = list_blocks(chosen, budget)
        for first in range(0, end - begin, attend_chunk):
            few = slice(first, min(first + attend_chunk, end - begin))
            some = slice(rows.start + few.start, rows.start + few.stop)
            attended = attend(
                q[:, :, some], k, v, chosen[:, :, few], positions[few], block_size=block_size, scale=scale
            )
            if needs_graph:
                pieces.append(attended)
            else:
                out[:, :, some] = attended
    return (torch.cat(pieces, 2) if needs_graph else out), blocks


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    init_blocks: int = 1,
    window_size: int = 2048,
    topk: int = 64,
    lse_approx: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    q_select: torch.Tensor | None = None,
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfLLM v2 attention: each query attends to the key blocks it selects; see `minicpm4_hf.kernels.infllm_v2`.

    Args:
        q: `[B, HQ, TQ, D]`; the queries are the last TQ of the TK positions.
        k, v: `[B, H, TK, D]`, HQ a multiple of H.
        scale: factor on q . k; `D ** -0.5` where None.
        kv_start: integer `[B]`, first real key of each row (left padding); positions count from there.
        q_select: queries to select with instead of `q` (`use_nope`: the unrotated ones), same shape.
        compressed: pooled keys `[B, H, N, D]` and their coarse companions, counted from each row's `kv_start`; pooled
            from `k` where None.

    Returns:
        `out [B, HQ, TQ, D]`, 0 for queries before `kv_start`, and `block_indices [B, H, TQ, S]`, int32, ascending,
        padded with -1, blocks counted from `kv_start`, `S = topk + window_size // block_size`.
    """
    settings = {
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
        "block_size": block_size,
        "init_blocks": init_blocks,
        "window_size": window_size,
        "topk": topk,
    }
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts = [0] * q.shape[0] if kv_start is None else kv_start.tolist()
    if not any(starts):
        return _attend_aligned(q, k, v, q_select, compressed, settings, scale, lse_approx)
    # Each row is its own problem over its real keys, so that padding changes nothing.
    width = topk + window_size // block_size
    outs, lists = [], []
    for row, start in enumerate(starts):
        b = slice(row, row + 1)
        num_padding = max(q.shape[2] - max(k.shape[2] - start, 0), 0)  # queries before the row's first key
        out = q.new_zeros(1, q.shape[1], num_padding, q.shape[3])
        blocks = torch.full((1, k.shape[1], num_padding, width), -1, dtype=torch.int32, device=q.device)
        if num_padding < q.shape[2]:
            real, real_blocks = _attend_aligned(
                q[b, :, num_padding:],
                k[b, :, start:],
                v[b, :, start:],
                None if q_select is None else q_select[b, :, num_padding:],
                None if compressed is None else (compressed[0][b], compressed[1][b]),
                settings,
                scale,
                lse_approx,
            )
            out, blocks = torch.cat((out, real), 2), torch.cat((blocks, real_blocks), 2)
        outs.append(out)
        lists.append(blocks)
    return torch.cat(outs), torch.cat(lists)


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Causal attention of the last TQ of TK positions: `[B, HQ, TQ, D]`."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    offset = k.shape[2] - q.shape[2]
    outs = []
    for begin in range(0, q.shape[2], _SCORE_CHUNK):
        rows = q[:, :, begin : begin + _SCORE_CHUNK]
        positions = torch.arange(offset + begin, offset + begin + rows.shape[2], device=q.device)
        end = offset + begin + rows.shape[2]
        everything = torch.ones(1, 1, rows.shape[2], 1, dtype=torch.bool, device=q.device)  # one block of all keys
        outs.append(
            attend_blocks(rows, k[:, :, :end], v[:, :, :end], everything, positions, block_size=end, scale=scale)
        )
    return torch.cat(outs, 2)
