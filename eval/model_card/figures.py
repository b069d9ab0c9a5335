"""Tables of a card's records, and the figure of a training."""

import io


def stage_table(training: dict) -> str:
    """The stages as a Markdown table: what each read, in which way, and the held-out text after it."""
    lines = [
        "| stage | steps x sequences x tokens | learning rate | generated sequences | attention "
        "| held out, bits/byte |",
        "|---|---|---|---|---|---|",
    ]
    for wanted, done in zip(training["recipe"]["stages"], training["stages"], strict=True):
        synthetic = wanted["synthetic"]
        tasks = "none"
        if synthetic:
            tasks = f"{synthetic['share']:.0%}: " + ", ".join(
                f"{n} {share:g}" for n, share in synthetic["tasks"].items()
            )
        attention = "dense" if wanted["sparse_config"] is None else "sparse"
        attention += ", selection trained" if wanted.get("selection") else ""
        size = f"{done['steps']:,} x {wanted['sequences_per_step']} x {wanted['length']:,}"
        lines.append(
            f"| {done['name']} | {size} | {wanted['learning_rate']:g} | {tasks} | {attention} "
            f"| {done['held_out_bits_per_byte']:.3f} |"
        )
    return "\n".join(lines)


def benchmark_table(records: list[dict]) -> str:
    """Records of `eval benchmarks` as a Markdown table: a line a task, a column an attention; "-" was not measured."""
    columns: dict[str, dict[str, dict]] = {}
    for record in records:
        columns.setdefault(attention_of(record), {}).update({row["task"]: row for row in record["rows"]})
    lines = [f"| | samples | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    tasks = {task: row for rows in columns.values() for task, row in rows.items()}
    for task, row in tasks.items():
        scores = " | ".join(f"{rows[task]['score']:.1f}" if task in rows else "-" for rows in columns.values())
        lines.append(f"| {task} | {row['samples']} | {scores} |")
    return "\n".join(lines)


def attention_of(record: dict) -> str:
    """How the model of a record attends: as "dense" or "sparse" in the cards."""
    return "dense" if record["model"]["sparse_config"] is None else "sparse"


def ruler_table(records: list[dict]) -> str:
    """Records of `eval ruler` at different lengths as a Markdown table: a line a task, dense / sparse by length."""
    rows = [row for record in records for row in record["rows"]]
    averages = [row for record in records for row in record["averages"]]
    scores = {(row["length"], row["mode"], row["task"]): row["score"] for row in rows}
    scores |= {(row["length"], row["mode"], "average"): row["score"] for row in averages}
    samples = {row["length"]: row["samples"] for row in rows}
    lengths = sorted(samples)
    lines = [
        "| dense / sparse | " + " | ".join(f"{length:,} ({samples[length]} a task)" for length in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for task in [*dict.fromkeys(row["task"] for row in rows), "average"]:
        cells = (f"{scores[n, 'dense', task]:.1f} / {scores[n, 'sparse', task]:.1f}" for n in lengths)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_training(training: dict) -> str:
    """The training loss and the held-out bits per byte over all stages, against the tokens read; SVG text.

    The same record gives the same file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: `pip install minicpm4-hf[eval]`.") from error

    with matplotlib.rc_context({"svg.hashsalt": "minicpm4-books", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 4.4))
        figure.set_layout_engine("constrained")
        FigureCanvasSVG(figure)
        above, below = figure.subplots(2, 1, sharex=True)
        begin = 0.0
        for number, stage in enumerate(training["stages"]):
            scale = stage["tokens"] / stage["steps"] / 1e6
            held_out = stage["evaluations"]
            points = ((above, held_out, "held_out_bits_per_byte", "o-"), (below, stage["log"], "loss", "-"))
            for axis, lines, key, style in points:
                places = [begin + line["step"] * scale for line in lines]
                axis.plot(places, [line[key] for line in lines], style, color="C0", markersize=3, linewidth=1)
                if number % 2:
                    axis.axvspan(begin, begin + stage["tokens"] / 1e6, color="0.93", linewidth=0)
            above.text(
                begin + stage["tokens"] / 2e6, 1.02, stage["name"], transform=above.get_xaxis_transform(), ha="center"
            )
            begin += stage["tokens"] / 1e6
        above.set(ylabel="held out, bits/byte")
        below.set(xlabel="tokens read, millions", ylabel="training loss, nats", xlim=(0, begin))
        for axis in (above, below):
            axis.grid(alpha=0.3)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
