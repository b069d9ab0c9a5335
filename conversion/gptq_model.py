"""Int4 weights for a whole model, one decoder layer in memory at a time, each finished layer kept for a resumed run.

The layer's inputs are those that the quantised layers before it make (GPTQ's order): for each group of linears that
share an input the second moments of that input are summed over the calibration sequences, the linears are quantised
and put in place, and the next group sees their results.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from minicpm4_hf.quantization.int4 import dequantize_int4, quantize_int4

from .gptq import DAMPING, output_error, quantize_gptq
from .gptq_calibration import HiddenStates
from .gptq_layer import INPUT_GROUPS, LINEARS, NORMS, LayerRunner
from .gptq_layout import LAYOUTS
from .gptq_rotation import EMBEDDINGS, HEAD, Rotation
from .gptq_smoothing import smooth_layer_
from .output import Output, Progress
from .source import Checkpoint

STATES_FOLDER = "steps"  # of the partial folder: what a resumed run keeps
PREFIX_TENSORS = ("prefix.keys", "prefix.values")

# Method -> (positions left out of the Hessian, smoothing first); None: round to nearest, without calibration.
# Source: MiniCPM4 technical report (arXiv:2506.07900): P- leaves out 4 positions, S- smooths first.
METHODS = {
    "rtn": None,
    "gptq": (0, False),
    "p-gptq": (4, False),
    "s-gptq": (0, True),
    "s-p-gptq": (4, True),
}


@dataclass(frozen=True)
class Int4Settings:
    """What the int4 weights depend on, beside the checkpoint and the calibration sequences.

    Args:
        method: a key of `METHODS`.
        group_size: columns that share a scale, or -1 for a whole row.
        act_order: quantise columns by falling input energy (see `quantize_gptq`).
        rotate: fold Hadamard rotations into the weights first (see `gptq_rotation`).
        skip_positions: positions at the start of each sequence, a prefix included, that the Hessian leaves out; None
            for the method's own.
        prefix_ids: tokens whose keys and values are stored (see `minicpm4_hf.quantization.prefix`).
        damping: see `quantize_gptq`.
        layout: a key of `gptq_layout.LAYOUTS`.
    """

    method: str = "p-gptq"
    group_size: int = 128
    act_order: bool = False
    rotate: bool = False
    skip_positions: int | None = None
    prefix_ids: tuple[int, ...] = ()
    damping: float = DAMPING
    layout: str = "gptq"

    @property
    def is_calibrated(self) -> bool:
        """Whether calibration sequences are needed."""
        return METHODS[self.method] is not None

    @property
    def smooth(self) -> bool:
        """Whether inputs are smoothed first."""
        return self.is_calibrated and METHODS[self.method][1]

    @property
    def skip(self) -> int:
        """Positions that the Hessian leaves out."""
        return METHODS[self.method][0] if self.skip_positions is None else self.skip_positions

    def describe(self) -> dict:
        """The settings as JSON."""
        return {
            **asdict(self),
            "prefix_ids": list(self.prefix_ids),
            "skip_positions": self.skip if self.is_calibrated else None,
        }


def layer_weight(index: int, name: str) -> str:
    """`(3, "mlp.up_proj.weight")` to the name in a checkpoint."""
    return f"model.layers.{index}.{name}"


class Weights:
    """A checkpoint's weights, rotated where that is asked for."""

    def __init__(self, checkpoint: Checkpoint, rotate: bool, device: torch.device | str = "cpu"):
        self.checkpoint = checkpoint
        self.is_head_added = rotate and HEAD not in checkpoint.tensors
        self.rotation = None
        if rotate:
            norms = [name for name in checkpoint.tensors if name.endswith("norm.weight")]
            self.rotation = Rotation(checkpoint.config, dict(checkpoint.read(norms)), device)

    def get(self, name: str) -> torch.Tensor:
        """The weight of that name, float32 where rotated, else as it is stored; do not change it in place."""
        stored = EMBEDDINGS if name == HEAD and self.is_head_added else name
        weight = self.checkpoint.tensor(stored)
        return weight if self.rotation is None else self.rotation.rotate(name, weight)

    def embed(self, sequences: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Embeddings `[T, hidden]` of each sequence of tokens `[T]`, float32, without `scale_emb`."""
        table = self.checkpoint.tensor(EMBEDDINGS)
        for token_ids in sequences:
            rows = table[token_ids].float()
            yield rows if self.rotation is None else self.rotation.rotate(EMBEDDINGS, rows)

    def layer(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights of a decoder layer by their names inside it, one by one."""
        names = [f"{part}.weight" for part in (*NORMS, *LINEARS)]
        return ((name, self.get(layer_weight(index, name))) for name in names)

    def layer_dtype(self, index: int) -> torch.dtype:
        """In which a layer's norms are stored."""
        return self.checkpoint.tensors[layer_weight(index, f"{NORMS[0]}.weight")].dtype


def quantize_layer_(
    runner: LayerRunner,
    sequences: Callable[[str], Iterator[torch.Tensor]],
    settings: Int4Settings,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
    """Quantise the linears of the layer that is in the runner; afterwards the runner holds the quantised layer.

    Args:
        sequences: gives the hidden states before the layer, from the first on at each call, whose argument says in a
            word what they are for.
        prefix: keys and values before each sequence.

    Returns:
        Linear -> codes int8 `[N, K]` and scales float16 `[N, K / g]`, on the CPU; and linear -> relative squared error
        of its outputs on the calibration inputs, or of its weights without calibration.

    Raises:
        ValueError: weights or inputs that cannot be quantised.
    """
    quantized, errors = {}, {}
    for group, linears in INPUT_GROUPS.items():
        weights = [runner.get_weight(f"{linear}.weight") for linear in linears]
        if settings.is_calibrated:
            sums = runner.collect([group], sequences(group), skip=settings.skip, prefix=prefix)
            hessian = sums[group].hessian
            codes, scales = quantize_gptq(
                torch.cat(weights),
                hessian,
                group_size=settings.group_size,
                act_order=settings.act_order,
                damping=settings.damping,
            )
        else:
            hessian = None
            codes, scales = quantize_int4(torch.cat(weights), settings.group_size)
        sizes = [len(weight) for weight in weights]
        for linear, weight, c, s in zip(linears, weights, codes.split(sizes), scales.split(sizes)):
            error, norm = output_error(weight, c, s, hessian)
            errors[linear] = error / norm if norm else 0.0
            quantized[linear] = c.cpu(), s.cpu()
            runner.set_weight(f"{linear}.weight", dequantize_int4(c, s, dtype=torch.float32))
    return quantized, errors


def quantize_layers(
    weights: Weights,
    out: Output,
    settings: Int4Settings,
    sequences: torch.Tensor | None,
    device: torch.device | str = "cpu",
) -> list[dict]:
    """Quantise all decoder layers, each a step `step_name(index)` of `out`; those that `out` has already are kept.

    A step holds the layer's tensors by their names in the file, and, with a prefix, `prefix.keys`, `prefix.values`
    `[H, P, D]` and `prefix.states` `[P, hidden]`, which are the states after the layer in full precision.

    Args:
        sequences: calibration tokens `[num, length]`, None where `settings.method` needs none.

    Returns:
        The record of each layer: `errors` by linear, and `powers` by input group where smoothing chose them.

    Raises:
        ValueError: weights or inputs that cannot be quantised, or an interrupted run that has lost its hidden states.
    """
    config = weights.checkpoint.config
    num_layers, first = config.num_hidden_layers, out.num_steps
    if first == num_layers:
        return [out.load_step(step_name(index))[1] for index in range(num_layers)]
    runner = LayerRunner(config, device)
    folder = out.partial / STATES_FOLDER
    folder.mkdir(exist_ok=True)
    states = _states_before(first, weights, folder, sequences, runner.scale_emb)
    prefix_states = _prefix_states_before(first, weights, out, settings, runner.scale_emb)
    num_sequences = 0 if sequences is None else len(sequences)
    num_passes = (len(INPUT_GROUPS) + 1 + settings.smooth) * num_sequences or 1
    progress = Progress(num_layers * num_passes, "passes", done=first * num_passes, is_bytes=False)

    for index in range(first, num_layers):
        before = states

        def read(what: str) -> Iterator[torch.Tensor]:
            for i in range(num_sequences):
                yield before.read(i)  # noqa: B023  used up before the next layer
                progress.advance(1, f"layer {index + 1} of {num_layers}, {what}")  # noqa: B023

        runner.load(index, weights.layer(index))
        tensors, record, prefix = {}, {}, None
        if settings.prefix_ids:
            _, prefix = runner.run_prefix(prefix_states)
        if settings.smooth:
            norm_dtype = weights.layer_dtype(index)
            record["powers"] = smooth_layer_(
                runner, read("smoothing"), settings.group_size, settings.skip, norm_dtype, prefix
            )
        if settings.prefix_ids:  # again, as smoothing scales the values
            prefix_states, prefix = runner.run_prefix(prefix_states)
            tensors["prefix.states"] = prefix_states
            tensors |= {name: tensor[0] for name, tensor in zip(PREFIX_TENSORS, prefix)}
        quantized, record["errors"] = quantize_layer_(runner, read, settings, prefix)
        tensors |= _layer_tensors(index, runner, quantized, settings.layout, weights.layer_dtype(index))
        if num_sequences == 0:
            progress.advance(1, f"layer {index + 1} of {num_layers}")
        elif index + 1 < num_layers:
            states = HiddenStates(folder / f"states-{index + 1}", before.shape)
            states.write_all(runner.run(hidden, prefix) for hidden in read("output"))
        out.save_step(step_name(index), {name: tensor.cpu() for name, tensor in tensors.items()}, record)
        if num_sequences:
            before.path.unlink()
    return [out.load_step(step_name(index))[1] for index in range(num_layers)]


def _layer_tensors(index, runner, quantized, layout: str, norm_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A quantised layer as it stands in the file."""
    tensors = {}
    for linear, (codes, scales) in quantized.items():
        packed = LAYOUTS[layout].pack(codes, scales)
        tensors |= {layer_weight(index, f"{linear}.{part}"): tensor for part, tensor in packed.items()}
    for norm in NORMS:
        tensors[layer_weight(index, f"{norm}.weight")] = runner.get_weight(f"{norm}.weight").to(norm_dtype)
    return tensors


def step_name(index: int) -> str:
    """Name of the step that quantises a layer."""
    return f"layer-{index:04}"


def _states_before(first, weights, folder, sequences, scale_emb) -> HiddenStates | None:
    """Hidden states before layer `first`: of the embeddings, or those that an interrupted run has left."""
    if sequences is None:
        return None
    states = HiddenStates(folder / f"states-{first}", (*sequences.shape, weights.checkpoint.config.hidden_size))
    for path in folder.glob("states-*"):
        if path != states.path:
            path.unlink()
    if first == 0:
        states.write_all(embedded * scale_emb for embedded in weights.embed(sequences))
    elif not states.is_complete():
        raise ValueError(
            f"The interrupted run has left no hidden states in {states.path}; run the same command again, which "
            "begins anew."
        )
    return states


def _prefix_states_before(first, weights, out, settings, scale_emb) -> torch.Tensor | None:
    if not settings.prefix_ids:
        return None
    if first == 0:
        return next(weights.embed([torch.tensor(settings.prefix_ids)])) * scale_emb
    return out.load_step(step_name(first - 1))[0]["prefix.states"]


__all__ = [
    "METHODS",
    "PREFIX_TENSORS",
    "Int4Settings",
    "Weights",
    "layer_weight",
    "quantize_layer_",
    "quantize_layers",
    "step_name",
]
