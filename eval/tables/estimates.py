"""What reproducing the tables takes on one GPU: hours and memory, estimated from the models' sizes.

    FLOPs of a prompt of T tokens  = 2 N T + 4 L H D * sum of the attended tokens       (N: weights without embeddings)
    bytes of a generated token     = 2 N' / B + 4 L K D * T          (N': all weights; B sequences at a time, 2 bytes)
    hours   = samples * (FLOPs / (peak FLOP/s * 0.4) + generated tokens * bytes / (peak bytes/s * 0.6)) / 3600
    memory  = 2 N' + B * 4 L K D * T + 2 GiB

L layers, H query heads, K key heads, D head dim. The shares of the peaks and the 2 GiB (CUDA, activations, a chunk of
logits) are assumptions, and so are the mean lengths below: nothing here was measured. What choosing the blocks of
sparse attention takes is left out.
"""

from dataclasses import dataclass

from minicpm4_hf import MiniCPM4Config
from minicpm4_hf.attended import mean_attended_tokens
from minicpm4_hf.presets import build_config

GIB = 1024**3
PEAK_FLOPS, PEAK_BYTES = 312e12, 2.0e12  # a second, of an A100 of 80 GB, bfloat16 (NVIDIA's data sheet)
FLOPS_SHARE, BYTES_SHARE = 0.4, 0.6
OVERHEAD_BYTES = 2 * GIB


@dataclass(frozen=True)
class Workload:
    """A benchmark.

    Args:
        samples: prompts; choices of a question share its prompt.
        prompt_tokens, new_tokens: means, assumed.
        batch: sequences that are generated together.
        sparse: with sparse attention beyond `dense_len`.
    """

    samples: int
    prompt_tokens: int
    new_tokens: int
    batch: int = 16
    sparse: bool = False


# Samples: the published test sets (C-Eval and BoolQ, PIQA, WinoGrande: validation, whose answers are public).
STANDARD = {
    "MMLU": Workload(14042, 800, 1),
    "CMMLU": Workload(11582, 600, 1),
    "C-Eval": Workload(1346, 600, 1),
    "BBH": Workload(6511, 900, 250),
    "GSM8K": Workload(1319, 700, 250),
    "MATH-500": Workload(500, 700, 700),
    "MBPP": Workload(500, 600, 200),
    "HumanEval": Workload(164, 200, 300),
}
TERNARY_SET = {
    "ARC-c": Workload(1172, 400, 1),
    "ARC-e": Workload(2376, 400, 1),
    "BoolQ": Workload(3270, 250, 1),
    "PIQA": Workload(1838, 200, 1),
    "WinoGrande": Workload(1267, 150, 1),
    "MMLU-Redux": Workload(5700, 800, 1),
}
RULER_SAMPLES, RULER_TASKS, RULER_NEW_TOKENS = 500, 13, 100
NEEDLE_LENGTHS = tuple(131072 * step // 10 for step in range(1, 11))
NEEDLE_DEPTHS, NEEDLE_SAMPLES = 10, 20


def ruler(length: int) -> Workload:
    """All thirteen tasks at one length, one sample at a time."""
    return Workload(RULER_SAMPLES * RULER_TASKS, length, RULER_NEW_TOKENS, batch=1, sparse=True)


# What is reproduced: title, models, workloads.
PLANS: tuple[tuple[str, tuple[str, ...], tuple[Workload, ...]], ...] = (
    ("Table 5", ("MiniCPM4-0.5B", "MiniCPM4-8B"), tuple(STANDARD.values())),
    ("Table 3, ternary", ("BitCPM4-0.5B", "BitCPM4-1B"), tuple(STANDARD.values())),
    ("ternary set beside it", ("BitCPM4-0.5B", "BitCPM4-1B"), tuple(TERNARY_SET.values())),
    ("Table 4, one column", ("MiniCPM4-8B",), tuple(STANDARD.values())[:-1]),
    ("RULER at 32K", ("MiniCPM4-8B",), (ruler(32768),)),
    ("RULER at 128K", ("MiniCPM4-8B",), (ruler(131072),)),
    (
        "Figure 7",
        ("MiniCPM4-8B",),
        tuple(Workload(NEEDLE_DEPTHS * NEEDLE_SAMPLES, length, 8, batch=1, sparse=True) for length in NEEDLE_LENGTHS),
    ),
    ("LongPPL, 50 windows of 32K", ("MiniCPM4-8B",), (Workload(50, 32768, 0, batch=1, sparse=True),)),
)


def count_parameters(config: MiniCPM4Config) -> tuple[int, int]:
    """All weights, and those of the layers alone."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    attention = 2 * width * heads * config.head_dim  # queries and outputs, keys and values
    layer = attention + 3 * width * config.intermediate_size + 2 * width
    layers = config.num_hidden_layers * layer
    return layers + width + width * config.vocab_size * (1 if config.tie_word_embeddings else 2), layers


def estimate(config: MiniCPM4Config, workload: Workload, sparse_config: dict | None) -> tuple[float, int]:
    """Hours and bytes of memory of a workload on one GPU; the module's formulas.

    Args:
        sparse_config: of the sparse path, or None.
    """
    total, layers = count_parameters(config)
    attending = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    cached = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # bytes a token
    tokens = workload.prompt_tokens
    attended = mean_attended_tokens(tokens, sparse_config if workload.sparse else None)
    flops = tokens * (2 * layers + attending * attended)
    length = tokens + workload.new_tokens
    read = 2 * total / workload.batch + cached * length
    seconds = flops / (PEAK_FLOPS * FLOPS_SHARE) + workload.new_tokens * read / (PEAK_BYTES * BYTES_SHARE)
    return workload.samples * seconds / 3600, 2 * total + workload.batch * cached * length + OVERHEAD_BYTES


def render_estimates() -> str:
    """A Markdown table, a line a plan and model."""
    lines = [
        "| what | model | samples | hours (estimate) | GPU memory, GiB (estimate) |",
        "|---|---|---|---|---|",
    ]
    sparse_config = build_config("MiniCPM4-8B", sparse=True).sparse_config
    for title, models, workloads in PLANS:
        for model in models:
            found = [estimate(build_config(model), workload, sparse_config) for workload in workloads]
            samples = sum(workload.samples for workload in workloads)
            hours, memory = sum(hours for hours, _ in found), max(memory for _, memory in found) / GIB
            lines.append(f"| {title} | {model} | {samples:,} | {hours:.2g} | {memory:.0f} |")
    return "\n".join(lines)
