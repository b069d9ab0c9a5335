"""InfLLM v2 block-sparse attention in plain PyTorch: pool keys, score blocks, select blocks, attend to them.

This is the definition that every kernel is measured against, and the path that runs where no kernel does: any device,
any floating dtype, differentiable (the gradient flows through the attention, never through the selection). It travels
with a checkpoint (`save_pretrained` copies it), so it imports torch and transformers only.

Shapes: B batch, HQ query heads, H key/value heads, G = HQ // H, TQ queries, TK keys, D head size, N pooled keys, NB
blocks, S selected blocks. The queries are the last TQ of the TK positions.

Source: InfLLM-V2 (arXiv:2509.24663) and MiniCPM4 (arXiv:2506.07900) for the method; OpenBMB/infllmv2_cuda_impl at
f908e73 and the official `modeling_minicpm.py` for what the papers leave open.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

# K2, from which the log-sum-exp is estimated, is pooled four times as coarsely as K1: 128/64 for 32/16.
COARSE = 4
# exp(80) times a query group still fits float32: the estimated log-sum-exp can lie far below a true score.
_MAX_EXPONENT = 80.0
# Neighbouring queries share most of their blocks, so this many are processed over the union of their blocks.
_QUERY_CHUNK = 64


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
    num_visible = (positions + 1 - kernel_size).div(stride, rounding_mode="floor") + 1  # [TQ]
    hidden = torch.arange(k_cmp.shape[2], device=q.device) >= num_visible[:, None]  # [TQ, N]
    scores = q.flatten(2, 3) @ k_cmp.to(q.dtype).transpose(-1, -2)
    return scores.unflatten(2, q.shape[2:4]).masked_fill_(hidden, -torch.inf)


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

    A pooled key's weight is `exp(q . k_cmp * scale - lse)`; a block's score is the largest weight among all pooled keys
    whose window touches the block. `lse` is the log-sum-exp over the coarse keys (`lse_approx`), or over `k_cmp` where
    a query sees no coarse key or the exact one is asked for. As upstream, the estimate gets no correction for there
    being four times fewer coarse keys. A pooled key is visible to a query once all its tokens are at or before it;
    upstream hides one legal kernel when the length is 15 modulo 16 (63 modulo 64 for the coarse keys): not here.

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
    q = q.to(torch.promote_types(q.dtype, torch.float32)).reshape(batch, heads, -1, num_queries, dim) * scale
    scores = _pooled_scores(q, k_cmp, positions, kernel_size, kernel_stride)
    sees_coarse = positions + 1 >= COARSE * kernel_size if lse_approx else torch.zeros_like(positions, dtype=torch.bool)
    if sees_coarse.all():
        lse = _pooled_scores(q, k_coarse, positions, COARSE * kernel_size, COARSE * kernel_stride).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)  # [B, H, G, TQ]
        if sees_coarse.any():
            coarse = _pooled_scores(q, k_coarse, positions, COARSE * kernel_size, COARSE * kernel_stride)
            lse = torch.where(sees_coarse, coarse.logsumexp(-1), lse)
    lse.masked_fill_(positions + 1 < kernel_size, 0.0)  # these queries see no kernel: all weights become 0
    weights = scores.sub_(lse.unsqueeze(-1)).clamp_(max=_MAX_EXPONENT).exp_().sum(2)  # [B, H, TQ, N]

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
    if width == union.shape[-1]:
        key_positions = torch.arange(min(width * block_size, num_keys), device=q.device)
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
    mask = mask.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(2, 3)
    q = q.reshape(batch, heads, group * num_queries, dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, query_heads, num_queries, dim)


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
    outs, lists = [], []
    offset = num_keys - num_queries
    # Chunks end at multiples of the chunk size among the keys, so that each shares one local window.
    for begin in range(offset - offset % _QUERY_CHUNK, num_keys, _QUERY_CHUNK):
        begin, end = max(begin, offset), min(begin + _QUERY_CHUNK, num_keys)
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
            lists.append(list_blocks(chosen, budget).expand(k.shape[0], k.shape[1], -1, -1))
        outs.append(attend_blocks(q[:, :, rows], k, v, chosen, positions, block_size=block_size, scale=scale))
    return torch.cat(outs, 2), torch.cat(lists, 2)


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
    for begin in range(0, q.shape[2], _QUERY_CHUNK):
        rows = q[:, :, begin : begin + _QUERY_CHUNK]
        positions = torch.arange(offset + begin, offset + begin + rows.shape[2], device=q.device)
        end = offset + begin + rows.shape[2]
        everything = torch.ones(1, 1, rows.shape[2], 1, dtype=torch.bool, device=q.device)  # one block of all keys
        outs.append(attend_blocks(rows, k[:, :, :end], v[:, :, :end], everything, positions, block_size=end, scale=scale))
    return torch.cat(outs, 2)


class GrowingBuffer:
    """A tensor `[B, H, T, D]` that grows along T; spare room is doubled, so appending T tokens copies O(T)."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = tensor
        self.length = tensor.shape[2]

    @property
    def filled(self) -> torch.Tensor:
        return self.storage[:, :, : self.length]

    def resize_(self, length: int) -> None:
        """Set the length; what lies beyond the old one is undefined until written."""
        if length > self.storage.shape[2] or (self.storage.is_inference() and not torch.is_inference_mode_enabled()):
            batch, heads, capacity, dim = self.storage.shape
            grown = self.storage.new_empty(batch, heads, max(length, 2 * capacity), dim)
            grown[:, :, : self.length] = self.filled
            self.storage = grown
        self.length = length

    def append_(self, new: torch.Tensor) -> None:
        if torch.is_grad_enabled() and (new.requires_grad or self.storage.requires_grad):
            self.storage = torch.cat((self.filled, new), 2)  # writing in place would break the graph
            self.length = self.storage.shape[2]
            return
        begin = self.length
        self.resize_(begin + new.shape[2])
        self.storage[:, :, begin : self.length] = new


class CompressedKeys:
    """Both streams of pooled keys of one layer, brought up to date when asked for.

    Rows may begin at different keys (left padding): a row's windows are counted from its own first key. Entries that a
    row has not filled yet are undefined; no query sees them.
    """

    def __init__(self):
        self.streams: dict[int, GrowingBuffer] = {}  # by pooling factor: 1 and COARSE
        self.num_tokens = 0  # keys pooled so far
        self.starts: torch.Tensor | None = None  # [B] int64 on the CPU

    def update(
        self, k: torch.Tensor, kv_start: torch.Tensor | None, kernel_size: int, kernel_stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the windows that `k [B, H, TK, D]` has completed since the last call; returns both streams."""
        starts = torch.zeros(k.shape[0], dtype=torch.int64) if kv_start is None else kv_start.to("cpu", torch.int64)
        if self.starts is None or not torch.equal(starts, self.starts):
            self.streams, self.num_tokens, self.starts = {}, 0, starts
        uniform = bool((starts == starts[0]).all())
        rows = [(slice(None), int(starts[0]))] if uniform else [(slice(i, i + 1), s) for i, s in enumerate(starts.tolist())]
        for factor in (1, COARSE):
            size, stride = factor * kernel_size, factor * kernel_stride
            if factor not in self.streams:
                self.streams[factor] = GrowingBuffer(k.new_empty(k.shape[0], k.shape[1], 0, k.shape[3]))
            stream = self.streams[factor]
            if stream.storage.device != k.device:
                stream.storage = stream.storage.to(k.device)
            stream.resize_(count_pooled(k.shape[2] - int(starts.min()), size, stride))
            for row, start in rows:
                done, now = (count_pooled(length - start, size, stride) for length in (self.num_tokens, k.shape[2]))
                if now > done:
                    window = k[row, :, start + done * stride : start + (now - 1) * stride + size].detach()
                    stream.storage[row, :, done:now] = pool_keys(window, size, stride)
        self.num_tokens = k.shape[2]
        return self.streams[1].filled, self.streams[COARSE].filled

    def crop(self, num_tokens: int) -> None:
        self.num_tokens = min(self.num_tokens, num_tokens)

    def map_rows(self, change) -> None:
        for stream in self.streams.values():
            stream.storage = change(stream.storage)
        if self.starts is not None:
            self.starts = change(self.starts)

    def to(self, device) -> None:
        for stream in self.streams.values():
            stream.storage = stream.storage.to(device, non_blocking=True)


class SparseLayer(DynamicLayer):
    """Cache layer for InfLLM v2: keys, values and both pooled-key streams, in buffers that grow by doubling.

    With `use_nope` it also keeps the unrotated keys, which are pooled instead of the rotated ones.
    """

    def __init__(self, **kwargs):
        self._buffers: dict[str, GrowingBuffer] = {}
        self.compressed = CompressedKeys()
        super().__init__(**kwargs)

    def _get(self, name: str) -> torch.Tensor | None:
        return self._buffers[name].filled if name in self._buffers else None

    def _set(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            self._buffers.pop(name, None)
        else:
            self._buffers[name] = GrowingBuffer(tensor)

    # Plain tensors to the rest of transformers, which reads and assigns them.
    keys = property(lambda self: self._get("keys"), lambda self, tensor: self._set("keys", tensor))
    values = property(lambda self: self._get("values"), lambda self, tensor: self._set("values", tensor))
    nope_keys = property(lambda self: self._get("nope_keys"), lambda self, tensor: self._set("nope_keys", tensor))

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> "SparseLayer":
        """A sparse layer with what a plain `DynamicLayer` holds."""
        adopted = cls()
        if layer.is_initialized and layer.get_seq_length():
            adopted.lazy_initialization(layer.keys, layer.values)
            adopted.keys, adopted.values = layer.keys, layer.values
        return adopted

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, key_nope=None, **kwargs):
        """Append `[B, H, T, D]` keys and values (and unrotated keys); returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = {"keys": key_states, "values": value_states, "nope_keys": key_nope}
        for name, tensor in new.items():
            if tensor is None:
                continue
            if name in self._buffers and self._buffers[name].length:
                self._buffers[name].append_(tensor)
            else:
                self._set(name, tensor)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)  # nothing to do, or the error of transformers
            return
        for buffer in self._buffers.values():
            buffer.length = max(buffer.length + tokens_to_remove, 0)
        self.compressed.crop(self.get_seq_length())

    def _map_rows(self, change) -> None:
        for buffer in self._buffers.values():
            buffer.storage = change(buffer.storage)
        self.compressed.map_rows(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device), ...])

    def reset(self) -> None:
        super().reset()
        self.nope_keys = None
        self.compressed = CompressedKeys()

    def offload(self) -> None:
        super().offload()
        if self.nope_keys is not None:
            self.nope_keys = self.nope_keys.to("cpu", non_blocking=True)
        self.compressed.to("cpu")

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            if self.nope_keys is not None:
                self.nope_keys = self.nope_keys.to(self.device, non_blocking=True)
            self.compressed.to(self.device)


@dataclass
class SparsePlan:
    """What one forward pass has to know to run sparse; None instead of a plan means: dense."""

    settings: dict  # the full `sparse_config`
    kv_start: torch.Tensor | None  # [B] int64, first real key of each row; None where every row begins at 0


def _first_keys(attention_mask: torch.Tensor | None, num_keys: int) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] != num_keys:
        raise ValueError(
            f"Sparse attention takes an `attention_mask` of shape [batch, {num_keys}] (past and new tokens), got "
            f"{list(attention_mask.shape)}."
        )
    real = attention_mask.bool()
    if real.all():
        return None
    positions = torch.arange(num_keys, device=real.device)
    first = torch.where(real, positions, num_keys).amin(1)
    last = torch.where(real, positions, -1).amax(1)
    if ((last - first + 1).clamp(min=0) != real.sum(1)).any():
        raise ValueError(
            "Sparse attention takes padding at the ends of a row only, but this `attention_mask` has a gap between real "
            "tokens; use left padding for generation (`tokenizer.padding_side = 'left'`)."
        )
    return first


def use_sparse_layers(cache: Cache, dense_len: int) -> None:
    """Replace a cache's plain layers by sparse ones, in place and with their contents.

    Raises:
        ValueError: the cache has layers that cannot hold pooled keys.
    """
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = SparseLayer
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, SparseLayer):
            continue
        if type(layer) is DynamicLayer:
            cache.layers[i] = SparseLayer.adopt(layer)
        elif not (isinstance(layer, StaticLayer) and layer.get_max_length() < dense_len):
            raise ValueError(
                f"Sparse attention keeps pooled keys, which a cache with {type(layer).__name__} has no place for; use the "
                "default dynamic cache (`cache_implementation='dynamic'`, or `DynamicCache(config=model.config)`), or "
                "set `config.sparse_config = None` for dense attention."
            )


def plan_sparse_attention(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_key_values: Cache | None,
    kwargs: dict,
) -> SparsePlan | None:
    """Decide whether a forward pass runs dense (None) or sparse, and check that it can.

    It is dense without a `sparse_config`, and while even the longest row is shorter than `dense_len`.

    Raises:
        ValueError: attention weights asked for, packed sequences, a mask with gaps, or an unfit cache.
    """
    settings = config.sparse_config
    if settings is None:
        return None
    if past_key_values is not None:
        use_sparse_layers(past_key_values, settings["dense_len"])
    past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
    num_keys = int(past_length) + inputs_embeds.shape[1]
    if num_keys < settings["dense_len"]:
        return None
    if kwargs.get("output_attentions") or config.output_attentions:
        raise ValueError(
            "`output_attentions` is not available with sparse attention, which never forms the full weights; set "
            "`config.sparse_config = None` and `attn_implementation='eager'` to get them."
        )
    kv_start = _first_keys(attention_mask, num_keys)
    if attention_mask is None and (position_ids.diff(dim=-1) <= 0).any():
        raise ValueError(
            "Sparse attention takes one sequence a row, but these `position_ids` start anew inside a row (packed "
            "sequences); pass each sequence as a row of its own with left padding and an `attention_mask`."
        )
    return SparsePlan(settings, kv_start)


def infllm_v2_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sparse_plan: SparsePlan,
    cache_layer: SparseLayer | None = None,
    query_nope: torch.Tensor | None = None,
    key_nope: torch.Tensor | None = None,
    dropout: float = 0.0,
    operation=sparse_attention,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for a pass with a plan: `[B, HQ, TQ, D]` in, `[B, TQ, HQ, D]` out.

    A query attends densely while its own length, counted from its row's first key, is below `dense_len`. Upstream
    decides once for the whole batch by the longest row, so that a prompt's result depends on its neighbours and on how
    it is cut into chunks; decided a query at a time it depends on neither.

    Args:
        operation: what runs the sparse queries, with the signature of `sparse_attention`.

    Raises:
        ValueError: attention dropout, which block selection does not support.
    """
    if dropout:
        raise ValueError(f"`attention_dropout` must be 0 with sparse attention, got {dropout}.")
    settings, kv_start = sparse_plan.settings, sparse_plan.kv_start
    num_queries, num_keys = query.shape[2], key.shape[2]
    starts = [0] * query.shape[0] if kv_start is None else kv_start.tolist()
    num_dense = [min(max(settings["dense_len"] - 1 + s - (num_keys - num_queries), 0), num_queries) for s in starts]

    compressed, q_select = None, None
    if min(num_dense) < num_queries:
        pooled = cache_layer.compressed if cache_layer is not None else CompressedKeys()
        source = key
        if settings["use_nope"]:
            source = key_nope if cache_layer is None else cache_layer.nope_keys
            q_select = query_nope
            if source is None or source.shape[2] != num_keys:
                raise ValueError("`use_nope` needs a cache that held unrotated keys from its first token on.")
        compressed = pooled.update(source.to(key.device), kv_start, settings["kernel_size"], settings["kernel_stride"])

    def attend(rows: slice, dense: int) -> torch.Tensor:
        q, k, v = query[rows], key[rows], value[rows]
        parts = []
        if dense:
            end = num_keys - num_queries + dense
            parts.append(_dense_rows(q[:, :, :dense], k[:, :, :end], v[:, :, :end], starts[rows], scaling))
        if dense < num_queries:
            out, _ = operation(
                q[:, :, dense:],
                k,
                v,
                **{n: settings[n] for n in settings if n not in ("use_nope", "dense_len")},
                scale=scaling,
                kv_start=None if kv_start is None else kv_start[rows],
                q_select=None if q_select is None else q_select[rows][:, :, dense:],
                compressed=(compressed[0][rows], compressed[1][rows]),
            )
            parts.append(out)
        return torch.cat(parts, 2)

    if len(set(num_dense)) == 1:
        out = attend(slice(None), num_dense[0])
    else:
        out = torch.cat([attend(slice(i, i + 1), dense) for i, dense in enumerate(num_dense)])
    return out.transpose(1, 2), None


def _dense_rows(q, k, v, starts: list[int], scale: float) -> torch.Tensor:
    """`dense_attention` where rows may begin at different keys; 0 for queries before a row's first key."""
    if not any(starts):
        return dense_attention(q, k, v, scale=scale)
    outs = []
    for row, start in enumerate(starts):
        num_padding = min(max(q.shape[2] - max(k.shape[2] - start, 0), 0), q.shape[2])
        out = q.new_zeros(1, q.shape[1], num_padding, q.shape[3])
        if num_padding < q.shape[2]:
            b = slice(row, row + 1)
            real = dense_attention(q[b, :, num_padding:], k[b, :, start:], v[b, :, start:], scale=scale)
            out = torch.cat((out, real), 2)
        outs.append(out)
    return torch.cat(outs)
