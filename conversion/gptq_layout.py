"""The file layouts of int4 weights: names, dtypes and shapes of a layer's tensors, and the `quantization_config`.

Sources: `gptq` is AutoGPTQ's and GPTQModel's layout (`checkpoint_format` "gptq"); `compressed-tensors` is the format
"pack-quantized" of the package compressed-tensors 0.20.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minicpm4_hf import __version__
from minicpm4_hf.quantization.int4 import pack_gptq, pack_int4

from .output import Plan


@dataclass(frozen=True)
class Layout:
    """How one layout writes a linear layer.

    Args:
        pack: `(codes [N, K], scales [N, K / g])` to the tensors by the last part of their names.
        plan: `(N, K, number of groups)` to what `pack` gives, as dtype and shape.
        describe: `(group size or -1, act_order, damping or None)` to the `quantization_config` of config.json.
    """

    pack: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    plan: Callable[[int, int, int], Plan]
    describe: Callable[[int, bool, float | None], dict]


def _plan_gptq(num_rows: int, num_columns: int, num_groups: int) -> Plan:
    return {
        "qweight": (torch.int32, (num_columns // 8, num_rows)),
        "scales": (torch.float16, (num_groups, num_rows)),
        "qzeros": (torch.int32, (num_groups, num_rows // 8)),
        "g_idx": (torch.int32, (num_columns,)),
    }


def _describe_gptq(group_size: int, act_order: bool, damping: float | None) -> dict:
    # `desc_act` says whether `g_idx` is out of order; ours never is (see `quantize_gptq`), which every kernel serves.
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "lm_head": False,
        **({} if damping is None else {"damp_percent": damping}),
        "meta": {"quantizer": [f"minicpm4-hf:{__version__}"]},
    }


def _pack_compressed(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "weight_packed": pack_int4(codes).t().contiguous(),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _plan_compressed(num_rows: int, num_columns: int, num_groups: int) -> Plan:
    return {
        "weight_packed": (torch.int32, (num_rows, num_columns // 8)),
        "weight_scale": (torch.float16, (num_rows, num_groups)),
        "weight_shape": (torch.int64, (2,)),
    }


def _describe_compressed(group_size: int, act_order: bool, damping: float | None) -> dict:
    by_row = group_size == -1
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else group_size,
        "dynamic": False,
        "actorder": "static" if act_order and not by_row else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


LAYOUTS = {
    "gptq": Layout(pack_gptq, _plan_gptq, _describe_gptq),
    "compressed-tensors": Layout(_pack_compressed, _plan_compressed, _describe_compressed),
}

__all__ = ["LAYOUTS", "Layout"]
