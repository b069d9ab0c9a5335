"""Write the committed records of the bench into the READMEs, so that no figure in them is typed by hand.

    python -m minicpm4_hf.kernels.bench.figures

run in the repository's root, rewrites the block of figures in `kernels/cpu/README.md` from the JSON documents in
`kernels/bench/records` (a bench's `--json`) and `eval/results` (`python -m minicpm4_hf.eval speed --output`).
"""

import argparse
import json
import sys
from pathlib import Path

README = Path("kernels/cpu/README.md")
DECODE, PREFILL = (Path(f"kernels/bench/records/cpu-{name}.json") for name in ("decode", "prefill"))
SPEED = tuple(Path(f"eval/results/speed-cpu-{name}.json") for name in ("llama.cpp", "qwen3"))
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


def speed_table(document: dict) -> str:
    """Tokens a second of whole models, and ours over each of the others."""
    names = list(document["contestants"])
    others = [name for name in names if not name.startswith("ours")]
    lines = [
        "| | tokens | " + " | ".join(names) + " | " + " | ".join(f"ours-sparse over {name}" for name in others) + " |",
        "|---" * (2 + len(names) + len(others)) + "|",
    ]
    for measure, title in (("prompt", "prompt, tokens/s"), ("decode", "decode at depth, tokens/s")):
        for tokens in sorted({row["tokens"] for row in document[measure]}):
            rate = {r["contestant"]: r["tokens_per_s"] for r in document[measure] if r["tokens"] == tokens}
            rates = [f"{rate[name]:,.{1 if rate[name] >= 10 else 2}f}" if name in rate else "" for name in names]
            ratios = [f"{rate['ours-sparse'] / rate[name]:.2f}x" if name in rate else "" for name in others]
            lines.append(f"| {title} | {tokens:,} | " + " | ".join(rates + ratios) + " |")
    return "\n".join(lines)


def render(root: Path) -> str:
    """The README's text with its figures from the records."""
    decode, prefill = (json.loads((root / path).read_text(encoding="utf-8")) for path in (DECODE, PREFILL))
    figures = "\n\n".join(
        [
            f"Medians, {_describe(prefill)}, contestants in turns. Inputs are random, which is the worst case: "
            "neighbouring queries share no more of their far blocks than chance has it.",
            "Attention of one layer over a prompt, selection and pooling included:",
            prefill_table(prefill),
            "One token in one layer, keys not in any cache:",
            decode_table(decode),
            *(
                part
                for path in SPEED
                for part in (
                    "Whole models of the 0.5B shape (Qwen3: its own 0.6B), random weights, bfloat16; llama.cpp: F16, "
                    "flash attention:"
                    if path == SPEED[0]
                    else "To the length that llama.cpp would need hours to reach:",
                    speed_table(json.loads((root / path).read_text(encoding="utf-8"))),
                )
            ),
        ]
    )
    text = (root / README).read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{README} must hold the markers {_BEGIN!r} and {_END!r}.")
    return f"{before}{begin}\n{figures}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    """Rewrite the README; 2 when a record or a marker is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.kernels.bench.figures", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository (default: the current folder)")
    args = parser.parse_args(argv)
    try:
        text = render(args.root)
    except (ValueError, OSError, KeyError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    (args.root / README).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
