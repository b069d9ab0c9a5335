"""The Triton kernels on a GPU, at real shapes: parity, 256K tokens, CUDA graphs, the shipped checkpoint."""

import pytest
import torch

from minicpm4_hf.kernels.infllm_v2 import sparse_attention, sparse_attention_packed
from minicpm4_hf.sparse_attention import count_pooled, pool_keys, score_blocks

pytestmark = [
    pytest.mark.requires_cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
HEADS = {"8B": (32, 2, 128), "0.5B": (16, 2, 64), "G3-D96": (24, 8, 96), "G1": (4, 4, 64)}  # HQ, H, D
CHECKED = 64  # queries of a call that are compared: a float64 answer for all of them would take the memory


@pytest.fixture
def poisoned(monkeypatch):
    """Memory the kernels get starts as NaN or -7."""

    def poison(allocate):
        def poisoned_allocate(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -7)

        return poisoned_allocate

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def make_inputs(batch, num_keys, heads, *, num_queries=None, dtype=torch.bfloat16, seed=0):
    query_heads, num_heads, dim = HEADS[heads]
    generator = torch.Generator("cuda").manual_seed(seed)
    num_queries = num_keys if num_queries is None else num_queries
    shapes = ((query_heads, num_queries), (num_heads, num_keys), (num_heads, num_keys))
    return tuple(
        torch.randn(batch, *shape, dim, generator=generator, device="cuda", dtype=torch.float32).to(dtype)
        for shape in shapes
    )


def attend_plainly(q, k, v, blocks, positions, dtype):
    """Attention of a few queries at `positions` over their blocks of 64, spelled out in `dtype`."""
    group = q.shape[1] // k.shape[1]
    keys = torch.arange(k.shape[2], device=q.device)
    chosen = torch.zeros(*blocks.shape[:3], -(-k.shape[2] // 64) + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(-1, torch.where(blocks < 0, chosen.shape[-1] - 1, blocks).long(), True)
    mask = chosen[..., :-1].repeat_interleave(64, -1)[..., : len(keys)] & (keys <= positions[:, None])
    q = q.to(dtype).unflatten(1, (k.shape[1], group))  # [B, H, G, T, D]
    scores = (q @ k.to(dtype).mT.unsqueeze(2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill_(~mask.unsqueeze(2), -torch.inf).softmax(-1)
    return (weights @ v.to(dtype).unsqueeze(2)).flatten(1, 2)


def assert_good(out, q, k, v, blocks, positions):
    """At most twice the error of the same maths in the tensors' dtype."""
    exact = attend_plainly(q, k, v, blocks, positions, torch.float64)
    plain = attend_plainly(q, k, v, blocks, positions, q.dtype)
    allowed = 2 * (plain.double() - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= allowed


def assert_best_blocks(blocks, q, k, positions, topk=64):
    """No block that was left out scores higher, but for rounding, than one that was picked freely."""
    num_blocks = -(-k.shape[2] // 64)
    pooled = (pool_keys(k, 32, 16), pool_keys(k, 128, 64))
    scores = score_blocks(
        q.double(), *(p.double() for p in pooled), positions, num_blocks, kernel_size=32, kernel_stride=16,
        block_size=64, scale=q.shape[-1] ** -0.5, lse_approx=True,
    )  # fmt: skip
    numbers = torch.arange(num_blocks, device=q.device)
    own = positions[:, None] // 64
    forced = (numbers < 1) | (numbers >= own - 32)
    visible = numbers <= own
    picked = (blocks.unsqueeze(-1) == numbers).any(-2)
    count = picked.sum(-1)
    assert torch.equal(count, (own.squeeze(1) + 1).clamp(max=topk + 32).expand_as(count))
    assert (picked | ~(forced & visible)).all() and not (picked & ~visible).any()
    steps = blocks.diff(dim=-1)
    assert (steps[blocks[..., 1:] >= 0] > 0).all()
    worst = scores.masked_fill(~picked | forced, torch.inf).amin(-1)
    best_left = scores.masked_fill(picked | ~visible, 0.0).amax(-1)
    assert (worst * (1 + 1e-4) + 1e-12 >= best_left).all()


@DTYPES
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    ("num_keys", "num_queries"), [(1, 1), (63, 63), (1000, 1000), (9001, 700), (12345, 1), (20000, 20000)]
)
def test_shape_matrix(heads, num_keys, num_queries, dtype, poisoned):
    q, k, v = make_inputs(2, num_keys, heads, num_queries=num_queries, dtype=dtype)
    out, blocks = sparse_attention(q, k, v, backend="triton")
    assert out.isfinite().all() and (blocks >= -1).all()
    last = slice(-CHECKED, None)
    positions = torch.arange(num_keys, device="cuda")[-num_queries:][last]
    assert_good(out[:, :, last], q[:, :, last], k, v, blocks[:, :, last], positions)
    assert_best_blocks(blocks[:, :, last], q[:, :, last], k, positions)


@DTYPES
def test_left_padding_and_packing_change_nothing(dtype, poisoned):
    q, k, v = make_inputs(1, 9000, "0.5B", dtype=dtype)
    alone, alone_blocks = sparse_attention(q[:, :, 1500:], k[:, :, 1500:], v[:, :, 1500:], backend="triton")
    start = torch.tensor([1500], device="cuda")
    padded, padded_blocks = sparse_attention(q, k, v, kv_start=start, backend="triton")
    cu_seqlens = torch.tensor([0, 1500, 9000], dtype=torch.int32, device="cuda")
    packed, packed_blocks = sparse_attention_packed(q, k, v, cu_seqlens, max_seqlen=7500, backend="triton")
    assert (padded[:, :, :1500] == 0).all() and (padded_blocks[:, :, :1500] == -1).all()
    assert torch.equal(padded_blocks[:, :, 1500:], alone_blocks)
    assert torch.equal(packed_blocks[:, :, 1500:], alone_blocks)
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(padded[:, :, 1500:], alone, **tolerance)
    torch.testing.assert_close(packed[:, :, 1500:], alone, **tolerance)


@DTYPES
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("heads", HEADS)
def test_gradients(heads, deterministic, dtype, poisoned):
    from minicpm4_hf.kernels.infllm_v2.triton_backend import sparse_attention

    settings = {"topk": 8, "window_size": 256}
    leaves = [t.requires_grad_() for t in make_inputs(1, 2000, heads, dtype=dtype)]
    out, blocks = sparse_attention(*leaves, **settings, deterministic=deterministic)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, weight)
    positions = torch.arange(2000, device="cuda")
    wants = {}
    for kind in (torch.float64, dtype):
        wanted = attend_plainly(*leaves, blocks, positions, kind)
        wants[kind] = torch.autograd.grad(wanted, leaves, weight.to(kind))
    for got, exact, plain in zip(gradients, wants[torch.float64], wants[dtype]):
        allowed = 2 * (plain.double() - exact.double()).abs().max() + 1e-5 * exact.abs().max()
        assert (got.double() - exact.double()).abs().max() <= allowed
    if deterministic:
        again = torch.autograd.grad(sparse_attention(*leaves, **settings, deterministic=True)[0], leaves, weight)
        assert all(torch.equal(a, b) for a, b in zip(gradients, again))


def test_256k_tokens(poisoned):
    q, k, v = make_inputs(1, 262144, "8B")
    out, blocks = sparse_attention(q, k, v, backend="triton")
    assert out.isfinite().all()
    for begin in (0, 100_000, 262144 - CHECKED):
        rows = slice(begin, begin + CHECKED)
        positions = torch.arange(begin, begin + CHECKED, device="cuda")
        assert_good(out[:, :, rows], q[:, :, rows], k, v, blocks[:, :, rows], positions)
    assert_best_blocks(blocks[:, :, rows], q[:, :, rows], k, positions)


def test_more_elements_than_32_bits_can_count():
    """Keys of 2.4 G elements: the last rows lie beyond what an int32 offset reaches."""
    query_heads, num_heads, dim = HEADS["8B"]
    k = torch.randn(36, num_heads, 262144, dim, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(36, query_heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    out, blocks = sparse_attention(q, k, k, backend="triton")
    alone, alone_blocks = sparse_attention(q[-1:], k[-1:].clone(), k[-1:].clone(), backend="triton")
    assert torch.equal(blocks[-1:], alone_blocks)
    torch.testing.assert_close(out[-1:], alone, rtol=0, atol=1e-2)


def decode_in_buffers(q, k, v, end, pooled):
    """One decoding step whose length is on the device."""
    from minicpm4_hf.kernels.infllm_v2.triton_backend import compress_keys_, sparse_attention

    compress_keys_(k, *pooled, 32, 16, 1, None, end)
    return sparse_attention(q, k, v, kv_end=end, compressed=pooled)


@pytest.mark.parametrize("how", ["graph", "reduce-overhead"])
def test_decoding_step_in_a_cuda_graph(how):
    q, k, v = make_inputs(2, 20000, "8B", num_queries=1)
    pooled = tuple(k.new_zeros(2, 2, count_pooled(20000, 32 * f, 16 * f), 128) for f in (1, 4))
    end = torch.full((2,), 19000, device="cuda", dtype=torch.int32)
    from minicpm4_hf.kernels.infllm_v2.triton_backend import compress_keys_

    compress_keys_(k, *pooled, 32, 16, 19000, None, end)
    if how == "graph":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            decode_in_buffers(q, k, v, end, pooled)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, blocks = decode_in_buffers(q, k, v, end, pooled)

        def step():
            graph.replay()
            return out, blocks
    else:
        compiled = torch.compile(decode_in_buffers, mode="reduce-overhead", fullgraph=True)

        def step():
            return compiled(q, k, v, end, pooled)

    for length in range(19001, 19040):
        end.fill_(length)
        got, picked = (t.clone() for t in step())
        expected, expected_blocks = sparse_attention(q, k[:, :, :length], v[:, :, :length], backend="triton")
        assert torch.equal(picked, expected_blocks), length
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-2)


def test_shipped_checkpoint_gives_the_logits_of_the_cpu():
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = files("minicpm4_hf") / "checkpoints" / "minicpm4-books"
    text = (files("minicpm4_hf") / "assets" / "dracula-excerpt.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :3000]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="infllm_v2").eval()
    model.config.sparse_config = {**model.config.sparse_config, "dense_len": 0}
    with torch.no_grad():
        expected = model(ids).logits
        continued = model.generate(ids[:, :500], max_new_tokens=20, do_sample=False)
        model.cuda()
        logits = model(ids.cuda()).logits.cpu()
        assert (logits - expected).abs().max() < 1e-2 * expected.abs().max()
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.999
        for cache in ("dynamic", "static"):  # transformers compiles a static cache's steps, as CUDA graphs
            options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": cache}
            assert torch.equal(model.generate(ids[:, :500].cuda(), **options).cpu(), continued), cache
