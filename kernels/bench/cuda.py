"""The bench on a GPU: selection, attention, gradient and decoding against PyTorch's dense backends and other kernels.

Each case checks our result against float64 first, then times everybody on the same tensors, in turns, with device
events. Ceilings are measured in the same run: a large matrix product and a large copy.

Sizes: as in registry.py; `S` selected blocks of 64 keys, a third of them the local window.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicpm4_hf.kernels.bench.registry import HEADS

DENSE = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLASH = "sdpa flash"  # the official figures are ratios over it
BLOCK_SIZE = 64
NUM_CHECKED = 16
# Ratios over FlashAttention to reach or beat on an H100: (blocks, batch, mode) -> ratio, 8B heads at 128K.
TARGETS = {
    (16, 1, "prefill"): 9.3,
    (32, 1, "prefill"): 7.1,
    (64, 1, "prefill"): 4.6,
    (96, 1, "prefill"): 4.0,
    (64, 2, "attention"): 5.25,
    (64, 2, "training"): 4.6,
}


@dataclass(frozen=True)
class Case:
    """One problem.

    Args:
        mode: "prefill" (selection and attention), "attention" (over blocks selected before), "training" (attention
            and its gradient over blocks selected before) or "decode" (one query, all of it, as a CUDA graph).
    """

    heads: str
    batch: int
    num_keys: int
    num_blocks: int
    mode: str

    @property
    def name(self) -> str:
        return f"{self.heads}-{self.batch}x{self.num_keys // 1024}k-s{self.num_blocks}-{self.mode}"

    @property
    def settings(self) -> dict:
        local = self.num_blocks // 3
        return {
            "kernel_size": 32,
            "kernel_stride": 16,
            "block_size": BLOCK_SIZE,
            "init_blocks": 1,
            "window_size": local * BLOCK_SIZE,
            "topk": self.num_blocks - local,
        }


def gpu_cases() -> dict[str, Case]:
    """Every case by name: lengths and batches of the official table and batch 1, four budgets, both models."""
    cases = []
    for heads in HEADS:
        for batch, num_keys in ((1, 32768), (1, 65536), (1, 131072), (8, 32768), (4, 65536), (2, 131072)):
            for num_blocks in (16, 32, 64, 96):
                cases += [Case(heads, batch, num_keys, num_blocks, m) for m in ("prefill", "attention", "training")]
        cases += [Case(heads, 1, 8192 << i, 96, "decode") for i in range(6)]
    return {case.name: case for case in cases}


# What runs when no shape is asked for: the cases with a target, and the large model's decoding.
GPU_DEFAULTS = (
    *(f"8b-{batch}x128k-s{blocks}-{mode}" for blocks, batch, mode in TARGETS),
    *(f"8b-1x{length}k-s96-decode" for length in (8, 32, 128, 256)),
)


def time_on_device(candidates: dict[str, Callable], repeats: int, device: str) -> dict[str, list[float]]:
    """Two calls each to warm up, then `repeats` in turns; milliseconds between device events."""
    flush = torch.empty(256 * 1024 * 1024 if device == "cuda" else 1, dtype=torch.uint8, device=device)
    times = {name: [] for name in candidates}
    for round_index in range(repeats + 2):
        for name, call in candidates.items():
            flush.fill_(round_index % 256)
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                elapsed = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                call()
                elapsed = (time.perf_counter() - start) * 1e3
            if round_index > 1:
                times[name].append(elapsed)
    return times


def measure_ceilings(device: str) -> dict[str, float]:
    """TFLOP/s of a bf16 product of 8192 x 8192 matrices, TB/s of a 2 GiB copy (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (2**31,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_on_device({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10, device)
    product, copy = (statistics.median(times[name]) for name in ("product", "copy"))
    return {"matmul_tflops": 2 * 8192**3 / product / 1e9, "copy_tbs": 2 * source.numel() / copy / 1e9}


def make_case_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """Random `q [B, HQ, TQ, D]`, `k`, `v [B, H, TK, D]`."""
    query_heads, num_heads, dim = HEADS[case.heads]
    generator = torch.Generator(device).manual_seed(0)
    num_queries = 1 if case.mode == "decode" else case.num_keys
    shapes = ((query_heads, num_queries), (num_heads, case.num_keys), (num_heads, case.num_keys))
    return tuple(
        torch.randn(case.batch, *shape, dim, generator=generator, device=device, dtype=dtype) for shape in shapes
    )


def attend_checked(q, k, v, blocks, dtype):
    """Attention of the last `NUM_CHECKED` queries over their blocks, gathered, in `dtype`."""
    q, blocks = q[:, :, -NUM_CHECKED:], blocks[:, :, -NUM_CHECKED:]
    num_keys, heads = k.shape[2], k.shape[1]
    positions = torch.arange(num_keys, device=q.device)[-q.shape[2] :]
    keys = (blocks.long().unsqueeze(-1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=q.device)).flatten(-2)
    seen = (keys >= 0) & (keys <= positions[:, None])  # [B, H, T, S * 64]
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    index = (rows, torch.arange(heads, device=q.device)[:, None, None], keys.clamp(0, num_keys - 1))
    gathered_k, gathered_v = k[index].to(dtype), v[index].to(dtype)  # [B, H, T, S * 64, D]
    grouped = q.to(dtype).unflatten(1, (heads, -1)).transpose(2, 3)  # [B, H, T, G, D]
    scores = grouped @ gathered_k.mT * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen.unsqueeze(3), -torch.inf).softmax(-1)
    return (weights @ gathered_v).transpose(2, 3).flatten(1, 2)


def check_case(q, k, v, out, blocks) -> dict[str, float]:
    """The largest error of the last queries, and the allowed one: twice that of the same maths in the dtype.

    Raises:
        RuntimeError: the error is larger, or not a number.
    """
    exact = attend_checked(q, k, v, blocks, torch.float64)
    limit = 2 * (attend_checked(q, k, v, blocks, q.dtype).double() - exact).abs().max().item()
    limit += 4 * torch.finfo(q.dtype).eps * exact.abs().max().item()
    error = (out[:, :, -NUM_CHECKED:].double() - exact).abs().nan_to_num(nan=torch.inf).max().item()
    if error > limit:
        raise RuntimeError(f"the triton backend is off by {error:.2e} (allowed {limit:.2e})")
    return {"error": error, "limit": limit}


def dense_call(backend: SDPBackend, q, k, v) -> Callable:
    """PyTorch's dense attention by one backend; a single query as rows of its group, which reads the keys once."""
    if q.shape[2] == 1:
        rows = q.reshape(*k.shape[:2], -1, q.shape[3])
        call = lambda: F.scaled_dot_product_attention(rows, k, v)  # noqa: E731
    else:
        call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731

    def run():
        with sdpa_kernel(backend):
            return call()

    return run


def flex_call(q, k, v) -> Callable:
    """FlexAttention, compiled, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # after eight shapes it would go on without compiling, which forms all scores
    num_queries, num_keys = q.shape[2], k.shape[2]
    offset = num_keys - num_queries
    mask = create_block_mask(
        lambda b, h, i, j: i + offset >= j, None, None, num_queries, num_keys, device=q.device, _compile=True
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def nsa_call(q, k, v, blocks) -> Callable:
    """The block-sparse stage of flash-linear-attention's Triton NSA over the same blocks."""
    from fla.ops.nsa.parallel import parallel_nsa

    tensors = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    gate = torch.ones(*tensors[0].shape[:3], device=q.device, dtype=q.dtype)
    chosen = blocks.transpose(1, 2).contiguous()
    counts = (chosen >= 0).sum(-1)
    return lambda: parallel_nsa(
        *tensors,
        g_cmp=torch.zeros_like(gate),
        g_slc=gate,
        g_swa=torch.zeros_like(gate),
        block_indices=chosen.clamp(min=0),
        block_counts=counts,
        block_size=BLOCK_SIZE,
        window_size=0,
    )


def our_calls(case: Case, q, k, v, device: str) -> tuple[dict[str, Callable], torch.Tensor, torch.Tensor]:
    """What of ours is timed in a case, our output and the blocks."""
    from minicpm4_hf.kernels.infllm_v2 import triton_backend as ours

    rows = (None, None, None, case.num_keys)
    options, scale = list(case.settings.values()), q.shape[3] ** -0.5

    def select():
        fine, coarse = ours.compress_keys(k, 32, 16, None, None, case.num_keys)
        return ours.select_blocks(q, fine, coarse, case.num_keys, *options, True, scale, *rows)

    def attend(blocks):
        return ours.attend_blocks(q, k, v, blocks, BLOCK_SIZE, scale, *rows, False)[0]

    with torch.no_grad():
        blocks = select()
        out = attend(blocks)
    if case.mode in ("attention", "training"):
        return {"ours": lambda: attend(blocks)}, out, blocks
    calls = {"ours": lambda: attend(select()), "ours, selection": select}
    if case.mode == "decode":  # in a decoding loop the pooled keys are there already
        pooled = ours.compress_keys(k, 32, 16, None, None, case.num_keys)
        select_only = lambda: ours.select_blocks(q, *pooled, case.num_keys, *options, True, scale, *rows)  # noqa: E731
        calls = {"ours": lambda: attend(select_only()), "ours, selection": select_only}
    return calls, out, blocks


def as_graph(call: Callable) -> Callable:
    """A CUDA graph of a call, so that launches do not hide the kernels' time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def with_gradient(call: Callable, leaves) -> Callable:
    """Forward and backward."""
    weight = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(call(), leaves, weight)


def count_work(case: Case, q, k, blocks) -> dict[str, float]:
    """Operations our attention has to do (forward; 3.5 times that with the gradient), and bytes it has to move."""
    last = torch.arange(k.shape[2], device=q.device)[-q.shape[2] :]
    first_of_block = blocks.long() * BLOCK_SIZE
    keys = (last[:, None] + 1 - first_of_block).clamp(0, BLOCK_SIZE).masked_fill(blocks < 0, 0).sum().item()
    flops = 4.0 * keys * q.shape[3] * (q.shape[1] // k.shape[1])
    num_bytes = float((2 * q.numel() + 2 * k.numel()) * q.element_size())
    if case.mode == "decode":
        num_bytes = 2.0 * keys * q.shape[3] * q.element_size()
    return {"flops": flops * (3.5 if case.mode == "training" else 1), "bytes": num_bytes}


def measure_case(case: Case, dtype: torch.dtype, device: str, repeats: int, ceilings: dict) -> dict:
    """Check and time one case.

    Returns:
        `parity`, `times` (a row a contestant: median, spread, ratios over FlashAttention and over the fastest dense
        backend), `left_out` (contestants that did not run, and why), and the achieved rates.
    """
    q, k, v = make_case_inputs(case, dtype, device)
    leaves = [t.requires_grad_() for t in (q, k, v)] if case.mode == "training" else None
    ours, out, blocks = our_calls(case, q, k, v, device)
    result = {"parity": check_case(q.detach(), k.detach(), v.detach(), out, blocks), "left_out": {}}
    del out
    builders = {name: lambda backend=backend: dense_call(backend, q, k, v) for name, backend in DENSE.items()}
    if device == "cuda":
        builders["flex attention"] = lambda: flex_call(q, k, v)
        if find_spec("fla") and case.mode == "attention":
            builders["nsa (fla)"] = lambda: nsa_call(q, k, v, blocks)
    calls = {}
    for name, build in [*builders.items(), *((name, lambda call=call: call) for name, call in ours.items())]:
        try:
            call = build()
            if leaves is not None:
                call = with_gradient(call, leaves)
            if case.mode == "decode" and device == "cuda" and "flex" not in name:
                call = as_graph(call)
            call()
            calls[name] = call
        except (RuntimeError, ImportError, TypeError, ValueError) as error:  # reported, unless it is ours
            if name.startswith("ours"):
                raise
            result["left_out"][name] = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    with torch.set_grad_enabled(leaves is not None):
        times = time_on_device(calls, repeats, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    dense = {name: medians[name] for name in DENSE if name in medians}
    result["times"] = []
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {"name": name, "median_ms": medians[name], "iqr_ms": high - low}
        row["over_flash"] = medians[FLASH] / medians[name] if FLASH in medians else None
        row["over_fastest_dense"] = min(dense.values()) / medians[name] if dense else None
        result["times"].append(row)
    result["target"] = TARGETS.get((case.num_blocks, case.batch, case.mode)) if "128k" in case.name else None
    if case.heads != "8b":
        result["target"] = None
    if case.mode == "decode" and case.num_keys == 131072:
        result["target_over_fastest_dense"] = 8.0
    if "ours, selection" in medians:
        result["selection_share"] = medians["ours, selection"] / medians["ours"]
    work = count_work(case, q, k, blocks)
    result["rates"] = {"tflops": work["flops"] / medians["ours"] / 1e9, "tbs": work["bytes"] / medians["ours"] / 1e9}
    if ceilings:
        result["rates"]["of_matmul"] = result["rates"]["tflops"] / ceilings["matmul_tflops"]
        result["rates"]["of_copy"] = result["rates"]["tbs"] / ceilings["copy_tbs"]
    return result


def print_case(case: Case, result: dict) -> None:
    """One case for a reader."""
    print(f"\n{case.name}: {HEADS[case.heads]} (query heads, key heads, head dim)")
    print(f"  {'':18} {'median ms':>12} {'spread ms':>12} {'x flash':>9} {'x best dense':>13}")
    for row in result["times"]:
        ratios = [f"{row[name]:.3g}" if row[name] else "-" for name in ("over_flash", "over_fastest_dense")]
        print(f"  {row['name']:18} {row['median_ms']:12.3f} {row['iqr_ms']:12.3f} {ratios[0]:>9} {ratios[1]:>13}")
    for name, reason in result["left_out"].items():
        print(f"  {name:18} did not run: {reason}")
    rates = ", ".join(f"{name} {value:.3g}" for name, value in result["rates"].items())
    print(f"  ours: {rates}; target x flash {result['target']}; selection {result.get('selection_share', '-')}")


def describe_gpu() -> dict:
    """What goes into the JSON document beside the machine: date, versions, device, ceilings."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    ceilings = measure_ceilings("cuda")
    print(", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "gpu": {"name": properties.name, "multiprocessors": properties.multi_processor_count},
        "ceilings": ceilings,
    }
