"""What `int4` refuses, each in one sentence."""

import torch

from .gptq_layer import LINEARS
from .gptq_model import Int4Settings
from .source import Checkpoint, expected_tensors, layer_of

GROUP_SIZES = (32, 64, 128, -1)


def check_model(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not a causal language model in full precision, or that has biases.

    Raises:
        ValueError: it is so.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised already; start from the checkpoint in full precision.")
    if expected_tensors(config) is None:
        raise ValueError(f"{folder} holds a {config.architectures[0]}; int4 is for causal language models.")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ValueError(f"{folder} has biases (`{name}` in its config.json), for which int4 has no place.")


def check_settings(checkpoint: Checkpoint, settings: Int4Settings) -> None:
    """Refuse settings that do not fit a checkpoint.

    Raises:
        ValueError: they do not.
    """
    if settings.skip_positions is not None and not settings.is_calibrated:
        raise ValueError("`--skip-positions` is for methods with calibration; rtn has none.")
    if settings.skip_positions is not None and settings.skip_positions < 0:
        raise ValueError(f"`--skip-positions` must be at least 0, got {settings.skip_positions}.")
    if settings.act_order and not settings.is_calibrated:
        raise ValueError("`--act-order` is for methods with calibration; rtn has none.")
    if settings.rotate and any(name.startswith("mtp.") for name in checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.folder} has an MTP head, which `--rotate` does not rotate; load the model without it, "
            "`save_pretrained` it and convert that."
        )
    if settings.prefix_ids and (getattr(checkpoint.config, "sparse_config", None) or {}).get("use_nope"):
        raise ValueError("`--prefix` stores rotated keys only, which `sparse_config['use_nope']` cannot do with.")
    for name, info in checkpoint.tensors.items():
        if linear_of(name) is None:
            continue
        if info.shape[0] % 8 or info.shape[1] % 8:
            raise ValueError(f"{name} has shape {list(info.shape)}; the int4 layouts need multiples of 8.")
        if settings.group_size != -1 and info.shape[1] % settings.group_size:
            raise ValueError(
                f"{name} has {info.shape[1]} inputs, no multiple of the group size {settings.group_size}; give "
                f"another `--group-size` ({', '.join(map(str, GROUP_SIZES))})."
            )


def check_sequences(checkpoint: Checkpoint, settings: Int4Settings, sequences: torch.Tensor | None) -> None:
    """Refuse calibration sequences `[num, length]` that do not fit the settings or the model.

    Raises:
        ValueError: they do not.
    """
    if settings.is_calibrated != (sequences is not None):
        raise ValueError(
            f"The method {settings.method} takes {'' if settings.is_calibrated else 'no '}calibration sequences."
        )
    if sequences is None:
        return
    length, longest = sequences.shape[1] + len(settings.prefix_ids), checkpoint.config.max_position_embeddings
    if length > longest:
        raise ValueError(f"Calibration sequences of {length} tokens are longer than the model's {longest}.")
    if length <= settings.skip:
        raise ValueError(
            f"Calibration sequences of {length} tokens leave nothing after the {settings.skip} positions that are "
            "left out; give longer ones (`--length`)."
        )
    vocabulary = checkpoint.config.vocab_size
    largest = max(sequences.max().item(), *settings.prefix_ids, 0)
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gave the token {largest}, but the model has {vocabulary}; the two do not belong together."
        )


def linear_of(name: str) -> str | None:
    """`mlp.up_proj` of `model.layers.3.mlp.up_proj.weight`; None for what is not quantised."""
    found = layer_of(name)
    linear = found[1].removesuffix(".weight") if found else None
    return linear if linear in LINEARS else None


__all__ = ["GROUP_SIZES", "check_model", "check_sequences", "check_settings", "linear_of"]
