"""The Triton kernels against the definition: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so one test runs this file again in a process of its own. It
gets bf16 products wrong, so that dtype is for GPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minicpm4_hf.kernels.infllm_v2 import sparse_attention, sparse_attention_packed
from minicpm4_hf.sparse_attention import count_pooled, pool_keys

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU; runs in the interpreter through the last test"
)

SMALL = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3}


@pytest.fixture
def poisoned(monkeypatch):
    """Memory the kernels get starts as NaN (numbers) or -7 (indices), so that what is never written shows."""

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

        return poisoned_allocate

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def make_inputs(batch, num_keys, heads, group, dim, *, num_queries=None, dtype=torch.float32, device=DEVICE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_queries = num_keys if num_queries is None else num_queries
    q = torch.randn(batch, heads * group, num_queries, dim, generator=generator)
    k = torch.randn(batch, heads, num_keys, dim, generator=generator) * 2
    v = torch.randn(batch, heads, num_keys, dim, generator=generator)
    return tuple(t.to(device=device, dtype=dtype) for t in (q, k, v))


def reference(*tensors, **settings):
    return sparse_attention(*tensors, **settings, backend="reference")


def kernels(*tensors, **settings):
    return sparse_attention(*tensors, **settings, backend="triton")


def attend_plainly(q, k, v, blocks, block_size, dtype):
    """Attention over given blocks, spelled out in `dtype`."""
    group, num_queries, num_keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    positions = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    keys = torch.arange(num_keys, device=q.device)
    mask = (blocks.unsqueeze(-1) == keys // block_size).any(-2) & (keys <= positions[:, None])
    q, k, v = (t.to(dtype) for t in (q, k, v))
    k, v, mask = (t.repeat_interleave(group, 1) for t in (k, v, mask))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).to(dtype) @ v


def assert_as_good_as_plain(out, q, k, v, blocks, block_size):
    """At most twice the error of the same maths written plainly in that dtype, over the same blocks."""
    exact = attend_plainly(q, k, v, blocks, block_size, torch.float64)
    plain = attend_plainly(q, k, v, blocks, block_size, q.dtype)
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed


@runs_kernels
@pytest.mark.parametrize(
    ("group", "num_keys", "num_queries", "options"),
    [
        (1, 63, 63, {}),
        (3, 175, 17, {"lse_approx": False}),
        (3, 128, 17, {"kv_start": torch.tensor([0, 21], dtype=torch.int32)}),
        (8, 143, 9, {"scale": 0.5}),
        (16, 191, 9, {"kv_start": torch.tensor([191, 60])}),
        (20, 100, 3, {}),
        (2, 111, 40, {"topk": 8}),
    ],
    ids=["G1", "G3-exact-lse", "G3-left-padding", "G8", "G16-row-of-padding", "G20", "all-blocks"],
)
def test_parity_with_the_definition(group, num_keys, num_queries, options, poisoned):
    q, k, v = make_inputs(2, num_keys, 2, group, 16, num_queries=num_queries)
    options = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    expected, expected_blocks = reference(q, k, v, **{**SMALL, **options})
    out, blocks = kernels(q, k, v, **{**SMALL, **options})
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


@runs_kernels
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
def test_parity_over_settings(settings, poisoned):
    q, k, v = make_inputs(1, 527, 2, 2, 16, num_queries=9)
    expected, expected_blocks = reference(q, k, v, **settings)
    for rows in (slice(None), slice(-1, None)):  # prefill, decode
        out, blocks = kernels(q[:, :, rows], k, v, **settings)
        assert torch.equal(blocks, expected_blocks[:, :, rows])
        torch.testing.assert_close(out, expected[:, :, rows], rtol=0, atol=5e-6)


@runs_kernels
@pytest.mark.parametrize("num_queries", [1, 10], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float16, 64), (torch.float16, 96), (torch.float16, 128), (torch.float32, 96)],
    ids=lambda x: f"D{x}" if isinstance(x, int) else str(x),
)
def test_head_sizes_and_dtypes(dim, dtype, num_queries, poisoned):
    q, k, v = make_inputs(1, 150, 1, 4, dim, num_queries=num_queries, dtype=dtype)
    out, blocks = kernels(q, k, v, **SMALL)
    assert out.dtype == dtype
    assert_as_good_as_plain(out, q, k, v, blocks, 16)
    assert torch.equal(blocks, reference(q, k, v, **SMALL)[1])


@runs_kernels
def test_decode_is_split_over_programs(poisoned):
    q, k, v = make_inputs(2, 1333, 1, 4, 16, num_queries=2)  # 84 blocks: three programs score them
    starts = torch.tensor([0, 101], device=DEVICE)
    expected, expected_blocks = reference(q, k, v, **SMALL, kv_start=starts)
    out, blocks = kernels(q, k, v, **SMALL, kv_start=starts)
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


@runs_kernels
def test_ties_go_to_the_lower_block():
    q, k = torch.zeros(1, 2, 320, 16, device=DEVICE), torch.zeros(1, 1, 320, 16, device=DEVICE)
    v = torch.randn_like(k)
    for rows in (slice(-10, None), slice(-1, None)):
        _, blocks = kernels(q[:, :, rows], k, v, **{**SMALL, "topk": 5})
        assert blocks[0, 0, -1].tolist() == [0, 1, 2, 3, 17, 18, 19]


@runs_kernels
def test_far_scores_do_not_overflow():
    q, k, v = make_inputs(1, 200, 1, 4, 16, num_queries=20)
    out, blocks = kernels(q * 100, k * 100, v, **SMALL)
    assert out.isfinite().all()
    assert (blocks[0, 0, -1] >= 0).all()


@runs_kernels
@pytest.mark.parametrize(
    ("kind", "deterministic"),
    [("one-query", False), ("plain", True), ("left-padding", False), ("packed", False), ("packed", True)],
    ids=lambda x: x if isinstance(x, str) else "deterministic" if x else "atomic",
)
def test_gradients(kind, deterministic, poisoned):
    from minicpm4_hf.kernels.infllm_v2.triton_backend import sparse_attention as kernels

    num_queries = {"one-query": 1, "packed": 60}.get(kind, 20)
    leaves = [
        t.requires_grad_() for t in make_inputs(1, 60 if kind == "packed" else 90, 1, 3, 16, num_queries=num_queries)
    ]
    settings, options = {**SMALL, "topk": 2, "window_size": 16}, {}
    if kind == "packed":
        cu_seqlens = torch.tensor([0, 21, 22, 60], dtype=torch.int32, device=DEVICE)
        expected, blocks = sparse_attention_packed(*leaves, cu_seqlens, **settings, backend="reference")
        options = {"cu_seqlens": cu_seqlens, "max_seqlen": 38}
    else:
        if kind == "left-padding":
            options["kv_start"] = torch.tensor([17], device=DEVICE)
        expected, blocks = reference(*leaves, **settings, **options)
    out, picked = kernels(*leaves, **settings, **options, deterministic=deterministic)
    assert torch.equal(picked, blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)
    weight = torch.randn(out.shape, device=DEVICE)
    gradients = torch.autograd.grad(out, leaves, weight)
    for got, want in zip(gradients, torch.autograd.grad(expected, leaves, weight)):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    if kind == "one-query":  # exactly zero for keys of blocks that it did not pick
        unseen = (torch.arange(90, device=DEVICE)[:, None] // 16 != blocks[0, 0, 0]).all(1)
        assert unseen.sum() == 48
        assert all((gradient[0, 0, unseen] == 0).all() for gradient in gradients[1:])


@runs_kernels
def test_gradcheck():
    from minicpm4_hf.kernels.infllm_v2.triton_backend import attend_blocks

    leaves = [t.requires_grad_() for t in make_inputs(1, 40, 1, 1, 16, num_queries=3)]
    blocks = torch.tensor([[0, 2, -1], [1, 2, -1], [0, 1, 2]], dtype=torch.int32, device=DEVICE)[None, None]

    def attend(q, k, v):
        return attend_blocks(q, k, v, blocks, 16, 0.25, None, None, None, 40, True)[0]

    # float32 only: a wide difference, and its truncation error allowed for
    assert torch.autograd.gradcheck(attend, leaves, eps=2e-2, atol=2e-3, rtol=2e-2, fast_mode=True, nondet_tol=0.0)


@runs_kernels
def test_packed_texts_are_texts_one_by_one():
    q, k, v = make_inputs(1, 110, 2, 3, 16)
    cu_seqlens = torch.tensor([0, 70, 71, 110], dtype=torch.int32, device=DEVICE)
    expected, expected_blocks = sparse_attention_packed(q, k, v, cu_seqlens, **SMALL, backend="reference")
    out, blocks = sparse_attention_packed(q, k, v, cu_seqlens, **SMALL, max_seqlen=70, backend="triton")
    assert torch.equal(blocks, expected_blocks)
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pooled_streams(dtype, poisoned):
    from minicpm4_hf.kernels.infllm_v2.triton_backend import compress_keys

    _, k, _ = make_inputs(2, 211, 2, 1, 96, dtype=dtype)
    starts = torch.tensor([0, 40], device=DEVICE)
    for streams in (compress_keys(k, 8, 4, None, None, 211), compress_keys(k, 8, 4, starts, None, 211)):
        for stream, factor in zip(streams, (1, 4)):
            begins = starts.tolist() if streams[0].shape[2] and (streams[0][1, :, -1] == 0).all() else [0, 0]
            for row, begin in enumerate(begins):
                whole = pool_keys(k[row : row + 1, :, begin:], 8 * factor, 4 * factor)[0]
                torch.testing.assert_close(stream[row, :, : whole.shape[1]], whole)


@runs_kernels
def test_static_buffers_step_by_step(poisoned):
    """Decoding in buffers of fixed size, their lengths on the device: what a captured graph replays."""
    from minicpm4_hf.kernels.infllm_v2.triton_backend import compress_keys_, sparse_attention

    q, k, v = make_inputs(2, 150, 1, 3, 16)
    starts = torch.tensor([0, 9], device=DEVICE)
    room_k, room_v = (torch.full((2, 1, 200, 16), torch.nan, device=DEVICE) for _ in range(2))
    pooled = [torch.full((2, 1, count_pooled(200, 8 * f, 4 * f), 16), torch.nan, device=DEVICE) for f in (1, 4)]
    room_k[:, :, :120], room_v[:, :, :120] = k[:, :, :120], v[:, :, :120]
    end = torch.full((2,), 120, device=DEVICE)
    compress_keys_(room_k, *pooled, 8, 4, 120, starts, end)
    for before, length in ((120, 121), (121, 128), (128, 149)):
        new = slice(before, length)
        room_k[:, :, new], room_v[:, :, new] = k[:, :, new], v[:, :, new]
        end.fill_(length)
        compress_keys_(room_k, *pooled, 8, 4, length - before, starts, end)
        row = slice(length - 1, length)
        out, blocks = sparse_attention(
            q[:, :, row], room_k, room_v, **SMALL, kv_start=starts, kv_end=end, compressed=tuple(pooled)
        )
        expected, expected_blocks = reference(
            q[:, :, row], k[:, :, :length], v[:, :, :length], **SMALL, kv_start=starts
        )
        assert torch.equal(blocks, expected_blocks)
        torch.testing.assert_close(out, expected, rtol=0, atol=5e-6)


@runs_kernels
def test_model_with_a_static_cache(monkeypatch):
    """A prompt and steps across `dense_len` in buffers of fixed size, rows left-padded; then one compiled step."""
    from small_models import SMALL_SPARSE, build_model
    from transformers import StaticCache

    from minicpm4_hf import kernels, sparse_cache
    from minicpm4_hf.kernels import infllm_v2

    model = build_model(group=2, heads=1, sparse={**SMALL_SPARSE, "dense_len": 100}).to(DEVICE)
    ids = torch.randint(1, 96, (2, 108), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        monkeypatch.setattr(sparse_cache, "STATIC_DEVICES", (DEVICE,))
        for module in (kernels, infllm_v2):
            monkeypatch.setattr(module, "resolve_backend", lambda *args: ("triton", ""))
        cache = StaticCache(config=model.config, max_cache_len=120)
        for begin, end in ((0, 95), (95, 98), (98, 99), (99, 107)):
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            real = mask[:, begin:end].bool()
            torch.testing.assert_close(out[real], expected[:, begin:end][real], rtol=0, atol=1e-4)
        assert all(isinstance(layer, sparse_cache.StaticSparseLayer) for layer in cache.layers)
        step = torch.compile(model, fullgraph=True, backend="eager")
        out = step(ids[:, 107:], past_key_values=cache).logits
        torch.testing.assert_close(out, expected[:, 107:], rtol=0, atol=1e-4)


@runs_kernels
def test_ops_follow_the_rules():
    from minicpm4_hf.kernels.infllm_v2 import triton_backend as ops

    q, k, v = make_inputs(1, 50, 1, 2, 16, num_queries=10)
    fine, coarse = ops.compress_keys(k, 8, 4, None, None, 50)
    rows = (None, None, None, 50)
    selecting = (q, fine, coarse, 50, *SMALL.values(), True, 0.25, *rows)
    blocks = ops.select_blocks(*selecting)
    o, lse = ops.attend_blocks(q, k, v, blocks, 16, 0.25, *rows, False)
    torch.library.opcheck(ops.compress_keys, (k, 8, 4, None, None, 50))
    torch.library.opcheck(ops.compress_keys_, (k, fine, coarse, 8, 4, 5, None, None))
    torch.library.opcheck(ops.select_blocks, selecting)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(ops.attend_blocks, (*leaves, blocks, 16, 0.25, *rows, True))
    torch.library.opcheck(
        ops.attend_blocks_backward, (torch.ones_like(o), q, k, v, o, lse, blocks, 16, 0.25, None, None, 50, True)
    )


@runs_kernels
def test_one_graph_in_torch_compile():
    q, k, v = make_inputs(1, 60, 1, 2, 16, num_queries=9)
    settings = {**SMALL, "topk": 2, "window_size": 16}
    compiled = torch.compile(
        lambda *tensors: kernels(*tensors, **settings)[0] * 2, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), 2 * reference(q, k, v, **settings)[0], rtol=0, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "takes float16, bfloat16 and float32, got torch.float64"),
        ({"dim": 24}, "multiple of 16, got 24"),
        ({"dim": 144}, "head_dim up to 128"),
        ({"group": 130}, "128 query heads a key head, got 130"),
        ({"settings": {"kernel_size": 24, "kernel_stride": 12, "block_size": 24, "window_size": 48}}, "power of 2"),
        ({"settings": {"kernel_size": 64}}, "touches up to 3 blocks, got 64"),
    ],
    ids=["dtype", "head-dim", "long-head", "group", "stride", "kernel"],
)
def test_misfits_are_named_and_auto_falls_back(change, words):
    from minicpm4_hf.kernels.infllm_v2.triton_backend import name_misfit

    change = {"group": 1, "dim": 16, "dtype": torch.float32, "settings": {}, **change}
    q, k, v = make_inputs(1, 20, 1, change["group"], change["dim"], dtype=change["dtype"])
    settings = {**SMALL, **change["settings"]}
    with pytest.raises(ValueError, match=words) as error:
        kernels(q, k, v, **settings)
    assert str(error.value).count(".") <= 2 and "\n" not in str(error.value)
    assert name_misfit(q, k, settings) == str(error.value)
    torch.testing.assert_close(sparse_attention(q, k, v, **settings), reference(q, k, v, **settings))


@runs_kernels
@pytest.mark.parametrize("mode", ["training", "decode"])
def test_the_gpu_bench_runs(mode, monkeypatch, capsys):
    from minicpm4_hf.kernels.bench import cuda as bench

    monkeypatch.setitem(bench.HEADS, "tiny", (2, 1, 16))
    case = bench.Case("tiny", 1, 90, 2, mode)
    result = bench.measure_case(case, torch.float32, DEVICE, 2, {"matmul_tflops": 1.0, "copy_tbs": 1.0})
    bench.print_case(case, result)
    assert result["parity"]["error"] <= result["parity"]["limit"]
    assert {row["name"] for row in result["times"]} >= {"ours"}
    assert result["rates"]["tflops"] > 0 and result["rates"]["of_copy"] > 0
    assert "ours" in capsys.readouterr().out


def test_every_gpu_case_has_a_name_and_fits():
    from minicpm4_hf.kernels.bench.cuda import GPU_DEFAULTS, gpu_cases

    cases = gpu_cases()
    assert len(cases) == 2 * (6 * 4 * 3 + 6) and set(GPU_DEFAULTS) <= set(cases)
    for case in cases.values():
        assert case.settings["topk"] + case.settings["window_size"] // 64 == case.num_blocks
        assert case.settings["topk"] > case.settings["init_blocks"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of any device")
def test_tensors_on_the_cpu_are_refused():
    q, k, v = make_inputs(1, 8, 1, 1, 16, device="cpu")
    with pytest.raises(ValueError, match="takes CUDA tensors, got tensors on cpu"):
        kernels(q, k, v)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import minicpm4_hf.kernels.infllm_v2, torch
ours = {name.rpartition(".")[2] for name in sys.modules if name.startswith("minicpm4_hf.kernels.infllm_v2.")}
assert ours <= {"checks", "gpu"}, ours
x = torch.zeros(1, 1, 8, 16)
minicpm4_hf.kernels.infllm_v2.sparse_attention(x, x, x)
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
