"""Generation with sparse attention gives what the same model gives without a cache, however it is driven."""

import dataclasses

import pytest
import torch
from small_models import SMALL_SPARSE, build_model
from transformers import DynamicCache

GROUPS = pytest.mark.parametrize("group", [1, 3, 8, 16], ids=lambda g: f"G{g}")
LENGTHS = (131, 40, 97)


class BlockRecorder:
    """Collects the blocks that each layer picks, by wrapping the operation behind the attention function."""

    def __init__(self, monkeypatch):
        from minicpm4_hf.kernels import infllm_v2

        self.calls = []
        real = infllm_v2.model_operations

        def operations(*tensors):
            operations = real(*tensors)

            def record(*args, **kwargs):
                out, blocks = operations.sparse(*args, **kwargs)
                self.calls.append(blocks)
                return out, blocks

            return dataclasses.replace(operations, sparse=record)

        monkeypatch.setattr(infllm_v2, "model_operations", operations)

    def take(self, num_layers=2):
        """Blocks `[B, H, T, S]` of each layer since the last call."""
        layers = [torch.cat(self.calls[i::num_layers], 2) for i in range(num_layers)]
        self.calls.clear()
        return layers


def left_pad(tokens, lengths):
    """Rows of different lengths: ids and mask `[B, max]`."""
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return ids, mask


@GROUPS
@pytest.mark.parametrize("use_nope", [False, True], ids=["rope", "nope"])
def test_decode_equals_prefill(group, use_nope, tokens, monkeypatch):
    model = build_model(group, sparse={**SMALL_SPARSE, "use_nope": use_nope})
    ids = tokens(2, 150)
    recorder = BlockRecorder(monkeypatch)
    with torch.no_grad():
        whole = model(ids, use_cache=use_nope).logits  # selecting by unrotated keys goes through a cache or not
        whole_blocks = recorder.take()
        cache, parts = None, []
        for begin, end in [(0, 70), *((t, t + 1) for t in range(70, 150))]:
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    for blocks, expected in zip(recorder.take(), whole_blocks):
        assert torch.equal(blocks, expected)
    assert (whole_blocks[0][:, :, -1].diff(dim=-1) > 1).any()  # there was something to choose
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=2e-4)


@GROUPS
@pytest.mark.parametrize("dense_len", [-1, 64, 100], ids=lambda n: f"dense{n}")
def test_chunks_of_any_size_equal_the_whole(group, dense_len, tokens):
    model = build_model(group, sparse={**SMALL_SPARSE, "dense_len": dense_len})
    ids, mask = left_pad(tokens, LENGTHS)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        for sizes in ((1, 130), (64, 67), (33, 31, 1, 66)):
            cache, parts, begin = DynamicCache(config=model.config), [], 0
            for size in sizes:
                end = begin + size
                out = model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions_of(mask)[:, begin:end],
                    past_key_values=cache,
                )
                parts.append(out.logits)
                begin = end
            real = mask.bool()
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=2e-4)


@GROUPS
@pytest.mark.parametrize("dense_len", [-1, 90], ids=lambda n: f"dense{n}")
def test_batch_equals_rows_alone(group, dense_len, tokens):
    model = build_model(group, sparse={**SMALL_SPARSE, "dense_len": dense_len})
    ids, mask = left_pad(tokens, LENGTHS)
    settings = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
    }  # no early end, which would pad the batch
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=mask, **settings)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], attention_mask=mask[row : row + 1, -length:], **settings)
        assert torch.equal(alone.sequences[0, length:], together.sequences[row, max(LENGTHS) :])
        for a, b in zip(alone.logits, together.logits):
            torch.testing.assert_close(a[0], b[row], rtol=0, atol=2e-4)


@GROUPS
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 2, "do_sample": True},
    ],
    ids=["greedy", "beam", "sample", "beam-sample"],
)
def test_generation_equals_generation_without_cache(group, how, tokens):
    model = build_model(group, sparse={**SMALL_SPARSE, "dense_len": 100})  # some rows cross it while decoding
    ids, mask = left_pad(tokens, LENGTHS)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=14, use_cache=use_cache, **how))
    assert torch.equal(*results)


@GROUPS
@pytest.mark.parametrize("how", ["assisted", "prompt-lookup"])
def test_speculation_equals_greedy(group, how, tokens):
    model = build_model(group)
    ids = tokens(1, 60).repeat(1, 2)  # a repeated prompt, so that looking up finds something
    extra = {"prompt_lookup_num_tokens": 4} if how == "prompt-lookup" else {}
    if how == "assisted":
        extra["assistant_model"] = build_model(group, seed=0, num_hidden_layers=1)
        extra["assistant_model"].model.layers[0] = model.model.layers[0]  # a draft that is right now and then
        extra["assistant_model"].model.embed_tokens = model.model.embed_tokens
    greedy = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, use_cache=False
    )
    fast = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, **extra)
    assert torch.equal(fast, greedy)


def test_speculative_sampling_keeps_the_distribution(tokens):
    """Next-token frequencies with a draft model agree with the model's own probabilities (chi-square, 0.1 % level)."""
    model, draft = build_model(2), build_model(2, seed=3)
    ids = tokens(1, 90)
    settings = {"do_sample": True, "top_k": 4, "max_new_tokens": 2, "attention_mask": torch.ones_like(ids)}
    draft.generation_config.num_assistant_tokens = 1
    torch.manual_seed(0)
    draws = [int(model.generate(ids, assistant_model=draft, **settings)[0, 90]) for _ in range(300)]
    with torch.no_grad():
        probabilities, best = (
            model(ids).logits[0, -1].topk(4).values.softmax(-1),
            model(ids).logits[0, -1].topk(4).indices,
        )
    counts = torch.tensor([draws.count(int(token)) for token in best], dtype=torch.float32)
    assert counts.sum() == 300
    assert ((counts - 300 * probabilities) ** 2 / (300 * probabilities)).sum() < 16.3  # 3 degrees of freedom


@GROUPS
def test_crop_and_continue_equals_straight(group, tokens):
    model = build_model(group, sparse={**SMALL_SPARSE, "dense_len": 50})
    ids = tokens(2, 140)
    with torch.no_grad():
        straight = model(ids).logits
        cache = model(ids[:, :100], use_cache=True).past_key_values
        model(tokens(2, 37), past_key_values=cache)  # a wrong turn, taken back
        cache.crop(-37)
        assert cache.get_seq_length() == 100
        model(ids[:, 100:101], past_key_values=cache)
        cache.crop(-60)  # into windows that were complete
        rest = model(ids[:, 41:], past_key_values=cache).logits
    torch.testing.assert_close(rest, straight[:, 41:], rtol=0, atol=2e-4)


@GROUPS
def test_cache_rows_can_be_repeated_selected_and_reordered(group, tokens):
    model = build_model(group)
    ids, mask = left_pad(tokens, LENGTHS)
    new = tokens(3, 5)
    with torch.no_grad():

        def run(order, prepare):
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            prepare(cache)
            longer = torch.cat((mask[order], torch.ones(len(order), 5, dtype=mask.dtype)), 1)
            return model(new[order], attention_mask=longer, past_key_values=cache).logits

        plain = run([0, 1, 2], lambda cache: None)
        for order, prepare in (
            ([2, 0, 0], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0]))),
            ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([0, 2]))),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
        ):
            torch.testing.assert_close(run(order, prepare), plain[order], rtol=0, atol=2e-4)


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)
