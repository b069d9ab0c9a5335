"""The Triton kernels of packed weights: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own. It
gets bfloat16 products wrong, so that dtype is for GPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_weights import OPERATIONS, make_packed, make_rows

from minicpm4_hf.kernels import lowbit

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU; runs in the interpreter through the last test"
)
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture
def poisoned(monkeypatch):
    """What the kernels get as memory starts as NaN; the interpreter asks for its own in other dtypes, too."""
    real = torch.Tensor.new_empty

    def poison(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


def check(packed, x, poisoned=None):
    """At most twice the error of the same maths written plainly in x's dtype, and a little of float32's."""
    tensors = [tensor if tensor is None else tensor.to(DEVICE) for tensor in packed.tensors]
    out = getattr(lowbit, OPERATIONS[packed.kind])(x.to(DEVICE), *tensors, backend="triton").cpu()
    exact = x.double() @ packed.weight.T
    plain = x @ packed.weight.to(x.dtype).T
    assert out.dtype == x.dtype and out.shape == exact.shape
    size = exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + 2**-20 * size + 0.5 * torch.finfo(x.dtype).eps * size
    assert (out.double() - exact).abs().max() <= allowed


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("rows", [1, 7, 64, 65], ids=lambda m: f"M{m}")
def test_sizes(kind, rows, dtype, poisoned):
    for columns, outputs in ((8, 8), (264, 33), (1032, 70)):
        check(make_packed(kind, outputs, columns, -1, seed=columns), make_rows(rows, columns, dtype))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("group_size", [256, 128, 64, 32, 8], ids=lambda g: f"g{g}")
def test_groups(kind, group_size, dtype, poisoned):
    for rows, scale_dtype in ((3, torch.float32), (70, torch.float16)):
        packed = make_packed(kind, 40, 512, group_size, scale_dtype=scale_dtype)
        check(packed, make_rows(rows, 512, dtype))


@runs_kernels
@pytest.mark.parametrize("rows", [2, 80], ids=lambda m: f"M{m}")
def test_groups_out_of_order(rows, poisoned):
    packed = make_packed("int4", 24, 256, 64, scale_dtype=torch.float16, act_order=True)
    check(packed, make_rows(rows, 256, torch.float32))


@runs_kernels
def test_columns_are_split_over_programs(poisoned, monkeypatch):
    from minicpm4_hf.kernels.lowbit import matmul

    splits = []
    real = matmul.choose_splits
    monkeypatch.setattr(matmul, "choose_splits", lambda *args: splits.append(real(*args)) or splits[-1])
    packed = make_packed("ternary", 70, 2056, -1)
    check(packed, make_rows(1, 2056, torch.float32))
    assert splits[0] > 8


@runs_kernels
@pytest.mark.parametrize("kind", OPERATIONS)
def test_any_layout_of_the_rows(kind, poisoned):
    packed = make_packed(kind, 24, 64, -1)
    for rows in (4, 68):
        x = make_rows(rows, 64, torch.float32)
        wide = x.new_full((rows, 69), torch.nan)
        wide[:, 5:] = x
        for same in (wide[:, 5:], x.T.contiguous().T):
            check(packed, same)
    tensors = [tensor if tensor is None else tensor.to(DEVICE) for tensor in packed.tensors]
    out = getattr(lowbit, OPERATIONS[kind])(x.view(2, -1, 64).to(DEVICE), *tensors, backend="triton")
    assert out.shape == (2, 34, 24)
    empty = getattr(lowbit, OPERATIONS[kind])(x[:0].to(DEVICE), *tensors, backend="triton")
    assert empty.shape == (0, 24)


@runs_kernels
def test_misfits_are_named():
    packed = make_packed("ternary", 8, 32, -1)
    with pytest.raises(ValueError, match=r"must be float16, bfloat16 or float32, got torch\.float64"):
        check(packed, make_rows(1, 32, torch.float64))
    tensors = (packed.tensors[0].to(DEVICE), torch.ones(8, 3, device=DEVICE))
    with pytest.raises(ValueError, match="32 columns do not fit 3 groups"):
        lowbit.ternary_linear(torch.zeros(1, 32, device=DEVICE), *tensors, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of any device")
def test_tensors_on_the_cpu_are_refused():
    packed = make_packed("ternary", 8, 32, -1)
    with pytest.raises(ValueError, match="the tensors are on cpu, and the Triton kernels take CUDA tensors"):
        lowbit.ternary_linear(make_rows(1, 32, torch.float32), *packed.tensors, backend="triton")


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, minicpm4_hf.kernels.lowbit as lowbit
ours = {name.rpartition(".")[2] for name in sys.modules if name.startswith("minicpm4_hf.kernels.lowbit.")}
assert not ours, ours
lowbit.ternary_linear(torch.zeros(1, 8), torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4, 1))
"""


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_import_needs_no_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is how the others run without a GPU")
def test_everything_in_the_interpreter():
    import numpy

    new_enough = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
    if not new_enough and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.9 does not run with numpy 2.4")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
