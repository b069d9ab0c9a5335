"""Dense causal attention with grouped heads: the native kernel and PyTorch against float64."""

import pytest
import torch
import torch.nn.functional as F
from definitions import causal_mask, check_rounding, make_inputs, masked_attention, rounding

from minicpm4_hf.kernels.cpu import attention, why_missing
from minicpm4_hf.kernels.dense import decode_attention, dense_attention, model_attention

needs_native = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])


@pytest.fixture(autouse=True)
def one_thread():
    """What one thread computes is compared bit for bit; more threads may cut a tile's keys elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_parity(q, k, v, backend, **options):
    scale = options.get("scale")
    out = dense_attention(q, k, v, **options, backend=backend)
    mask = causal_mask(q.shape[2], k.shape[2], options.get("sliding_window", 0), options.get("kv_start"))
    exact = masked_attention(q.double(), k.double(), v.double(), mask, scale)
    check_rounding(out, exact, masked_attention(q, k, v, mask, scale))
    return out


@needs_native
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 12, 16, 20], ids=lambda g: f"G{g}")
@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128, 160], ids=lambda d: f"D{d}")
@DTYPES
def test_parity_over_heads(dtype, dim, group):
    for num_queries in (139, 3, 1):
        check_parity(*make_inputs(1, 139, 2, group, dim, num_queries=num_queries, dtype=dtype, seed=group), "cpu")


@pytest.mark.parametrize(
    ("num_keys", "num_queries"),
    [(1, 1), (15, 15), (63, 63), (64, 64), (65, 3), (129, 70), (333, 1), (333, 3), (333, 70), (1501, 1501)],
    ids=lambda n: f"T{n}",
)
@needs_native
@DTYPES
def test_parity_over_lengths(dtype, num_keys, num_queries):
    heads, group = (1, 2) if num_keys > 1000 else (2, 4)
    q, k, v = make_inputs(1, num_keys, heads, group, 64, num_queries=num_queries, dtype=dtype)
    for sliding_window in (0, 100) if num_keys > 1000 else (0, 1, 5, 64, 100):
        check_parity(q, k, v, "cpu", sliding_window=sliding_window)


@pytest.mark.parametrize("num_queries", [203, 70, 3, 1], ids=lambda n: f"TQ{n}")
@pytest.mark.parametrize("group", [1, 2, 5, 16], ids=lambda g: f"G{g}")
@BACKENDS
@DTYPES
def test_left_padding(dtype, backend, group, num_queries):
    q, k, v = make_inputs(5, 203, 1, group, 32, num_queries=num_queries, dtype=dtype)
    kv_start = torch.tensor([0, 77, 203, 170, 202])  # the third row is all padding
    for sliding_window in (0, 21):
        options = {"sliding_window": sliding_window, "backend": backend}
        out = check_parity(q, k, v, kv_start=kv_start, **options)
        assert (out[2] == 0).all() and (out[1, :, : max(0, 77 - 203 + num_queries)] == 0).all()
        order = torch.tensor([3, 1, 0, 4, 2])
        shuffled = dense_attention(q[order], k[order], v[order], kv_start=kv_start[order].int(), **options)
        assert torch.equal(shuffled, out[order])
        for row in (1, 3, 4):
            start = int(kv_start[row])
            real, b = slice(max(0, start - 203 + num_queries), None), slice(row, row + 1)
            alone = dense_attention(q[b, :, real], k[b, :, start:], v[b, :, start:], **options)
            torch.testing.assert_close(alone, out[b, :, real], **rounding(dtype))


@needs_native
@DTYPES
def test_what_padding_holds_does_not_matter(dtype, poisoned_empty):
    for num_queries in (333, 70, 1):
        q, k, v = make_inputs(3, 333, 2, 4, 64, num_queries=num_queries, dtype=dtype)
        kv_start = torch.tensor([0, 77, 333])
        clean = dense_attention(q, k, v, kv_start=kv_start, backend="cpu")
        for row, start in enumerate(kv_start.tolist()):
            k[row, :, :start] = v[row, :, :start] = torch.nan
            q[row, :, : max(0, start - 333 + num_queries)] = torch.nan
        assert torch.equal(dense_attention(q, k, v, kv_start=kv_start, backend="cpu"), clean)
        assert clean.isfinite().all()


@pytest.mark.parametrize("group", [1, 3, 4, 16], ids=lambda g: f"G{g}")
@BACKENDS
@DTYPES
def test_equals_sdpa(dtype, backend, group):
    q, k, v = make_inputs(2, 203, 2, group, 64, dtype=dtype)
    out = dense_attention(q, k, v, backend=backend)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    limit = rounding(dtype)["atol"] * 4  # SDPA rounds inside as well
    torch.testing.assert_close(out, expected, rtol=limit, atol=limit)
    if backend == "cpu":
        assert torch.equal(model_attention(q, k, v, scale=64**-0.5), out)


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 1e-9, 0.0], ids=lambda s: f"scale{s}")
@pytest.mark.parametrize("group", [1, 4, 16], ids=lambda g: f"G{g}")
@BACKENDS
@DTYPES
def test_parity_over_scales(dtype, backend, group, scale):
    for num_queries in (150, 1):
        check_parity(*make_inputs(1, 150, 2, group, 64, num_queries=num_queries, dtype=dtype), backend, scale=scale)


@pytest.mark.parametrize("sliding_window", [0, 21], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("group", [1, 3, 8, 16], ids=lambda g: f"G{g}")
@BACKENDS
@DTYPES
def test_decode_and_chunks_equal_prefill(dtype, backend, group, sliding_window):
    q, k, v = make_inputs(2, 199, 2, group, 64, dtype=dtype)
    options = {"sliding_window": sliding_window, "backend": backend}
    out = dense_attention(q, k, v, **options)
    for begin, end in ((0, 1), (1, 70), (70, 71), (71, 199), (198, 199)):
        part = dense_attention(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], **options)
        torch.testing.assert_close(part, out[:, :, begin:end], **rounding(dtype))


@needs_native
@pytest.mark.parametrize("sliding_window", [0, 1, 5, 64, 100], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("dim", [16, 64, 128], ids=lambda d: f"D{d}")
@pytest.mark.parametrize("group", [1, 3, 4, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_every_key_counts_once(dtype, group, dim, sliding_window):
    """With equal weights the output counts keys, which shows one too many or too few even in bfloat16."""
    q, k, _ = make_inputs(1, 203, 2, group, dim, dtype=dtype)
    v = torch.eye(dim, dtype=dtype).repeat(203 // dim + 1, 1)[:203].expand(1, 2, -1, -1)
    for num_queries in (203, 1):
        few = q[:, :, -num_queries:] * 0
        out = dense_attention(few, k, v, sliding_window=sliding_window, backend="cpu")
        mask = causal_mask(num_queries, 203, sliding_window)
        expected = masked_attention(few.double(), k.double(), v.double(), mask)
        torch.testing.assert_close(out.double(), expected, rtol=rounding(dtype)["rtol"] / 2, atol=0)


@needs_native
@DTYPES
def test_one_key_takes_all(dtype):
    """Each query's score is far above the others' at one key alone, so the output is that key's value."""
    dim, num_keys = 128, 128
    k = torch.eye(dim, dtype=dtype).expand(1, 2, -1, -1)
    v = torch.randn(1, 2, num_keys, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = torch.stack(
        [torch.randint(0, t + 1, (8,), generator=torch.Generator().manual_seed(t)) for t in range(128)]
    )
    q = F.one_hot(wanted.T, dim).to(dtype).unsqueeze(0) * 64  # [1, 8, TQ, D]
    out = dense_attention(q, k, v, scale=8.0, backend="cpu")
    expected = v.repeat_interleave(4, 1).gather(2, wanted.T[None, :, :, None].expand(-1, -1, -1, dim))
    assert torch.equal(out, expected) or dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


@needs_native
def test_auto_takes_the_native_kernel_where_it_serves(monkeypatch):
    calls = []
    real = attention.dense_attention
    monkeypatch.setattr(attention, "dense_attention", lambda *a, **o: calls.append(1) or real(*a, **o))
    tensors = make_inputs(1, 20, 1, 2, 32, dtype=torch.float32)
    dense_attention(*tensors)
    assert len(calls) == 1
    dense_attention(*tensors, backend="reference")
    dense_attention(*(t.double() for t in tensors))
    dense_attention(*(t[..., :24] for t in tensors))
    assert len(calls) == 1


@pytest.mark.parametrize("num_keys", [1, 17, 333], ids=lambda n: f"T{n}")
@pytest.mark.parametrize("group", [1, 3, 16], ids=lambda g: f"G{g}")
@DTYPES
def test_a_query_as_rows_of_its_group(dtype, group, num_keys):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (t.to(device) for t in make_inputs(2, num_keys, 2, group, 64, num_queries=1, dtype=dtype))
    mask = causal_mask(1, num_keys).to(device)
    exact = masked_attention(q.double(), k.double(), v.double(), mask, 0.3)
    out = decode_attention(q, k, v, scale=0.3)
    if device == "cpu" or dtype.itemsize == 2:  # on a GPU float32 is left to plain SDPA
        check_rounding(out, exact, masked_attention(q, k, v, mask, 0.3))
    if device == "cuda":
        chosen = model_attention(q, k, v, scale=0.3)
        assert chosen is None if dtype == torch.float32 else torch.equal(chosen, out)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_subnormal_weights_are_zero_inside_and_nowhere_else(threads):
    """exp(-90) is below 2^-126, where arithmetic may be 80 times slower; the caller's keeps such numbers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = torch.ones(1, 1, 1, 16)
        k = torch.stack((torch.zeros(16), torch.full((16,), -90 / 16)))[None, None]
        v = torch.stack((torch.zeros(16), torch.full((16,), 1e30)))[None, None]
        assert torch.equal(dense_attention(q, k, v, scale=1.0, backend="cpu"), torch.zeros(1, 1, 1, 16))
        assert torch.tensor(1e-40) * 0.5 > 0
    finally:
        torch.set_num_threads(before)


def test_float64_and_gradients_run_on_the_reference():
    tensors = make_inputs(2, 50, 2, 3, 16)
    out = check_parity(*tensors, "auto", kv_start=torch.tensor([0, 20]), sliding_window=7)
    assert out.dtype == torch.float64
    small = [t[:, :, :12, :4].contiguous().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *t: dense_attention(*t, sliding_window=5), small)
    floats = [t.float().requires_grad_() for t in tensors]
    assert dense_attention(*floats).requires_grad
    with torch.no_grad():
        assert not dense_attention(*floats).requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.zeros(1, 2, 9, 16)}, "same shape"),
        ({"q": torch.zeros(1, 3, 8, 16)}, "multiple"),
        ({"q": torch.zeros(1, 4, 9, 16)}, "1 to 8"),
        ({"q": torch.zeros(1, 4, 8, 32)}, "head_dim"),
        ({"q": torch.zeros(1, 4, 8, 16, dtype=torch.float16)}, "one floating dtype"),
        ({"q": torch.zeros(1, 4, 8, 16, device="meta")}, "one device"),
        ({"kv_start": torch.zeros(3, dtype=torch.int32)}, "kv_start"),
        ({"kv_start": torch.zeros(1)}, "kv_start"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"sliding_window": True}, "sliding_window"),
        ({"backend": "fast"}, "backend"),
    ],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else "",
)
def test_bad_arguments_are_named(change, words):
    good = {"q": torch.zeros(1, 4, 8, 16), "k": torch.zeros(1, 2, 8, 16), "v": torch.zeros(1, 2, 8, 16)}
    arguments = {**good, **change}
    with pytest.raises(ValueError, match=words) as error:
        dense_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert "\n" not in str(error.value)
