"""InfLLM v2's public operation: parity with the float64 definition, properties, edges, errors."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from definitions import (
    block_mask,
    check_rounding,
    make_inputs,
    masked_attention,
    naive_sparse_attention,
    rounding,
)

from minicpm4_hf import kernels
from minicpm4_hf.kernels.cpu import why_missing
from minicpm4_hf.kernels.infllm_v2 import sparse_attention
from minicpm4_hf.sparse_attention import count_pooled, pool_keys
from minicpm4_hf.sparse_cache import CompressedKeys

SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3}
GROUPS = pytest.mark.parametrize("group", [1, 3, 8, 16], ids=lambda g: f"G{g}")


BACKENDS = pytest.mark.parametrize(
    "backend",
    ["reference", pytest.param("cpu", marks=pytest.mark.skipif(why_missing() is not None, reason=str(why_missing())))],
)


@GROUPS
@pytest.mark.parametrize("lse_approx", [True, False], ids=["coarse", "exact"])
@pytest.mark.parametrize(
    ("num_keys", "num_queries"), [(1, 1), (63, 63), (175, 40), (143, 1), (191, 24)], ids=lambda n: f"T{n}"
)
def test_parity_with_definition(group, lse_approx, num_keys, num_queries):
    q, k, v = make_inputs(2, num_keys, 2, group, 16, num_queries=num_queries)
    for kv_start in (None, torch.tensor([0, min(21, num_keys - 1)], dtype=torch.int32)):
        out, blocks = sparse_attention(q, k, v, **SMALL, lse_approx=lse_approx, kv_start=kv_start)
        expected, expected_blocks = naive_sparse_attention(q, k, v, **SMALL, lse_approx=lse_approx, kv_start=kv_start)
        assert torch.equal(blocks, expected_blocks)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "init_blocks": 1, "window_size": 128, "topk": 3},
        {"kernel_size": 16, "kernel_stride": 16, "block_size": 16, "init_blocks": 0, "window_size": 0, "topk": 2},
        {"kernel_size": 24, "kernel_stride": 8, "block_size": 16, "init_blocks": 2, "window_size": 16, "topk": 4},
        {"kernel_size": 64, "kernel_stride": 16, "block_size": 32, "init_blocks": 1, "window_size": 32, "topk": 3},
    ],
    ids=lambda s: f"K{s['kernel_size']}-{s['kernel_stride']}-BS{s['block_size']}",
)
def test_parity_over_settings(settings):
    q, k, v = make_inputs(1, 527, 2, 2, 16, num_queries=30)  # 527 is 15 modulo 16: upstream hides one kernel here
    out, blocks = sparse_attention(q, k, v, **settings)
    expected, expected_blocks = naive_sparse_attention(q, k, v, **settings)
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@BACKENDS
@GROUPS
@pytest.mark.parametrize("lse_approx", [True, False], ids=["coarse", "exact"])
def test_float32_parity_with_definition(lse_approx, group, backend):
    """float64 runs on the reference alone, so what every backend shares is measured here."""
    q, k, v = make_inputs(2, 191, 2, group, 16, num_queries=24, dtype=torch.float32)
    for kv_start in (None, torch.tensor([0, 21], dtype=torch.int32)):
        options = {**SMALL, "lse_approx": lse_approx, "kv_start": kv_start}
        out, blocks = sparse_attention(q, k, v, **options, backend=backend)
        expected, expected_blocks = naive_sparse_attention(q, k, v, **options)
        assert torch.equal(blocks, expected_blocks)
        torch.testing.assert_close(out.double(), expected, **rounding(torch.float32))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 96, 128], ids=lambda d: f"D{d}")
def test_low_precision_error(dtype, dim, backend):
    """At most twice the error of the same maths written plainly in that dtype, over the blocks that were picked."""
    q, k, v = make_inputs(2, 200, 2, 4, dim, dtype=dtype)
    out, blocks = sparse_attention(q, k, v, **SMALL, backend=backend)
    mask = block_mask(blocks, 200, 200, 16)
    exact = masked_attention(q.double(), k.double(), v.double(), mask)
    check_rounding(out, exact, masked_attention(q, k, v, mask))
    if dtype == torch.float32:  # the lower ones round the pooled keys, and with them the ranking
        assert torch.equal(blocks, naive_sparse_attention(q, k, v, **SMALL)[1])


@BACKENDS
@GROUPS
def test_budget_over_all_blocks_is_dense(group, backend):
    q, k, v = make_inputs(2, 111, 2, group, 16, dtype=torch.float32)
    out, blocks = sparse_attention(q, k, v, **{**SMALL, "topk": 8}, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    assert blocks[0, 0, -1].tolist() == [*range(7), -1, -1, -1]


@BACKENDS
@GROUPS
def test_decode_and_chunks_equal_prefill(group, backend):
    q, k, v = make_inputs(2, 199, 2, group, 16, dtype=torch.float32)
    out, blocks = sparse_attention(q, k, v, **SMALL, backend=backend)
    for begin, end in ((0, 1), (1, 70), (70, 71), (71, 199)):
        part, part_blocks = sparse_attention(
            q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **SMALL, backend=backend
        )
        assert torch.equal(part_blocks, blocks[:, :, begin:end])
        torch.testing.assert_close(part, out[:, :, begin:end], rtol=0, atol=1e-5)


@BACKENDS
def test_rows_do_not_see_each_other(backend):
    q, k, v = make_inputs(3, 150, 2, 4, 16, dtype=torch.float32)
    starts = torch.tensor([0, 77, 150], dtype=torch.int32)  # the last row is all padding
    k[1, :, :77] = v[1, :, :77] = torch.nan
    out, blocks = sparse_attention(q, k, v, **SMALL, kv_start=starts, backend=backend)
    alone, alone_blocks = sparse_attention(q[1:2, :, 77:], k[1:2, :, 77:], v[1:2, :, 77:], **SMALL, backend=backend)
    torch.testing.assert_close(out[1:2, :, 77:], alone, **rounding(torch.float32))  # threads may share a tile's keys
    assert torch.equal(blocks[1:2, :, 77:], alone_blocks)
    assert (out[1, :, :77] == 0).all() and (blocks[1, :, :77] == -1).all()
    assert (out[2] == 0).all() and (blocks[2] == -1).all()
    order = torch.tensor([2, 0, 1])
    shuffled, _ = sparse_attention(q[order], k[order], v[order], **SMALL, kv_start=starts[order], backend=backend)
    torch.testing.assert_close(shuffled, out[order], rtol=0, atol=0)


@BACKENDS
def test_forced_blocks_and_ties(backend):
    q = torch.zeros(1, 2, 320, 16)
    k, v = torch.zeros(1, 1, 320, 16), torch.randn(1, 1, 320, 16)
    _, blocks = sparse_attention(q, k, v, **{**SMALL, "topk": 5}, backend=backend)
    # own block 19, two local ones, the first one; every score ties, so the free picks are the lowest numbers
    assert blocks[0, 0, -1].tolist() == [0, 1, 2, 3, 17, 18, 19]
    assert (blocks.diff(dim=-1)[blocks[..., 1:] >= 0] > 0).all()


@BACKENDS
def test_far_scores_do_not_overflow(backend):
    q, k, v = make_inputs(1, 200, 1, 4, 16, dtype=torch.float32)
    out, blocks = sparse_attention(q * 100, k * 100, v, **SMALL, backend=backend)
    assert out.isfinite().all()
    assert (blocks[0, 0, -1] >= 0).all()


def test_gradients():
    q, k, v = make_inputs(1, 90, 1, 2, 4)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    settings = {**SMALL, "topk": 2}
    out, blocks = sparse_attention(*leaves, **settings)
    mask = block_mask(blocks, 90, 90, 16)
    expected = masked_attention(*leaves, mask)
    weight = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, leaves, weight), torch.autograd.grad(expected, leaves, weight)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    # the last query alone: blocks it did not pick get a gradient of exactly zero
    grads = torch.autograd.grad(sparse_attention(*leaves, **settings)[0][:, :, -1].sum(), leaves[1:])
    unseen = ~mask[0, 0, -1]
    assert unseen.any()
    for grad in grads:
        assert (grad[0, 0, unseen] == 0).all()
        assert (grad[0, 0, ~unseen] != 0).any()


def test_gradcheck():
    q, k, v = make_inputs(1, 40, 1, 2, 2, num_queries=3)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    settings = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "init_blocks": 1, "window_size": 4, "topk": 2}
    assert torch.autograd.gradcheck(lambda *t: sparse_attention(*t, **settings)[0], leaves)


def test_scale_is_used():
    q, k, v = make_inputs(1, 130, 1, 2, 16)
    torch.testing.assert_close(
        sparse_attention(q, k, v, **SMALL, scale=0.5)[0], naive_sparse_attention(q, k, v, **SMALL, scale=0.5)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pooled_streams_grow_as_pooled_whole(dtype, poisoned_empty):
    _, k, _ = make_inputs(3, 211, 2, 1, 16, dtype=dtype)
    starts = torch.tensor([0, 9, 40])
    state = CompressedKeys()
    for end in (1, 7, 8, 60, 61, 211):
        fine, coarse = state.update(k[:, :, :end], starts, 8, 4)
    for row, start in enumerate(starts.tolist()):
        for stream, factor in ((fine, 1), (coarse, 4)):
            whole = pool_keys(k[row : row + 1, :, start:], 8 * factor, 4 * factor)
            assert whole.shape[2] == count_pooled(211 - start, 8 * factor, 4 * factor) > 0
            assert torch.equal(stream[row : row + 1, :, : whole.shape[2]], whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(1, 2, 9, 16)}, "same shape"),
        ({"q": torch.zeros(1, 3, 8, 16)}, "multiple"),
        ({"q": torch.zeros(1, 4, 9, 16)}, "1 to 8"),
        ({"q": torch.zeros(1, 4, 8, 16, dtype=torch.float16)}, "one floating dtype"),
        ({"q": torch.zeros(4, 8, 16)}, "shape"),
        ({"q": torch.zeros(2, 4, 8, 16)}, "batch"),
        ({"kv_start": torch.zeros(3, dtype=torch.int32)}, "kv_start"),
        ({"block_size": 24, "kernel_stride": 16, "kernel_size": 32}, "block_size"),
        ({"topk": 0}, "topk"),
        ({"window_size": 30}, "window_size"),
        ({"backend": "fast"}, "backend"),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else "",
)
def test_bad_arguments_are_named(change, words):
    good = {"q": torch.zeros(1, 4, 8, 16), "k": torch.zeros(1, 2, 8, 16), "v": torch.zeros(1, 2, 8, 16), **SMALL}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=words) as error:
        sparse_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert "\n" not in str(error.value)


MEMORY_SCRIPT = """
import resource, sys, torch
from minicpm4_hf.kernels.infllm_v2 import sparse_attention
q, k, v = (torch.randn(1, heads, 32768, 64) for heads in (16, 2, 2))
sparse_attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, blocks = sparse_attention(q, k, v, topk=8, window_size=512, backend=sys.argv[1])
assert out.isfinite().all() and blocks.shape == (1, 2, 32768, 16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@BACKENDS
def test_memory_at_32k_with_the_heads_of_the_half_billion_model(backend):
    result = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT, backend], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.0  # GiB beyond the inputs


def test_triton_is_never_replaced_silently(monkeypatch):
    q, k, v = (torch.zeros(1, 1, 8, 16) for _ in range(3))
    with pytest.raises((ValueError, RuntimeError), match=r"Triton|CUDA") as error:
        sparse_attention(q, k, v, backend="triton")
    assert "\n" not in str(error.value)
    # on a GPU "auto" takes it where it is installed, unless told not to
    for has_triton, enabled, name, word in [
        (True, True, "triton", "Triton kernels"),
        (False, True, "reference", "minicpm4-hf[gpu]"),
        (True, False, "reference", "MINICPM4_TRITON=0"),
    ]:
        monkeypatch.setattr(kernels, "_has_triton", has_triton)
        monkeypatch.setattr(kernels, "_triton_enabled", enabled)
        found, reason = kernels.resolve_backend("cuda")
        assert found == name and word in reason
    with pytest.raises(ValueError, match="takes tensors on the CPU, got cuda"):
        kernels.resolve_backend("cuda", "cpu")
