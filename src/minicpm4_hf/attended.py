"""How many keys a query attends to, from the settings alone: selection always fills its budget, so it is exact."""

import torch


def attended_tokens(positions: torch.Tensor, sparse_config: dict | None) -> torch.Tensor:
    """Keys that the queries at `positions` attend to, in each layer and head.

    A query sees the keys up to its own position. Below `dense_len` of them, and where its blocks do not exceed the
    budget of `topk + window_size / block_size`, it attends to all; otherwise to that many blocks, the last of which is
    its own and filled up to its position.

    Args:
        positions: 0-based int64, any shape.
        sparse_config: all keys of `DEFAULT_SPARSE_CONFIG`, or None for dense attention.

    Returns:
        int64, shape of `positions`.
    """
    visible = positions + 1
    if sparse_config is None:
        return visible
    block = sparse_config["block_size"]
    budget = sparse_config["topk"] + sparse_config["window_size"] // block
    within = (visible < sparse_config["dense_len"]) | (positions // block < budget)
    return torch.where(within, visible, (budget - 1) * block + positions % block + 1)


def mean_attended_tokens(num_tokens: int, sparse_config: dict | None) -> float:
    """Mean of `attended_tokens` over a sequence of `num_tokens` queries."""
    return attended_tokens(torch.arange(num_tokens), sparse_config).double().mean().item()


__all__ = ["attended_tokens", "mean_attended_tokens"]
