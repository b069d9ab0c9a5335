"""What a forward pass with InfLLM v2 needs around the operation: the cache layer, the plan, the attention function.

This file travels with a checkpoint (`save_pretrained` copies it), so it imports torch, transformers and its sibling
`sparse_attention.py` only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .sparse_attention import COARSE, count_pooled, dense_attention, pool_keys, sparse_attention


class GrowingBuffer:
    """A tensor `[B, H, T, D]` that grows along T; spare room is doubled, so appending T tokens copies O(T)."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = tensor
        self.length = tensor.shape[2]
        self.is_own = False  # the caller may still hold `tensor`: it is read, never written to

    @property
    def filled(self) -> torch.Tensor:
        return self.storage[:, :, : self.length]

    def resize_(self, length: int) -> None:
        """Set the length; what lies beyond the old one is undefined until written."""
        frozen = self.storage.is_inference() and not torch.is_inference_mode_enabled()
        if length > self.storage.shape[2] or not self.is_own or frozen:
            batch, heads, capacity, dim = self.storage.shape
            grown = self.storage.new_empty(batch, heads, max(length, 2 * capacity), dim)
            grown[:, :, : self.length] = self.filled
            self.storage, self.is_own = grown, True
        self.length = length

    def append_(self, new: torch.Tensor) -> None:
        if torch.is_grad_enabled() and (new.requires_grad or self.storage.requires_grad):
            self.storage = torch.cat((self.filled, new), 2)  # writing in place would break the graph
            self.length, self.is_own = self.storage.shape[2], False  # nor may a later append, after a crop
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
        self.starts: list[int] | None = None  # first key of each row

    def update(
        self,
        k: torch.Tensor,
        kv_start: torch.Tensor | None,
        kernel_size: int,
        kernel_stride: int,
        pool: Callable = pool_keys,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pool the windows that `k [B, H, TK, D]` has completed since the last call; returns both streams.

        `pool` is `pool_keys`, or a kernel that gives the same.
        """
        starts = [0] * k.shape[0] if kv_start is None else kv_start.tolist()
        if starts != self.starts:
            self.streams, self.num_tokens, self.starts = {}, 0, starts
        rows = [(slice(i, i + 1), start) for i, start in enumerate(starts)]
        if starts.count(starts[0]) == len(starts):
            rows = [(slice(None), starts[0])]
        for factor in (1, COARSE):
            size, stride = factor * kernel_size, factor * kernel_stride
            if factor not in self.streams:
                self.streams[factor] = GrowingBuffer(k.new_empty(k.shape[0], k.shape[1], 0, k.shape[3]))
            stream = self.streams[factor]
            if stream.storage.device != k.device:
                stream.storage = stream.storage.to(k.device)
            length = count_pooled(k.shape[2] - min(starts), size, stride)
            if length != stream.length:
                stream.resize_(length)
            for row, start in rows:
                done, now = (count_pooled(end - start, size, stride) for end in (self.num_tokens, k.shape[2]))
                if now > done:
                    window = k[row, :, start + done * stride : start + (now - 1) * stride + size].detach()
                    stream.storage[row, :, done:now] = pool(window, size, stride)
        self.num_tokens = k.shape[2]
        return self.streams[1].filled, self.streams[COARSE].filled

    def get_complete(self, num_tokens: int, kernel_size: int, kernel_stride: int) -> tuple | None:
        """Both streams if keys up to `num_tokens` complete no further window, in rows without padding; else None."""
        done, now = (count_pooled(n, kernel_size, kernel_stride) for n in (self.num_tokens, num_tokens))
        if self.starts is None or any(self.starts) or done != now or self.streams[1].length != now:
            return None
        return self.streams[1].filled, self.streams[COARSE].filled

    def crop(self, num_tokens: int) -> None:
        self.num_tokens = min(self.num_tokens, num_tokens)

    def map_rows(self, change) -> None:
        for stream in self.streams.values():
            stream.storage = change(stream.storage)
        if self.starts is not None:
            self.starts = change(torch.tensor(self.starts)).tolist()

    def to(self, device) -> None:
        for stream in self.streams.values():
            stream.storage = stream.storage.to(device, non_blocking=True)


class GrowingLayer(DynamicLayer):
    """Cache layer with keys and values in buffers that grow by doubling; `DynamicLayer` copies all at every token.

    `_buffers` may hold more tensors of the same length, which then share its fate.
    """

    def __init__(self, **kwargs):
        self._buffers: dict[str, GrowingBuffer] = {}
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

    @classmethod
    def adopt(cls, layer: DynamicLayer) -> "GrowingLayer":
        """A layer of this class with the keys and values that another one holds."""
        adopted = cls()
        if layer.is_initialized and layer.get_seq_length():
            adopted.lazy_initialization(layer.keys, layer.values)
            adopted.keys, adopted.values = layer.keys, layer.values
        return adopted

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append `[B, H, T, D]` keys and values; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append("keys", key_states)
        self._append("values", value_states)
        return self.keys, self.values

    def _append(self, name: str, new: torch.Tensor) -> None:
        if name in self._buffers and self._buffers[name].length:
            self._buffers[name].append_(new)
        else:
            self._set(name, new)

    def extend(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Make room for tokens that the caller writes itself: both whole buffers, or None where that cannot be."""
        if not self.is_initialized or set(self._buffers) != {"keys", "values"} or torch.is_grad_enabled():
            return None
        for buffer in self._buffers.values():
            buffer.resize_(buffer.length + num_tokens)
        return self._buffers["keys"].storage, self._buffers["values"].storage

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or not self.is_initialized:
            super().crop(tokens_to_remove)  # nothing to do, or the error of transformers
            return
        for buffer in self._buffers.values():
            buffer.length = max(buffer.length + tokens_to_remove, 0)

    def _map_rows(self, change) -> None:
        for buffer in self._buffers.values():
            buffer.storage = change(buffer.storage)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device), ...])


class SparseLayer(GrowingLayer):
    """Cache layer for InfLLM v2: a growing layer with both pooled-key streams.

    With `use_nope` it also keeps the unrotated keys, which are pooled instead of the rotated ones.
    """

    def __init__(self, **kwargs):
        self.compressed = CompressedKeys()
        super().__init__(**kwargs)

    nope_keys = property(lambda self: self._get("nope_keys"), lambda self, tensor: self._set("nope_keys", tensor))

    def update(self, key_states, value_states, *args, key_nope=None, **kwargs):
        """Append `[B, H, T, D]` keys and values (and unrotated keys); returns all keys and values so far."""
        updated = super().update(key_states, value_states)
        if key_nope is not None:
            self._append("nope_keys", key_nope)
        return updated

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.compressed.crop(self.get_seq_length())

    def _map_rows(self, change) -> None:
        super()._map_rows(change)
        self.compressed.map_rows(change)

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


class StaticSparseLayer(StaticLayer):
    """Cache layer of fixed size for InfLLM v2, with room for both pooled-key streams; lengths stay on the device."""

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len, **kwargs)
        self.pooled: tuple[torch.Tensor, torch.Tensor] | None = None
        self.kv_start: torch.Tensor | None = None  # [B] int64, set by the pass that plans
        self.is_planned = False

    @classmethod
    def adopt(cls, layer: StaticLayer) -> "StaticSparseLayer":
        """A sparse layer in the place of a plain static one that holds nothing yet."""
        adopted = cls(layer.max_cache_len)
        adopted.__dict__.update(layer.__dict__)
        return adopted

    def reset(self) -> None:
        super().reset()
        self.kv_start, self.is_planned = None, False

    def get_pooled(self, kernel_size: int, kernel_stride: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both streams, `[B, H, N, D]` with N as many windows as the layer has room for."""
        if self.pooled is None:
            counts = (count_pooled(self.max_cache_len, f * kernel_size, f * kernel_stride) for f in (1, COARSE))
            self.pooled = tuple(self.keys.new_zeros(*self.keys.shape[:2], n, self.keys.shape[3]) for n in counts)
            for stream in self.pooled:
                torch._dynamo.mark_static_address(stream)  # as transformers does with the keys: for CUDA graphs
        return self.pooled

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        for stream in self.pooled or ():
            stream.copy_(stream.index_select(0, beam_idx.to(stream.device)))


@dataclass
class SparsePlan:
    """What one forward pass has to know to run sparse; None instead of a plan means: dense."""

    settings: dict  # the full `sparse_config`
    kv_start: torch.Tensor | None  # [B] int64, first real key of each row; None where every row begins at 0
    num_keys: int | None = None  # keys in a static cache, the new ones included; None for a step that must not know
    segments: list[list[int]] | None = None  # packed rows, without a cache: lengths of each row's sequences


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
            "Sparse attention takes padding at the ends of a row only, but this `attention_mask` has a gap between "
            "real tokens; use left padding for generation (`tokenizer.padding_side = 'left'`)."
        )
    return first


def sequence_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Where each token stands in its own sequence of a packed row, counted from 0 without gaps; `[B, T]` int64.

    A sequence begins where the position is not above the one before. transformers' mask functions begin one wherever
    the position is not the one before plus 1, and would cut a sequence whose positions skip (PoSE, arXiv:2309.10400);
    given these positions they do not.
    """
    places = torch.arange(position_ids.shape[-1], device=position_ids.device).expand(position_ids.shape)
    begins = F.pad(position_ids.diff(dim=-1) <= 0, (1, 0), value=True)
    return places - places.masked_fill(~begins, 0).cummax(-1).values


def use_growing_layers(cache: Cache) -> None:
    """Replace a cache's plain layers by growing ones, in place and with their contents; others stay."""
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = GrowingLayer.adopt(layer)


def use_sparse_layers(cache: Cache, dense_len: int, device_type: str, use_nope: bool) -> None:
    """Replace a cache's plain layers by sparse ones, in place and with their contents.

    A static layer that ends below `dense_len` stays; a longer one is replaced while it is empty, on a GPU.

    Raises:
        ValueError: the cache has layers that cannot hold pooled keys.
    """
    if cache.layer_class_to_replicate in (DynamicLayer, GrowingLayer):
        cache.layer_class_to_replicate = SparseLayer
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, SparseLayer | StaticSparseLayer):
            continue
        fits = type(layer) is StaticLayer and device_type in STATIC_DEVICES and not use_nope
        if type(layer) in (DynamicLayer, GrowingLayer):
            cache.layers[i] = SparseLayer.adopt(layer)
        elif fits and layer.get_max_length() >= dense_len and not layer.is_initialized:
            cache.layers[i] = StaticSparseLayer.adopt(layer)
        elif not (isinstance(layer, StaticLayer) and layer.get_max_length() < dense_len):
            raise ValueError(
                f"Sparse attention keeps pooled keys, which a cache with {type(layer).__name__} has no place for; use "
                "the default one (`cache_implementation='dynamic'`, or a `DynamicCache(config=model.config)`), or "
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
        ValueError: attention weights asked for, packed sequences with a cache, a mask with gaps, or an unfit cache.
    """
    settings = config.sparse_config
    if settings is None:
        if past_key_values is not None and not torch.compiler.is_compiling():
            use_growing_layers(past_key_values)
        return None
    if past_key_values is not None:
        use_sparse_layers(past_key_values, settings["dense_len"], inputs_embeds.device.type, settings["use_nope"])
        first_layer = past_key_values.layers[0] if past_key_values.layers else None
        if isinstance(first_layer, StaticSparseLayer):
            return _plan_static(settings, attention_mask, inputs_embeds.shape[1], first_layer)
        if isinstance(first_layer, StaticLayer):
            return None  # it ends below `dense_len`; its length is a tensor, which a compiled step must not read
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
    steps = position_ids.diff(dim=-1)
    if attention_mask is None and past_key_values is not None and (steps <= 0).any():
        raise ValueError(
            "A cache takes one sequence a row, but these `position_ids` start anew inside a row (packed "
            "sequences); pass `use_cache=False`, or each sequence as a row of its own with left padding and an "
            "`attention_mask`."
        )
    if attention_mask is None and past_key_values is None and (steps <= 0).any():
        rows = steps.expand(inputs_embeds.shape[0], -1)
        ends = [[*(row <= 0).nonzero()[:, 0].add(1).tolist(), num_keys] for row in rows]
        lengths = [[end - begin for begin, end in zip([0, *row], row)] for row in ends]
        return SparsePlan(settings, None, segments=lengths)
    return SparsePlan(settings, kv_start)


def _plan_static(settings, attention_mask, num_new: int, layer: StaticSparseLayer) -> SparsePlan:
    """The plan for a static cache; a step of few tokens reads no length and no mask, so that it can be compiled."""
    if layer.is_planned and num_new <= STATIC_STEP:
        return SparsePlan(settings, layer.kv_start)
    num_keys = int(layer.get_seq_length()) + num_new
    if attention_mask is not None and attention_mask.dim() == 4:  # generation makes one: its last query sees all
        last = attention_mask[:, 0, -1, :num_keys]
        attention_mask = last if last.dtype == torch.bool else last == 0
    layer.is_planned = True
    layer.kv_start = _first_keys(None if attention_mask is None else attention_mask[:, :num_keys], num_keys)
    return SparsePlan(settings, layer.kv_start, num_keys)


def _dense_rows(q, k, v, *, scale: float, kv_start: torch.Tensor | None) -> torch.Tensor:
    """`dense_attention` where rows may begin at different keys; 0 for queries before a row's first key."""
    starts = [0] if kv_start is None else kv_start.tolist()
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


@dataclass(frozen=True)
class AttentionOperations:
    """The three operations that a backend brings; they take and return what the reference's do.

    Args:
        sparse: `sparse_attention`.
        dense: `(q, k, v, *, scale, kv_start) -> out`, causal attention of the last TQ of TK positions.
        pool_keys: `pool_keys`.
        pool_static: `(k, pooled, num_new, *, kernel_size, kernel_stride, kv_start, kv_end)`, adds the windows that the
            newest keys complete to buffers of fixed size; None where a static cache is not served.
        attend_static: `(q, k, v, pooled, settings, *, scale, kv_start, kv_end) -> out`, a decoding step in them.
    """

    sparse: Callable
    dense: Callable
    pool_keys: Callable
    pool_static: Callable | None = None
    attend_static: Callable | None = None


def _pool_static(operations, layer: StaticSparseLayer, key, num_new: int, plan: SparsePlan):
    """Bring a static layer's pooled keys up to date and return them.

    Raises:
        ValueError: nothing here serves a static cache.
    """
    if operations.pool_static is None:
        raise ValueError(
            "Sparse attention in a static cache needs the Triton kernels (a GPU and `minicpm4-hf[gpu]`); use "
            "the default cache (`cache_implementation='dynamic'`)."
        )
    size, stride = plan.settings["kernel_size"], plan.settings["kernel_stride"]
    pooled = layer.get_pooled(size, stride)
    ends = layer.cumulative_length.expand(key.shape[0]).contiguous()
    rows = {"kv_start": plan.kv_start, "kv_end": ends}
    operations.pool_static(key, pooled, num_new, kernel_size=size, kernel_stride=stride, **rows)
    return pooled


REFERENCE_OPERATIONS = AttentionOperations(sparse_attention, _dense_rows, pool_keys)
# The keys of `sparse_config` that `sparse_attention` takes.
_OPERATION_SETTINGS = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
_ALL_ROWS = slice(None)
STATIC_DEVICES = ("cuda",)  # where a static cache can be sparse
STATIC_STEP = 8  # new tokens that a step in a static cache takes at a time without reading its length


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
    operations: AttentionOperations | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for a pass with a plan: `[B, HQ, TQ, D]` in, `[B, TQ, HQ, D]` out.

    A query attends densely while its own length, counted from its row's first key, is below `dense_len`. Upstream
    decides once for the whole batch by the longest row, so that a prompt's result depends on its neighbours and on how
    it is cut into chunks; decided a query at a time it depends on neither.

    Args:
        operations: what runs the attention; plain PyTorch where None.

    Raises:
        ValueError: attention dropout, which block selection does not support.
    """
    if dropout:
        raise ValueError(f"`attention_dropout` must be 0 with sparse attention, got {dropout}.")
    operations = operations or REFERENCE_OPERATIONS
    if sparse_plan.segments is not None:
        return _attend_segments(module, query, key, value, scaling, sparse_plan, query_nope, key_nope, operations)
    settings, kv_start = sparse_plan.settings, sparse_plan.kv_start
    static = isinstance(cache_layer, StaticSparseLayer)
    if static:
        pooled = _pool_static(operations, cache_layer, key, query.shape[2], sparse_plan)
        if sparse_plan.num_keys is None:
            ends = cache_layer.cumulative_length.expand(query.shape[0]).contiguous()
            options = {"scale": scaling, "kv_start": kv_start, "kv_end": ends}
            return operations.attend_static(query, key, value, pooled, settings, **options).transpose(1, 2), None
        key, value = (tensor[:, :, : sparse_plan.num_keys] for tensor in (key, value))
    num_queries, num_keys = query.shape[2], key.shape[2]
    starts = [0] if kv_start is None else kv_start.tolist()
    num_dense = [min(max(settings["dense_len"] - 1 + s - (num_keys - num_queries), 0), num_queries) for s in starts]

    compressed, q_select = pooled if static else None, None
    if min(num_dense) < num_queries and not static:
        pooled = cache_layer.compressed if cache_layer is not None else CompressedKeys()
        source = key
        if settings["use_nope"]:
            source = key_nope if cache_layer is None else cache_layer.nope_keys
            q_select = query_nope
            if source is None or source.shape[2] != num_keys:
                raise ValueError("`use_nope` needs a cache that held unrotated keys from its first token on.")
        compressed = pooled.update(
            source.to(key.device), kv_start, settings["kernel_size"], settings["kernel_stride"], operations.pool_keys
        )

    def attend(rows: slice, dense: int) -> torch.Tensor:
        q, k, v = query[rows], key[rows], value[rows]
        row_starts = None if kv_start is None else kv_start[rows]
        parts = []
        if dense:
            end = num_keys - num_queries + dense
            parts.append(
                operations.dense(q[:, :, :dense], k[:, :, :end], v[:, :, :end], scale=scaling, kv_start=row_starts)
            )
        if dense < num_queries:
            out, _ = operations.sparse(
                q[:, :, dense:],
                k,
                v,
                **{name: settings[name] for name in _OPERATION_SETTINGS},
                scale=scaling,
                kv_start=row_starts,
                q_select=None if q_select is None else q_select[rows][:, :, dense:],
                compressed=compressed if rows is _ALL_ROWS else (compressed[0][rows], compressed[1][rows]),
            )
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    if len(set(num_dense)) == 1:
        out = attend(_ALL_ROWS, num_dense[0])
    else:
        out = torch.cat([attend(slice(i, i + 1), dense) for i, dense in enumerate(num_dense)])
    return out.transpose(1, 2), None


def _attend_segments(module, query, key, value, scaling, plan: SparsePlan, query_nope, key_nope, operations):
    """`infllm_v2_attention_forward` for packed rows: each sequence alone, dense where shorter than `dense_len`."""
    alone = SparsePlan(plan.settings, None)
    rows = []
    for row, lengths in enumerate(plan.segments):
        parts = [
            infllm_v2_attention_forward(
                module,
                *tensors[:3],
                None,
                scaling=scaling,
                sparse_plan=alone,
                query_nope=tensors[3],
                key_nope=tensors[4],
                operations=operations,
            )[0]
            for tensors in zip(
                *(
                    [None] * len(lengths) if tensor is None else tensor[row : row + 1].split(lengths, 2)
                    for tensor in (query, key, value, query_nope, key_nope)
                )
            )
        ]
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows), None
