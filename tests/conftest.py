"""Fixtures shared by the suite."""

import pytest
import torch


@pytest.fixture
def tokens():
    """`tokens(batch, length)`: random ids, none of them padding or end of text."""
    generator = torch.Generator().manual_seed(1)
    return lambda batch, length: torch.randint(1, 96, (batch, length), generator=generator)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every `new_empty` in the library starts as NaN, so that reading what was never written shows."""
    real = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        tensor = real(self, *args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
