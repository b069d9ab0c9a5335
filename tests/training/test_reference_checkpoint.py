"""The training of the reference checkpoint, with a recipe and books that take seconds."""

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.training import reference_checkpoint
from minicpm4_hf.training.reference_checkpoint import IGNORED, Batches, Recipe, learning_rate, main
from minicpm4_hf.training.tokenizer import BYTE_TOKENS, TAIL_TOKENS, train_tokenizer

VOCAB_SIZE = 400
TINY = Recipe(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    steps=8,
    tokens_per_step=256,
    micro_batch_tokens=128,
    short_length=32,
    long_length=128,
    long_every=2,
    max_distance=400,
    warmup_steps=2,
    decay_share=0.5,
    threads=1,
    checkpoint_every=3,
    evaluations=4,
    evaluation_bytes=600,
    excerpt_length=64,
    evaluation_length=64,
)
KILLED_AT = 5  # between two checkpoints and after a record

# A child that kills itself the hard way in the middle of a step.
KILLED_RUN = f"""
import json, os, signal, sys
from minicpm4_hf.training import reference_checkpoint
from minicpm4_hf.training.reference_checkpoint import Recipe

step_of = reference_checkpoint.train_step

def train_step(model, optimizer, batches, recipe, step):
    if step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step_of(model, optimizer, batches, recipe, step)

reference_checkpoint.train_step = train_step
fields = json.loads(sys.argv[1])
fields["validation_books"] = tuple(fields["validation_books"])
reference_checkpoint.main(sys.argv[2:], Recipe(**fields))
"""


def book(seed: int, words: int = 3000) -> str:
    """A made-up book: words of made-up syllables in paragraphs."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    chosen = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words)
    return "".join(word + (".\n\n" if i % 40 == 39 else " ") for i, word in enumerate(chosen)) + "Café — 12\n"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for seed, name in enumerate(("dracula", "emma", "first", "second")):
        (folder / f"{name}.txt").write_bytes(book(seed).encode("utf-8"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([book(2), book(3)], vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def finished(books, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    assert main(["--books", str(books), "--output", str(output)], TINY) == 0
    return output


def test_killed_and_resumed_equals_straight_through(books, finished, tmp_path):
    arguments = ["--books", str(books), "--output", str(tmp_path)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, json.dumps(dataclasses.asdict(TINY)), *arguments],
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "model").exists()
    (tmp_path / "checkpoint.safetensors.partial").write_bytes(b"cut off")

    assert main(arguments, TINY) == 0
    resumed, straight = (load_file(run / "checkpoint.safetensors") for run in (tmp_path, finished))
    assert resumed.keys() == straight.keys()
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name
    weights = "model/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()

    curves = []
    for run in (tmp_path, finished):
        curves.append([json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()])
        for record in curves[-1]:
            del record["seconds"]
    assert curves[0] == curves[1]


def test_export(finished):
    record = json.loads((finished / "model" / "training_record.json").read_text())
    assert record["recipe"]["steps"] == TINY.steps
    assert [point["step"] for point in record["curve"]] == [2, 4, 6, 8]
    assert record["books"]["emma"]["role"] == "validation" and record["books"]["first"]["role"] == "training"
    assert set(record["bits_per_byte"]) == {"dracula", "emma"}
    assert math.isfinite(record["bits_per_byte"]["emma"])
    assert str(finished) not in "".join(file.read_text() for file in (finished / "model").glob("*.json"))

    model = MiniCPM4ForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.dtype == torch.bfloat16
    assert model.config.sparse_config["dense_len"] == 1024
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [2, VOCAB_SIZE - 8]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer("a").input_ids[0] == model.config.bos_token_id


def test_whole_book_is_scored(finished):
    """The bits of the record are those of every token of the book, from windows that each begin with `<s>`."""
    model = MiniCPM4ForCausalLM.from_pretrained(finished / "model")
    tokens = np.load(finished / "corpus" / "emma.npy")[:150]
    total = 0.0
    for start in range(0, len(tokens), 64):
        ids = [1, *tokens[start : start + 64].tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].float()
        total -= logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
    assert reference_checkpoint.total_nats(model, tokens, 64, autocast=False) == pytest.approx(total, rel=1e-5)


def test_other_recipe_is_refused(books, finished, capsys):
    arguments = ["--books", str(books), "--output", str(finished)]
    assert main(arguments, dataclasses.replace(TINY, peak_lr=1e-3)) == 2
    assert "peak_lr" in capsys.readouterr().err
    assert main([*arguments, "--steps", "16"], TINY) == 2
    assert "steps" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["absent", "empty", "only-validation", "not-utf8", "too-short"])
def test_bad_books(case, tmp_path, capsys):
    folder = tmp_path / "books"
    if case != "absent":
        folder.mkdir()
    if case not in ("absent", "empty"):
        for name in TINY.validation_books:
            (folder / f"{name}.txt").write_text(book(0), encoding="utf-8")
    if case == "not-utf8":
        (folder / "other.txt").write_bytes(b"caf\xe9")
    if case == "too-short":
        (folder / "other.txt").write_text("Once upon a time.", encoding="utf-8")
        (folder / "third.txt").write_text(book(2), encoding="utf-8")
    assert main(["--books", str(folder), "--output", str(tmp_path / "run")], TINY) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and message.endswith(".")


def test_loss_that_is_not_finite_stops(books, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        reference_checkpoint,
        "token_losses",
        lambda model, batch, **_: model.lm_head.weight.sum() * float("nan"),
    )
    assert main(["--books", str(books), "--output", str(tmp_path)], TINY) == 2
    assert "not finite at step 1" in capsys.readouterr().err


def test_batches_are_a_function_of_the_step():
    tokens = [np.arange(5000, dtype=np.uint16), np.arange(5000, 9000, dtype=np.uint16)]
    first, again = Batches(tokens, TINY), Batches(tokens, TINY)
    num_skips = 0
    for step in (0, 3, 4, 7):
        for left, right in zip(first.step(step), again.step(step), strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)
            length = TINY.long_length if step in (4,) else TINY.short_length
            ids, positions, labels = left["input_ids"], left["position_ids"], left["labels"]
            assert ids.shape[1] == length
            assert (ids[:, 0] == 1).all() and (positions[:, 0] == 0).all()
            # the books count up, so a position is the distance in the book
            assert torch.equal(ids[:, 1:] - ids[:, 1:2], positions[:, 1:] - 1)
            # a label is the token of the next position, unless that one lies behind a skip
            counted = labels != IGNORED
            assert torch.equal(counted[:, 1:-1], (positions.diff()[:, 1:] == 1))
            assert torch.equal(labels[:, :-1][counted[:, :-1]], ids[:, 1:][counted[:, :-1]])
            assert positions.max() <= TINY.max_distance
            num_skips += int((~counted).sum())
    assert num_skips > 0


def test_tokens_before_a_skip_are_seen(finished):
    model = MiniCPM4ForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    positions = torch.tensor([[0, 1, 2, 300, 301]])
    losses = []
    for ids in ([1, 300, 301, 302, 303], [1, 310, 301, 302, 303]):
        batch = {
            "input_ids": torch.tensor([ids]),
            "position_ids": positions,
            "labels": torch.tensor([[IGNORED, IGNORED, IGNORED, 303, 304]]),
        }
        losses.append(reference_checkpoint.token_losses(model, batch, autocast=False, reduction="sum").item())
    assert losses[0] != losses[1]


def test_learning_rate():
    rates = [learning_rate(TINY, step) for step in range(TINY.steps)]
    assert rates[:4] == [TINY.peak_lr / 2, TINY.peak_lr, TINY.peak_lr, TINY.peak_lr]
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[4] < TINY.peak_lr
    assert rates[-1] == pytest.approx(TINY.peak_lr * TINY.final_lr_share)


def test_tokenizer_ids(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(range(259)) == ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    assert tokenizer.convert_ids_to_tokens(range(VOCAB_SIZE - 8, VOCAB_SIZE)) == list(TAIL_TOKENS)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == "<|im_end|>"
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, VOCAB_SIZE - 8]
    assert tokenizer("a").input_ids == [1, *tokenizer("a", add_special_tokens=False).input_ids]
    assert tokenizer.tokenize("12 a") == ["1", "2", "▁a"] or tokenizer.tokenize("12 a") == ["1", "2", "▁", "a"]
    assert tokenizer.tokenize("\U0001f642") == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " leading",
        "trailing ",
        "  two  and   three",
        "\n",
        "line\r\n\n\tline",
        "\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467",
        "Caf\u00e9 caf\u0065\u0301",
        "\u2581 \u2581\u2581 sentencepiece\u2581space",
        "\ufdd0 \ufdd00 \ufdd01 \ufdd0\u2581",
        "<0x41> is no byte token",
        "\x00\x7f\ufeff",
        "\u4e2d\u6587 \u05d0\u05d1",
        "x" * 1000 + " " * 50,
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == 1
    assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_round_trip_random(tokenizer):
    rng = random.Random(0)
    parts = [" ", "  ", "\n", "\u2581", "\ufdd0", "0", "1", "The", "\u00e9"]
    for _ in range(500):
        ranges = rng.choices([range(1, 0xD800), range(0xE000, 0x110000)], k=10)
        text = "".join(rng.choice([*parts, chr(rng.choice(codes))]) for codes in ranges)
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_tokenizer_is_deterministic(tokenizer):
    again = train_tokenizer([book(2), book(3)], vocab_size=VOCAB_SIZE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    user = "<|im_start|>user\nhi<|im_end|>\n"

    def render(**options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert render() == user
    assert render(enable_thinking=False) == user
    assert render(add_generation_prompt=True) == user + "<|im_start|>assistant\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == user + "<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n"
    assert render(add_generation_prompt=True, enable_thinking=False) == user + "<|im_start|>assistant\n" + thought
