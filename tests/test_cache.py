"""The sparse cache layer: buffers that grow by doubling, every cache operation, and caches that cannot be used."""

import copy

import pytest
import torch
from small_models import SMALL_SPARSE, build_model
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from minicpm4_hf.sparse_cache import SparseLayer


def fill(layer, num_tokens, *, batch=2, step=1):
    for _ in range(0, num_tokens, step):
        layer.update(torch.randn(batch, 2, step, 16), torch.randn(batch, 2, step, 16))


def test_appending_does_not_copy_the_cache_each_time():
    layer = SparseLayer()
    fill(layer, 1)
    moves, address = 0, None
    for _ in range(1000):
        fill(layer, 1)
        moves += layer.keys.data_ptr() != address
        address = layer.keys.data_ptr()
    assert layer.get_seq_length() == 1001
    assert moves <= 11  # log2(1001), and the first


def test_update_returns_what_went_in(poisoned_empty):
    layer = SparseLayer()
    keys, values = torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    for begin, end in ((0, 7), (7, 8), (8, 150), (150, 151), (151, 300)):
        got = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)
    assert layer.get_mask_sizes(5) == (305, 0)


@pytest.mark.parametrize("appended", [0, 3], ids=["crop-first", "append-first"])
def test_what_was_handed_over_is_not_written_to(appended):
    layer = SparseLayer()
    keys = torch.randn(1, 2, 8, 16)
    original = keys.clone()
    layer.update(keys, keys)
    fill(layer, appended, batch=1)
    layer.crop(-appended - 4)
    fill(layer, 5, batch=1)
    assert torch.equal(keys, original)
    assert torch.equal(layer.keys[:, :, :4], original[:, :, :4])


def test_adopting_a_layer_leaves_its_tensors_alone():
    plain = DynamicLayer()
    plain.update(torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16))
    original = plain.keys.clone()
    layer = SparseLayer.adopt(plain)
    layer.crop(-4)
    fill(layer, 3, batch=1)
    assert torch.equal(plain.keys, original)


def test_gradients_flow_through_the_cache(tokens):
    model = build_model().train()
    ids = tokens(1, 120)
    grads = []
    for parts in ((120,), (80, 40)):
        model.zero_grad()
        cache, begin, loss = DynamicCache(config=model.config), 0, 0.0
        for size in parts:
            loss = loss + model(ids[:, begin : begin + size], past_key_values=cache).logits.float().pow(2).sum()
            begin += size
        loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())


def test_reset_and_reuse(tokens):
    model = build_model()
    ids = tokens(2, 120)
    with torch.no_grad():
        cache = model(tokens(2, 90), use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_nope", [False, True], ids=["rope", "nope"])
def test_offload_and_prefetch_keep_everything(use_nope, tokens):
    model = build_model(sparse={**SMALL_SPARSE, "use_nope": use_nope})
    ids = tokens(2, 120)
    with torch.no_grad():
        cache = model(ids[:, :100], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        rest = model(ids[:, 100:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 100:], rtol=0, atol=2e-4)


def test_copies_are_independent(tokens):
    model = build_model()
    ids = tokens(1, 110)
    with torch.no_grad():
        cache = model(ids[:, :100], use_cache=True).past_key_values
        model(ids[:, 100:101], past_key_values=cache)
        copied = copy.deepcopy(cache)
        model(tokens(1, 5), past_key_values=copied)
        rest = model(ids[:, 101:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 101:], rtol=0, atol=2e-4)


def test_a_cache_made_without_the_config_is_used_as_well(tokens):
    model = build_model()
    ids = tokens(1, 120)
    with torch.no_grad():
        cache = DynamicCache()
        model(ids[:, :100], past_key_values=cache)
        rest = model(ids[:, 100:], past_key_values=cache).logits
        assert isinstance(cache.layers[0], SparseLayer)
        torch.testing.assert_close(rest, model(ids).logits[:, 100:], rtol=0, atol=2e-4)


def test_a_cache_filled_by_dense_attention_goes_on_sparse(tokens):
    model = build_model(sparse=None)
    ids = tokens(1, 120)
    with torch.no_grad():
        cache = model(ids[:, :100], use_cache=True).past_key_values
        model.config.sparse_config = {**SMALL_SPARSE, "use_nope": False, "dense_len": 101}
        rest = model(ids[:, 100:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 100:], rtol=0, atol=2e-4)


def test_padding_that_moves_pools_anew(tokens):
    """A mask that hides other keys than before changes the windows: nothing stale may be left."""
    model = build_model()
    ids = tokens(1, 120)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        cache = model(ids[:, :119], use_cache=True).past_key_values
        mask[:, :20] = 0
        got = model(ids[:, 119:], attention_mask=mask, past_key_values=cache).logits
        fresh = DynamicCache(config=model.config)
        for layer, filled in zip(fresh.layers, cache.layers):
            layer.update(filled.keys[:, :, :119], filled.values[:, :, :119])
        want = model(ids[:, 119:], attention_mask=mask, past_key_values=fresh).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_static_cache_says_what_to_use(tokens):
    model = build_model(sparse={**SMALL_SPARSE, "dense_len": 64})
    ids = tokens(1, 80)
    with pytest.raises(ValueError, match="cache_implementation='dynamic'"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, cache_implementation="static")
    with torch.no_grad():  # one that cannot reach the sparse lengths is fine
        cache = StaticCache(config=model.config, max_cache_len=60)
        short = model(ids[:, :50], past_key_values=cache).logits
        torch.testing.assert_close(short, model(ids[:, :50]).logits, rtol=0, atol=1e-4)


def test_crop_of_a_positive_number_is_refused_as_in_transformers():
    layer = SparseLayer()
    fill(layer, 4)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(2)
