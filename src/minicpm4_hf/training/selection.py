"""A loss that makes pooled keys point to the blocks that attention wants: selection, trained directly.

InfLLM v2 picks blocks by pooled keys, and the choice passes no gradient: a query whose block is not picked learns
nothing of it. What attends to single tokens, such as the digits of a number, is lost in a mean over 32 keys, and in a
small model nothing else brings it back. So, at some queries of each sequence, the scores of the blocks are compared
with what full attention gives them, over the blocks that have to be chosen:

    target_b   = mean over the query group of the attention weight on block b, a constant for the gradient
    predicted  = the scores of the blocks as `score_blocks` has them, divided by their sum
    loss       = sum_b target_b * (log(target_b / sum_b target_b) - log predicted_b)

that is, their KL divergence times the weight that goes far; 0 where the scores are in proportion to the attention.
Distilling full attention into the choice of blocks is SeerAttention's idea (arXiv:2410.13276), which has a gate of its
own for it; here the keys and queries themselves learn it, so that the model stays what it was.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minicpm4_hf.configuration_minicpm4 import complete_sparse_config
from minicpm4_hf.modeling_minicpm4 import MiniCPM4Attention, MiniCPM4ForCausalLM
from minicpm4_hf.sparse_attention import pool_keys
from minicpm4_hf.sparse_cache import sequence_positions
from minicpm4_hf.training.packing import IGNORED

_TINY = 1e-6  # of a probability


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """The loss of the selection, in a recipe's stage.

    Args:
        weight: of this loss beside that of the tokens.
        num_queries: of a sequence of the batch that are compared, in each layer.
        sparse_config: InfLLM v2 settings to train for; None for the stage's own.

    Raises:
        ValueError: a setting out of its range.
    """

    weight: float = 1.0
    num_queries: int = 16
    sparse_config: dict | None = None

    def __post_init__(self):
        if self.weight <= 0:
            raise ValueError(f"`selection.weight` must be above 0, got {self.weight}.")
        if self.num_queries < 1:
            raise ValueError(f"`selection.num_queries` must be at least 1, got {self.num_queries}.")
        if self.sparse_config is not None:
            complete_sparse_config(self.sparse_config)


def selection_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    settings: dict,
    *,
    scale: float,
    query_select: torch.Tensor | None = None,
    key_select: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of some queries of one sequence, see above, mean over key heads and queries.

    Args:
        query: `[HQ, M, D]`.
        key: `[H, T, D]`, of the whole sequence.
        positions: `[M]` int64, of the queries among the keys.
        settings: complete sparse settings.
        scale: of the attention's scores.
        query_select, key_select: what blocks are chosen by where it is not the same (`use_nope`).

    Returns:
        A float32 scalar, at least 0 but for rounding.
    """
    heads, num_keys, dim = key.shape
    block, kernel, stride = settings["block_size"], settings["kernel_size"], settings["kernel_stride"]
    num_blocks = -(-num_keys // block)
    query = query.float().reshape(heads, -1, len(positions), dim)  # [H, G, M, D]
    with torch.no_grad():
        scores = query @ key.float().transpose(-1, -2).unsqueeze(1) * scale  # [H, G, M, T]
        later = torch.arange(num_keys, device=key.device) > positions[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1).mean(1)
        target = F.pad(weights, (0, num_blocks * block - num_keys)).unflatten(-1, (num_blocks, block)).sum(-1)
        blocks, own = torch.arange(num_blocks, device=key.device), positions[:, None] // block
        far = (blocks >= settings["init_blocks"]) & (blocks < own - settings["window_size"] // block)
        target = target.where(far, 0.0)  # [H, M, NB]
        mass = target.sum(-1, keepdim=True)
        entropy = torch.special.xlogy(target, target / mass.clamp_min(_TINY)).sum(-1)

    chosen_by = query if query_select is None else query_select.float().reshape(query.shape)
    pooled = pool_keys((key if key_select is None else key_select).float()[None], kernel, stride)[0]  # [H, N, D]
    scores = chosen_by @ pooled.transpose(-1, -2).unsqueeze(1) * scale
    ends = torch.arange(pooled.shape[1], device=key.device) * stride + kernel - 1
    scores = scores.masked_fill(ends > positions[:, None], -torch.inf)
    weights = scores.softmax(-1).sum(1)  # [H, M, N]
    per_block, per_kernel = block // stride, kernel // stride
    padded = F.pad(weights, (per_kernel - 1, num_blocks * per_block - pooled.shape[1]))
    best = F.max_pool1d(padded, per_block + per_kernel - 1, per_block)  # [H, M, NB]
    best = best.where(far, 0.0) + _TINY
    predicted = best / best.where(far, 0.0).sum(-1, keepdim=True).clamp_min(_TINY)
    return (entropy - (target * predicted.log()).sum(-1)).mean()


class SelectionObserver:
    """Adds up the loss of the selection over the layers of a forward pass.

        observer = SelectionObserver(model, settings, sparse_config)
        observer.prepare(position_ids, labels)
        loss = model(...).loss + settings.weight * observer.take()

    Args:
        model: its attention layers are watched from now on; its weights and names stay as they are.
        sparse_config: settings to train for, complete or not.
    """

    def __init__(self, model: MiniCPM4ForCausalLM, settings: SelectionSettings, sparse_config: dict):
        self.settings, self.sparse = settings, complete_sparse_config(sparse_config)
        self._device, self._samples, self._losses = model.device, [], []
        for layer in model.model.layers:
            layer.self_attn.attend = functools.partial(self._attend, layer.self_attn, layer.self_attn.attend)

    def prepare(self, position_ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Choose the queries of the next pass: evenly, of those before a labelled token that have blocks to choose.

        Args:
            position_ids, labels: `[B, T]` int64, of packed rows.
        """
        self._device, places = labels.device, sequence_positions(position_ids)
        block = self.sparse["block_size"]
        nearest = (self.sparse["init_blocks"] + self.sparse["window_size"] // block + 2) * block
        asked = F.pad(labels[:, 1:] != IGNORED, (0, 1)) & (places >= nearest)
        self._samples, self._losses = [], []
        for row in range(len(labels)):
            found = asked[row].nonzero().squeeze(-1)
            if len(found) > self.settings.num_queries:
                found = found[torch.linspace(0, len(found) - 1, self.settings.num_queries, device=found.device).long()]
            begins = found - places[row, found]
            for begin in begins.unique().tolist():
                own = found[begins == begin]
                self._samples.append((row, begin, own, own - begin))

    def take(self) -> torch.Tensor:
        """The mean over layers and sequences of the pass since `prepare`; 0 where no query had to choose."""
        losses, self._samples, self._losses = self._losses, [], []
        return torch.stack(losses).mean() if losses else torch.zeros((), device=self._device)

    def _attend(self, module: MiniCPM4Attention, attend, query, key, value, *args, **kwargs):
        for row, begin, places, positions in self._samples:
            keys = slice(begin, begin + int(positions[-1]) + 1)
            select = {}
            if self.sparse["use_nope"]:
                select = {
                    "query_select": kwargs["query_nope"][row][:, places],
                    "key_select": kwargs["key_nope"][row][:, keys],
                }
            with torch.autocast(query.device.type, enabled=False):  # its products would be rounded, and the loss
                loss = selection_loss(
                    query[row][:, places], key[row][:, keys], positions, self.sparse, scale=module.scaling, **select
                )
            self._losses.append(loss)
        return attend(query, key, value, *args, **kwargs)


__all__ = ["SelectionObserver", "SelectionSettings", "selection_loss"]
