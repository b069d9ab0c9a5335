"""How far a quantised checkpoint is from its source: layer by layer on unseen inputs, and as a language model."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from minicpm4_hf.conversion.gptq import output_error
from minicpm4_hf.conversion.gptq_layer import LINEARS, NORMS, LayerRunner
from minicpm4_hf.conversion.gptq_model import Weights, layer_weight
from minicpm4_hf.conversion.gptq_rotation import HEAD, random_hadamard
from minicpm4_hf.conversion.source import Checkpoint, build_config, read_config
from minicpm4_hf.perplexity import score_tokens
from minicpm4_hf.quantization.int4 import dequantize_int4, unpack_gptq
from minicpm4_hf.quantization.prefix import PREFIX_FILE, Prefix

_GPTQ_PARTS = ("qweight", "scales", "qzeros", "g_idx")


class QuantizedFolder:
    """Weights of a folder in the GPTQ layout of one file, as float32 matrices."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        with safe_open(self.folder / "model.safetensors", framework="pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}
        self.prefix = Prefix.load(folder) if (self.folder / PREFIX_FILE).is_file() else None

    def codes(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[N, K]` and scales `[N, K / g]` of a linear by its name, such as `model.layers.0.mlp.up_proj`."""
        return unpack_gptq(*(self.tensors[f"{name}.{part}"] for part in _GPTQ_PARTS))[:2]

    def get(self, name: str) -> torch.Tensor:
        """A weight by its name in full precision, `model.layers.0.mlp.up_proj.weight`, float32."""
        if name in self.tensors:
            return self.tensors[name].float()
        return dequantize_int4(*self.codes(name.removesuffix(".weight")), dtype=torch.float32)

    def load_model(self) -> PreTrainedModel:
        """The model in float32, with the weights that the codes stand for."""
        content = read_config(self.folder)
        del content["quantization_config"]
        config = build_config(content, self.folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        names = [name for name in model.state_dict() if name != HEAD or HEAD in self.tensors]
        model.load_state_dict({name: self.get(name) for name in names}, strict=False)
        return model.eval()


def layer_errors(
    source: Checkpoint, quantized: QuantizedFolder, sequences: torch.Tensor, *, first: int, rotated: bool = False
) -> dict[str, list[float]]:
    """Relative squared error of each decoder layer, given the inputs that it has in full precision.

    Args:
        sequences: tokens `[num, length]` that were not used for calibration.
        first: positions at the start of each sequence that are left out, a prefix included.
        rotated: whether `quantized` was rotated: its inputs are then rotated, and its outputs back.

    Returns:
        `layer`: what a layer adds to the residual stream; and, unless a weight of the quantised checkpoint is not an
        approximation of the source's (rotated or smoothed ones are not), `down_proj`: that linear's outputs.
    """
    weights, prefix = Weights(source, rotate=False), quantized.prefix
    exact, rounded = LayerRunner(source.config), LayerRunner(source.config)
    turn = random_hadamard(source.config.hidden_size).float() if rotated else None
    skip = max(first - (len(prefix.token_ids) if prefix else 0), 0)
    states = [embedded * exact.scale_emb for embedded in weights.embed(sequences)]
    errors = {"layer": [], "down_proj": []}
    for index in range(source.config.num_hidden_layers):
        names = [f"{part}.weight" for part in (*NORMS, *LINEARS)]
        exact.load(index, weights.layer(index))
        rounded.load(index, ((name, quantized.get(layer_weight(index, name))) for name in names))
        cached = None if prefix is None else (prefix.keys[index][None], prefix.values[index][None])
        down = layer_weight(index, "mlp.down_proj")
        moments = exact.collect(["down"], states, skip=first, prefix=cached)["down"].hessian
        error, norm = output_error(weights.get(f"{down}.weight"), *quantized.codes(down), moments)
        errors["down_proj"].append(error / norm)
        error = norm = 0.0
        for i, before in enumerate(states):
            after = exact.run(before, cached)
            approximate = rounded.run(before if turn is None else before @ turn, cached)
            if turn is not None:
                approximate = approximate @ turn.t()
            error += (approximate - after)[skip:].double().square().sum().item()
            norm += (after - before)[skip:].double().square().sum().item()
            states[i] = after
        errors["layer"].append(error / norm)
    return errors


def score_windows(model: PreTrainedModel, ids: torch.Tensor, context: int, bos: int, prefix: Prefix | None) -> float:
    """Mean nats of a text's tokens `[T]` in windows of `context - 1`, each after `bos`, or after the prefix.

    The first token of each window is conditioned on and not scored: a stored prefix says nothing of it.
    """
    nats = []
    for window in ids.split(context - 1):
        if len(window) < 2:
            continue
        if prefix is None:
            nats.append(score_tokens(model, torch.cat((torch.tensor([bos]), window)))[1:])
        else:
            nats.append(score_tokens(model, window, past_key_values=prefix.build_cache(model)))
    return torch.cat(nats).double().mean().item()


__all__ = ["QuantizedFolder", "layer_errors", "score_windows"]
