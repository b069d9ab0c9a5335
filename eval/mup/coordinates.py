"""The coordinate check: how large the entries of each kind of layer's output are, by width, over the first steps.

Under muP neither their size nor what training changes in them depends on the width, in any layer (Tensor Programs V,
arXiv:2203.03466, appendix D.1). The logits' size before training is the exception: as a sum of random terms that is
divided by the width it falls with the width's square root, slope -0.5, and training fills in what does not fall.
"""

import math
import statistics

import torch

from .experiment import Cell, Corpus, Settings, finite_or_none, train

# Last part of a module's name ("layer": a number) -> kind of layer. Outputs of the same kind in different layers count
# as one tensor.
KINDS = {
    "embed_tokens": "embedding",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention output",
    "gate_proj": "MLP gate",
    "up_proj": "MLP up",
    "down_proj": "MLP output",
    "layer": "residual stream",
    "model": "hidden state",
    "lm_head": "logits",
}
PROBE_SEQUENCES = 4
FLAT = 0.2  # largest slope, either way, that is called flat


class Observer:
    """Sizes of the activations on held-out sequences, and of their change since the first call."""

    def __init__(self, probe: torch.Tensor):
        """Take the sequences `[B, T]` that the model is shown."""
        self.probe = probe
        self.first: dict[str, list[torch.Tensor]] = {}
        self.scale: dict[str, list[float]] = {kind: [] for kind in KINDS.values()}
        self.change: dict[str, list[float]] = {kind: [] for kind in KINDS.values()}

    def __call__(self, model) -> None:
        outputs = self.record(model)
        self.first = self.first or outputs
        for kind, tensors in outputs.items():
            self.scale[kind].append(root_mean_square(tensors))
            self.change[kind].append(root_mean_square([a - b for a, b in zip(tensors, self.first[kind])]))

    @torch.no_grad()
    def record(self, model) -> dict[str, list[torch.Tensor]]:
        """The outputs of each kind of layer, one tensor a layer."""
        outputs: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS.values()}
        hooks = []
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            kind = KINDS.get("layer" if last.isdigit() else last)
            if kind:

                def keep(module, inputs, output, kind=kind):
                    outputs[kind].append(output if torch.is_tensor(output) else output.last_hidden_state)

                hooks.append(module.register_forward_hook(keep))
        try:
            model(input_ids=self.probe, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


def root_mean_square(tensors: list[torch.Tensor]) -> float:
    """Over all entries of all tensors."""
    total = sum(tensor.double().square().sum().item() for tensor in tensors)
    return math.sqrt(total / sum(tensor.numel() for tensor in tensors))


def run_cell(settings: Settings, cell: Cell, corpus: Corpus) -> dict:
    """Train a few steps; `scale` and `change` by kind of layer before the first step and after each, or None."""
    observer = Observer(corpus.held_out_windows(settings)[:PROBE_SEQUENCES, :-1])
    _, result = train(settings, cell, corpus, observer)
    measures = {
        name: {kind: [finite_or_none(value) for value in values] for kind, values in sizes.items()}
        for name, sizes in (("scale", observer.scale), ("change", observer.change))
    }
    return {**result, **measures}


def mean_over_seeds(
    cells: list[dict], parametrization: str, width: int, measure: str, kind: str
) -> list[float | None]:
    """The size of a kind of layer at each step; None where a seed has none."""
    by_seed = [
        cell[measure][kind] for cell in cells if (cell["parametrization"], cell["width"]) == (parametrization, width)
    ]
    return [None if None in values else statistics.fmean(values) for values in zip(*by_seed)]


def slope(widths: list[int], sizes: list[float | None]) -> float | None:
    """Least-squares slope of log(size) against log(width); None where a size is 0 or missing."""
    if not all(sizes):
        return None
    fit = statistics.linear_regression([math.log(width) for width in widths], [math.log(size) for size in sizes])
    return round(fit.slope, 4)


def summarize(settings: Settings, cells: list[dict]) -> dict:
    """Slopes by parametrisation, measure and kind of layer, a value a step; sizes are means over seeds.

    Returns:
        `slopes`; `largest_at_the_end`: by parametrisation and measure, the steepest slope after the last step, without
        its sign, None if a size was not finite; `flat`: what is called flat.
    """
    slopes: dict = {}
    largest: dict = {}
    for parametrization in settings.parametrizations:
        for measure in ("scale", "change"):
            kinds = slopes.setdefault(parametrization, {}).setdefault(measure, {})
            for kind in KINDS.values():
                sizes = [mean_over_seeds(cells, parametrization, width, measure, kind) for width in settings.widths]
                kinds[kind] = [slope(list(settings.widths), list(step)) for step in zip(*sizes)]
            ends = [values[-1] for values in kinds.values()]
            largest.setdefault(parametrization, {})[measure] = None if None in ends else max(map(abs, ends))
    return {"slopes": slopes, "largest_at_the_end": largest, "flat": FLAT}


def describe(summary: dict) -> str:
    """The summary in lines: the slopes at the end, and whether they are flat."""
    lines = []
    for parametrization, measures in summary["slopes"].items():
        for measure, kinds in measures.items():
            largest = summary["largest_at_the_end"][parametrization][measure]
            if largest is None:
                lines.append(f"{parametrization}, slope of {measure}: not finite")
                continue
            values = ", ".join(f"{kind} {values[-1]:+.2f}" for kind, values in kinds.items())
            word = "flat" if largest <= summary["flat"] else "not flat"
            lines.append(f"{parametrization}, slope of {measure}: {word} (at most {largest:.2f} either way): {values}")
    return "\n".join(lines)
