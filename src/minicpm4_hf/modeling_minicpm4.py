"""MiniCPM4: Llama with muP scales, float32 rotary embedding and logits, and InfLLM v2 block-sparse attention.

This file travels with a checkpoint (`save_pretrained` copies it), so it imports torch, transformers and its sibling
files only. Dense attention goes through transformers' attention functions; the sparse one is looked up under
the name "infllm_v2", where the installed package registers its kernels, and is plain PyTorch otherwise.

Multi-token prediction (MTP) is a head to train with, attached on request: `model.add_mtp_head_()` for a new one,
`from_pretrained(folder, with_mtp_head=True)` to go on with a saved one. A saved one speeds up decoding without being
attached: `model.generate(..., use_mtp=True)` on a model that was loaded from its folder.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_minicpm4 import MiniCPM4Config
from .sparse_cache import SparsePlan, infllm_v2_attention_forward, plan_sparse_attention, sequence_positions

logger = logging.get_logger(__name__)

# What may run a "decoder_layer" `(layer, hidden_states, **kwargs)` or a "linear" layer `(module, x)` in place of the
# code below; it returns None where it does not serve a call. The installed package fills this; remote code does not.
FUSED_FUNCTIONS: dict[str, Callable] = {}


def run_fused(name: str, module: nn.Module, x: torch.Tensor, **kwargs) -> torch.Tensor | None:
    """What the fused function of this name gives for a module, or None; a compiler fuses by itself."""
    if torch.compiler.is_compiling() or name not in FUSED_FUNCTIONS:
        return None
    return FUSED_FUNCTIONS[name](module, x, **kwargs)


class MiniCPM4RMSNorm(LlamaRMSNorm):
    pass


class MiniCPM4MLP(LlamaMLP):
    pass


class MiniCPM4RotaryEmbedding(nn.Module):
    """Cosine and sine tables `[B, T, D]`, float32 whatever the model's dtype.

    LongRoPE's long factors are used where `max_position_embeddings` exceeds the original length, the short ones
    otherwise: fixed when the model is built, as in the official code, so that neither a batch neighbour nor the number
    of generated tokens changes the rotation of a cached key.

    Source: official `modeling_minicpm.py`, class `MiniCPMLongRoPE` (4.1 revision).
    """

    def __init__(self, config: MiniCPM4Config):
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = self.compute_inv_freq(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)

    @staticmethod
    def compute_inv_freq(config: MiniCPM4Config, device=None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[D / 2]`, float32, and the factor on cosine and sine."""
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            dim = config.head_dim
            exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
            return 1.0 / rope["rope_theta"] ** exponent, 1.0
        if rope["rope_type"] == "dynamic":
            raise NotImplementedError(
                "RoPE type 'dynamic' rotates a key differently as the text grows, which cached keys cannot follow; "
                "set `rope_parameters` to a fixed type ('default', 'linear', 'yarn' or 'longrope')."
            )
        seq_len = None
        if (
            rope["rope_type"] == "longrope"
            and config.max_position_embeddings > rope["original_max_position_embeddings"]
        ):
            seq_len = config.max_position_embeddings
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device, seq_len=seq_len)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` would round the frequencies: at position 100,000 that turns keys by whole radians.
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = nn.Buffer(self.compute_inv_freq(self.config, self.inv_freq.device)[0], persistent=False)
        return self

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class MiniCPM4Attention(LlamaAttention):
    """Llama's attention with the rotation in float32; block-sparse where the forward pass has a `sparse_plan`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # [B, HQ, TQ, D]
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # [B, H, TQ, D]
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        query_nope, key_nope = query, key
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
        attended, weights = self.attend(
            query.to(value.dtype), key.to(value.dtype), value, query_nope=query_nope, key_nope=key_nope, **kwargs
        )
        return self.o_proj(attended), weights

    @property
    def needs_unrotated(self) -> bool:
        """Whether blocks are selected by the unrotated queries and keys."""
        sparse_config = self.config.sparse_config
        return sparse_config is not None and sparse_config["use_nope"]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        sparse_plan: SparsePlan | None = None,
        query_nope: torch.Tensor | None = None,
        key_nope: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Put the new keys into the cache and attend: rotated `[B, heads, TQ, D]` in, `[B, TQ, HQ * D]` out."""
        if past_key_values is not None:
            extra = {"key_nope": key_nope} if self.needs_unrotated else {}
            key, value = past_key_values.update(key, value, self.layer_idx, **extra)

        if sparse_plan is None:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
        else:
            attention = ALL_ATTENTION_FUNCTIONS.get("infllm_v2", infllm_v2_attention_forward)
            layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
            kwargs.update(sparse_plan=sparse_plan, cache_layer=layer, query_nope=query_nope, key_nope=key_nope)

        attended, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return attended.reshape(*attended.shape[:2], -1).contiguous(), weights


class MiniCPM4DecoderLayer(LlamaDecoderLayer):
    """Llama's layer with both residual branches multiplied by `scale_depth / sqrt(num_hidden_layers)`."""

    def __init__(self, config: MiniCPM4Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = MiniCPM4Attention(config, layer_idx)
        self.residual_scale = config.residual_scale

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        fused = run_fused("decoder_layer", self, hidden_states, **kwargs)
        if fused is not None:
            return fused
        branch, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + branch * self.residual_scale
        branch = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + branch * self.residual_scale


class MiniCPM4MtpLayer(nn.Module):
    """From the state of token i and the embedding of token i + 1, the state that predicts token i + 2.

    Names and mathematics are those of transformers' `MtpLayer` with the hidden state first, which drafts with these
    weights.

    Source: MiniCPM4 technical report (arXiv:2506.07900), multi-token prediction; the norm at the end is that of
    DeepSeek-V3's checkpoints, without which a head shared with the main model would get states of another scale.
    """

    def __init__(self, config: MiniCPM4Config):
        super().__init__()
        self.enorm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.mtp_block = MiniCPM4DecoderLayer(config, layer_idx=0)
        # scale_depth / sqrt(1): to `MtpModel`, which builds it from `config.get_mtp_config()`, it is a model of one
        # layer. The config here is the model's own, so that a new `_attn_implementation` reaches this layer too.
        self.mtp_block.residual_scale = config.scale_depth
        self.post_norm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        """Final states of tokens i and unscaled embeddings of tokens i + 1, both `[B, T, hidden]`, to such states."""
        joined = self.eh_proj(torch.cat((self.hnorm(hidden_states), self.enorm(next_embeds)), dim=-1))
        return self.post_norm(self.mtp_block(joined, **kwargs))


class MiniCPM4MtpHead(nn.Module):
    """What is saved under `mtp.`: one layer, in a list because transformers' `MtpModel` knows models with more."""

    def __init__(self, config: MiniCPM4Config):
        super().__init__()
        self.layers = nn.ModuleList([MiniCPM4MtpLayer(config)])

    def forward(self, hidden_states: torch.Tensor, next_embeds: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.layers[0](hidden_states, next_embeds, **kwargs)


@dataclass
class MiniCPM4CausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, and the parts of the loss where labels are given and an MTP head is attached.

    Args:
        ntp_loss: loss of the next token, detached.
        mtp_loss: loss of the token after it, detached and without its weight.
    """

    ntp_loss: torch.FloatTensor | None = None
    mtp_loss: torch.FloatTensor | None = None


class MiniCPM4PreTrainedModel(LlamaPreTrainedModel):
    config_class = MiniCPM4Config
    config: MiniCPM4Config
    # Loaded on request only. transformers' `MtpModel` also takes from here which weights are the head's.
    _keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    _no_split_modules = ["MiniCPM4DecoderLayer"]
    _can_record_outputs = {"hidden_states": MiniCPM4DecoderLayer, "attentions": MiniCPM4Attention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        # The installed package's attention where nothing else was asked for; SDPA when run as remote code.
        if requested_attention is None and "infllm_v2" in ALL_ATTENTION_FUNCTIONS:
            requested_attention = "infllm_v2"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MiniCPM4RotaryEmbedding):
            module.inv_freq.copy_(module.compute_inv_freq(module.config)[0])

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers. Without the MTP head that its checkpoint had, the model is saved as one without a head.

        The weights of a head that is not attached are not here to be saved, so `num_mtp_layers` is left out of the
        saved config (not of the model's), and a warning says so.
        """
        num_mtp_layers = self.config.num_mtp_layers
        if num_mtp_layers is None or getattr(self, "mtp", None) is not None:
            return super().save_pretrained(save_directory, *args, **kwargs)
        logger.warning_once(
            "This model was loaded without the MTP head of its checkpoint and is saved without it; to keep the head, "
            "load the model with `from_pretrained(..., with_mtp_head=True)`."
        )
        self.config.num_mtp_layers = None
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.num_mtp_layers = num_mtp_layers


class MiniCPM4Model(MiniCPM4PreTrainedModel):
    """The decoder without a head; returns the final norm's output, not yet divided by `logits_scaling`."""

    def __init__(self, config: MiniCPM4Config):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MiniCPM4DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = MiniCPM4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MiniCPM4RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: `[B, T]` int64; multiplied by `scale_emb` after the embedding.
            attention_mask: `[B, TK]`, 1 for real tokens; sparse attention takes padding at either end of a row, but
                no gaps.
            position_ids: `[B, T]` or `[1, T]`. With neither a mask nor a cache, a row may hold several sequences: one
                begins where the position is not above the one before.
            inputs_embeds: `[B, T, hidden]` instead of `input_ids`, already scaled by the caller (as upstream).

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`; attention weights asked for on the sparse
                path; a mask or a cache that sparse attention cannot use.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids) * self.config.scale_emb
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)

        sparse_plan = plan_sparse_attention(
            self.config, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
        )
        if sparse_plan is None:
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=sequence_positions(position_ids) if past_key_values is None else None,
            )
        else:
            attention_mask = None

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                sparse_plan=sparse_plan,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MiniCPM4ForCausalLM(MiniCPM4PreTrainedModel, GenerationMixin):
    """MiniCPM4 with its language-model head; logits are float32.

    Args:
        with_mtp_head: attach the MTP head that the checkpoint has, to go on training it. Without this a head is
            neither built nor loaded, whatever the config says.

    Raises:
        ValueError: `with_mtp_head` with a config that has no head.
    """

    _tied_weights_keys = LlamaForCausalLM._tied_weights_keys
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan
    _fsdp_plan = LlamaForCausalLM._fsdp_plan

    def __init__(self, config: MiniCPM4Config, with_mtp_head: bool = False):
        super().__init__(config)
        self.model = MiniCPM4Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = None
        if with_mtp_head:
            if config.num_mtp_layers is None:
                raise ValueError(
                    "`with_mtp_head=True` asks for an MTP head, but this checkpoint has none (its config has no "
                    "`num_mtp_layers`); load it without, and call `model.add_mtp_head_()` for a new one."
                )
            self.mtp = MiniCPM4MtpHead(config)
        self.post_init()

    def add_mtp_head_(self) -> "MiniCPM4ForCausalLM":
        """Attach a new head for multi-token prediction, in place, with the model's own initialisation.

        From then on `forward` with labels trains it with the model, and `save_pretrained` saves it. Call this before
        the model is given to an optimizer, to PEFT or to `gradient_checkpointing_enable`.

        Raises:
            ValueError: there is a head already.
        """
        if self.mtp is not None:
            raise ValueError("This model has an MTP head already; `add_mtp_head_` adds the first one only.")
        place = self.model.norm.weight
        head = MiniCPM4MtpHead(self.config).to(device=place.device, dtype=place.dtype)
        head.apply(self._init_weights)
        self.mtp = head.train(self.training)
        self.config.num_mtp_layers = 1
        return self

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        if getattr(generation_config, "use_mtp", None) and self.mtp is not None:
            raise ValueError(
                "`use_mtp=True` drafts with the MTP head in the folder that a model was loaded from, and this model "
                "has one attached, to train it; save the model, load it without `with_mtp_head`, and generate there."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[B, T, vocab]` of final states `[B, T, hidden]`."""
        hidden_states = hidden_states / self.config.logits_scaling
        fused = run_fused("linear", self.lm_head, hidden_states)
        return (self.lm_head(hidden_states) if fused is None else fused).float()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MiniCPM4CausalLMOutput:
        """Logits `[B, T, vocab]` (or the last `logits_to_keep`), and the loss where `labels [B, T]` are given.

        With an MTP head the loss in training is `ntp_loss + config.mtp_loss_weight * mtp_loss`; in evaluation it is
        `ntp_loss`, so that a perplexity does not change with the head. Both parts are in the output.

        Raises:
            ValueError: training with an MTP head and a cache, a mask that is not `[B, T]`, or `shift_labels`; in
                evaluation there is no `mtp_loss` then.
        """
        with_mtp = labels is not None and self.mtp is not None
        if with_mtp:
            unfit = past_key_values is not None or kwargs.get("shift_labels") is not None
            unfit |= attention_mask is not None and getattr(attention_mask, "ndim", None) != 2
            with_mtp = not unfit
            if self.training and unfit:
                raise ValueError(
                    "The MTP loss needs whole rows: leave out `past_key_values` and `shift_labels`, and give an "
                    "`attention_mask` of shape [batch, tokens] or none."
                )
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.compute_logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = ntp_loss = mtp_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if with_mtp:
            # What `MtpModel` feeds: embeddings without `scale_emb`. The norm after them makes it 1, but for its eps.
            if inputs_embeds is None:
                embeds = self.model.embed_tokens(input_ids)
            else:
                embeds = inputs_embeds / self.config.scale_emb
            mtp_loss = self.compute_mtp_loss(
                outputs.last_hidden_state, embeds, labels, attention_mask, position_ids, **kwargs
            )
            ntp_loss = loss.detach()
            if self.training:
                loss = loss + self.config.mtp_loss_weight * mtp_loss
            mtp_loss = mtp_loss.detach()
        return MiniCPM4CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            ntp_loss=ntp_loss,
            mtp_loss=mtp_loss,
        )

    def compute_mtp_loss(
        self,
        hidden_states: torch.Tensor,
        embeds: torch.Tensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        *,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Loss of the MTP head, which predicts token i + 2 from the state of token i and token i + 1.

        Element i of the head's row belongs to token i, so rows keep their length, and packed sequences and padding lie
        where they lie in the model. The last element of a sequence has no token after it: the one that stands in its
        place is of the next sequence, or padding. No other element of the sequence can see it, and it has no target.

        The head's layer is dense at every length, as when drafting: at T tokens it costs T * T / 2 attention scores a
        head, also where the model's layers are sparse. The logits take as much memory again as the model's.

        Args:
            hidden_states: the model's final states `[B, T, hidden]`.
            embeds: embeddings of the same tokens `[B, T, hidden]`, without `scale_emb`.
            labels: `[B, T]`, -100 for tokens that are no target.
            attention_mask: `[B, T]`, 1 for real tokens, or None.
            position_ids: `[B, T]` or `[1, T]`. Without a mask, a position that is not above the one before it begins
                a sequence.
            num_items_in_batch: what the sum over the targets is divided by; their number if None. DeepSeek-V3
                (arXiv:2412.19437, equation 24) divides both losses by the same number too.

        Returns:
            A scalar, 0 where there is no target.
        """
        if position_ids is None:
            position_ids = torch.arange(labels.shape[1], device=labels.device)[None]
        if attention_mask is None:
            follows, keys = position_ids.diff(dim=-1) > 0, None
        else:
            follows = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
            keys = F.pad(follows, (0, 1), value=True)
        targets = F.pad(labels, (0, 2), value=-100)[:, 2:]
        targets = targets.masked_fill(F.pad(~follows, (0, 1)), -100)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embeds,
            attention_mask=keys,
            past_key_values=None,
            position_ids=sequence_positions(position_ids),
        )
        states = self.mtp(
            hidden_states,
            embeds.roll(-1, dims=1),
            attention_mask=mask,
            position_embeddings=self.model.rotary_emb(hidden_states, position_ids + 1),  # where token i + 1 stands
            position_ids=position_ids,
            **kwargs,
        )
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum().clamp(min=1)
        return self.loss_function(
            logits=self.compute_logits(states),
            labels=labels,
            shift_labels=targets,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )


class MiniCPM4ForSequenceClassification(GenericForSequenceClassification, MiniCPM4PreTrainedModel):
    """MiniCPM4 with a classification head on the final norm's output, which is not divided (as upstream)."""

    def __init__(self, config: MiniCPM4Config):
        # Not through the Auto classes, as the generic head does: they would need the package when run as remote code.
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = MiniCPM4Model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = [
    "MiniCPM4ForCausalLM",
    "MiniCPM4ForSequenceClassification",
    "MiniCPM4Model",
    "MiniCPM4PreTrainedModel",
]
