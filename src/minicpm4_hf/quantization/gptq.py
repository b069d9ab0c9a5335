"""Int4 checkpoints in the GPTQ layout where GPTQModel is not installed: quantisation method "gptq".

transformers leaves these files to GPTQModel and optimum. Where either is missing, and it would refuse to load, the
linear layers of the decoder become `Int4Linear` instead. Where both are installed nothing changes.
"""

import re
from importlib.util import find_spec

from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import GPTQConfig

from .linear import Int4Linear

# What GPTQConfig must say for `Int4Linear`: attribute -> value.
SERVED = {"bits": 4, "sym": True, "format": "gptq", "modules_in_block_to_quantize": None}
_DECODER_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.")


class Int4Quantizer(HfQuantizer):
    """Loads int4 checkpoints in the GPTQ layout; hands over to transformers' own class where GPTQModel is installed.

    Raises:
        ImportError: GPTQModel is missing, and the file is not symmetric int4 in version 1 of the layout.
        ValueError: the checkpoint is not quantised yet, which is what `minicpm4 convert int4` is for.
    """

    requires_calibration = True
    quantization_config: GPTQConfig

    def __new__(cls, quantization_config, **kwargs):
        if find_spec("gptqmodel") is not None and find_spec("optimum") is not None:
            return GptqHfQuantizer(quantization_config, **kwargs)
        return super().__new__(cls)

    def validate_environment(self, *args, **kwargs):
        wrong = {name: getattr(self.quantization_config, name) for name in SERVED}
        wrong = {name: value for name, value in wrong.items() if value != SERVED[name]}
        if wrong:
            name, value = next(iter(wrong.items()))
            raise ImportError(
                f"This checkpoint's quantization_config has `{name}` {value!r}; only symmetric int4 in version 1 of "
                "the GPTQ layout loads without GPTQModel: `pip install gptqmodel optimum`."
            )

    def _process_model_before_weight_loading(self, model, **kwargs):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and not name.startswith("mtp.") and _DECODER_LINEAR.search(name):
                parent, attribute = get_module_from_name(model, name)
                new = Int4Linear(
                    module.in_features,
                    module.out_features,
                    module.bias is not None,
                    group_size=self.quantization_config.group_size,
                    device="meta",
                    dtype=module.weight.dtype,
                )
                setattr(parent, attribute, new)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, Int4Linear):
                module.check_loaded_()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


AUTO_QUANTIZER_MAPPING["gptq"] = Int4Quantizer

__all__ = ["Int4Quantizer"]
