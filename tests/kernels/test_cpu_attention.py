"""Native sparse attention on the CPU: parity with the float64 definition, properties, and any layout of memory."""

from functools import partial

import pytest
import torch
from definitions import block_mask, check_rounding, check_sparse_parity, make_inputs, masked_attention, rounding

from minicpm4_hf.kernels.cpu import attention, why_missing
from minicpm4_hf.kernels.dense import dense_attention
from minicpm4_hf.kernels.infllm_v2 import sparse_attention
from minicpm4_hf.sparse_attention import count_pooled
from minicpm4_hf.sparse_cache import SparseLayer

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def one_thread():
    """What one thread computes is compared bit for bit; more threads may cut a tile's keys elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_sparse(q, k, v, **options):
    return sparse_attention(q, k, v, **{**SMALL, **options}, backend="cpu")


def check_parity(q, k, v, **options):
    operation = partial(sparse_attention, backend="cpu")
    return check_sparse_parity(operation, attention.pool_streams, q, k, v, **{**SMALL, **options})


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 20], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128, 160], ids=lambda d: f"D{d}")
@DTYPES
def test_parity_over_heads(dtype, dim, group):
    for num_queries in (139, 1):
        check_parity(*make_inputs(1, 139, 2, group, dim, num_queries=num_queries, dtype=dtype, seed=group))


@pytest.mark.parametrize(
    ("num_keys", "num_queries"),
    [(1, 1), (15, 15), (63, 63), (64, 64), (65, 3), (203, 203), (333, 70), (333, 64), (333, 5), (1501, 1501)],
    ids=lambda n: f"T{n}",
)
@DTYPES
def test_parity_over_lengths(dtype, num_keys, num_queries):
    heads, group = (1, 2) if num_keys > 1000 else (2, 4)
    q, k, v = make_inputs(1, num_keys, heads, group, 64, num_queries=num_queries, dtype=dtype)
    for lse_approx in (True, False):
        check_parity(q, k, v, lse_approx=lse_approx)


@DTYPES
@pytest.mark.parametrize("lse_approx", [True, False], ids=["coarse", "exact"])
@pytest.mark.parametrize(
    "geometry",
    [
        (32, 16, 64, 1, 128, 3),
        (16, 16, 16, 0, 0, 2),
        (24, 8, 16, 2, 16, 4),
        (64, 16, 32, 1, 32, 3),
        (8, 4, 8, 1, 0, 4),
        (24, 12, 24, 2, 48, 4),
        (96, 32, 96, 0, 96, 2),
        (32, 16, 128, 1, 128, 3),
        (36, 36, 72, 0, 72, 3),  # a block that is a tile and a bit
        (640, 8, 8, 1, 16, 9),  # a window of more blocks than are scored at a time
        (800, 16, 16, 1, 16, 5),  # no coarse window fits
        (2000, 16, 16, 1, 16, 5),  # no window fits: every score is 0, so the lowest blocks win
        (32, 16, 16, 0, 0, 1),  # nothing but the own block
        (1, 1, 1, 1, 3, 5),
        (32, 16, 64, 1, 2048, 64),  # everything fits the budget
    ],
    ids=lambda g: "K{}-{}-BS{}-I{}-W{}-top{}".format(*g),
)
def test_parity_over_settings(geometry, lse_approx, dtype):
    settings = dict(zip(SMALL, geometry))
    q, k, v = make_inputs(1, 1003, 2, 2, 32, num_queries=70, dtype=dtype)
    check_parity(q, k, v, **settings, lse_approx=lse_approx)
    check_parity(q[:, :, -1:], k, v, **settings, lse_approx=lse_approx)


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 1e-9, 0.0], ids=lambda s: f"scale{s}")
@pytest.mark.parametrize("group", [1, 4, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_parity_over_scales(dtype, group, scale):
    q, k, v = make_inputs(1, 150, 2, group, 64, dtype=dtype)
    out, blocks = run_sparse(q, k, v, scale=scale)
    if scale:
        check_parity(q, k, v, scale=scale)
    else:  # all weights are equal, so the ranking rests on ties
        mask = block_mask(blocks, 150, 150, 16)
        exact, plain = (masked_attention(*(t.to(d) for t in (q, k, v)), mask, scale) for d in (torch.float64, dtype))
        check_rounding(out, exact, plain)


@pytest.mark.parametrize("num_queries", [203, 70, 5, 1], ids=lambda n: f"TQ{n}")
@pytest.mark.parametrize("group", [1, 2, 5, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_ragged_batch(dtype, group, num_queries):
    q, k, v = make_inputs(5, 203, 1, group, 32, num_queries=num_queries, dtype=dtype)
    kv_start = torch.tensor([0, 77, 203, 170, 202], dtype=torch.int32)  # the third row is all padding
    for row, start in enumerate(kv_start.tolist()):
        k[row, :, :start] = v[row, :, :start] = torch.nan
        q[row, :, : max(0, start - 203 + num_queries)] = torch.nan
    clean = torch.where(torch.isnan(q), 0, q)
    out, blocks = check_parity(clean, k, v, kv_start=kv_start)
    poisoned, poisoned_blocks = run_sparse(q, k, v, kv_start=kv_start)
    assert torch.equal(poisoned, out) and torch.equal(poisoned_blocks, blocks)
    assert (out[2] == 0).all() and (blocks[2] == -1).all()
    padding = max(0, 77 - 203 + num_queries)
    assert (out[1, :, :padding] == 0).all() and (blocks[1, :, :padding] == -1).all()
    order = torch.tensor([3, 1, 0, 4, 2])
    shuffled, shuffled_blocks = run_sparse(q[order], k[order], v[order], kv_start=kv_start[order])
    assert torch.equal(shuffled, out[order]) and torch.equal(shuffled_blocks, blocks[order])
    for row, start in enumerate(kv_start.tolist()):
        if start == 203:
            continue
        real = slice(max(0, start - 203 + num_queries), None)
        alone, alone_blocks = run_sparse(
            q[row : row + 1, :, real], k[row : row + 1, :, start:], v[row : row + 1, :, start:]
        )
        assert torch.equal(alone, out[row : row + 1, :, real])
        assert torch.equal(alone_blocks, blocks[row : row + 1, :, real])


@pytest.mark.parametrize("group", [1, 3, 4, 16], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("dim", [16, 64, 128], ids=lambda d: f"D{d}")
@DTYPES
def test_every_key_counts_once(dtype, dim, group):
    """With equal weights the output counts keys, which shows one too many or too few even in bfloat16."""
    q, k, _ = make_inputs(1, 203, 2, group, dim, dtype=dtype)
    v = torch.eye(dim, dtype=dtype).repeat(203 // dim + 1, 1)[:203].expand(1, 2, -1, -1)
    out, blocks = run_sparse(q * 0, k, v)
    expected = masked_attention(q.double() * 0, k.double(), v.double(), block_mask(blocks, 203, 203, 16))
    torch.testing.assert_close(out.double(), expected, rtol=rounding(dtype)["rtol"] / 2, atol=0)


@pytest.mark.parametrize("group", [1, 3, 8, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_a_budget_over_all_blocks_is_dense(dtype, group):
    q, k, v = make_inputs(2, 111, 2, group, 64, dtype=dtype)
    out, blocks = run_sparse(q, k, v, topk=8)
    assert blocks[0, 0, -1].tolist() == [*range(7), -1, -1, -1]
    torch.testing.assert_close(out, dense_attention(q, k, v, backend="cpu"), **rounding(dtype))


@pytest.mark.parametrize("group", [1, 3, 8, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_decode_and_chunks_equal_prefill(dtype, group):
    q, k, v = make_inputs(2, 199, 2, group, 64, dtype=dtype)
    out, blocks = run_sparse(q, k, v)
    for begin, end in ((0, 1), (1, 70), (70, 71), (71, 199), (198, 199)):
        part, part_blocks = run_sparse(q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
        assert torch.equal(part_blocks, blocks[:, :, begin:end])
        torch.testing.assert_close(part, out[:, :, begin:end], **rounding(dtype))


@DTYPES
def test_decode_through_the_cache(dtype):
    """Keys appended one at a time to growing buffers, pooled as they come."""
    q, k, v = make_inputs(2, 150, 2, 4, 32, dtype=dtype)
    out, blocks = run_sparse(q, k, v)
    layer = SparseLayer()
    for t in range(150):
        keys, values = layer.update(k[:, :, t : t + 1], v[:, :, t : t + 1])
        compressed = layer.compressed.update(keys, None, 8, 4, attention.pool_keys)
        step, picked = attention.sparse_attention(q[:, :, t : t + 1], keys, values, **SMALL, compressed=compressed)
        assert torch.equal(picked[:, :, 0], blocks[:, :, t])
        torch.testing.assert_close(step[:, :, 0], out[:, :, t], **rounding(dtype))


def test_ties_go_to_the_lowest_blocks():
    q, k, v = torch.zeros(1, 2, 320, 16), torch.zeros(1, 1, 320, 16), torch.randn(1, 1, 320, 16)
    _, blocks = run_sparse(q, k, v, topk=5)
    assert blocks[0, 0, -1].tolist() == [0, 1, 2, 3, 17, 18, 19]


@DTYPES
def test_far_scores_do_not_overflow(dtype):
    q, k, v = make_inputs(1, 200, 1, 4, 16, dtype=dtype)
    out, blocks = run_sparse(q * 100, k * 100, v)
    assert out.isfinite().all() and out.abs().max() <= v.abs().max()
    assert (blocks[0, 0, -1] >= 0).all()


@DTYPES
def test_selecting_with_other_queries(dtype):
    q, k, v = make_inputs(1, 203, 2, 4, 64, dtype=dtype)
    other = make_inputs(1, 203, 2, 4, 64, dtype=dtype, seed=1)[0]
    _, expected = run_sparse(other, k, v)
    out, blocks = attention.sparse_attention(q, k, v, **SMALL, q_select=other)
    assert torch.equal(blocks, expected)
    mask = block_mask(blocks, 203, 203, 16)
    check_rounding(out, masked_attention(q.double(), k.double(), v.double(), mask), masked_attention(q, k, v, mask))


@pytest.mark.parametrize(
    "sizes", [(32, 16), (8, 4), (128, 64), (24, 8), (5, 5), (1, 1)], ids=lambda s: f"K{s[0]}-{s[1]}"
)
@DTYPES
def test_pooled_keys(dtype, sizes, poisoned):
    size, stride = sizes
    for num_tokens in (1, size - 1, size, 203, 1501):
        k = make_inputs(2, max(num_tokens, 1), 3, 1, 48, dtype=dtype)[1][:, :, :num_tokens]
        pooled = attention.pool_keys(k, size, stride)
        assert pooled.shape == (2, 3, count_pooled(num_tokens, size, stride), 48) and pooled.dtype == dtype
        if not pooled.numel():
            continue
        exact = k.double().unfold(2, size, stride).mean(-1)
        # one rounding to the dtype, and float32 sums of numbers up to the largest key
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + size * torch.finfo(torch.float32).eps * k.abs().max()
        smallest = torch.finfo(dtype).smallest_normal
        assert ((pooled.double() - exact).abs() <= allowed.double() + smallest).all()
        part = attention.pool_keys(k[:, :, stride:], size, stride)  # an entry does not depend on its neighbours
        assert torch.equal(part, pooled[:, :, 1:])


# Memory: the same numbers, however they lie.


@pytest.fixture
def poisoned(poisoned_empty, monkeypatch):
    """Outputs start as NaN, block lists as numbers that no list holds."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 0x6F6F6F6F)

    monkeypatch.setattr(attention.torch, "empty", empty)


def place(tensor, shape, where):
    """A view of new NaN memory of `shape`, holding `tensor`."""
    view = tensor.new_full(shape, torch.nan)[where]
    view.copy_(tensor)
    return view


def shift_by_one_element(t):
    memory = t.new_full((t.numel() + 1,), torch.nan)
    memory[1:] = t.flatten()
    return memory[1:].view(t.shape)


ALL = slice(None)
LAYOUTS = {
    "shifted": shift_by_one_element,
    "tokens-first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every-other-head": lambda t: place(t, (t.shape[0], 2 * t.shape[1], *t.shape[2:]), (ALL, slice(1, None, 2))),
    "wide-rows": lambda t: place(t, (*t.shape[:3], t.shape[3] + 3), (..., slice(3, None))),
    "last-strided": lambda t: place(t, (*t.shape[:3], 2 * t.shape[3]), (..., slice(None, None, 2))),
    "growing": lambda t: place(t, (*t.shape[:2], t.shape[2] + 37, t.shape[3]), (ALL, ALL, slice(t.shape[2]))),
    "at-the-end": lambda t: place(t, (*t.shape[:2], t.shape[2] + 5, t.shape[3]), (ALL, ALL, slice(5, None))),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("group", [1, 4, 5, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_any_layout(dtype, group, layout, poisoned):
    for num_queries in (203, 1):
        tensors = make_inputs(2, 203, 2, group, 48, num_queries=num_queries, dtype=dtype)
        placed = [layout(tensor) for tensor in tensors]
        for settings in (SMALL, {**SMALL, "kernel_size": 12, "block_size": 24, "window_size": 24}):
            for a, b in zip(run_sparse(*tensors, **settings), run_sparse(*placed, **settings)):
                assert torch.equal(a, b) and not a.isnan().any()
        for window in (0, 21):
            a, b = (dense_attention(*t, sliding_window=window, backend="cpu") for t in (tensors, placed))
            assert torch.equal(a, b) and not a.isnan().any()
        streams = [attention.pool_streams(keys, None, 8, 4) for keys in (tensors[1], placed[1])]
        assert all(torch.equal(a, b) for a, b in zip(*streams))
        placed_streams = tuple(layout(stream) for stream in streams[0])
        a = attention.sparse_attention(*tensors, **SMALL, q_select=tensors[0].flip(1), compressed=streams[0])
        b = attention.sparse_attention(
            *placed, **SMALL, q_select=layout(tensors[0].flip(1)), compressed=placed_streams
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b))


@DTYPES
def test_inputs_are_left_alone(dtype):
    tensors = make_inputs(2, 150, 2, 4, 32, dtype=dtype)
    before = [tensor.clone() for tensor in tensors]
    kv_start = torch.tensor([3, 0])
    run_sparse(*tensors, kv_start=kv_start)
    dense_attention(*tensors, kv_start=kv_start, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(tensors, before)) and kv_start.tolist() == [3, 0]
