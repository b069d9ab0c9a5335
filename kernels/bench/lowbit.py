"""The bench of packed linear layers: ours against torch's bfloat16 layer, its int4 product and llama.cpp's.

A shape is NxK-rM: outputs, inputs, rows. Groups have 128 columns, or what --group says, but for llama.cpp, whose types
have their own (TQ2_0 256, Q4_0 32). "ours" is timed as a Python call a layer; "ours, one call" computes all layers in
one native call, as a decoder layer does and as llama.cpp computes its graph. Every weight is read from memory: copies
of it follow one another.
"""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minicpm4_hf import quantization
from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.bench import ggml
from minicpm4_hf.kernels.bench.timing import COLD_BYTES, MATMUL, MEMORY, ceilings, time_in_turns
from minicpm4_hf.kernels.lowbit import int4_linear, int8_linear, ternary_linear

OP = "lowbit"
DEFAULT_SHAPES = ("4096x4096-r1", "4096x4096-r8", "4096x4096-r64", "4096x4096-r512", "1024x4096-r1", "4096x1024-r1")
TINY = "64x256-r3"
OURS = {"ternary": ternary_linear, "int4": int4_linear, "int8": int8_linear}
PEER_LIMIT = 0.02  # relative error allowed to others, which round inputs to 8 bits or weights to bfloat16
BASE = "torch bf16 linear"


@dataclass(frozen=True)
class Case:
    outputs: int
    inputs: int
    rows: int
    group_size: int = 128


def parse_case(name: str, group_size: int = 128) -> Case | None:
    """The case of a name "NxK-rM", None for any other name."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)-r([1-9]\d*)", name)
    return None if found is None else Case(*map(int, found.groups()), group_size)


def check_case(case: Case) -> str | None:
    """What the formats need and the case has not, in words."""
    if case.inputs % 256 or case.outputs % 64:
        return "inputs must be a multiple of 256 and outputs of 64, as the formats compared need"
    if case.group_size < 32 or case.group_size & (case.group_size - 1) or case.inputs % case.group_size:
        return f"--group must be a power of two from 32 on that divides the inputs, got {case.group_size}"
    return None


def pack_weight(kind: str, weight: torch.Tensor, group_size: int) -> tuple[tuple, torch.Tensor]:
    """A kind's tensors for `OURS`, and the weight that they stand for, float64."""
    if kind == "ternary":
        codes, scales = quantization.quantize_ternary(weight, group_size)
        return (quantization.pack_ternary(codes), scales), quantization.dequantize_ternary(
            codes, scales, torch.float64
        )
    if kind == "int4":
        codes, scales = quantization.quantize_int4(weight, group_size)
        packed = quantization.pack_gptq(codes, scales)
        return (packed["qweight"], packed["scales"]), quantization.dequantize_int4(codes, scales, dtype=torch.float64)
    codes, scales = quantization.quantize_int8(weight)
    return (codes, scales), codes.double() * scales.double()


def _relative(out: torch.Tensor, exact: torch.Tensor) -> float:
    error = (out.double().cpu() - exact).norm() / exact.norm()
    return error.nan_to_num(nan=float("inf")).item()


def _copies(tensors: tuple, count: int) -> list[tuple]:
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(min(count, -(-COLD_BYTES // size)) - 1)]


def measure(case: Case, dtype: torch.dtype, device: str, repeats: int, backend: str = "auto") -> dict:
    """Check everybody at one case, then time all in turns.

    Returns:
        `parity`: relative errors against float64 over the weight that each format holds; `times`: a row a candidate,
        with the speed-up over torch's bfloat16 layer, the bytes of its weight and the time over that of reading them;
        `ceilings` as for the other operations.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(case.outputs, case.inputs, generator=generator) * case.inputs**-0.5
    x = torch.randn(case.rows, case.inputs, generator=generator).to(dtype)
    on_device, dense = x.to(device), weight.bfloat16()
    calls, sizes, parity, layers = {}, {}, [], []
    count = 64 if case.rows <= 64 else 4
    few = COLD_BYTES // (case.outputs * case.inputs // 4) + 1
    count = min(count, max(few, 4))

    def check(name: str, out: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
        error = _relative(out, exact)
        if not error <= limit:
            raise RuntimeError(f"{name} differs from float64 by {error:.2e} (allowed {limit:.2e})")
        parity.append({"name": name, "error": error, "limit": limit})

    def add(name: str, call: Callable, tensors: tuple) -> None:
        copies = _copies(tuple(t.to(device) for t in tensors), count)
        calls[name] = lambda i: call(*copies[i % len(copies)])
        sizes[name] = sum(t.numel() * t.itemsize for t in tensors)

    rounded = on_device.bfloat16()
    add(BASE, lambda w: F.linear(rounded, w), (dense,))
    exact = x.double() @ weight.double().T
    check(BASE, calls[BASE](0), exact, PEER_LIMIT)
    for kind, function in OURS.items():
        tensors, held = pack_weight(kind, weight, case.group_size)
        exact = x.double() @ held.T
        plain = _relative(F.linear(x, held.to(dtype)), exact)
        name = f"ours {kind}"
        add(name, lambda *args, f=function: f(on_device, *args, backend=backend), tensors)
        check(name, calls[name](0), exact, 2 * plain + 4 * torch.finfo(torch.float32).eps)
        if resolve_backend(device, backend)[0] == "cpu" and dtype == torch.bfloat16 and case.rows <= 8:
            calls[f"{name}, one call"] = _one_call(kind, x, _copies(tensors, count), count)
            sizes[f"{name}, one call"] = sizes[name]
        if kind == "int4" and torch.device(device).type == "cpu" and dtype == torch.bfloat16:
            _add_int4pack(add, x, weight, case.group_size)
            check("torch int4pack_mm", calls["torch int4pack_mm"](0), x.double() @ weight.double().T, 10 * PEER_LIMIT)
        type_name = {"ternary": "TQ2_0", "int4": "Q4_0"}.get(kind)
        if type_name and torch.device(device).type == "cpu" and ggml.missing_reason() is None:
            layers.append(ggml.GgmlLayers(held, type_name, case.rows, count, torch.get_num_threads()))
            layers[-1].set_input(x)
            layers[-1].compute()
            name = f"llama.cpp {type_name}"
            # Its groups are not ours: it quantises what ours stands for once more.
            check(name, layers[-1].output(), x.double() @ layers[-1].weight.double().T, PEER_LIMIT)
            calls[name] = lambda i, graph=layers[-1]: None if i else graph.compute()
            sizes[name] = int(case.outputs * case.inputs * {"TQ2_0": 66 / 256, "Q4_0": 18 / 32}[type_name])
    limits = ceilings(dtype, device)
    with torch.no_grad():
        times_ms = time_in_turns(
            {**calls, **{name: call for name, (call, _) in limits.items()}}, repeats, device, count
        )
    for graph in layers:
        graph.close()
    median_ms = {name: statistics.median(values) for name, values in times_ms.items()}
    rates = {name: amount / median_ms[name] / 1e6 for name, (_, amount) in limits.items()}
    times = []
    for name in calls:
        low, _, high = statistics.quantiles(times_ms[name], n=4, method="inclusive")
        times.append(
            {
                "name": name,
                "median_ms": median_ms[name],
                "iqr_ms": high - low,
                "calls": len(times_ms[name]),
                "speedup": median_ms[BASE] / median_ms[name],
                "weight_bytes": sizes[name],
                "over_limit": median_ms[name] / (sizes[name] / rates[MEMORY] / 1e6),
                "gflops": 2 * case.outputs * case.inputs * case.rows / median_ms[name] / 1e6,
            }
        )
    return {
        "parity": parity,
        "times": times,
        "ceilings": {"matmul_gflops": rates[MATMUL], "read_gb_s": rates[MEMORY]},
        "group_size": case.group_size,
    }


def _one_call(kind: str, x: torch.Tensor, copies: list[tuple], count: int) -> Callable:
    """All copies in one native call, made at index 0."""
    from minicpm4_hf.kernels.cpu import load_library
    from minicpm4_hf.kernels.cpu.library import check_result
    from minicpm4_hf.kernels.cpu.linear import pack_call
    from minicpm4_hf.kernels.cpu.packed import int4_weight, int8_weight, pack_weights, ternary_weight

    make = {"ternary": ternary_weight, "int4": int4_weight, "int8": int8_weight}[kind]
    packed = [make(*copies[i % len(copies)]) for i in range(count)]
    outs = [x.new_empty(len(x), packed[0].out_features) for _ in range(count)]
    arguments = b"".join(pack_call(x, out) + pack_weights((weight,)) for weight, out in zip(packed, outs))

    def call(i, keep=(packed, outs)):
        if i == 0:
            check_result(load_library().mc_linear(arguments, count))

    return call


def _add_int4pack(add: Callable, x: torch.Tensor, weight: torch.Tensor, group_size: int) -> None:
    """torch's own 4-bit product; its codes are 0 to 15 around 8, scales and offsets bfloat16."""
    codes, scales = quantization.quantize_int4(weight, group_size)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    pairs = torch.stack((scales.T, torch.zeros_like(scales.T)), -1).bfloat16().contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    add("torch int4pack_mm", lambda w, s: product(x, w, group_size, s), (packed, pairs))


def print_table(name: str, result: dict) -> None:
    """One case's rows for a reader."""
    peak = result["ceilings"]
    print(f"\n{name}, groups of {result['group_size']}")
    print(f"  torch's matrix product {peak['matmul_gflops']:.0f} GFLOP/s, memory {peak['read_gb_s']:.1f} GB/s")
    print(f"  {'':24} {'median ms':>12} {'spread ms':>12} {'x bf16 linear':>14} {'x reading':>10} {'GFLOP/s':>9}")
    for row in result["times"]:
        print(
            f"  {row['name']:24} {row['median_ms']:12.4f} {row['iqr_ms']:12.4f} {row['speedup']:14.3g} "
            f"{row['over_limit']:10.3g} {row['gflops']:9.4g}"
        )
