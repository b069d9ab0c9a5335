"""The native decoder layer gives what PyTorch's operators give, and steps aside where it would skip something."""

import pytest
import torch
from small_models import SMALL_SPARSE, build_model
from torch import nn

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
    real = decoder_layer.fused_decoder_layer

    def count(*args, **kwargs):
        out = real(*args, **kwargs)
        counter.layers += out is not None
        return out

    monkeypatch.setattr(decoder_layer, "fused_decoder_layer", count)
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
