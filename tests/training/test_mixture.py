"""Generated sequences among those of the text: shares, segments, positions that skip, and errors."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt
from minicpm4_hf.training.mixture import Mixture, SyntheticRows, SyntheticSettings, skipping_positions
from minicpm4_hf.training.packing import IGNORED, PackedDataset, cu_seqlens
from minicpm4_hf.training.recipe import load_recipe, shipped_recipe
from minicpm4_hf.training.shards import build_shards
from minicpm4_hf.training.synthetic import Prose


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


@pytest.fixture(scope="module")
def prose(tokenizer):
    return Prose([shipped_excerpt().read_text(encoding="utf-8")], tokenizer)


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    return build_shards([shipped_excerpt()], tokenizer, tmp_path_factory.mktemp("shards") / "excerpt")


def rows_of(tokenizer, prose, length=1024, *, seed=3, **settings):
    return SyntheticRows(SyntheticSettings(share=0.5, **settings), tokenizer, prose, length, seed=seed)


def texts_of(tokenizer, row):
    bounds = cu_seqlens(row["position_ids"]).tolist()
    return [tokenizer.decode(row["input_ids"][a:b]) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("length", (200, 777, 1500))
def test_a_row_is_full_of_segments_that_begin_with_bos(tokenizer, prose, length):
    rows = rows_of(tokenizer, prose, length, min_length=128)
    for index in range(12):
        row = rows.row(index)
        assert {name: (list(t.shape), t.dtype) for name, t in row.items()} == {
            name: ([length], torch.int64) for name in ("input_ids", "labels", "position_ids")
        }
        starts = cu_seqlens(row["position_ids"])[:-1]
        assert torch.equal(torch.where(row["input_ids"] == tokenizer.bos_token_id)[0], starts.long())
        labelled = row["labels"] != IGNORED
        assert labelled.any() and torch.equal(row["labels"][labelled], row["input_ids"][labelled])
        assert not labelled[starts].any() and not labelled[row["input_ids"] == tokenizer.pad_token_id].any()


def test_rows_depend_on_seed_and_index_alone(tokenizer, prose):
    options = {"skip_share": 0.5, "max_position": 9000}
    rows, again = rows_of(tokenizer, prose, **options), rows_of(tokenizer, prose, **options)
    last = again.row(7)  # in another order
    for index in range(8):
        assert torch.equal(rows.row(index)["input_ids"], again.row(index)["input_ids"])
    assert all(torch.equal(tensor, rows.row(7)[name]) for name, tensor in last.items())
    other = rows_of(tokenizer, prose, seed=4, **options).row(7)
    assert not torch.equal(other["input_ids"], last["input_ids"])
    assert not torch.equal(rows.row(6)["input_ids"], last["input_ids"])


def test_tasks_come_by_their_weights(tokenizer, prose):
    marks = {"needle": "secret number", "lookup": "Look up:", "copy": "Repeat it:", "addition": "=?"}
    rows = rows_of(tokenizer, prose, 1024, tasks={"needle": 3, "lookup": 1, "copy": 0}, min_length=512)
    texts = [text for index in range(40) for text in texts_of(tokenizer, rows.row(index))]
    counts = {task: sum(mark in text for text in texts) for task, mark in marks.items()}
    assert counts["copy"] == counts["addition"] == 0 and sum(counts.values()) == len(texts)
    assert 1.5 < counts["needle"] / counts["lookup"] < 6  # 3 expected of about 50
    chats = texts_of(tokenizer, rows_of(tokenizer, prose, 700, tasks={"tools": 1}, min_length=96).row(0))
    assert "<|tool_call_start|>" in chats[0]


def test_each_sum_is_a_segment(tokenizer, prose):
    row = rows_of(tokenizer, prose, 512, tasks={"addition": 1}).row(0)
    texts = texts_of(tokenizer, row)
    assert len(texts) > 4 and all(text.count("=?") == 1 for text in texts)


@pytest.mark.parametrize("length", (5, 50, 64))
def test_skipping_positions(length):
    rng = np.random.default_rng(0)
    reached, gaps = [], set()
    for _ in range(300):
        positions = skipping_positions(rng, length, 1000)
        steps = np.diff(positions)
        assert len(positions) == length and positions[0] == 0 and (steps >= 1).all() and positions[-1] <= 1000
        reached.append(positions[-1])
        gaps.add(int((steps > 1).sum()))
    assert max(reached) > 900 and gaps <= {0, 1, 2, 3} and {1, 2, 3} <= gaps
    assert np.array_equal(skipping_positions(rng, length, length - 1), np.arange(length))


def test_positions_skip_in_their_share_of_the_examples(tokenizer, prose):
    settings = {"tasks": {"needle": 1}, "min_length": 512, "skip_share": 0.5, "max_position": 20000}
    rows = rows_of(tokenizer, prose, 512, **settings)
    far = [int(rows.row(index)["position_ids"].max()) > 511 for index in range(60)]
    assert 15 < sum(far) < 45
    for index in np.flatnonzero(far)[:5]:  # a skip begins no segment
        assert cu_seqlens(rows.row(int(index))["position_ids"]).tolist() == [0, 512]


@pytest.mark.parametrize("share", (0.25, 0.4, 1.0))
@pytest.mark.parametrize("per_step", (1, 3))
def test_steps_of_a_mixture_are_of_one_kind_in_their_shares(tokenizer, prose, shards, share, per_step):
    text = PackedDataset(shards, 256, num_sequences=60, seed=1)
    rows = SyntheticRows(SyntheticSettings(share=share, min_length=128), tokenizer, prose, 256)
    mixed = Mixture(text, rows, per_step)
    assert len(mixed) == 60
    generated = 0
    for step in range(60 // per_step):
        wanted_rows = [rows.row(generated * per_step + place) for place in range(per_step)]
        wanted_text = [text[(step - generated) * per_step + place] for place in range(per_step)]
        got = [mixed[step * per_step + place] for place in range(per_step)]
        kinds = [
            all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(got, wanted))
            for wanted in (wanted_rows, wanted_text)
        ]
        assert sum(kinds) == 1
        generated += kinds[0]
        assert abs(generated - (step + 1) * share) < 1
    left = 1 - generated / (60 // per_step)
    assert mixed.passes() == pytest.approx({name: times * left for name, times in text.passes().items()})
    with pytest.raises(IndexError, match="holds 60"):
        mixed[60]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "above 0"),
        ({"share": 1.5}, "at most 1"),
        ({"tasks": {"riddle": 1}}, "some of needle"),
        ({"tasks": {}}, "some of needle"),
        ({"tasks": {"needle": -1}}, "at least 0"),
        ({"tasks": {"needle": 0}}, "not all 0"),
        ({"tasks": {"needle": "much"}}, "at least 0"),
        ({"min_length": 10}, "at least 96"),
        ({"skip_share": 2.0}, "from 0 to 1"),
        ({"skip_share": 0.5}, "max_position"),
        ({"max_facts": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSettings(**{"share": 0.5, **settings})


def test_a_sequence_too_short_for_its_tasks(tokenizer, prose):
    with pytest.raises(ValueError, match="at least 256 tokens, got `length` 100"):
        rows_of(tokenizer, prose, 100)
    with pytest.raises(ValueError, match="at least 600 tokens"):
        rows_of(tokenizer, prose, 512, tasks={"tools": 1, "needle": 0})


def test_the_recipe_of_the_shipped_checkpoint_reads():
    recipe = load_recipe(shipped_recipe("minicpm4-books"))
    shares = [stage.synthetic.share if stage.synthetic else 0 for stage in recipe.stages]
    assert shares[:3] == [0, 1, 1] and all(0 < share < 1 for share in shares[3:])
    assert [stage.sparse_config is None for stage in recipe.stages] == [True] * 5 + [False] * 3 + [True] * 3 + [False]
