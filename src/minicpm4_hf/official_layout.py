"""Checkpoints in the official layout, as OpenBMB published them, through transformers' Auto classes.

Their config says `model_type: "minicpm"`, or nothing at all, and an `auto_map` to remote code; the 2024 MiniCPM models
share all three. Importing this module registers both layouts, so that

* a MiniCPM4, BitCPM4 or MiniCPM-type BitCPM-CANN folder loads as `MiniCPM4Config` and `MiniCPM4*` models,
* a MiniCPM-1B or -2B folder of 2024 loads as `MiniCPMConfig` and `MiniCPM*` models and is saved back as what it is,

with and without `trust_remote_code=True`: the remote code in such a folder is never run. The weight names are the same
in both layouts; only the config differs.
"""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from .configuration_minicpm4 import MiniCPM4Config
from .modeling_minicpm4 import MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, MiniCPM4Model

# Class names: official -> ours.
ARCHITECTURES = {
    "MiniCPMModel": "MiniCPM4Model",
    "MiniCPMForCausalLM": "MiniCPM4ForCausalLM",
    "MiniCPMForSequenceClassification": "MiniCPM4ForSequenceClassification",
}

_MINICPM4_VOCAB_SIZE = 73448

# Keys of the official file that have no meaning in ours: where it came from, and what `from_official` translates.
_DROPPED = ("_name_or_path", "auto_map", "kv_channels", "no_rope", "rope_theta", "transformers_version", "use_mup")

# Relatives that share the `model_type` and compute something else: (how to tell, what they are).
_RELATIVES = (
    (lambda c: c.get("num_experts"), "a mixture of experts (MiniCPM-MoE, BlockFFN)"),
    (lambda c: c.get("attention_type") == "mla", "a model with latent attention (BlockFFN)"),
    (lambda c: c.get("hidden_act", "silu") not in ACT2FN, "a model with thresholded activations (MiniCPM-S)"),
    (lambda c: c.get("is_causal") is False, "a bidirectional encoder (MiniCPM-Embedding, MiniCPM-Reranker)"),
    (lambda c: c.get("no_rope"), "a backbone without rotary embedding (VoxCPM)"),
)


@strict
class MiniCPMConfig(MiniCPM4Config):
    """Configuration of a 2024 MiniCPM-1B or -2B model; the defaults are the official class's.

    The mathematics is MiniCPM4's with dense attention. It is saved in the official layout. `from_dict` hands a
    MiniCPM4 file on to `MiniCPM4Config`.

    Source: `MiniCPMConfig.__init__` in the official `configuration_minicpm.py`, except that `dim_model_base` has no
    default: official files that left it out gave gibberish.
    """

    model_type = "minicpm"
    _auto_class = None  # saved without remote code: the official files are what its folder needs

    vocab_size: int = 32000
    intermediate_size: int = 11008
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    scale_emb: int | float = 1
    scale_depth: int | float = 1
    dim_model_base: int | None = None

    def __setattr__(self, name, value):
        if name == "sparse_config" and value is not None:
            raise ValueError("A 2024 MiniCPM model has dense attention only; leave `sparse_config` out.")
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        config_dict = from_official(config_dict)
        if config_dict["model_type"] == "minicpm4":
            return MiniCPM4Config.from_dict(config_dict, **kwargs)
        if "dim_model_base" in kwargs:  # no default here: it must be there from the start
            config_dict["dim_model_base"] = kwargs["dim_model_base"]
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        no_minicpm4_keys = super().to_dict()
        del no_minicpm4_keys["sparse_config"], no_minicpm4_keys["mup_denominator"]
        return no_minicpm4_keys

    def to_diff_dict(self):  # what `save_pretrained` writes
        return to_official(super().to_diff_dict(), rope_type_key="type")


class MiniCPMModel(MiniCPM4Model):
    config_class = MiniCPMConfig
    _auto_class = None


class MiniCPMForCausalLM(MiniCPM4ForCausalLM):
    config_class = MiniCPMConfig
    _auto_class = None


class MiniCPMForSequenceClassification(MiniCPM4ForSequenceClassification):
    config_class = MiniCPMConfig
    _auto_class = None


_OFFICIAL_DEFAULTS = {
    name: getattr(MiniCPMConfig, name) for name in MiniCPMConfig.__annotations__ if name != "dim_model_base"
}


def is_official(config_dict: dict) -> bool:
    """Whether the content of a config.json is in the official layout (2024 MiniCPM or MiniCPM4).

    The 2024 files, MiniCPM4-0.5B's and BitCPM4's have no `model_type`; they are told by the class in their `auto_map`.
    """
    if "model_type" in config_dict:
        return config_dict["model_type"] == "minicpm"
    auto_map = config_dict.get("auto_map") or {}
    return auto_map.get("AutoConfig", "").split("--")[-1] == "configuration_minicpm.MiniCPMConfig"


def is_minicpm4(config_dict: dict) -> bool:
    """Whether a config in the official layout is a MiniCPM4 (or BitCPM) and not a 2024 MiniCPM.

    `model_type` does not say it. Told by a key that only MiniCPM4 has, its vocabulary, or LongRoPE with equal lists
    and two key-value heads. Nothing numerical hangs on the answer: the mathematics is the same.
    """
    if "mup_denominator" in config_dict or "sparse_config" in config_dict:
        return True
    if config_dict.get("vocab_size") == _MINICPM4_VOCAB_SIZE:
        return True
    rope = config_dict.get("rope_scaling") or config_dict.get("rope_parameters") or {}
    equal_lists = "short_factor" in rope and rope["short_factor"] == rope.get("long_factor")
    return equal_lists and config_dict.get("num_key_value_heads") == 2


def unsupported_relative(config_dict: dict) -> str | None:
    """The sentence that refuses a config in the official layout which is no MiniCPM4 and no dense MiniCPM, or None."""
    for matches, what in _RELATIVES:
        if matches(config_dict):
            return (
                f"This checkpoint has the model type of MiniCPM but is {what}; minicpm4_hf loads dense MiniCPM-1B/2B, "
                "MiniCPM4 and BitCPM checkpoints. Use the library its model card names."
            )
    return None


def from_official(config_dict: dict) -> dict:
    """Translate a config.json from the official layout.

    Args:
        config_dict: the parsed file; not changed. Keys it leaves out get the official class's defaults, apart from
            `dim_model_base`, which `MiniCPM4Config` refuses to guess.

    Returns:
        The settings in the minicpm4 layout, with `model_type` "minicpm4", or "minicpm" for a 2024 MiniCPM.

    Raises:
        ValueError: a relative that computes something else (see `unsupported_relative`).

    Source: official `configuration_minicpm.py` (defaults) and `modeling_minicpm.py` (`factor` of LongRoPE is not read:
    the attention factor follows from the lengths alone); OpenBMB/VoxCPM `modules/minicpm4/model.py` (`use_mup`,
    `kv_channels`).
    """
    reason = unsupported_relative(config_dict)
    if reason is not None:
        raise ValueError(reason)
    new = {**_OFFICIAL_DEFAULTS, **config_dict}
    theta = new.get("rope_theta") or 10000.0
    if new.get("kv_channels") is not None:
        new["head_dim"] = new["kv_channels"]
    if new.get("use_mup") is False:  # all three scales are 1
        new |= {"scale_emb": 1, "scale_depth": new["num_hidden_layers"] ** 0.5, "dim_model_base": new["hidden_size"]}
    for key in _DROPPED:
        new.pop(key, None)

    rope = dict(new.pop("rope_scaling", None) or new.get("rope_parameters") or {})
    old_key = rope.pop("type", "default")
    rope = {"rope_type": old_key, "rope_theta": float(theta), **rope}
    if rope["rope_type"] == "longrope":
        rope.pop("factor", None)
    new["rope_parameters"] = rope

    if "torch_dtype" in new:
        new["dtype"] = new.pop("torch_dtype")
    new["model_type"] = "minicpm"
    if is_minicpm4(config_dict):
        new["model_type"] = "minicpm4"
        new["architectures"] = [ARCHITECTURES.get(name, name) for name in new.get("architectures") or []]
    return new


def to_official(config_dict: dict, *, rope_type_key: str = "rope_type") -> dict:
    """Translate a config.json into the official layout, the reverse of `from_official`.

    Args:
        config_dict: the parsed file, or a config's `to_dict()`; not changed.
        rope_type_key: "rope_type" as in the MiniCPM4 files, "type" as in the 2024 ones.

    Returns:
        The settings under the official keys, with `model_type` "minicpm" and without `auto_map`. A context extended
        with attention factor 1 (`extend_context`) is written with its new length as the original one, because the
        official code derives the attention factor from the ratio of the two.
    """
    names = {ours: official for official, ours in ARCHITECTURES.items()}
    new = {key: value for key, value in config_dict.items() if key not in ("auto_map", "mlp_bias")}
    new["model_type"] = "minicpm"
    new["architectures"] = [names.get(name, name) for name in new.get("architectures") or []]
    if "dtype" in new:
        new["torch_dtype"] = new.pop("dtype")
    for key in ("sparse_config", "mup_denominator"):  # the 2024 files do not have them, and None says nothing
        if new.get(key) is None:
            new.pop(key, None)
    if new.get("head_dim") == new["hidden_size"] // new["num_attention_heads"]:
        new.pop("head_dim")

    rope = dict(new.pop("rope_parameters", None) or {"rope_type": "default"})
    new["rope_theta"] = rope.pop("rope_theta", 10000.0)
    rope_type = rope.pop("rope_type")
    if rope_type == "longrope":
        length, original = new["max_position_embeddings"], rope["original_max_position_embeddings"]
        if rope.pop("factor", None) == 1.0 and length > original:
            rope |= {"short_factor": rope["long_factor"], "original_max_position_embeddings": length}
    new["rope_scaling"] = None if rope_type == "default" else {rope_type_key: rope_type, **rope}
    return new


_read_config_dict = PreTrainedConfig.get_config_dict.__func__


def _get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
    """`PreTrainedConfig.get_config_dict`, with files in the official layout translated.

    The Auto classes look at `model_type` and `auto_map` before any registered class is asked, and files without
    `model_type` would reach none, so the translation has to happen where the file is read. A relative that we refuse
    only gets its `model_type`: `MiniCPMConfig.from_dict` gives the reason, and its tokenizer still loads.
    """
    config_dict, kwargs = _read_config_dict(cls, pretrained_model_name_or_path, **kwargs)
    if is_official(config_dict):
        if unsupported_relative(config_dict) is None:
            config_dict = from_official(config_dict)
        else:
            config_dict = {**config_dict, "model_type": "minicpm"}
    return config_dict, kwargs


def _register() -> None:
    PreTrainedConfig.get_config_dict = classmethod(_get_config_dict)
    ours = (MiniCPM4Config, MiniCPM4Model, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification)
    official = (MiniCPMConfig, MiniCPMModel, MiniCPMForCausalLM, MiniCPMForSequenceClassification)
    auto_classes = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
    for config_class, *model_classes in (ours, official):
        # exist_ok: ours wins where transformers has a class for this `model_type` of its own.
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in zip(auto_classes, model_classes, strict=True):
            auto_class.register(config_class, model_class, exist_ok=True)
        # tokenizer.json as it is: the files say LlamaTokenizer, which transformers 5 rebuilds, losing leading spaces.
        TOKENIZER_MAPPING_NAMES[config_class.model_type] = "TokenizersBackend"

    # With this, `save_pretrained` copies the remote-code files next to the weights.
    MiniCPM4Config.register_for_auto_class()
    for auto_class, model_class in zip(auto_classes, ours[1:], strict=True):
        model_class.register_for_auto_class(auto_class.__name__)


_register()
