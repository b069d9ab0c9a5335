"""MiniCPM4 configuration: Llama's, plus the muP scales and the InfLLM v2 settings.

This file travels with a checkpoint (`save_pretrained` copies it), so it imports transformers only.
"""

import math
from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig

# The official keys with the values the MiniCPM4 README recommends for 8B (MiniCPM README, "sparse_config").
DEFAULT_SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}

# Smallest allowed integer of each key. `dense_len` below 1 means: always sparse (upstream writes -1).
_SPARSE_MINIMUM = {
    "kernel_size": 1,
    "kernel_stride": 1,
    "init_blocks": 0,
    "block_size": 1,
    "window_size": 0,
    "topk": 1,
    "dense_len": -1,
}


def complete_sparse_config(sparse_config: dict) -> dict:
    """Fill the keys that `sparse_config` leaves out with the official values and check all of them.

    Args:
        sparse_config: any subset of the keys of `DEFAULT_SPARSE_CONFIG`; lengths are in tokens, `init_blocks` and
            `topk` in blocks.

    Returns:
        A new dict with every key.

    Raises:
        ValueError: an unknown key, a wrong type, a value outside its range, or values that do not fit together.

    Source: key names and values from the MiniCPM README; the fitting rules follow from the pooling geometry.
    """
    if not isinstance(sparse_config, dict):
        raise ValueError(f"`sparse_config` must be a dict or None, got {sparse_config!r}.")
    unknown = sorted(set(sparse_config) - set(DEFAULT_SPARSE_CONFIG))
    if unknown:
        allowed = ", ".join(DEFAULT_SPARSE_CONFIG)
        raise ValueError(f"`sparse_config` has no key {unknown[0]!r}; the allowed keys are {allowed}.")
    full = {**DEFAULT_SPARSE_CONFIG, **sparse_config}
    if not isinstance(full["use_nope"], bool):
        raise ValueError(f"`sparse_config['use_nope']` must be true or false, got {full['use_nope']!r}.")
    for key, minimum in _SPARSE_MINIMUM.items():
        value = full[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"`sparse_config[{key!r}]` must be an integer of at least {minimum}, got {value!r}.")
    multiples = (("kernel_size", "kernel_stride"), ("block_size", "kernel_stride"), ("window_size", "block_size"))
    for key, unit in multiples:
        if full[key] % full[unit]:
            raise ValueError(
                f"`sparse_config[{key!r}]` must be a multiple of `{unit}` ({full[unit]}), got {full[key]}."
            )
    if full["topk"] < full["init_blocks"] + 1:
        raise ValueError(
            f"`sparse_config['topk']` must be at least `init_blocks` + 1 ({full['init_blocks'] + 1}), so that the "
            f"forced blocks fit the budget, got {full['topk']}."
        )
    return full


@strict
class MiniCPM4Config(LlamaConfig):
    """Configuration of a MiniCPM4 model; the defaults are MiniCPM4-8B's.

    Only what differs from `LlamaConfig` is redeclared.

    Args:
        scale_emb: factor on the token embeddings.
        scale_depth: each residual branch is multiplied by `scale_depth / sqrt(num_hidden_layers)`.
        dim_model_base: the final hidden state is divided by `hidden_size / dim_model_base` before the LM head.
        mup_denominator: read by official draft heads only; kept so that it is not lost on a round trip.
        sparse_config: InfLLM v2 settings under the official keys (`DEFAULT_SPARSE_CONFIG`), or None for dense
            attention. Keys left out get the official value.
        num_mtp_layers: 1 for a checkpoint with a head for multi-token prediction (MTP), None for one without. A plain
            load ignores the head; `generate(use_mtp=True)` and `from_pretrained(..., with_mtp_head=True)` read it.
        mtp_loss_weight: factor on the MTP loss in training.

    Raises:
        ValueError: a setting out of its range, or `dim_model_base` missing.

    Source: MiniCPM4 technical report (arXiv:2506.07900) and the configs of the official checkpoints. The report does
    not give the weight of the MTP loss; 0.3 is that of the first 10T tokens of DeepSeek-V3 (arXiv:2412.19437, 4.2),
    which goes on with 0.1.
    """

    model_type = "minicpm4"
    keys_to_ignore_at_inference = ["past_key_values", "ntp_loss", "mtp_loss"]  # no predictions, to `Trainer.evaluate`
    mtp_hidden_states_first = True  # transformers' `MtpLayer`: concat(h, embedding), the order of the report

    vocab_size: int = 73448
    intermediate_size: int = 16384
    num_key_value_heads: int | None = 2
    max_position_embeddings: int = 32768
    initializer_range: float = 0.1
    pad_token_id: int | None = 2
    eos_token_id: int | list[int] | None = field(default_factory=lambda: [2, 73440])
    scale_emb: int | float = 12
    scale_depth: int | float = 1.4
    dim_model_base: int | None = 256
    mup_denominator: int | None = None
    sparse_config: dict | None = None
    num_mtp_layers: int | None = None
    mtp_loss_weight: int | float = 0.3

    def __setattr__(self, name, value):
        if name == "sparse_config" and value is not None:  # also set later, or by `from_pretrained(sparse_config=...)`
            value = complete_sparse_config(value)
        super().__setattr__(name, value)

    def __post_init__(self, **kwargs):
        if self.dim_model_base is None:
            raise ValueError(missing_dim_model_base(self.hidden_size))
        for name in ("scale_emb", "scale_depth", "dim_model_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if self.num_mtp_layers not in (None, 1):
            raise ValueError(f"`num_mtp_layers` must be 1, or None for no MTP head, got {self.num_mtp_layers}.")
        if not 0 <= self.mtp_loss_weight < math.inf:
            raise ValueError(f"`mtp_loss_weight` must be a number of at least 0, got {self.mtp_loss_weight}.")
        super().__post_init__(**kwargs)
        rope = self.rope_parameters
        if rope and rope.get("rope_type") == "longrope" and rope.get("factor") is None:
            # What transformers derives when the key is absent; spelled out, it does not warn at each load.
            rope["factor"] = max(1.0, self.max_position_embeddings / rope["original_max_position_embeddings"])

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("dim_model_base") is None and "dim_model_base" not in kwargs:
            raise ValueError(missing_dim_model_base(config_dict.get("hidden_size")))
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self):  # what `save_pretrained` writes: nothing of MTP where nothing was said of it
        diff = super().to_diff_dict()
        for name in ("num_mtp_layers", "mtp_loss_weight"):
            if name in diff and diff[name] == getattr(MiniCPM4Config, name):
                del diff[name]
        return diff

    def validate_architecture(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )

    @property
    def residual_scale(self) -> float:
        """Factor on each residual branch: `scale_depth / sqrt(num_hidden_layers)`."""
        return self.scale_depth / self.num_hidden_layers**0.5

    @property
    def logits_scaling(self) -> float:
        """Divisor of the final hidden state before the LM head: `hidden_size / dim_model_base`."""
        return self.hidden_size / self.dim_model_base

    @property
    def logits_mup_width_multiplier(self) -> float:
        """`logits_scaling` under the name by which transformers' `MtpModel` divides drafted logits."""
        return self.logits_scaling


def missing_dim_model_base(hidden_size: int | None) -> str:
    """The sentence for a config without `dim_model_base` (OpenBMB/MiniCPM#284: such a file gave gibberish)."""
    return (
        f"The config has no `dim_model_base`: without it the hidden state (size {hidden_size}) would be divided by "
        "the wrong number before the LM head and the output would be gibberish; add the value the model was trained "
        'with (`"dim_model_base": 256` for every official MiniCPM4).'
    )


__all__ = ["DEFAULT_SPARSE_CONFIG", "MiniCPM4Config", "complete_sparse_config"]
