"""Time a kernel against PyTorch's dense form on the same tensors, after a parity check on them.

    python -m minicpm4_hf.kernels.bench --op infllm_v2
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --shape 8b-32k-decode --repeats 30 --json speed.json
    python -m minicpm4_hf.kernels.bench --op dense --shape 0.5b-32k-prefill --dtype bfloat16 --device cpu
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --device cuda --dtype bfloat16
    python -m minicpm4_hf.kernels.bench --op infllm_v2 --device cuda --dtype bfloat16 --shape 8b-2x128k-s64-training
    python -m minicpm4_hf.kernels.bench --op lowbit --shape 4096x4096-r1 --shape 11008x4096-r16 --group 64

The candidates take turns, over so many different inputs that none finds its keys or weights in a cache. Two ceilings
of the machine are measured in the same turns: the rate of a large matrix product, and how fast memory is read. The
last line of stdout is one JSON document.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from minicpm4_hf.kernels import BACKENDS
from minicpm4_hf.kernels.bench import lowbit
from minicpm4_hf.kernels.bench.cuda import GPU_DEFAULTS, describe_gpu, gpu_cases, measure_case, print_case
from minicpm4_hf.kernels.bench.registry import OPS, Op, Shape, measure_parity
from minicpm4_hf.kernels.bench.timing import COLD_BYTES, MATMUL, MEMORY, ceilings, time_in_turns
from minicpm4_hf.kernels.cpu import load_library, why_missing

DTYPES = ("float32", "bfloat16", "float16")


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


def bench_shape(
    op: Op, shape: Shape, dtype: torch.dtype, device: str, repeats: int, backends: list[str] | None = None
) -> dict:
    """Check every backend at one shape, then time all of them, the dense forms and the machine's ceilings.

    Returns:
        `parity`: a row a backend; `times`: a row a candidate, with the speed-up over the fastest dense form;
        `ceilings`: GFLOP/s and GB/s; for our calls `gflops` of attention (prefill), or `over_limit`, the time over
        that of reading what must be read (decoding).

    Raises:
        RuntimeError: a backend is wrong; nothing is timed then.
    """
    backends = backends or op.backends(torch.device(device).type)
    inputs = [op.make_inputs(shape, dtype, device, 0)]
    parity = []
    for backend in backends:
        error, limit = measure_parity(op, shape, backend, inputs[0])
        if error > limit:
            raise RuntimeError(f"backend {backend} differs from dense attention by {error:.2e} (allowed {limit:.2e})")
        parity.append({"backend": backend, "error": error, "limit": limit})

    if shape.num_queries == 1:
        size = sum(tensor.numel() * tensor.itemsize for tensor in inputs[0])
        copies = min(max(-(-COLD_BYTES // size), 8), 64)
        inputs += [op.make_inputs(shape, dtype, device, seed) for seed in range(1, copies)]
    calls = {name: lambda i, form=form: form(*inputs[i]) for name, form in op.dense_forms(shape).items()}
    dense = list(calls)
    for backend in backends:
        kept = [op.keep(shape, backend, k) for _, k, _ in inputs]
        call = op.call(shape, backend)
        calls[f"ours {backend}"] = lambda i, call=call, kept=kept: call(*inputs[i], kept[i])
    best = backends[0]
    if op.call is not OPS["dense"].call:
        ours_dense = OPS["dense"].call(shape, best)
        calls[f"ours dense {best}"] = lambda i: ours_dense(*inputs[i])
    limits = ceilings(dtype, device)
    with torch.no_grad():
        times_ms = time_in_turns(
            {**calls, **{name: call for name, (call, _) in limits.items()}}, repeats, device, len(inputs)
        )

    median_ms = {name: statistics.median(values) for name, values in times_ms.items()}
    best_dense = min(median_ms[name] for name in dense)
    rates = {name: amount / median_ms[name] / 1e6 for name, (_, amount) in limits.items()}  # GFLOP/s, GB/s
    times = []
    for name in calls:
        low, _, high = (
            statistics.quantiles(times_ms[name], n=4, method="inclusive") if len(times_ms[name]) > 1 else (0,) * 3
        )
        row = {
            "name": name,
            "median_ms": median_ms[name],
            "iqr_ms": high - low,
            "calls": len(times_ms[name]),
            "speedup": best_dense / median_ms[name],
        }
        if name.startswith("ours"):
            counted = OPS["dense"] if name.startswith("ours dense") else op
            if shape.num_queries > 1:
                operations = 4 * shape.head_dim * shape.num_query_heads * counted.attended(shape)
                row["gflops"] = operations / median_ms[name] / 1e6
                row["of_matmul"] = row["gflops"] / rates[MATMUL]
            else:
                limit_ms = counted.read(shape) * dtype.itemsize / rates[MEMORY] / 1e6
                row["over_limit"] = median_ms[name] / limit_ms
        times.append(row)
    return {"parity": parity, "times": times, "ceilings": {"matmul_gflops": rates[MATMUL], "read_gb_s": rates[MEMORY]}}


def print_table(name: str, shape: Shape, result: dict) -> None:
    """One shape's rows for a reader."""
    print(
        f"\n{name}: {shape.num_queries} queries, {shape.num_keys} keys, {shape.num_query_heads} query heads, "
        f"{shape.num_kv_heads} key heads, head dim {shape.head_dim}"
    )
    peak = result["ceilings"]
    print(f"  torch's matrix product {peak['matmul_gflops']:.0f} GFLOP/s, memory {peak['read_gb_s']:.1f} GB/s")
    print(f"  {'':24} {'median ms':>12} {'spread ms':>12} {'x best dense':>13}")
    for row in result["times"]:
        note = ""
        if "gflops" in row:
            note = f"   {row['gflops']:.0f} GFLOP/s, {row['of_matmul']:.2f} of the matrix product"
        if "over_limit" in row:
            note = f"   {row['over_limit']:.2f} x the time to read what must be read"
        print(f"  {row['name']:24} {row['median_ms']:12.3f} {row['iqr_ms']:12.3f} {row['speedup']:13.3g}{note}")


def build_parser() -> argparse.ArgumentParser:
    """The command line of the bench."""
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes = "; ".join(f"{name}: {', '.join(op.shapes)}" for name, op in OPS.items())
    parser.add_argument("--op", required=True, choices=(*OPS, lowbit.OP))
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME",
        help=f"repeatable (default: the 8K ones, on a GPU those with a target). {shapes}; on a GPU also {{8b,0.5b}}-"
        "BATCHxLENGTHk-sBLOCKS-{prefill,attention,training} and {8b,0.5b}-1xLENGTHk-s96-decode; "
        f"{lowbit.OP}: OUTPUTSxINPUTS-rROWS (default: {', '.join(lowbit.DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--group", type=int, default=128, metavar="N", help=f"{lowbit.OP}: columns that share a scale (default: 128)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", choices=BACKENDS, help="repeatable (default: the best one)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls of each (default: 10)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the JSON document to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the bench; 0 when done, 1 when a backend is wrong, 2 for a wrong argument."""
    parser = build_parser()
    args = parser.parse_args(argv)
    op = OPS.get(args.op)
    cases = gpu_cases() if args.device == "cuda" and args.op == "infllm_v2" else {}
    if op is None:
        names = args.shape or list(lowbit.DEFAULT_SHAPES)
        packed = {name: lowbit.parse_case(name, args.group) for name in names}
        for name, case in packed.items():
            reason = "it is not OUTPUTSxINPUTS-rROWS" if case is None else lowbit.check_case(case)
            if reason:
                parser.error(f"--shape {name}: {reason}")
    else:
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
        "benchmark": "kernels",
        "op": args.op,
        "version": version("minicpm4-hf"),
        "machine": machine,
        "device": args.device,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "shapes": {},
    }
    if args.device == "cpu" and why_missing() is None:
        document["instruction_set"] = load_library().isa
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + f"; {args.dtype}, {args.repeats} repeats")
    if set(names) & set(cases):
        document.update(describe_gpu())
    for name in names:
        print(f"timing {name}", file=sys.stderr)
        try:
            if op is None:
                backend = args.backend[0] if args.backend else "auto"
                result = lowbit.measure(packed[name], getattr(torch, args.dtype), args.device, args.repeats, backend)
                lowbit.print_table(name, result)
                document["shapes"][name] = result
                continue
            if name in cases:
                document["shapes"][name] = measure_case(
                    cases[name], getattr(torch, args.dtype), args.device, args.repeats, document["ceilings"]
                )
                print_case(cases[name], document["shapes"][name])
                torch.cuda.empty_cache()
                continue
            result = bench_shape(
                op,
                op.shapes[name],
                getattr(torch, args.dtype),
                args.device,
                args.repeats,
                args.backend or op.backends(args.device)[:1],
            )
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
