"""Write the committed records of the bench into the READMEs, so that no figure in them is typed by hand.

    python -m minicpm4_hf.kernels.bench.figures

run in the repository's root, rewrites the blocks of figures in the READMEs of `kernels/cpu`, `kernels/infllm_v2` and
`kernels/lowbit` from the JSON documents in `kernels/bench/records` and `eval/results` (a bench's `--json`, and
`python -m minicpm4_hf.eval speed --output`).
"""

import argparse
import json
import sys
from pathlib import Path

DECODE, PREFILL, PREFILL_AMX = (
    Path(f"kernels/bench/records/cpu-{name}.json") for name in ("decode", "prefill", "prefill-amx")
)
SPEED = tuple(Path(f"eval/results/speed-cpu-{name}.json") for name in ("llama.cpp", "qwen3"))
GPU = tuple(Path(f"eval/results/infllm_v2-{name}.json") for name in ("h100", "training-h100"))
LOWBIT, LOWBIT_SPEED = Path("eval/results/lowbit-cpu.json"), Path("eval/results/speed-cpu-lowbit.json")
LOWBIT_PAIRS = (("ours-ternary", "llama.cpp-tq2_0"), ("ours-int4", "llama.cpp-q4_0"))
MODELS = {"0.5b": "0.5B (16/2 heads x 64)", "8b": "8B (32/2 heads x 128)"}
_BEGIN, _END = "<!-- figures: written by minicpm4_hf.kernels.bench.figures -->", "<!-- end of figures -->"


def _rows(record: dict) -> dict[str, dict[str, dict]]:
    """`times` by shape and candidate."""
    return {shape: {row["name"]: row for row in result["times"]} for shape, result in record["shapes"].items()}


def _best_dense(times: dict[str, dict]) -> dict:
    return min((row for name, row in times.items() if not name.startswith("ours")), key=lambda row: row["median_ms"])


def _describe(record: dict) -> str:
    machine = record["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {record['dtype']}"


def prefill_table(record: dict) -> str:
    """Milliseconds of PyTorch's SDPA and of ours, dense and sparse with selection."""
    lines = [
        "| heads | queries | SDPA, ms | ours dense, ms | ours sparse, ms | sparse over SDPA | dense over SDPA | "
        "sparse, of torch's matrix product |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, times in _rows(record).items():
        model, length, kind = shape.split("-")
        queries = f"last 2,048 of {length.upper()}" if kind == "slice" else length.upper()
        sdpa, dense, sparse = _best_dense(times), times["ours dense cpu"], times["ours cpu"]
        lines.append(
            f"| {MODELS[model]} | {queries} | {sdpa['median_ms']:,.0f} | {dense['median_ms']:,.0f} | "
            f"{sparse['median_ms']:,.0f} | {sparse['speedup']:.1f}x | {dense['speedup']:.1f}x | "
            f"{sparse['of_matmul']:.2f} |"
        )
    return "\n".join(lines)


def decode_table(record: dict) -> str:
    """Microseconds of one token in one layer, selection included."""
    lines = [
        "| heads | keys | best of PyTorch, µs | ours dense, µs | ours sparse, µs | sparse over PyTorch | "
        "sparse over ours dense | sparse, times the reading limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, times in _rows(record).items():
        model, length, _ = shape.split("-")
        rows = _best_dense(times), times["ours dense cpu"], times["ours cpu"]
        best, dense, sparse = (row["median_ms"] * 1e3 for row in rows)
        lines.append(
            f"| {MODELS[model]} | {length.upper()} | {best:,.0f} | {dense:,.0f} | {sparse:,.0f} | "
            f"{best / sparse:.1f}x | {dense / sparse:.1f}x | {times['ours cpu']['over_limit']:.2f} |"
        )
    return "\n".join(lines)


def speed_table(document: dict, pairs: tuple[tuple[str, str], ...] | None = None) -> str:
    """Tokens a second of whole models, and ratios of `pairs`: our sparse model over each of the others where None."""
    names = list(document["contestants"])
    pairs = pairs or [("ours-sparse", name) for name in names if not name.startswith("ours")]
    lines = [
        "| | tokens | " + " | ".join(names) + " | " + " | ".join(f"{ours} over {name}" for ours, name in pairs) + " |",
        "|---" * (2 + len(names) + len(pairs)) + "|",
    ]
    for measure, title in (("prompt", "prompt, tokens/s"), ("decode", "decode at depth, tokens/s")):
        for tokens in sorted({row["tokens"] for row in document[measure]}):
            rate = {r["contestant"]: r["tokens_per_s"] for r in document[measure] if r["tokens"] == tokens}
            rates = [f"{rate[name]:,.{1 if rate[name] >= 10 else 2}f}" if name in rate else "" for name in names]
            ratios = [f"{rate[ours] / rate[name]:.2f}x" if name in rate else "" for ours, name in pairs]
            lines.append(f"| {title} | {tokens:,} | " + " | ".join(rates + ratios) + " |")
    return "\n".join(lines)


def gpu_table(records: list[dict]) -> str:
    """Milliseconds of FlashAttention and of the fastest dense attention, and ours, by case."""
    lines = [
        "| case | FlashAttention-2, ms | fastest dense, ms | ours, ms | over FlashAttention-2 (target) | over the "
        "fastest dense (target) | selection's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        for shape, result in record["shapes"].items():
            times = {row["name"]: row for row in result["times"]}
            ours, flash = times["ours"], times["sdpa flash"]
            fastest = ours["over_fastest_dense"] * ours["median_ms"]
            targets = [result.get(name) for name in ("target", "target_over_fastest_dense")]
            flash_target, dense_target = (f" ({target:g})" if target else "" for target in targets)
            share = f"{result['selection_share']:.0%}" if "selection_share" in result else ""
            digits = 3 if shape.endswith("decode") else 1
            lines.append(
                f"| {shape} | {flash['median_ms']:,.{digits}f} | {fastest:,.{digits}f} | "
                f"{ours['median_ms']:,.{digits}f} | {ours['over_flash']:.2f}x{flash_target} | "
                f"{ours['over_fastest_dense']:.2f}x{dense_target} | {share} |"
            )
    return "\n".join(lines)


def lowbit_table(record: dict) -> str:
    """Milliseconds of one layer by format, and ours over torch's bfloat16 layer and over llama.cpp."""
    lines = [
        "| outputs x inputs, rows | layer | ms | over torch's bfloat16 layer | GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for shape, times in _rows(record).items():
        for name, row in times.items():
            lines.append(
                f"| {shape.replace('-r', ', ')} | {name} | {row['median_ms']:.3f} | {row['speedup']:.2f}x | "
                f"{row['gflops']:,.0f} |"
            )
    return "\n".join(lines)


def cpu_figures(load) -> list[str]:
    """What `kernels/cpu/README.md` shows; `load` reads a record."""
    decode, prefill, amx = load(DECODE), load(PREFILL), load(PREFILL_AMX)
    parts = [
        f"Medians, {_describe(prefill)}, contestants in turns. Inputs are random, which is the worst case: "
        "neighbouring queries share no more of their far blocks than chance has it.",
        "Attention of one layer over a prompt, selection and pooling included:",
        prefill_table(prefill),
        "One token in one layer, keys not in any cache:",
        decode_table(decode),
        "A prompt on a processor with AMX, which PyTorch's attention and matrix product use as well: "
        f"{_describe(amx)}, instruction set `{amx['instruction_set']}`.",
        prefill_table(amx),
    ]
    for path in SPEED:
        parts.append(
            "Whole models of the 0.5B shape (Qwen3: its own 0.6B), on the first machine, random weights, bfloat16; "
            "llama.cpp: F16, flash attention:"
            if path == SPEED[0]
            else "To the length that llama.cpp would need hours to reach:"
        )
        parts.append(speed_table(load(path)))
    return parts


def gpu_figures(load) -> list[str]:
    """What `kernels/infllm_v2/README.md` shows."""
    records = [load(path) for path in GPU]
    machine, ceilings = records[0]["machine"], records[0]["ceilings"]
    return [
        f"Medians of {records[0]['repeats']}, {machine['gpu']}, torch {machine['torch']}, Triton "
        f"{records[0]['versions']['triton']}, {records[0]['dtype']}; measured in the same run: a matrix product at "
        f"{ceilings['matmul_tflops']:.0f} TFLOP/s, a copy at {ceilings['copy_tbs']:.2f} TB/s. A case is named heads - "
        "batch x keys - selected blocks - what is done: `prefill` is pooling, selection and attention, `attention` "
        "the last alone, `training` attention and its gradient, `decode` one query, as a CUDA graph.",
        gpu_table(records),
    ]


def lowbit_figures(load) -> list[str]:
    """What `kernels/lowbit/README.md` shows."""
    record = load(LOWBIT)
    return [
        f"Medians of one layer, {_describe(record)}, groups of 128 (llama.cpp: its own), contestants in turns, "
        'weights not in the inner caches. "One call" computes all layers in one native call, as a decoder layer does '
        "and as llama.cpp computes its graph.",
        lowbit_table(record),
        "Whole models of the 0.5B shape on the same machine, random weights, the same codes in our folder and in "
        "llama.cpp's file (`python -m minicpm4_hf.eval speed`):",
        speed_table(load(LOWBIT_SPEED), LOWBIT_PAIRS),
    ]


READMES = {
    Path("kernels/cpu/README.md"): cpu_figures,
    Path("kernels/infllm_v2/README.md"): gpu_figures,
    Path("kernels/lowbit/README.md"): lowbit_figures,
}


def render(root: Path, readme: Path) -> str:
    """A README's text with its figures from the records."""
    figures = "\n\n".join(READMES[readme](lambda path: json.loads((root / path).read_text(encoding="utf-8"))))
    text = (root / readme).read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{readme} must hold the markers {_BEGIN!r} and {_END!r}.")
    return f"{before}{begin}\n{figures}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the READMEs; 2 when a record or a marker is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.kernels.bench.figures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository (default: the current folder)")
    args = parser.parse_args(argv)
    try:
        texts = {readme: render(args.root, readme) for readme in READMES}
    except (ValueError, OSError, KeyError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    for readme, text in texts.items():
        (args.root / readme).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
