"""The kernels of packed weights compiled for GPUs that are not here; see test_infllm_v2_triton_aot.py."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_aot import SHARED_LIMITS, TYPES, compile_all, compile_for, record_launches  # noqa: E402

from minicpm4_hf.kernels.lowbit.matmul import packed_matmul  # noqa: E402

TYPES.update({torch.uint8: "*u8", torch.int8: "*i8"})


def launches_of(bits, rows, dtype, *, outputs=4096, columns=4096, group_size=128, act_order=False):
    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    groups = columns // group_size
    if bits == 4:
        weight, scales = empty(columns // 8, outputs, dtype=torch.int32), empty(groups, outputs, dtype=torch.float16)
    else:
        weight = empty(outputs, columns * bits // 8, dtype=torch.uint8 if bits == 2 else torch.int8)
        scales = empty(outputs, groups, dtype=torch.float32)
    g_idx = empty(columns, dtype=torch.int32) if act_order else None
    with record_launches() as launches:
        packed_matmul(empty(rows, columns, dtype=dtype), weight, scales, bits=bits, g_idx=g_idx)
    return list(launches)


def check(launches, capability):
    for launch, report in zip(launches, compile_all(launches, capability), strict=True):
        name = launch.kernel.__name__
        where = f"{name} for sm_{capability}, {dict(launch.constants)}, {dict(launch.options)}: {report}"
        assert report.spilled_bytes == 0, where
        assert report.registers <= 255, where
        assert report.shared_bytes <= SHARED_LIMITS[capability], where


@pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda c: f"sm{c}")
@pytest.mark.parametrize("bits", [2, 4])
def test_decoding_and_prompts_in_bf16(bits, capability):
    names = set()
    for rows in (1, 512):
        launches = launches_of(bits, rows, torch.bfloat16)
        names |= {launch.kernel.__name__ for launch in launches}
        check(launches, capability)
    assert names == {"packed_matmul_kernel", "sum_splits_kernel"}


@pytest.mark.parametrize("bits", [2, 4])
def test_prompts_use_the_matrix_instructions_of_hopper(bits):
    (launch,) = launches_of(bits, 512, torch.bfloat16)
    assert "HGMMA" in compile_for(launch, 90, with_sass=True).sass


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda c: f"sm{c}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_configuration(bits, dtype, capability):
    launches = launches_of(bits, 1, dtype, outputs=8, columns=128)  # sizes of one become constants
    for rows in (1, 16, 33, 64, 65):
        for group_size in (4096, 128, 32):
            launches += launches_of(bits, rows, dtype, group_size=group_size)
    if bits == 4:
        launches += launches_of(bits, 1, dtype, act_order=True) + launches_of(bits, 300, dtype, act_order=True)
    check(list(dict.fromkeys(launches)), capability)
