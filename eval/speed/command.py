"""The flags of `python -m minicpm4_hf.eval speed`, and what they start."""

import argparse
import json
import os
from pathlib import Path

import torch

from minicpm4_cli.loading import positive_int
from minicpm4_hf.kernels.bench.__main__ import write_atomically
from minicpm4_hf.presets import PRESETS

from .contestants import CONTESTANTS, describe_shape, missing_reason
from .records import Records, sidecar_path
from .report import build_document, describe_host, describe_versions, print_table
from .schedule import GIB, Benchmark, Settings

DTYPES = ("bfloat16", "float16", "float32")
BASELINES = ("llama-sdpa", "qwen3-0.6b", "qwen3-8b", "llama.cpp")  # what ratios are to, unless it is said
EPILOG = """\
examples:
  python -m minicpm4_hf.eval speed --output speed.json
  python -m minicpm4_hf.eval speed --contestants ours-sparse ours-dense --prompt 8192 --depth 0 8192 131072
  python -m minicpm4_hf.eval speed --against llama.cpp --threads 8 --output speed.json --resume
  python -m minicpm4_hf.eval speed --preset tiny --prompt 300 --depth 0 200 --threads 1

contestants:
{contestants}

Every contestant is a process of its own with random weights of one seed; in each round all do the same measurement
in turn, the others waiting. Before that, those with the same weights must give the same logits. A prompt is timed from
its ids to the first token (TTFT). A decode step is timed with that many tokens in the cache: random keys and values,
for llama.cpp those of an evaluated prompt. Peak memory is without Python and its libraries. What --output FILE.json
holds in the end is measurement by measurement in FILE.jsonl, from which --resume goes on. The last line of stdout is
the result as one JSON document.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags, and the help's end."""
    width = max(map(len, CONTESTANTS))
    contestants = "\n".join(f"  {name:{width}}  {entry.title}" for name, entry in CONTESTANTS.items())
    parser.epilog, parser.formatter_class = (
        EPILOG.format(contestants=contestants),
        argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        metavar="NAME",
        help="default: all that are installed, without glm-sdpa and the 8B shapes",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=CONTESTANTS,
        metavar="NAME",
        help=f"what ratios are to (default: those of {', '.join(BASELINES)} that take part)",
    )
    parser.add_argument(
        "--preset",
        choices=("tiny", *PRESETS),
        default="MiniCPM4-0.5B",
        metavar="NAME",
        help="shape of the models; tiny makes all of them small, for a trial (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt", type=positive_int, nargs="*", default=[16384, 32768], metavar="N", help="prompt lengths"
    )
    parser.add_argument(
        "--depth", type=count, nargs="*", default=[0, 16384, 32768, 131072], metavar="N", help="depths to decode at"
    )
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--steps", type=positive_int, default=8, metavar="N", help="decode steps a round (default: %(default)s)"
    )
    parser.add_argument(
        "--once-above",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="do not repeat a measurement that takes longer (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="llama.cpp takes part on the CPU only (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of all but llama.cpp, which runs in F16 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N")
    parser.add_argument(
        "--chunk",
        type=positive_int,
        metavar="N",
        help="prompt tokens a forward pass (default: all, or what fits where attention writes its scores down)",
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="for all workers together, on the host or the GPU (default: 85%% of what the machine has)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result to this file")
    parser.add_argument("--resume", action="store_true", help="go on with the run that wrote --output's .jsonl")


def count(text: str) -> int:
    """argparse type of a number that may be 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def choose_contestants(asked: list[str] | None, against: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Those that take part, and why others do not.

    Raises:
        ValueError: one that was asked for by name cannot run, or a baseline does not take part.
    """
    absent = {name: reason for name in CONTESTANTS if (reason := missing_reason(name))}
    for name in (*(asked or ()), *against):
        if name in absent:
            raise ValueError(absent[name])
        if asked and name not in asked:
            raise ValueError(f"--against {name} is not among the --contestants: {', '.join(asked)}.")
    if asked:
        return tuple(dict.fromkeys(asked)), {}
    return tuple(name for name, entry in CONTESTANTS.items() if name not in absent and not entry.by_name), absent


def default_memory_limit(device: str) -> int:
    """85 % of the memory of the host or the GPU, in bytes."""
    if device == "cuda":
        return int(0.85 * torch.cuda.get_device_properties(0).total_memory)
    return int(0.85 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def run_speed(args: argparse.Namespace) -> dict:
    """Measure what the arguments say, write and print the result.

    Raises:
        ValueError, OSError: wrong input.
        DisagreementError: contestants that must agree do not.
    """
    if args.resume and not args.output:
        raise ValueError("--resume needs the --output of the run to go on with.")
    if not args.prompt and not args.depth:
        raise ValueError("There is nothing to measure: --prompt and --depth are both empty.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs an NVIDIA GPU and a PyTorch built for CUDA; PyTorch finds none here.")
    contestants, absent = choose_contestants(args.contestants, args.against or [])
    against = args.against or [name for name in BASELINES if name in contestants] or [contestants[0]]
    settings = Settings(
        contestants=contestants,
        prompts=tuple(args.prompt),
        depths=tuple(args.depth),
        rounds=args.rounds,
        steps=args.steps,
        preset=args.preset,
        dtype=args.dtype,
        threads=args.threads,
        seed=args.seed,
        chunk=args.chunk,
        once_above_s=args.once_above,
        memory_limit=default_memory_limit(args.device) if args.memory_limit is None else int(args.memory_limit * GIB),
        device=args.device,
    )
    header = {name: getattr(settings, name) for name in ("preset", "dtype", "threads", "seed", "steps", "chunk")}
    header.update(machine=describe_host(settings.threads, settings.device), versions=describe_versions())
    shapes = {name: describe_shape(CONTESTANTS[name].make_config(settings.preset)) for name in contestants}
    records = Records(sidecar_path(args.output) if args.output else None, header, resume=args.resume)
    benchmark = Benchmark(settings, shapes, records)
    benchmark.run()
    document = build_document(benchmark, against, absent)
    print_table(document)
    line = json.dumps(document)
    print(line)
    if args.output:
        write_atomically(args.output, line + "\n")
    return document
