"""Low-bit weights in plain PyTorch: quantising, packing, the modules that hold packed weights, and their loading."""

from . import gptq  # noqa: F401  registers the loading of GPTQ's layout
from .bitcpm import BitCPMConfig
from .int4 import dequantize_int4, pack_gptq, quantize_int4, quantize_int8, unpack_gptq
from .linear import Int4Linear, PackedEmbedding, PackedHead, TernaryLinear, TiedHead
from .ternary import dequantize_ternary, detect_group_size, pack_ternary, quantize_ternary, unpack_ternary

__all__ = [
    "BitCPMConfig",
    "Int4Linear",
    "PackedEmbedding",
    "PackedHead",
    "TernaryLinear",
    "TiedHead",
    "dequantize_int4",
    "dequantize_ternary",
    "detect_group_size",
    "pack_gptq",
    "pack_ternary",
    "quantize_int4",
    "quantize_int8",
    "quantize_ternary",
    "unpack_gptq",
    "unpack_ternary",
]
