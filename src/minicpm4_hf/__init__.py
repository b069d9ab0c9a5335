"""MiniCPM4 for transformers 5: `import minicpm4_hf`, then use the Auto classes.

Importing registers the model with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and
`AutoModelForSequenceClassification`, and the official checkpoints' `model_type` "minicpm" with the same classes.
It needs torch, transformers and safetensors only.
"""

from importlib.metadata import version

from . import kernels, official_layout  # noqa: F401  registers the attention function and the official layout
from .configuration_minicpm4 import MiniCPM4Config
from .longrope import extend_context, longrope_factors
from .modeling_minicpm4 import FUSED_FUNCTIONS as _MODEL_FUSED_FUNCTIONS
from .modeling_minicpm4 import MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, MiniCPM4Model
from .presets import PRESETS, build_config
from .quantization import BitCPMConfig

_MODEL_FUSED_FUNCTIONS.update(kernels.FUSED_FUNCTIONS)

__version__ = version("minicpm4-hf")

__all__ = [
    "PRESETS",
    "BitCPMConfig",
    "MiniCPM4Config",
    "MiniCPM4ForCausalLM",
    "MiniCPM4ForSequenceClassification",
    "MiniCPM4Model",
    "build_config",
    "extend_context",
    "longrope_factors",
]
