"""The native decoder layer gives what PyTorch's operators give, and steps aside where it would skip something."""

import pytest
import torch
from small_models import SMALL_SPARSE, build_model
from torch import nn
from transformers import DynamicCache

from minicpm4_hf import kernels
from minicpm4_hf.kernels.cpu import decoder_layer, why_missing
from minicpm4_hf.kernels.cpu.linear import linear

pytestmark = pytest.mark.skipif(why_missing() is not None, reason="no native library")


@pytest.fixture
def fused(monkeypatch):
    """Counts the layers that ran natively; `fused.enabled = False` switches them off."""

    class Counter:
        layers = 0

        def use(self, enabled):
            kernels.use_fused_layers(enabled)

    counter = Counter()
    counter.whole_calls = 0
    real, pack = decoder_layer.fused_decoder_layer, decoder_layer._pack_attention

    def count(*args, **kwargs):
        out = real(*args, **kwargs)
        counter.layers += out is not None
        return out

    def count_packed(*args, **kwargs):
        packed = pack(*args, **kwargs)
        counter.whole_calls += packed[0] is not None
        return packed

    monkeypatch.setattr(decoder_layer, "fused_decoder_layer", count)
    monkeypatch.setattr(decoder_layer, "_pack_attention", count_packed)
    yield counter
    kernels.use_fused_layers(True)


def logits_of(model, ids, chunks):
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", [1, 2], ids=["B1", "B2"])
def test_a_model_gives_the_same_with_and_without(sparse, rows, tokens, fused):
    model = build_model(8, sparse=sparse).to(torch.bfloat16)
    exact = build_model(8, sparse=sparse).double()
    exact.load_state_dict(model.state_dict())
    ids = tokens(rows, 90)
    chunks = [70, 1, 1, 4, *[1] * 14]  # a prompt, single tokens, several at once
    got = logits_of(model, ids, chunks)
    assert fused.layers == len(chunks) * model.config.num_hidden_layers
    fused.use(False)
    plain = logits_of(model, ids, chunks)
    assert fused.layers == len(chunks) * model.config.num_hidden_layers
    expected = logits_of(exact, ids, chunks)
    if sparse is None:  # sparse selection may tip either way between roundings
        error, plain_error = (got - expected).norm(), (plain - expected).norm()
        assert error <= 1.2 * plain_error
    assert (got - plain).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("rows", [1, 8, 9, 70])
@pytest.mark.parametrize("features", [64, 136], ids=lambda n: f"K{n}")
def test_each_fusion_is_the_operators_one_after_another(rows, features):
    torch.manual_seed(rows)
    x, residual = torch.randn(rows, features).bfloat16(), torch.randn(rows, 96).bfloat16()
    weights = [(torch.randn(n, features) / 8).bfloat16() for n in (96, 32, 32)]
    norm = (1 + torch.randn(features) / 8).bfloat16()
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    normed = norm * scaled.bfloat16()

    def close(got, expected):
        torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)  # one rounding may go the other way

    close(linear(x, weights[0], norm=(norm, 1e-5)), normed @ weights[0].mT)
    gate = (torch.randn(96, features) / 8).bfloat16()
    close(linear(x, weights[0], gate=gate), nn.functional.silu(x @ gate.mT) * (x @ weights[0].mT))
    added = residual + (x @ weights[0].mT) * 0.3
    close(linear(x, weights[0], residual=(residual, 0.3)), added)
    strided = residual.mT.contiguous().mT, x.mT.contiguous().mT  # as embeddings from elsewhere may come
    close(linear(strided[1], weights[0], residual=(strided[0], 0.3)), added)
    close(linear(strided[1], weights[0], norm=(norm, 1e-5)), normed @ weights[0].mT)
    cos, sin = torch.randn(2, rows, 32)
    projected = torch.cat([x @ weight.mT for weight in weights], -1).view(rows, -1, 32)
    heads = projected[:, :4].float()
    halves = torch.cat((-heads[..., 16:], heads[..., :16]), -1)
    rotated = (heads * cos[:, None] + halves * sin[:, None]).bfloat16()
    expected = torch.cat((rotated, projected[:, 4:]), 1).flatten(1)
    close(linear(x, *weights, rope=(cos, sin, 4)), expected)
    one = linear(x, *weights, rope=(cos[:1], sin[:1], 4))  # one position for all rows
    close(one[0], linear(x[:1], *weights, rope=(cos[:1], sin[:1], 4))[0])


def test_it_steps_aside(tokens, fused):
    ids = tokens(1, 3)

    def layers_used(model, **kwargs):
        fused.layers = 0
        with torch.no_grad():
            model(ids, **kwargs)
        return fused.layers

    def bf16():
        return build_model(8, sparse=None).to(torch.bfloat16)

    assert layers_used(bf16()) == 2
    assert layers_used(build_model(8)) == 0  # float32
    assert layers_used(bf16(), output_attentions=True) == 0

    model = bf16()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert layers_used(model) == 1 and seen  # a hook is never skipped
    handle.remove()
    assert layers_used(model) == 2

    model = bf16()
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)  # an adapter, say
    assert layers_used(model) == 1

    model = bf16()
    fused.layers = 0
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert fused.layers == 0 and model.model.layers[0].mlp.up_proj.weight.grad is not None

    model = build_model(8, sparse={**SMALL_SPARSE, "use_nope": True}).to(torch.bfloat16)
    assert layers_used(model, use_cache=True) == 0


def run_cached(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])
def test_a_layer_in_one_call_is_the_layer_in_parts(sparse, tokens, fused, monkeypatch):
    model = build_model(8, sparse=sparse).to(torch.bfloat16)
    ids = tokens(2, 120)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    schedule = [70, *[1] * 20, 4, 7, "crop", 5, 2, *[1] * 5, "swap rows", 3, 1]
    whole = fused.whole_calls
    for step, size in enumerate(schedule):
        if size == "crop":  # by less and by more than a pooling window
            for cache in caches:
                cache.crop(-(3 if step % 2 else 11))
            continue
        if size == "swap rows":
            for cache in caches:
                cache.reorder_cache(torch.tensor([1, 0]))
            continue
        begin = caches[0].get_seq_length()
        part = (ids + step)[:, begin : begin + size] % model.config.vocab_size
        got = run_cached(model, part, caches[0])
        with monkeypatch.context() as patch:
            patch.setattr(decoder_layer, "_pack_attention", lambda *args, **kwargs: (None, ()))
            expected = run_cached(model, part, caches[1])
        assert torch.equal(got, expected), f"step {step}"
    for one, other in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    # all of at most eight rows, but for the sparse ones that complete a window of pooled keys
    steps = sum(2 * size <= 8 for size in schedule if isinstance(size, int)) * model.config.num_hidden_layers
    assert steps * (1 if sparse is None else 0.4) <= fused.whole_calls - whole <= steps


def test_a_change_of_the_layer_is_seen_at_the_next_token(tokens, fused):
    model = build_model(8, sparse=None).to(torch.bfloat16)
    layer, ids = model.model.layers[0], tokens(1, 4)

    def same_as_without():
        fused.layers = 0
        cache = DynamicCache(config=model.config)
        got = run_cached(model, ids, cache), run_cached(model, ids[:, :1], cache)
        used = fused.layers
        fused.use(False)
        cache = DynamicCache(config=model.config)
        expected = run_cached(model, ids, cache), run_cached(model, ids[:, :1], cache)
        fused.use(True)
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
        return used

    assert same_as_without() == 4
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(-3)  # in place
    assert same_as_without() == 4
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * -2  # other memory, the same parameter
    assert same_as_without() == 4
    layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight.detach() * -2)
    assert same_as_without() == 4
    query = layer.self_attn.q_proj
    layer.self_attn.q_proj = nn.Linear(query.in_features, query.out_features, bias=False, dtype=torch.bfloat16)
    assert same_as_without() == 4
    layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data.mT.contiguous().mT  # not row-major
    assert same_as_without() == 2
    layer.mlp.gate_proj.weight.data = layer.mlp.gate_proj.weight.data.contiguous()
    value = layer.self_attn.v_proj.weight
    layer.self_attn.v_proj.forward = lambda x: x @ value.mT * 2  # what accelerate does to offload
    assert same_as_without() == 2
    del layer.self_attn.v_proj.forward
    nn.utils.parametrizations.weight_norm(layer.mlp.up_proj)
    assert same_as_without() == 2
    layer.self_attn.o_proj = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_cached(model, ids, None)


def test_a_frozen_query_does_not_cost_the_others_their_gradient(tokens, fused):
    model = build_model(8, sparse=None).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
    fused.layers = 0
    model(tokens(1, 4), use_cache=False).logits.sum().backward()
    assert weight.grad is not None and fused.layers == 0


def test_a_cache_of_another_batch_is_named(tokens):
    model = build_model(8, sparse=None).to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    run_cached(model, tokens(2, 9), cache)
    with pytest.raises(ValueError, match=r"2 rows in torch\.bfloat16 on cpu, and the new tokens are 1"):
        run_cached(model, tokens(1, 1), cache)


def test_a_dense_cache_is_not_copied_at_every_token(tokens):
    model = build_model(8, sparse=None).to(torch.bfloat16)
    cache = DynamicCache(config=model.config)
    run_cached(model, tokens(1, 100), cache)
    places = set()
    for _ in range(80):
        run_cached(model, tokens(1, 1), cache)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1 and cache.get_seq_length() == 180
