"""Fixtures shared by the suite, and the threads of a run on several processes (`pytest -n 2`)."""

import os

# Before torch is imported, which reads it: processes that each take all cores wait for each other's threads.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.pop("PYTEST_ADDOPTS", None)  # a pytest that a test starts is one process

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
