"""Packed sequences: what is in them, in which order, in which shares, and what the model makes of them."""

import json
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from small_models import build_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from transformers.masking_utils import find_packed_sequence_indices

from minicpm4_hf.training.packing import (
    DocumentSubset,
    LengthBuckets,
    PackedDataset,
    cu_seqlens,
    split_held_out,
)
from minicpm4_hf.training.shards import build_shards

IGNORED = -100


@pytest.fixture
def make_shards(tmp_path):
    """`make_shards([3, 5])`: documents of 3 and 5 tokens whose ids count on from `first`."""

    def make(lengths, *, first=0, num_words=8000, shard_tokens=200):
        folder = tmp_path / f"shards-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(num_words)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        ends = first + np.cumsum(lengths)
        lines = [" ".join(f"w{n % num_words}" for n in range(end - k, end)) for k, end in zip(lengths, ends)]
        (folder / "lines.txt").write_text("\n".join(lines))
        return build_shards(
            folder / "lines.txt",
            PreTrainedTokenizerFast(tokenizer_object=backend),
            folder,
            split_documents="line",
            shard_tokens=shard_tokens,
            bos=None,
            eos=None,
        )

    return make


def segments_of(item):
    """The segments of a packed row, read off the position ids with a plain loop."""
    segments = []
    for token, position in zip(item["input_ids"].tolist(), item["position_ids"].tolist()):
        if position == 0:
            segments.append([])
        assert position == len(segments[-1])
        segments[-1].append(token)
    return segments


def random_lengths(count, longest, seed=0):
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_packing_equals_the_definition(make_shards):
    """Write the whole run as one list of tokens, then cut it."""
    shards, length, seed = make_shards(random_lengths(40, 30)), 16, 7
    tokens, positions, labels = [], [], []
    for epoch in range(3):
        # the order of an epoch is that of the random words of PCG64 under (seed, what for, stream, epoch)
        words = np.random.PCG64([seed, 0, 0, epoch]).random_raw(40).tolist()
        for document in sorted(range(40), key=words.__getitem__):
            for place, token in enumerate(shards.document(document).tolist()):
                starts_row = len(tokens) % length == 0
                positions.append(0 if place == 0 or starts_row else positions[-1] + 1)
                labels.append(token if positions[-1] else IGNORED)
                tokens.append(token)
    count = len(tokens) // length
    data = PackedDataset(shards, length, num_sequences=count, seed=seed)
    assert len(data) == count > 2 * shards.num_tokens // length
    for index in range(count):
        row = slice(index * length, (index + 1) * length)
        item = data[index]
        assert {name: tensor.tolist() for name, tensor in item.items()} == {
            "input_ids": tokens[row],
            "position_ids": positions[row],
            "labels": labels[row],
        }
        assert all(tensor.dtype == torch.int64 and tensor.shape == (length,) for tensor in item.values())


@pytest.mark.parametrize("length", [2, 15, 64, 1000])
def test_every_token_comes_once_in_a_pass_and_passes_differ(make_shards, length):
    shards = make_shards(random_lengths(60, 40))
    total = shards.num_tokens
    data = PackedDataset(shards, length, num_sequences=-(-2 * total // length))
    stream = torch.cat([item["input_ids"] for item in data])
    first, second = stream[:total].tolist(), stream[total : 2 * total].tolist()
    assert sorted(first) == sorted(second) == list(range(total))
    assert first != second
    # no token is followed by one of another document without a new segment
    owner = np.repeat(np.arange(60), shards.document_lengths)
    for item in data:
        assert all(len({owner[token] for token in segment}) == 1 for segment in segments_of(item))
    by_default = PackedDataset(shards, length)
    assert len(by_default) == -(-total // length)
    assert same(by_default[0], data[0]) and same(by_default[len(by_default) - 1], data[len(by_default) - 1])


def test_seeds_give_other_orders(make_shards):
    shards = make_shards([4] * 50)
    assert not same(PackedDataset(shards, 64, seed=1)[0], PackedDataset(shards, 64, seed=2)[0])


def test_items_depend_on_their_index_alone(make_shards):
    sources = [(make_shards(random_lengths(50, 60, seed=1)), 1), (make_shards(random_lengths(30, 60, seed=2)), 3)]
    settings = {"num_sequences": 150, "buckets": LengthBuckets((20, 60), (1, 2)), "seed": 3}
    data = PackedDataset(sources, 64, **settings)
    wanted = [data[index] for index in range(150)]
    other = PackedDataset(sources, 64, **{**settings, "num_sequences": 400})
    for index in np.random.default_rng(0).permutation(150).tolist():
        assert same(other[index], wanted[index])
    assert same(pickle.loads(pickle.dumps(data))[149], wanted[149])
    for num_workers in (0, 2):
        loader = DataLoader(data, batch_size=4, num_workers=num_workers)
        batches = list(loader)
        for name in ("input_ids", "position_ids", "labels"):
            assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([w[name] for w in wanted]))


def test_sources_have_their_shares_everywhere_in_the_run(make_shards):
    small, large = make_shards([10] * 20), make_shards([11] * 200, first=4000)
    data = PackedDataset([(small, 1), (large, 3), (small, 0)], 20, num_sequences=640)
    tokens = torch.stack([item["input_ids"] for item in data])
    is_small = tokens[:, 0] < 4000
    assert torch.equal(tokens < 4000, is_small[:, None].expand(640, 20))  # a sequence is of one source
    windows = is_small.view(10, 64)
    assert windows.sum(dim=1).tolist() == [16] * 10
    assert len({tuple(row) for row in windows.tolist()}) == 10  # in another order each time
    assert data.passes() == {"sources[0]": 160 * 20 / 200, "sources[1]": 480 * 20 / 2200}
    # sixteen whole passes over the first, less than five over the second
    counts = tokens.flatten().bincount()
    assert counts[:200].tolist() == [16] * 200 and set(counts[4000:].tolist()) == {4, 5}


def test_odd_weights_are_kept_over_a_long_run(make_shards):
    shards = make_shards([10] * 20)
    weights = [0.37, 0.0013, 5.1, 1e-3]
    data = PackedDataset([(shards, weight) for weight in weights], 10, num_sequences=1 << 40)
    located = Counter(data._locate(index)[0] for index in range(6400))
    for number, weight in enumerate(weights):
        assert abs(located[number] - 6400 * weight / sum(weights)) < 2 * len(weights)
    # far into the run too, and no place of a stream is used twice
    start = (1 << 40) - 640
    places = [data._locate(index) for index in range(start, 1 << 40)]
    assert len(set(places)) == 640
    assert max(place for number, place in places if number == 2) == pytest.approx((1 << 40) * 5.1 / sum(weights))


def test_buckets_have_their_shares(make_shards):
    bounds = (16, 48, 96)
    lengths = [*random_lengths(150, 16), *[20, 48, 17] * 10, 49, 96, 250]  # 250 = 96 + 96 + 58
    shards = make_shards(lengths)
    data = PackedDataset(shards, 96, num_sequences=640, buckets=LengthBuckets(bounds, (1, 1, 2)))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.zeros(3, int)
    for item in data:
        segments = segments_of(item)
        for segment in segments:
            assert segment == list(range(segment[0], segment[0] + len(segment)))
            assert len({owner[token] for token in segment}) == 1
        owners = [min(lengths[owner[segment[0]]], 96) for segment in segments]
        numbers = set(np.searchsorted(bounds, owners).tolist())
        assert len(numbers) == 1  # a sequence is of one bucket
        rows[numbers.pop()] += 1
    assert rows.tolist() == [160, 160, 320]
    passes = data.passes()
    assert passes["sources[0] 49-96"] == pytest.approx(320 * 96 / (49 + 96 + 250))
    assert list(passes) == ["sources[0] 1-16", "sources[0] 17-48", "sources[0] 49-96"]


def test_long_documents_are_cut_into_pieces_of_the_last_bound(make_shards):
    shards = make_shards([250, 3])
    data = PackedDataset(shards, 96, num_sequences=200, buckets=LengthBuckets((10, 96), (0, 1)))
    joined = [token for item in data for token in item["input_ids"].tolist()]
    starts = set()
    for first in range(0, len(joined) - 250, 250):  # pass by pass
        tokens = joined[first : first + 250]
        assert sorted(tokens) == list(range(250))
        starts |= {b for a, b in pairwise(tokens) if b != a + 1}
    assert starts == {0, 96, 192}


def test_default_buckets_are_those_of_the_long_stage():
    buckets = LengthBuckets()
    assert [buckets.label(n) for n in range(4)] == ["1-4096", "4097-12288", "12289-24576", "24577-32768"]
    assert buckets.weights == (1, 1, 1, 1)


def test_held_out_documents_are_not_trained_on(make_shards):
    shards = make_shards([5, 6, 7, 8] * 10)
    train, held_out = split_held_out(shards, share=0.1, seed=5)
    assert held_out.num_documents == 4 and train.num_documents == 36
    assert sorted([*train.indices, *held_out.indices]) == list(range(40))
    assert np.array_equal(split_held_out(shards, count=4, seed=5)[1].indices, held_out.indices)
    assert not np.array_equal(split_held_out(shards, count=4, seed=6)[1].indices, held_out.indices)
    seen = [
        {
            token
            for item in PackedDataset(part, 8, num_sequences=part.num_tokens // 8)
            for token in item["input_ids"].tolist()
        }
        for part in (train, held_out)
    ]
    assert not seen[0] & seen[1] and len(seen[0]) > 200
    assert train.num_tokens + held_out.num_tokens == shards.num_tokens
    assert train.sha256 != held_out.sha256 != shards.sha256
    for settings, message in (
        ({}, "exactly one of `share` and `count`"),
        ({"share": 0.1, "count": 1}, "exactly one of `share` and `count`"),
        ({"share": 1.0}, "`share` must be between 0 and 1, got 1.0"),
        ({"count": 40}, "40 of 40 documents cannot be held out"),
        ({"count": 0}, "0 of 40 documents cannot be held out"),
    ):
        with pytest.raises(ValueError, match=message):
            split_held_out(shards, **settings)


def test_identity_tells_runs_apart(make_shards):
    shards, other = make_shards([5] * 9), make_shards([6] * 9)
    bounds = LengthBuckets((6,), (1,))
    variants = [
        PackedDataset(shards, 8),
        PackedDataset(other, 8),
        PackedDataset(split_held_out(shards, count=1)[0], 8),
        PackedDataset(shards, 9),
        PackedDataset(shards, 8, seed=1),
        PackedDataset(shards, 8, buckets=bounds),
        PackedDataset([(shards, 1), (other, 1)], 8),
        PackedDataset([(shards, 1), (other, 2)], 8),
    ]
    written = [json.dumps(data.identity) for data in variants]
    assert len(set(written)) == len(written)
    assert json.loads(written[0]) == PackedDataset(shards, 8, num_sequences=77).identity


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([0], [0, 1]),
        ([0, 1, 2, 3], [0, 4]),
        ([0, 0, 0, 1, 0], [0, 1, 2, 4, 5]),
        ([[0, 1, 2], [0, 1, 0]], [0, 3, 5, 6]),
        ([[0, 1], [2, 3]], [0, 2, 4]),
    ],
)
def test_cu_seqlens(rows, wanted):
    bounds = cu_seqlens(torch.tensor(rows))
    assert bounds.tolist() == wanted and bounds.dtype == torch.int32


def test_cu_seqlens_agree_with_transformers(make_shards):
    data = PackedDataset(make_shards(random_lengths(40, 9)), 32)
    positions = torch.stack([item["position_ids"] for item in data])
    numbers = find_packed_sequence_indices(positions)
    sizes = [count for row in numbers for count in row.unique_consecutive(return_counts=True)[1].tolist()]
    assert cu_seqlens(positions).diff().tolist() == sizes
    for wrong in (torch.zeros(1, 1, 1), torch.zeros(0)):
        with pytest.raises(ValueError, match=r"must be \[T\] or \[B, T\] and not empty"):
            cu_seqlens(wrong)


def test_model_reads_a_packed_row_as_the_documents_one_by_one(make_shards):
    shards = make_shards(random_lengths(30, 25), num_words=90)
    model = build_model(sparse=None)
    data = PackedDataset(shards, 48)
    batch = {name: torch.stack([data[n][name] for n in range(3)]) for name in data[0]}
    assert sum(len(segments_of(data[n])) for n in range(3)) > 6
    with torch.no_grad():
        output = model(**batch, use_cache=False)
        packed = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
        ).view(3, -1)
        alone = []
        for n in range(3):
            for segment in segments_of(data[n]):
                ids = torch.tensor([segment])
                logits = model(input_ids=ids, use_cache=False).logits[0]
                alone.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    counted = packed[batch["labels"][:, 1:] != IGNORED]
    torch.testing.assert_close(counted, torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, torch.cat(alone).mean(), rtol=1e-5, atol=1e-5)
    # the test would see attention across documents
    with torch.no_grad():
        across = model(input_ids=batch["input_ids"], use_cache=False).logits
    assert (across - output.logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 1}, "`length` must be at least 2, got 1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"num_sequences": 0}, "`num_sequences` must be at least 1, got 0"),
        ({"buckets": LengthBuckets((4, 9), (1, 1))}, "The last bound of `buckets`, 9, must be at most `length`, 8"),
        (
            {"buckets": LengthBuckets((4, 6, 8), (1, 1, 1))},
            r"`buckets`: no document of sources\[0\] has 7-8 tokens; add such documents, give the bucket weight 0",
        ),
    ],
)
def test_settings_out_of_range(make_shards, settings, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(make_shards([3, 5]), **{"length": 8, **settings})


def test_sources_weights_and_indices_out_of_range(make_shards):
    shards = make_shards([3, 5])
    for sources, message in (
        ([shards, shards], r"`sources` must be one source, or pairs \(source, weight\)"),
        ([], r"weights must be at least 0 and not all 0, got \[\]"),
        ([(shards, 0)], r"weights must be at least 0 and not all 0, got \[0\]"),
        ([(shards, 1), (shards, -1)], r"weights must be at least 0 and not all 0, got \[1, -1\]"),
        ([(shards, float("nan"))], r"weights must be at least 0 and not all 0, got \[nan\]"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedDataset(sources, 8)
    for bounds, weights, message in (
        ((), (), r"`bounds` must ascend from above 0, got \(\)"),
        ((0, 4), (1, 1), "`bounds` must ascend from above 0"),
        ((4, 4), (1, 1), "`bounds` must ascend from above 0"),
        ((4, 8), (1,), "`weights` must be one for each of the 2 bounds, got 1"),
        ((4, 8), (0, 0), "weights must be at least 0 and not all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LengthBuckets(bounds, weights)
    data = PackedDataset(shards, 4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"There is no sequence {index}: the data set holds 2"):
            data[index]
    with pytest.raises(IndexError, match="no document 40"):
        DocumentSubset(shards, np.array([1, 40])).document(1)
