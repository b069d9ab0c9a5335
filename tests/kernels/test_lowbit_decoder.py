"""Decoder layers with packed weights: one native call, the same as their modules give one by one."""

from functools import partial

import pytest
import torch
from small_models import SMALL_SPARSE, build_model
from torch import nn
from transformers import DynamicCache

from minicpm4_hf import kernels
from minicpm4_hf.kernels.cpu import decoder_layer, why_missing
from minicpm4_hf.quantization import Int4Linear, TernaryLinear, pack_gptq, quantize_int4

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def pack_linear(linear, kind, group_size=32):
    if kind == "ternary":
        return TernaryLinear.from_linear(linear, group_size)
    layer = Int4Linear(linear.in_features, linear.out_features, group_size=group_size)
    return layer.load_tensors_(pack_gptq(*quantize_int4(linear.weight.detach(), group_size)))


def build_packed(kind, *, sparse=SMALL_SPARSE, names=None):
    """A small bfloat16 model, the linear layers of its decoder packed; `kind` may be a function of the name."""
    model = build_model(8, sparse=sparse)
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in list(owner.named_children()):
                chosen = kind(name) if callable(kind) else kind
                if isinstance(module, nn.Linear) and chosen:
                    setattr(owner, name, pack_linear(module, chosen))
    return model.to(torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """Counts the layers that ran as one native call."""
    counter = {"layers": 0}
    real = decoder_layer.fused_decoder_layer

    def count(*args, **kwargs):
        out = real(*args, **kwargs)
        counter["layers"] += out is not None
        return out

    monkeypatch.setattr(decoder_layer, "fused_decoder_layer", count)
    yield counter
    kernels.use_fused_layers(True)


def logits_of(model, ids, chunks):
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            parts.append(model(part, past_key_values=cache).logits)
    return torch.cat(parts, 1)


def mixed(name):
    return "int4" if name in ("q_proj", "k_proj", "v_proj", "down_proj") else "ternary"


def half(name):
    return "ternary" if name in ("gate_proj", "up_proj", "o_proj") else None


@pytest.mark.parametrize("kind", ["ternary", "int4", mixed, half], ids=["ternary", "int4", "mixed", "some-bf16"])
@pytest.mark.parametrize("sparse", [None, SMALL_SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", [1, 2], ids=["B1", "B2"])
def test_a_model_gives_the_same_with_and_without(kind, sparse, rows, tokens, calls):
    model = build_packed(kind, sparse=sparse)
    ids, chunks = tokens(rows, 90), [70, 1, 1, 4, *[1] * 14]
    got = logits_of(model, ids, chunks)
    assert calls["layers"] == len(chunks) * model.config.num_hidden_layers
    kernels.use_fused_layers(False)
    plain = logits_of(model, ids, chunks)
    assert calls["layers"] == len(chunks) * model.config.num_hidden_layers
    assert (got - plain).norm() < 0.05 * plain.norm()
    if sparse is None:  # sparse selection may tip either way between roundings
        exact = build_packed(kind, sparse=sparse).double()
        for ours, theirs in zip(exact.modules(), model.modules()):
            if isinstance(theirs, (TernaryLinear, Int4Linear)):
                ours.forward = partial(torch.nn.functional.linear, weight=theirs.dequantize(torch.float64))
            elif not list(theirs.children()) and hasattr(theirs, "weight"):
                ours.weight.data = theirs.weight.data.double()
        expected = logits_of(exact, ids, chunks)
        assert (got - expected).norm() <= 1.2 * (plain - expected).norm()


def test_it_steps_aside(tokens, calls):
    ids = tokens(1, 3)

    def layers_used(model):
        calls["layers"] = 0
        with torch.no_grad():
            model(ids)
        return calls["layers"]

    model = build_packed("ternary")
    assert layers_used(model) == 2
    model.model.layers[0].self_attn.k_proj = pack_linear(nn.Linear(64, 32), "int4").to(torch.bfloat16)
    assert layers_used(model) == 1  # query, key and value are of two kinds
    model.model.layers[1].mlp.up_proj = pack_linear(nn.Linear(64, 64), "ternary", 64).to(torch.bfloat16)
    assert layers_used(model) == 0  # other groups than the gate's
    model = build_packed("ternary")
    model.model.layers[0].mlp.down_proj = TernaryLinear.from_linear(nn.Linear(64, 64, bias=True))
    model.to(torch.bfloat16)
    assert layers_used(model) == 1
    model = build_packed("int4")
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: seen.append(1))
    assert layers_used(model) == 1 and seen
    handle.remove()
    assert layers_used(model) == 2


def test_a_change_of_the_layer_is_seen_at_the_next_token(tokens, calls):
    model, ids = build_packed("int4", sparse=None), tokens(1, 4)
    layer = model.model.layers[0]

    def same_as_without():
        calls["layers"] = 0
        got = logits_of(model, ids, [3, 1])
        used = calls["layers"]
        kernels.use_fused_layers(False)
        expected = logits_of(model, ids, [3, 1])
        kernels.use_fused_layers(True)
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        return used

    assert same_as_without() == 4
    layer.mlp.down_proj.scales.mul_(-3)  # in place
    assert same_as_without() == 4
    layer.mlp.down_proj.scales = layer.mlp.down_proj.scales * -1  # other memory
    assert same_as_without() == 4
    layer.mlp.up_proj.qweight.data = layer.mlp.up_proj.qweight.data ^ 0x11111111
    assert same_as_without() == 4
    order = torch.arange(64, dtype=torch.int32) % 2
    tensors = {name: getattr(layer.mlp.gate_proj, name).clone() for name in ("qweight", "scales", "qzeros")}
    layer.mlp.gate_proj.load_tensors_({**tensors, "g_idx": order})
    assert layer.mlp.gate_proj.act_order
    assert same_as_without() == 2  # act-order: module by module
    layer.mlp.gate_proj = pack_linear(nn.Linear(64, 64), "int4")
    assert same_as_without() == 4
    layer.mlp = build_packed("ternary").model.layers[0].mlp
    assert same_as_without() == 4


def test_state_dict_is_what_was_loaded(tokens):
    model = build_packed("int4", sparse=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits_of(model, tokens(2, 20), [12, 1, 1, 6])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
