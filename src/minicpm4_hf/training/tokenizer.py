"""A tokenizer trained on given texts: the official MiniCPM4 tokenizer in miniature.

A SentencePiece-style BPE with byte fallback that writes a space as `▁`. As in the official vocabulary, ids 0-2 are
`<unk> <s> </s>`, the 256 byte tokens follow, and the eight chat and code tokens are the last ids, `<|im_end|>` before
`<|im_start|>`. Unlike the Llama form no space is put before the text, so `decode(encode(text)) == text` for any text.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

HEAD_TOKENS = ("<unk>", "<s>", "</s>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
TAIL_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)

# The official template's text; `generation` marks what the assistant writes, which is what fine-tuning learns.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n' }}"
    "{% endif %}"
    "{% endif %}"
)

# A word with the space before it; a single digit; a run of line ends, of punctuation, or of spaces.
WORD_PATTERN = (
    "▁?[\\p{L}\\p{M}]+(?:[\u2019'][\\p{L}\\p{M}]+)?"
    r"|\p{N}"
    r"|\n+"
    r"|▁+(?=▁)"
    r"|▁?[^\p{L}\p{M}\p{N}▁\n]+"
    r"|▁"
)

# `▁` stands for a space, so a `▁` of the text itself is written as a code point that no text should hold (a Unicode
# noncharacter) and a digit, and that code point likewise. The model sees the byte tokens of both.
ESCAPE = "\ufdd0"
ESCAPES = ((ESCAPE, ESCAPE + "0"), ("▁", ESCAPE + "1"))

# A character seen less often in the training text is left to the byte tokens.
MIN_CHARACTER_COUNT = 20


def _build_backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(text, escaped) for text, escaped in ESCAPES] + [normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Replace(escaped, text) for text, escaped in reversed(ESCAPES)]
    )
    return backend


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train the tokenizer. The same texts always give the same tokenizer.

    Args:
        texts: the training texts, read once.
        vocab_size: all tokens, the special ones and the byte tokens included.

    Returns:
        A tokenizer that `AutoTokenizer.from_pretrained` loads after `save_pretrained`.

    Raises:
        ValueError: `vocab_size` leaves no room for pieces, or the texts are too short to fill it.
    """
    num_fixed = len(HEAD_TOKENS) + len(BYTE_TOKENS) + len(TAIL_TOKENS)
    if vocab_size <= num_fixed:
        raise ValueError(f"`vocab_size` must be above {num_fixed}, got {vocab_size}.")

    paragraphs = [paragraph for text in texts for paragraph in re.findall(r"[^\n]*\n+|[^\n]+", text)]
    counts = Counter()
    for paragraph in paragraphs:
        counts.update(paragraph)
    rare = {ord(character): "\n" for character, count in counts.items() if count < MIN_CHARACTER_COUNT}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAIL_TOKENS),
        special_tokens=[*HEAD_TOKENS, *BYTE_TOKENS],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    learner = _build_backend({}, [])
    learner.train_from_iterator((paragraph.translate(rare) for paragraph in paragraphs), trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab = learned["vocab"]
    if len(vocab) != vocab_size - len(TAIL_TOKENS):
        raise ValueError(f"The texts give only {len(vocab)} pieces; use longer texts or a smaller `vocab_size`.")

    backend = _build_backend(vocab, [tuple(merge) for merge in learned["merges"]])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*HEAD_TOKENS, *TAIL_TOKENS)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
