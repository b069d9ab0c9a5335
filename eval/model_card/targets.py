"""What the shipped checkpoint was meant to reach, and what was measured: the table of its card."""

from dataclasses import dataclass

# A sum in two or three digits with its steps written out, right answers.
ADDITION_SHARE = 0.9
# Context -> (perplexity with sparse attention over dense, share of the tokens that are attended), at most.
SPARSE_BOUNDS = {8192: (1.005, 0.25), 32768: (1.01, 0.07)}
# Length -> right answers to a fact hidden in prose, over all depths.
NEEDLE_SHARES = {2048: 1.0, 4096: 1.0, 8192: 1.0, 32768: 0.95}
NEEDLE_GAP = 0.01  # between sparse and dense attention at a length, either way


@dataclass(frozen=True)
class Row:
    """A line of the table: what was wanted and measured, as text, and whether it was reached."""

    name: str
    target: str
    measured: str
    reached: bool


def needle_shares(memory: dict) -> dict[int, dict[str, float]]:
    """Right answers as a share, by length and attention."""
    shares = {}
    for row in memory["parts"]["needle"]["rows"]:
        shares.setdefault(row["length"], {})[row["mode"]] = row["solved"] / row["asked"]
    return shares


def check_targets(records: dict) -> list[Row]:
    """Every target against the records `memory` and `compressors`.

    Raises:
        KeyError: a record has no such measurement.
    """
    memory, ppmd = records["memory"]["parts"], records["compressors"]["compressors"]["ppmd"]
    addition = memory["addition"]
    rows = [
        Row(
            "sums of numbers of two and three digits, steps written out",
            f"at least {ADDITION_SHARE:.0%}",
            f"{addition['solved']} of {addition['asked']}, {addition['accuracy']:.1%}",
            addition["accuracy"] >= ADDITION_SHARE,
        )
    ]
    for row in memory["bits-per-byte"]["rows"]:
        if row["mode"] == "dense":
            book = row["text"].removesuffix(".txt")
            wanted = ppmd["bits_per_byte"][book]
            rows.append(
                Row(
                    f"bits per byte of *{book.title()}*, dense",
                    f"below PPMd, {wanted:.3f}",
                    f"{row['bits_per_byte']:.3f}",
                    row["bits_per_byte"] < wanted,
                )
            )
    for row in memory["sparse-dense"]["rows"]:
        ratio, share = SPARSE_BOUNDS[row["context"]]
        rows.append(
            Row(
                f"perplexity at {row['context']:,} tokens, sparse/dense",
                f"at most {ratio:g}, attending to at most {share:.0%}",
                f"{row['ratio']:.3f}, attending to {row['attended_share']:.1%}",
                row["ratio"] <= ratio and row["attended_share"] <= share,
            )
        )
    shares = needle_shares(records["memory"])
    for length, wanted in NEEDLE_SHARES.items():
        found = shares[length]
        rows.append(
            Row(
                f"a fact in {length:,} tokens of prose",
                f"at least {wanted:.0%}, dense and sparse" if wanted < 1 else "100%, dense and sparse",
                f"{found['dense']:.1%} dense, {found['sparse']:.1%} sparse",
                min(found.values()) >= wanted,
            )
        )
    gaps = {length: shares[length]["sparse"] - shares[length]["dense"] for length in NEEDLE_SHARES}
    rows.append(
        Row(
            "the same, sparse less dense, by length",
            f"within {NEEDLE_GAP * 100:g} point",
            ", ".join(f"{gap * 100:+.1f}" for gap in gaps.values()) + " points",
            max(map(abs, gaps.values())) <= NEEDLE_GAP + 1e-9,
        )
    )
    return rows


def target_table(records: dict) -> str:
    """The targets as a Markdown table."""
    lines = ["| | target | measured | reached |", "|---|---|---|---|"]
    for row in check_targets(records):
        lines.append(f"| {row.name} | {row.target} | {row.measured} | {'yes' if row.reached else '**no**'} |")
    return "\n".join(lines)
