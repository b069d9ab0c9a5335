"""The tokenizer that a run trains: ids, round trips, and the chat template."""

import random

import pytest
from transformers import AutoTokenizer

from minicpm4_hf.training.tokenizer import BYTE_TOKENS, TAIL_TOKENS, train_tokenizer

VOCAB_SIZE = 400


def book(seed: int, words: int = 3000) -> str:
    """A made-up book: words of made-up syllables in paragraphs."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    chosen = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words)
    return "".join(word + (".\n\n" if i % 40 == 39 else " ") for i, word in enumerate(chosen)) + "Café — 12\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([book(2), book(3)], vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


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
