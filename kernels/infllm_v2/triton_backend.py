"""`backend="triton"`: the kernels of this folder as `torch.library` custom ops, and the operation made of them.

Each stage is one op with a fake implementation, so that `torch.compile(fullgraph=True)` sees single nodes:
`minicpm4_hf::compress_keys` (and `compress_keys_` for the newest windows of a static cache), `::select_blocks`,
`::attend_blocks`, differentiable in `q`, `k` and `v`, and `::attend_blocks_backward`.
"""

import torch
import triton

from minicpm4_hf.kernels.infllm_v2.attend import attend_fwd
from minicpm4_hf.kernels.infllm_v2.attend_bwd import attend_bwd
from minicpm4_hf.kernels.infllm_v2.compress import compress_fwd
from minicpm4_hf.kernels.infllm_v2.decode import MAX_QUERIES, attend_decode, list_width, select_decode
from minicpm4_hf.kernels.infllm_v2.topk import MAX_PLANES, num_planes, select_fwd

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_BLOCKS = 32768
MAX_GRID = 65535  # programs along a grid's second axis
COARSE = 4
IS_INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on tensors of any device


def name_misfit(q: torch.Tensor, k: torch.Tensor, settings: dict) -> str | None:
    """What the kernels take and did not get, in one sentence; None where they can run."""
    is_power = lambda n: n & (n - 1) == 0  # noqa: E731
    if q.device.type != "cuda" and not IS_INTERPRETED:
        return f"The triton backend takes CUDA tensors, got tensors on {q.device.type}."
    if q.is_cuda and not torch.compiler.is_compiling() and torch.cuda.get_device_capability(q.device) < (8, 0):
        name = torch.cuda.get_device_name(q.device)
        return f"The triton backend takes GPUs of compute capability 8.0 or later, got {name}."
    if q.dtype not in DTYPES:
        return f"The triton backend takes float16, bfloat16 and float32, got {q.dtype}."
    if q.shape[3] > 128 or q.shape[3] % 16:
        return f"The triton backend takes a head_dim up to 128 that is a multiple of 16, got {q.shape[3]}."
    if q.shape[1] // k.shape[1] > 128:
        return f"The triton backend takes up to 128 query heads a key head, got {q.shape[1] // k.shape[1]}."
    size, stride, block = (settings[name] for name in ("kernel_size", "kernel_stride", "block_size"))
    if not is_power(stride) or not is_power(block) or not 16 <= block <= 128:
        return (
            "The triton backend takes a `kernel_stride` that is a power of 2 and a `block_size` of 16, 32, 64 or 128, "
            f"got {stride} and {block}."
        )
    if num_planes(size, stride, block) > MAX_PLANES:
        return f"The triton backend takes a `kernel_size` that touches up to {MAX_PLANES} blocks, got {size}."
    if k.shape[2] > MAX_BLOCKS * block:
        return f"The triton backend takes up to {MAX_BLOCKS * block} keys, got {k.shape[2]}."
    if q.shape[0] * q.shape[1] > MAX_GRID:
        return f"The triton backend takes up to {MAX_GRID} rows times query heads, got {q.shape[0] * q.shape[1]}."
    return None


def _with_dense_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any strides but the last."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


def _on_device(rows: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Numbers of rows as a kernel reads them."""
    return None if rows is None else rows.to(device).contiguous()


def _allocate_streams(k, kernel_size: int, kernel_stride: int, is_padded: bool, is_packed: bool):
    """Both streams; a packed row's entries begin at its first token over the stride."""
    num_keys, streams = k.shape[2], []
    for factor in (1, COARSE):
        size, stride = factor * kernel_size, factor * kernel_stride
        count = num_keys // stride if is_packed else max((num_keys - size) // stride + 1, 0)
        shape = (*k.shape[:2], count, k.shape[3])
        streams.append(k.new_zeros(shape) if is_padded or is_packed else k.new_empty(shape))
    return tuple(streams)


@torch.library.custom_op("minicpm4_hf::compress_keys", mutates_args=())
def compress_keys(
    k: torch.Tensor,
    kernel_size: int,
    kernel_stride: int,
    kv_start: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both streams of pooled keys of `k [B, H, TK, D]`: `[B, H, N, D]` and the coarse one; 0 where a row has none."""
    (k,) = _with_dense_rows(k)
    fine, coarse = _allocate_streams(k, kernel_size, kernel_stride, kv_start is not None, cu_seqlens is not None)
    if fine.numel():
        compress_fwd(
            k,
            fine,
            coarse,
            kernel_size=kernel_size,
            kernel_stride=kernel_stride,
            kv_start=kv_start,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
    return fine, coarse


@compress_keys.register_fake
def _(k, kernel_size, kernel_stride, kv_start, cu_seqlens, max_seqlen):
    return _allocate_streams(k, kernel_size, kernel_stride, kv_start is not None, cu_seqlens is not None)


@torch.library.custom_op("minicpm4_hf::compress_keys_", mutates_args=("k_cmp", "k_coarse"))
def compress_keys_(
    k: torch.Tensor,
    k_cmp: torch.Tensor,
    k_coarse: torch.Tensor,
    kernel_size: int,
    kernel_stride: int,
    num_new: int,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
) -> None:
    """Add to both streams the windows that each row's last `num_new` keys complete; lengths may be on the device."""
    (k,) = _with_dense_rows(k)
    compress_fwd(
        k,
        k_cmp,
        k_coarse,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        num_new=num_new,
        kv_start=kv_start,
        kv_end=kv_end,
    )


@compress_keys_.register_fake
def _(k, k_cmp, k_coarse, kernel_size, kernel_stride, num_new, kv_start, kv_end):
    return None


@torch.library.custom_op("minicpm4_hf::select_blocks", mutates_args=())
def select_blocks(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    k_coarse: torch.Tensor,
    num_keys: int,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    lse_approx: bool,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    dense_len: int = 0,
) -> torch.Tensor:
    """Blocks for each query of `q [B, HQ, TQ, D]`: int32 `[B, H, TQ, S]`, ascending, padded with -1.

    Args:
        num_keys: keys of a row, padding included; the most it can have where `kv_end` gives the end of each.
        cu_seqlens: int32 `[rows + 1]` for packed rows (B = 1); `max_seqlen` bounds their length.
        dense_len: a query with fewer keys gets all their blocks (decoding only; S grows to hold them).
    """
    q, k_cmp, k_coarse = _with_dense_rows(q, k_cmp, k_coarse)
    settings = {
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
        "block_size": block_size,
        "init_blocks": init_blocks,
        "window_size": window_size,
        "topk": topk,
        "lse_approx": lse_approx,
        "scale": scale,
    }
    if dense_len or _is_decoding(q, k_cmp, cu_seqlens):
        rows = {"kv_start": kv_start, "kv_end": kv_end, "dense_len": dense_len}
        return select_decode(q, k_cmp, k_coarse, num_keys, **settings, **rows)
    rows = {"kv_start": kv_start, "kv_end": kv_end, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return select_fwd(q, k_cmp, k_coarse, num_keys, **settings, **rows)


@select_blocks.register_fake
def _(q, k_cmp, k_coarse, num_keys, size, stride, block_size, init, window_size, topk, *rest, dense_len=0):
    budget, dense_len = topk + window_size // block_size, rest[6] if len(rest) > 6 else dense_len
    width = list_width(budget, dense_len, -(-num_keys // block_size), block_size) if dense_len else budget
    shape = (q.shape[0], k_cmp.shape[1], q.shape[2], width)
    return q.new_empty(shape, dtype=torch.int32)


def _is_decoding(q: torch.Tensor, k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    """Whether the kernels that split one query over the device are to run."""
    return cu_seqlens is None and q.shape[2] <= MAX_QUERIES and q.shape[0] * q.shape[2] * k.shape[1] <= MAX_GRID


@torch.library.custom_op("minicpm4_hf::attend_blocks", mutates_args=())
def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    block_size: int,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each query over its blocks: `o [B, HQ, TQ, D]` and its log-sum-exp `[B, HQ, TQ]`, float32.

    Differentiable through `o`. `block_indices [B, H, TQ, S]` must ascend, end in -1 pads, and hold no block that
    begins after its query. `deterministic` makes `k`'s and `v`'s gradients the same in every run.
    """
    q, k, v = _with_dense_rows(q, k, v)
    rows = {"kv_start": kv_start, "kv_end": kv_end}
    if _is_decoding(q, k, cu_seqlens):
        return attend_decode(q, k, v, block_indices, block_size=block_size, scale=scale, **rows)
    rows |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return attend_fwd(q, k, v, block_indices, block_size=block_size, scale=scale, **rows)


@attend_blocks.register_fake
def _(q, k, v, block_indices, block_size, scale, kv_start, kv_end, cu_seqlens, max_seqlen, deterministic):
    return torch.empty_like(*_with_dense_rows(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("minicpm4_hf::attend_blocks_backward", mutates_args=())
def attend_blocks_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    block_size: int,
    scale: float,
    kv_start: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend_blocks`' `o` with respect to `q`, `k` and `v`."""
    do, q, k, v = _with_dense_rows(do, q, k, v)
    return attend_bwd(
        do,
        q,
        k,
        v,
        o,
        lse,
        block_indices,
        block_size=block_size,
        scale=scale,
        kv_start=kv_start,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        deterministic=deterministic,
    )


@attend_blocks_backward.register_fake
def _(do, q, k, v, *rest):
    return torch.empty_like(*_with_dense_rows(q)), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_for_backward(ctx, inputs, output):
    q, k, v, block_indices, block_size, scale, kv_start, kv_end, cu_seqlens, max_seqlen, deterministic = inputs
    if kv_end is not None and any(ctx.needs_input_grad[:3]):
        raise ValueError("Attention with `kv_end` (a static cache) has no gradient; call it under `torch.no_grad()`.")
    ctx.save_for_backward(q, k, v, *output, block_indices, kv_start, cu_seqlens)
    ctx.mark_non_differentiable(output[1])
    ctx.options = (block_size, scale, max_seqlen, deterministic)


def _attend_blocks_gradient(ctx, do, _):
    q, k, v, o, lse, block_indices, kv_start, cu_seqlens = ctx.saved_tensors
    block_size, scale, max_seqlen, deterministic = ctx.options
    rows = (kv_start, cu_seqlens, max_seqlen, deterministic)
    gradients = attend_blocks_backward(do, q, k, v, o, lse, block_indices, block_size, scale, *rows)
    return *gradients, *(None,) * 8


attend_blocks.register_autograd(_attend_blocks_gradient, setup_context=_keep_for_backward)


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
    kv_end: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`minicpm4_hf.sparse_attention.sparse_attention` on a GPU, and what only kernels offer:

    Args:
        kv_end: integer `[B]` on the device, the end of each row's keys in a longer buffer (a static cache): the
            queries are the last before it. No number is read back, so that a CUDA graph can hold the call; needs
            `compressed`, buffers that `compress_keys_` keeps.
        cu_seqlens: integer `[rows + 1]`, packed rows along the tokens of B = 1, each a text of its own; blocks count
            from the row's first token.
        max_seqlen: longest packed row; the number of tokens where None.
        deterministic: gradients of `k` and `v` that are the same in every run; where None, what
            `torch.use_deterministic_algorithms` asks for.

    Raises:
        ValueError: a device, dtype or shape that the kernels do not take, or arguments that exclude each other.
    """
    settings = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "block_size": block_size}
    misfit = name_misfit(q, k, settings)
    if misfit is not None:
        raise ValueError(misfit)
    if cu_seqlens is not None and (q.shape[0] != 1 or q.shape[2] != k.shape[2] or kv_start is not None):
        raise ValueError(
            "Packed rows (`cu_seqlens`) need one batch entry, as many queries as keys, and no `kv_start`."
        )
    if cu_seqlens is not None and (cu_seqlens.numel() - 1) * k.shape[1] > MAX_GRID:
        raise ValueError(f"The triton backend takes up to {MAX_GRID} packed rows times key heads.")
    if kv_end is not None and compressed is None:
        raise ValueError("`kv_end` needs `compressed`, the pooled keys that `compress_keys_` keeps.")
    kv_start, kv_end, cu_seqlens = (_on_device(rows, q.device) for rows in (kv_start, kv_end, cu_seqlens))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    deterministic = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
    longest = k.shape[2] if max_seqlen is None else max_seqlen
    settings |= {"init_blocks": init_blocks, "window_size": window_size, "topk": topk}
    with torch.no_grad():
        if compressed is None:
            compressed = compress_keys(k.detach(), kernel_size, kernel_stride, kv_start, cu_seqlens, longest)
        block_indices = select_blocks(
            (q if q_select is None else q_select).detach(),
            *compressed,
            k.shape[2],
            *settings.values(),
            lse_approx,
            scale,
            kv_start,
            kv_end,
            cu_seqlens,
            longest,
        )
    rows = (kv_start, kv_end, cu_seqlens, longest, deterministic)
    return attend_blocks(q, k, v, block_indices, block_size, scale, *rows)[0], block_indices


def pool_static(
    k: torch.Tensor,
    pooled: tuple[torch.Tensor, torch.Tensor],
    num_new: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor,
) -> None:
    """Add the windows that the last `num_new` keys of each row complete to buffers of fixed size.

    Args:
        k: `[B, H, TK, D]`, a buffer whose rows end at `kv_end [B]`.
        pooled: `[B, H, N, D]` and the coarse one, with room for the windows of TK keys; changed in place.
    """
    compress_keys_(k, *pooled, kernel_size, kernel_stride, num_new, kv_start, kv_end)


def attend_static(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pooled: tuple[torch.Tensor, torch.Tensor],
    settings: dict,
    *,
    scale: float,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor,
) -> torch.Tensor:
    """A decoding step in buffers of fixed size: up to `MAX_QUERIES` new queries, lengths on the device.

    A query with fewer than `settings["dense_len"]` keys attends to all of them. Grids depend on shapes only and no
    number is read back, so a CUDA graph can hold the step.
    """
    misfit = name_misfit(q, k, settings)
    if misfit is not None:
        raise ValueError(misfit)
    names = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
    selecting = (k.shape[2], *(settings[name] for name in names), True, scale, kv_start, kv_end, None, k.shape[2])
    with torch.no_grad():
        blocks = select_blocks(q, *pooled, *selecting, settings["dense_len"])
        rows = (kv_start, kv_end, None, k.shape[2], False)
        return attend_blocks(q, k, v, blocks, settings["block_size"], scale, *rows)[0]
