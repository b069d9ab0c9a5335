"""Every Triton kernel compiled for GPUs that are not here: the launches of the host code at real shapes, and the
compiler's own report on each. No launch may spill registers or ask for more shared memory than a program gets.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_aot import SHARED_LIMITS, compile_all, compile_for, record_launches  # noqa: E402

from minicpm4_hf.kernels.infllm_v2.attend import attend_fwd  # noqa: E402
from minicpm4_hf.kernels.infllm_v2.attend_bwd import attend_bwd  # noqa: E402
from minicpm4_hf.kernels.infllm_v2.compress import compress_fwd  # noqa: E402
from minicpm4_hf.kernels.infllm_v2.decode import attend_decode, select_decode  # noqa: E402
from minicpm4_hf.kernels.infllm_v2.topk import select_fwd  # noqa: E402

KERNELS = {
    "compress_fwd_kernel",
    "lse_fwd_kernel",
    "score_fwd_kernel",
    "topk_fwd_kernel",
    "merge_blocks_kernel",
    "attend_fwd_kernel",
    "delta_kernel",
    "attend_bwd_dq_kernel",
    "attend_bwd_dkdv_kernel",
    "lse_decode_kernel",
    "select_decode_kernel",
    "attend_decode_kernel",
    "reduce_decode_kernel",
}
HEADS = {
    "8B": (32, 2, 128),
    "0.5B": (16, 2, 64),
    "group of 3": (24, 8, 96),
    "no group": (8, 8, 64),
    "one head": (1, 1, 16),
}  # HQ, H, D


def launches_of(heads, dtype, num_keys=131072, num_rows=None):
    """What selection, attention, its gradient and a decoding step launch; `num_rows` packed texts, or one row."""
    query_heads, num_heads, dim = HEADS[heads]

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, one = empty(1, query_heads, num_keys, dim), empty(1, query_heads, 1, dim)
    k, v = (empty(1, num_heads, num_keys, dim) for _ in range(2))
    fine, coarse = (empty(1, num_heads, num_keys // stride, dim) for stride in (16, 64))
    pooling = {"kernel_size": 32, "kernel_stride": 16}
    settings = {**pooling, "block_size": 64, "init_blocks": 1, "window_size": 2048, "topk": 64}
    rows = {} if num_rows is None else {"cu_seqlens": empty(num_rows + 1, dtype=torch.int32), "max_seqlen": num_keys}
    with record_launches() as launches:
        compress_fwd(k, fine, coarse, **pooling, **rows)
        blocks = select_fwd(q, fine, coarse, num_keys, **settings, lse_approx=True, scale=0.1, **rows)
        o, lse = attend_fwd(q, k, v, blocks, block_size=64, scale=0.1, **rows)
        for deterministic in (False, True):
            options = {"block_size": 64, "scale": 0.1, "deterministic": deterministic, **rows}
            attend_bwd(o, q, k, v, o, lse, blocks, **options)
        if num_rows is None:
            blocks = select_decode(one, fine, coarse, num_keys, **settings, lse_approx=True, scale=0.1)
            attend_decode(one, k, v, blocks, block_size=64, scale=0.1, kv_end=empty(1, dtype=torch.int64))
    return list(launches)


def check(launches, capability):
    reports = {}
    for launch, report in zip(launches, compile_all(launches, capability), strict=True):
        name = launch.kernel.__name__
        where = f"{name} for sm_{capability}, {dict(launch.constants)}, {dict(launch.options)}: {report}"
        assert report.spilled_bytes == 0, where
        assert report.registers <= 255, where
        assert report.shared_bytes <= SHARED_LIMITS[capability], where
        reports[name] = report
    return reports


def without_narrow_topk(launches):
    """The top-k of a long text comes in all widths up to its own; one stands for them."""
    widths = [dict(x.constants)["NBP"] for x in launches if x.kernel.__name__ == "topk_fwd_kernel"]
    return [x for x in launches if dict(x.constants).get("NBP", max(widths)) >= max(widths)]


@pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda c: f"sm{c}")
def test_kernels_of_the_large_model_in_bf16(capability):
    launches = without_narrow_topk(launches_of("8B", torch.bfloat16))
    assert {launch.kernel.__name__ for launch in launches} == KERNELS
    reports = check(launches, capability)
    # two programs of the attention kernel share a multiprocessor: 64 Ki registers, and the shared memory of one
    attend = reports["attend_fwd_kernel"]
    assert 2 * attend.registers * 128 <= 65536
    assert capability != 90 or 2 * (attend.shared_bytes + 1024) <= 228 * 1024


def test_matrix_instructions_of_hopper_are_used():
    for launch in launches_of("8B", torch.bfloat16, num_keys=8192):
        if launch.kernel.__name__ in ("score_fwd_kernel", "attend_fwd_kernel", "attend_bwd_dkdv_kernel"):
            sass = compile_for(launch, 90, with_sass=True).sass
            assert "HGMMA" in sass, launch.kernel.__name__
            assert "LDGSTS" in sass, launch.kernel.__name__  # loads run ahead of the products


@pytest.mark.slow
def test_sizes_of_one_compile():
    """Triton makes constants of arguments that are 1: one key head, one query head, a text of few blocks."""
    for num_keys in (9, 700):
        check(launches_of("one head", torch.bfloat16, num_keys=num_keys), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda c: f"sm{c}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_every_configuration(heads, dtype, capability):
    check(launches_of(heads, dtype), capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMITS, ids=lambda c: f"sm{c}")
def test_packed_texts(capability):
    check(without_narrow_topk(launches_of("0.5B", torch.bfloat16, num_keys=32768, num_rows=5)), capability)
