"""What the bench can time: for each op its shapes, its inputs, the dense PyTorch forms and our own call.

Sizes: `B` batch, `TQ` queries, `TK` keys, `HQ` query heads, `H` key/value heads, `D` head dim, `G = HQ // H`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from minicpm4_hf.attended import attended_tokens
from minicpm4_hf.configuration_minicpm4 import complete_sparse_config
from minicpm4_hf.kernels import BACKENDS, resolve_backend
from minicpm4_hf.kernels.dense import dense_attention
from minicpm4_hf.kernels.infllm_v2 import operations_of, sparse_attention
from minicpm4_hf.sparse_attention import COARSE, count_pooled

NUM_CHECKED_QUERIES = 16  # parity is checked on the last queries: they see every key, and a float64 answer stays cheap


@dataclass(frozen=True)
class Shape:
    """One causal attention problem: the last `num_queries` of `num_keys` tokens ask.

    `budget` holds the op's own settings; without it they are the op's defaults, the official ones.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_keys: int
    num_queries: int
    budget: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An op under the bench.

    Args:
        shapes: name -> `Shape`.
        default_shapes: the names timed when none is asked for.
        make_inputs: `(shape, dtype, device, seed) -> (q, k, v)`.
        dense_forms: `(shape) -> {name: f(q, k, v)}`, each giving what dense attention gives.
        backends: `(device_type) -> names` of the backends that run there, the best one first.
        call: `(shape, backend) -> f(q, k, v, kept)`, our op at the shape's budget.
        call_covering_all: the same, without `kept`, with a budget that covers every key: dense attention's answer.
        keep: `(shape, backend, k) -> kept`, what a cache would hold of the keys before the call; None for nothing.
        attended: `(shape) -> tokens` that all queries attend to.
        read: `(shape) -> elements` of keys, values and pooled keys that one decoding step has to read.
    """

    shapes: dict[str, Shape]
    default_shapes: tuple[str, ...]
    make_inputs: Callable
    dense_forms: Callable
    backends: Callable
    call: Callable
    call_covering_all: Callable
    keep: Callable
    attended: Callable
    read: Callable


HEADS = {"0.5b": (16, 2, 64), "8b": (32, 2, 128)}  # MiniCPM4-0.5B and -8B: HQ, H, D
LENGTHS = {"8k": 8192, "16k": 16384, "32k": 32768, "128k": 131072}
SLICE = 2048  # queries where a whole prefill would take minutes: the last ones of the text


def attention_shapes() -> dict[str, Shape]:
    """Prefill (at 128K its last part) and decoding of one token, each model and length, and `tiny` for a test."""
    shapes = {
        "tiny": Shape(4, 2, 16, 203, 203, dict(kernel_size=8, kernel_stride=4, block_size=8, window_size=16, topk=4))
    }
    for model, heads in HEADS.items():
        for length, num_keys in LENGTHS.items():
            if num_keys <= 32768:
                shapes[f"{model}-{length}-prefill"] = Shape(*heads, num_keys, num_keys)
            else:
                shapes[f"{model}-{length}-slice"] = Shape(*heads, num_keys, SLICE)
            shapes[f"{model}-{length}-decode"] = Shape(*heads, num_keys, 1)
    return shapes


def make_attention_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0):
    """Random `q [1, HQ, TQ, D]`, `k` and `v [1, H, TK, D]`; the same for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (shape.num_query_heads, shape.num_queries), (shape.num_kv_heads, shape.num_keys)
    return tuple(
        torch.randn(1, *size, shape.head_dim, generator=generator).to(device=device, dtype=dtype)
        for size in (queries, keys, keys)
    )


def dense_grouped_view(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query a head: the G heads of a group become G rows, so that the keys are read once. `[B, HQ, 1, D]`."""
    rows = q.reshape(*k.shape[:2], -1, q.shape[-1])  # [B, H, G, D]
    return F.scaled_dot_product_attention(rows, k, v).reshape(q.shape)


def dense_grouped_matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`dense_grouped_view` as two matrix products and a softmax, which wins on some CPUs. `[B, HQ, 1, D]`."""
    rows = q.reshape(*k.shape[:2], -1, q.shape[-1])  # [B, H, G, D]
    weights = torch.softmax(rows @ k.mT * q.shape[-1] ** -0.5, dim=-1, dtype=torch.float32)
    return (weights.to(v.dtype) @ v).reshape(q.shape)


def dense_enable_gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's own grouped attention, causal where the queries are all tokens. `[B, HQ, TQ, D]`."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=1 < q.shape[2] == k.shape[2], enable_gqa=True)


def dense_attention_forms(shape: Shape) -> dict[str, Callable]:
    """The dense forms that compete at this shape; the fastest one is what ours is compared with.

    For a slice SDPA gets no mask, which is wrong and a little more work, but faster than any mask that would be right.
    """
    if shape.num_queries == shape.num_keys:
        return {"sdpa enable_gqa": dense_enable_gqa}
    if shape.num_queries > 1:
        return {"sdpa, no mask": dense_enable_gqa}
    return {
        "sdpa enable_gqa": dense_enable_gqa,
        "sdpa grouped view": dense_grouped_view,
        "matmul grouped view": dense_grouped_matmul,
    }


def backends_on(device_type: str) -> list[str]:
    """Backends that run on tensors of `device_type`, the one that "auto" picks first."""
    names = [name for name, served in BACKENDS.items() if served is None or device_type in served]
    best = resolve_backend(device_type)[0]
    return sorted((name for name in names if name != "cpu" or best == "cpu"), key=lambda name: name != best)


def call_infllm_v2(shape: Shape, backend: str) -> Callable:
    """`sparse_attention` at the shape's own budget; the output without the selected blocks.

    With pooled keys that a cache kept it is the operation as the model calls it, without the public one's checks.
    """
    settings = complete_sparse_config(shape.budget)
    budget = {name: settings[name] for name in settings if name not in ("use_nope", "dense_len")}
    operation = operations_of(backend).sparse

    def call(q, k, v, kept=None):
        if kept is None:
            return sparse_attention(q, k, v, **shape.budget, backend=backend)[0]
        return operation(q, k, v, **budget, compressed=kept)[0]

    return call


def call_infllm_v2_covering_all(shape: Shape, backend: str) -> Callable:
    """`sparse_attention` with as many blocks as there are."""
    num_blocks = -(-shape.num_keys // shape.budget.get("block_size", 64))
    budget = {**shape.budget, "topk": num_blocks + 1}
    return lambda q, k, v: sparse_attention(q, k, v, **budget, backend=backend)[0]


def keep_pooled_keys(shape: Shape, backend: str, k: torch.Tensor):
    """Both streams of pooled keys, which a cache holds when one token is decoded; a prefill pools within the call."""
    if shape.num_queries > 1:
        return None
    settings, pool = complete_sparse_config(shape.budget), operations_of(backend).pool_keys
    size, stride = settings["kernel_size"], settings["kernel_stride"]
    return pool(k, size, stride), pool(k, COARSE * size, COARSE * stride)


def call_dense(shape: Shape, backend: str) -> Callable:
    """Our dense attention; for one token as the model calls it, without the public operation's checks."""
    if shape.num_queries > 1 or backend == "reference":
        return lambda q, k, v, kept=None: dense_attention(q, k, v, backend=backend)
    operation, scale = operations_of(backend).dense, shape.head_dim**-0.5
    return lambda q, k, v, kept=None: operation(q, k, v, scale=scale, kv_start=None)


def _sparse_settings(shape: Shape) -> dict:
    return {**complete_sparse_config(shape.budget), "dense_len": -1}


def attended_tokens_of(shape: Shape, settings: dict | None) -> int:
    """Tokens that all queries of a shape attend to, dense without settings."""
    positions = torch.arange(shape.num_keys - shape.num_queries, shape.num_keys)
    return int(attended_tokens(positions, settings).sum())


def elements_read(shape: Shape, settings: dict | None) -> int:
    """Elements that a decoding step reads at least: keys and values attended to, and both streams of pooled keys."""
    tokens = 2 * attended_tokens_of(shape, settings)
    if settings is not None:
        for factor in (1, COARSE):
            tokens += count_pooled(
                shape.num_keys, factor * settings["kernel_size"], factor * settings["kernel_stride"]
            )
    return tokens * shape.num_kv_heads * shape.head_dim


def dense_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Causal attention of the last TQ tokens, spelled out and computed in `dtype`. `[B, HQ, TQ, D]`."""
    group, num_queries, num_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5  # [B, HQ, TQ, TK]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).triu(num_keys - num_queries + 1)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v


def max_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, taken in float64; NaN counts as infinite."""
    return (x.double() - expected.double()).abs().nan_to_num(nan=float("inf")).max().item()


def measure_parity(op: Op, shape: Shape, backend: str, inputs: tuple) -> tuple[float, float]:
    """Our op, with a budget that covers every key, against dense attention in float64, on the tensors to be timed.

    Returns:
        The largest error and the allowed one: twice the error that the same mathematics makes in the tensors' own
        dtype, plus four of its rounding steps.
    """
    q, k, v = inputs
    q = q[:, :, -NUM_CHECKED_QUERIES:]
    exact = dense_reference(q, k, v, torch.float64)
    limit = 2 * max_error(dense_reference(q, k, v, q.dtype), exact)
    limit += 4 * torch.finfo(q.dtype).eps * exact.abs().max().item()
    return max_error(op.call_covering_all(shape, backend)(q, k, v), exact), limit


DEFAULT_SHAPES = ("0.5b-8k-decode", "8b-8k-decode", "0.5b-8k-prefill", "8b-8k-prefill")
OPS = {
    "infllm_v2": Op(
        shapes=attention_shapes(),
        default_shapes=DEFAULT_SHAPES,
        make_inputs=make_attention_inputs,
        dense_forms=dense_attention_forms,
        backends=backends_on,
        call=call_infllm_v2,
        call_covering_all=call_infllm_v2_covering_all,
        keep=keep_pooled_keys,
        attended=lambda shape: attended_tokens_of(shape, _sparse_settings(shape)),
        read=lambda shape: elements_read(shape, _sparse_settings(shape)),
    ),
    "dense": Op(
        shapes=attention_shapes(),
        default_shapes=DEFAULT_SHAPES,
        make_inputs=make_attention_inputs,
        dense_forms=dense_attention_forms,
        backends=backends_on,
        call=call_dense,
        call_covering_all=call_dense,
        keep=lambda shape, backend, k: None,
        attended=lambda shape: attended_tokens_of(shape, None),
        read=lambda shape: elements_read(shape, None),
    ),
}
