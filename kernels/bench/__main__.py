"""Time a kernel against PyTorch's dense attention on the same tensors, after a parity check on them.

    python -m minicpm4_hf.kernels.bench --op infllm_v2
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --shape 8b-32k-decode --repeats 30 --json speed.json
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --device cuda --dtype bfloat16
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --device cuda --dtype bfloat16 --shape 8b-2x128k-s64-training

The candidates take turns, and 256 MB are overwritten before each call, so that none finds its keys in a cache. The
last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from minicpm4_hf.kernels.bench.cuda import GPU_DEFAULTS, describe_gpu, gpu_cases, measure_case, print_case
from minicpm4_hf.kernels.bench.registry import OPS, Op, Shape, measure_parity

DTYPES = ("float32", "bfloat16", "float16")
FLUSH_BYTES = 256 * 1024 * 1024  # more than the last-level cache of today's CPUs and GPUs


def describe_machine(device: str) -> dict:
    """What a figure depends on besides the code."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        processor = names[0] if names else processor
    machine = {"cpu": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def time_in_turns(candidates: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Call each candidate once to warm up, then `repeats` times in turns; wall times in milliseconds."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    synchronize = torch.cuda.synchronize if flush.is_cuda else lambda: None
    times_ms = {name: [] for name in candidates}
    for round_index in range(repeats + 1):
        for name, call in candidates.items():
            flush.fill_(round_index % 256)
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_index:
                times_ms[name].append((time.perf_counter() - start) * 1e3)
    return times_ms


def bench_shape(op: Op, shape: Shape, dtype: torch.dtype, device: str, repeats: int) -> dict:
    """Check every backend at one shape, then time all of them and the dense forms.

    Returns:
        `parity`: a row a backend, and `times`: a row a candidate, with the speed-up over the fastest dense form.

    Raises:
        RuntimeError: a backend is wrong; nothing is timed then.
    """
    inputs = op.make_inputs(shape, dtype, device, 0)
    backends = op.backends(torch.device(device).type)
    parity = []
    for backend in backends:
        error, limit = measure_parity(op, shape, backend, inputs)
        if error > limit:
            raise RuntimeError(f"backend {backend} differs from dense attention by {error:.2e} (allowed {limit:.2e})")
        parity.append({"backend": backend, "error": error, "limit": limit})

    dense = op.dense_forms(shape)
    ours = {f"ours {backend}": op.call(shape, backend) for backend in backends}
    with torch.no_grad():
        times_ms = time_in_turns(
            {name: lambda call=call: call(*inputs) for name, call in {**dense, **ours}.items()}, repeats, device
        )
    best_dense = min(statistics.median(times_ms[name]) for name in dense)
    times = []
    for name, values in times_ms.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        times.append({"name": name, "median_ms": median, "iqr_ms": high - low, "speedup": best_dense / median})
    return {"parity": parity, "times": times}


def print_table(name: str, shape: Shape, result: dict) -> None:
    """One shape's rows for a reader."""
    print(
        f"\n{name}: {shape.num_queries} queries, {shape.num_keys} keys, {shape.num_query_heads} query heads, "
        f"{shape.num_kv_heads} key heads, head dim {shape.head_dim}"
    )
    print(f"  {'':24} {'median ms':>12} {'spread ms':>12} {'x best dense':>13}")
    for row in result["times"]:
        print(f"  {row['name']:24} {row['median_ms']:12.3f} {row['iqr_ms']:12.3f} {row['speedup']:13.3g}")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the bench."""
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = "; ".join(f"{name}: {', '.join(op.shapes)}" for name, op in OPS.items())
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME",
        help=f"repeatable (default: the 8K ones, on a GPU those with a target). {shapes}; on a GPU also {{8b,0.5b}}-"
        "BATCHxLENGTHk-sBLOCKS-{prefill,attention,training} and {8b,0.5b}-1xLENGTHk-s96-decode",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls of each (default: 10)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the JSON document to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the bench; 0 when done, 1 when a backend is wrong, 2 for a wrong argument."""
    parser = build_parser()
    args = parser.parse_args(argv)
    op = OPS[args.op]
    cases = gpu_cases() if args.device == "cuda" else {}
    names = args.shape or list(GPU_DEFAULTS if cases else op.default_shapes)
    for name in names:
        if name not in op.shapes and name not in cases:
            parser.error(f"--shape {name} is not one of {', '.join((*op.shapes, *cases))}")
    if args.repeats < 2:
        parser.error(f"--repeats must be at least 2, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA build of torch and a GPU")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")

    machine = describe_machine(args.device)
    document = {
        "op": args.op,
        "version": version("minicpm4-hf"),
        "machine": machine,
        "device": args.device,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "shapes": {},
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + f"; {args.dtype}, {args.repeats} repeats")
    if set(names) & set(cases):
        document.update(describe_gpu())
    for name in names:
        print(f"timing {name}", file=sys.stderr)
        try:
            if name in cases:
                document["shapes"][name] = measure_case(
                    cases[name], getattr(torch, args.dtype), args.device, args.repeats, document["ceilings"]
                )
                print_case(cases[name], document["shapes"][name])
                torch.cuda.empty_cache()
                continue
            result = bench_shape(op, op.shapes[name], getattr(torch, args.dtype), args.device, args.repeats)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print_table(name, op.shapes[name], result)
        document["shapes"][name] = result
    line = json.dumps(document)
    print(line)
    if args.json:
        write_atomically(args.json, line + "\n")
    return 0


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
