"""One decoder layer at a time, run by the model's own code: the rest of the model is never in memory."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from .gptq_calibration import InputStatistics

# The linears of a layer by the input they share, in the order in which a forward pass reaches them.
INPUT_GROUPS = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
LINEARS = tuple(linear for group in INPUT_GROUPS.values() for linear in group)
NORMS = ("input_layernorm", "post_attention_layernorm")


class _ReachedError(Exception):
    """Ends a forward pass where nothing after it is wanted."""


class LayerRunner:
    """Runs one decoder layer of a model, in float32, without the others.

    It is the model's own forward pass around a list of one layer, so that masks, rotary embedding, residual scale and
    sparse attention are those of the checkpoint's config.

    Args:
        config: of a Llama-like model that the Auto classes know: minicpm4, minicpm or llama.
        device: where to run.
    """

    def __init__(self, config, device: torch.device | str = "cpu"):
        with torch.device("meta"):
            model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32)
        self.device = torch.device(device)
        self._layers = model.layers
        model.norm = nn.Identity()
        model.embed_tokens = nn.Embedding(1, 1)
        model.rotary_emb = type(model.rotary_emb)(config=config).to(self.device)
        model.layers = nn.ModuleList()
        self._model = model.eval().requires_grad_(False)
        self.scale_emb = getattr(config, "scale_emb", 1)

    @property
    def layer(self) -> nn.Module:
        """The layer in place."""
        return self._model.layers[0]

    def load(self, index: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Put layer `index` in place, with these weights by their names inside the layer, one after the other."""
        layer = copy.deepcopy(self._layers[index]).to_empty(device=self.device).eval().requires_grad_(False)
        layer.self_attn.layer_idx = 0  # of a cache that has this layer alone
        self._model.layers = nn.ModuleList([layer])
        for name, weight in weights:
            self.set_weight(name, weight)

    def get_weight(self, name: str) -> torch.Tensor:
        """A weight of the layer in place by its name inside it, such as `mlp.up_proj.weight`."""
        return self.layer.get_parameter(name)

    def set_weight(self, name: str, weight: torch.Tensor) -> None:
        """Overwrite a weight of the layer in place."""
        self.get_weight(name).copy_(weight)

    @torch.no_grad()
    def run(self, states: torch.Tensor, prefix: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Hidden states `[T, hidden]` after the layer.

        Args:
            states: `[T, hidden]`, before the layer.
            prefix: keys and values `[1, H, P, D]` of the positions before the first state.
        """
        cache = None
        if prefix is not None:
            cache = DynamicCache()
            cache.update(*(tensor.to(self.device) for tensor in prefix), 0)
        inputs = states.to(self.device, torch.float32)[None]
        return self._model(inputs_embeds=inputs, past_key_values=cache, use_cache=cache is not None).last_hidden_state[
            0
        ]

    @torch.no_grad()
    def run_prefix(self, states: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """States `[P, hidden]` after the layer, and the keys and values `[1, H, P, D]` that it made of them."""
        cache = DynamicCache()
        inputs = states.to(self.device, torch.float32)[None]
        states = self._model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
        layer = cache.layers[0]
        return states, (layer.keys.clone(), layer.values.clone())

    def collect(
        self,
        groups: Iterable[str],
        sequences: Iterable[torch.Tensor],
        *,
        skip: int,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, InputStatistics]:
        """Sum up the inputs of groups of linears over sequences; a pass ends at the last group.

        Args:
            groups: keys of `INPUT_GROUPS`.
            sequences: hidden states `[T, hidden]` before the layer.
            skip: positions at the start of each sequence that are left out, those of the prefix included.

        Raises:
            ValueError: an input is infinite or NaN.
        """
        groups = [group for group in INPUT_GROUPS if group in set(groups)]
        modules = {group: self.layer.get_submodule(INPUT_GROUPS[group][0]) for group in groups}
        statistics = {group: InputStatistics(module.in_features, self.device) for group, module in modules.items()}
        first = max(skip - (prefix[0].shape[2] if prefix is not None else 0), 0)

        def hook_of(group: str):
            def add(module, arguments):
                statistics[group].add(arguments[0][0, first:])
                if group == groups[-1]:
                    raise _ReachedError

            return add

        handles = [module.register_forward_pre_hook(hook_of(group)) for group, module in modules.items()]
        try:
            for states in sequences:
                try:
                    self.run(states, prefix)
                except _ReachedError:
                    pass
        finally:
            for handle in handles:
                handle.remove()
        for group, sums in statistics.items():
            if not torch.isfinite(sums.sum_magnitudes).all():
                raise ValueError(f"An input of {' and '.join(INPUT_GROUPS[group])} is infinite or NaN.")
        return statistics


__all__ = ["INPUT_GROUPS", "LINEARS", "NORMS", "LayerRunner"]
