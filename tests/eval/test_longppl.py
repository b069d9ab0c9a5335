"""`python -m minicpm4_hf.eval longppl`: by hand, against plain computations, across tokenizers; errors."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.eval.longppl import find_key_tokens, longppl
from minicpm4_hf.eval.longppl.contexts import encode, key_spans, short_context_nats, split_windows
from minicpm4_hf.eval.longppl.metric import merge_spans, tokens_within, trim
from minicpm4_hf.shipped import shipped_excerpt
from minicpm4_hf.training.tokenizer import train_tokenizer

TEXT = shipped_excerpt().read_text(encoding="utf-8")[:6000]
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 16, "topk": 2, "dense_len": -1}
SHORT, STRIDE, LENGTH = 24, 8, 100
NAN = float("nan")


def build(folder, vocabulary, seed, sparse=SPARSE, positions=512):
    tokenizer = train_tokenizer([TEXT * 20], vocab_size=vocabulary)
    torch.manual_seed(seed)
    config = MiniCPM4Config(
        vocab_size=len(tokenizer),
        dim_model_base=16,
        sparse_config=sparse,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.5,
        max_position_embeddings=positions,
    )
    MiniCPM4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with different tokenizers, and a text."""
    root = tmp_path_factory.mktemp("longppl")
    build(root / "model", 700, 0)
    build(root / "evaluator", 500, 1)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("long", "short", "expected"),
    [
        ([1.0, 1.0, 1.0], [3.1, 3.0, 2.9], [True, False, False]),  # a gain of more than 2
        ([1.9, 2.0, 2.1], [9.0, 9.0, 9.0], [True, False, False]),  # and a probability of more than exp(-2)
        ([0.5, 0.5], [NAN, 8.0], [False, True]),  # no more context than the short one
    ],
)
def test_key_tokens(long, short, expected):
    assert find_key_tokens(torch.tensor(long), torch.tensor(short)).tolist() == expected


def test_key_tokens_at_other_limits():
    long, short = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 9.0])
    assert find_key_tokens(long, short, alpha=0.5).tolist() == [True, False]
    assert find_key_tokens(long, short, alpha=0.5, beta=-4.0).tolist() == [True, True]


@pytest.mark.parametrize(
    ("nats", "is_key", "expected"),
    [
        ([math.log(2), 5.0, math.log(8)], [True, False, True], 4.0),  # the geometric mean of 2 and 8
        ([0.0, 7.0], [True, False], 1.0),
        ([1.0, 2.0], [False, False], None),
    ],
)
def test_longppl(nats, is_key, expected):
    found = longppl(torch.tensor(nats), torch.tensor(is_key))
    assert found == (expected if expected is None else pytest.approx(expected))


def test_all_tokens_key_is_perplexity():
    nats = torch.rand(1000)
    assert longppl(nats, torch.ones(1000, dtype=torch.bool)) == pytest.approx(math.exp(nats.double().mean()))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"`long_nats` and `short_nats` must have one shape, got \[2\] and \[3\]"):
        find_key_tokens(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"`nats` and `is_key` must have one shape, got \[2\] and \[3\]"):
        longppl(torch.zeros(2), torch.zeros(3, dtype=torch.bool))


def test_spans():
    text = "the old garden, is 4817"
    assert trim(text, [(3, 7), (7, 15), (18, 19)]) == [(4, 7), (8, 15), (19, 19)]
    assert merge_spans(text, [(4, 7), (8, 14), (19, 23)]) == [(4, 14), (19, 23)]
    # Within as a whole; half of a span will do, a token that reaches beyond it will not.
    offsets = [(0, 3), (4, 9), (9, 14), (9, 15), (16, 18), (19, 21), (21, 23), (23, 23)]
    assert tokens_within(offsets, [(4, 14), (19, 23)]) == [False, True, True, False, False, True, True, False]
    assert tokens_within(offsets, []) == [False] * 8


def plain_nats(model, ids):
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def test_against_plain_computation(folders):
    """Each token's short context by itself, and the metric written out."""
    model = AutoModelForCausalLM.from_pretrained(folders / "evaluator").eval()
    model.config.sparse_config = None
    tokenizer = AutoTokenizer.from_pretrained(folders / "evaluator")
    ids = encode(tokenizer, TEXT).ids[:LENGTH]
    found = short_context_nats(model, ids, short=SHORT, stride=STRIDE)
    assert found.isnan().tolist() == [i + 1 < SHORT for i in range(LENGTH - 1)]
    for token in range(SHORT, LENGTH):
        begin = (token - SHORT) // STRIDE * STRIDE
        expected = plain_nats(model, ids[begin : token + 1])[-1].item()
        assert found[token - 1].item() == pytest.approx(expected, abs=2e-4)
    long = plain_nats(model, ids)
    window = split_windows(tokenizer, TEXT, LENGTH)[0]
    again = encode(tokenizer, window)
    assert again.ids.tolist() == ids.tolist()
    alpha, beta = 0.05, -6.0  # random weights gain little
    spans = key_spans(model, tokenizer, window, short=SHORT, stride=STRIDE, alpha=alpha, beta=beta)
    is_key = [
        not math.isnan(short) and short - known > alpha and -known > beta
        for short, known in zip(found.tolist(), long.tolist())
    ]
    assert 3 < sum(is_key) < LENGTH - SHORT
    assert tokens_within(again.offsets, spans) == [
        key and begin < end for key, (begin, end) in zip(is_key, again.offsets)
    ]


def test_windows_cover_the_text(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "model")
    windows = split_windows(tokenizer, TEXT, LENGTH)
    total = len(encode(tokenizer, TEXT).offsets)
    assert len(windows) == total // (LENGTH - 1)
    squeezed = "".join("".join(windows).split())
    assert "".join(TEXT.split()).startswith(squeezed)


def run(folders, *arguments):
    command = ["longppl", "--model", str(folders / "model"), "--evaluator", str(folders / "evaluator")]
    settings = ["--length", str(LENGTH), "--short", str(SHORT), "--stride", str(STRIDE), "--alpha", "0.05"]
    settings += ["--beta", "-6", "--windows", "3", "--threads", "1"]
    return main([*command, "--text", str(folders / "text.txt"), *settings, *arguments])


def test_command(folders, tmp_path, capsys):
    output = tmp_path / "l.json"
    assert run(folders, "--output", str(output)) == 0
    printed = capsys.readouterr().out
    record = json.loads(output.read_text())
    assert json.loads(printed.splitlines()[-1]) == record
    dense, sparse = record["rows"]
    assert (dense["mode"], sparse["mode"]) == ("dense", "sparse") and dense["longppl"] != sparse["longppl"]
    # The dense row, computed with the two models side by side.
    evaluator = AutoModelForCausalLM.from_pretrained(folders / "evaluator").eval()
    model = AutoModelForCausalLM.from_pretrained(folders / "model").eval()
    evaluator.config.sparse_config = model.config.sparse_config = None
    first, second = (AutoTokenizer.from_pretrained(folders / name) for name in ("evaluator", "model"))
    nats, key_nats = [], []
    for window in split_windows(first, TEXT, LENGTH)[:3]:
        spans = key_spans(evaluator, first, window, short=SHORT, stride=STRIDE, alpha=0.05, beta=-6.0)
        chars = {place for begin, end in spans for place in range(begin, end)}
        found = encode(second, window)
        plain = plain_nats(model, found.ids).tolist()
        nats += plain
        key_nats += [
            value for value, (begin, end) in zip(plain, found.offsets) if begin < end and {*range(begin, end)} <= chars
        ]
    assert dense["key_tokens"] == len(key_nats) > 5 and dense["tokens"] == len(nats)
    assert dense["longppl"] == pytest.approx(math.exp(sum(key_nats) / len(key_nats)), rel=1e-4)
    assert dense["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    # What is measured is not measured again, and the evaluator's weights are not needed for it.
    journal = output.with_suffix(".jsonl")
    lines = journal.read_text().splitlines()
    assert len(lines) == 3 + 2 * 3
    journal.write_text("\n".join(lines[:-2]) + "\n")
    assert run(folders, "--output", str(output)) == 0
    assert json.loads(output.read_text())["rows"] == record["rows"]
    assert journal.read_text().splitlines()[:-2] == lines[:-2]


def test_no_key_token(folders, capsys):
    assert run(folders, "--alpha", "1000", "--modes", "dense") == 0
    shown = capsys.readouterr().out
    (row,) = json.loads(shown.splitlines()[-1])["rows"]
    assert row["longppl"] is None and row["key_tokens"] == 0 and "no key token" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--short", "100"], "`--short` must be below `--length` 100, got 100."),
        (["--modes", "dense", "dense"], "`--modes` must name each value once, got dense dense."),
        (["--length", "5000"], "tokens, and `--length` asks for 5000."),
        (["--length", "600"], "`--length` must be at most the evaluator's context of 512 tokens, got 600."),
        (["--output", "absent/l.json"], "The folder of 'absent/l.json' does not exist."),
        (["--output", "l.txt"], "`--output` must be a file that ends in .json, got 'l.txt'."),
        (["--evaluator", "absent"], "There is no model folder 'absent'"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--context", "64"], "`extend_context` needs LongRoPE factors"),
    ],
)
def test_wrong_input(arguments, sentence, folders, capsys):
    assert run(folders, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_models_that_cannot(folders, tmp_path, capsys):
    build(tmp_path / "dense", 700, 0, sparse=None)
    assert run(folders, "--model", str(tmp_path / "dense")) == 2
    assert "has no sparse attention (its `sparse_config` is null)" in capsys.readouterr().err
    build(tmp_path / "short", 700, 0, positions=64)
    assert run(folders, "--model", str(tmp_path / "short")) == 2
    assert "and its context is 64; choose a smaller `--length`" in capsys.readouterr().err


def test_tokenizer_without_places():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="LongPPL needs a tokenizer that knows its tokens' places"):
        encode(Slow(), "text")
