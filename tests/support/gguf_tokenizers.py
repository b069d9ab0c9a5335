"""Tokenizers of MiniCPM4's kind, small: pieces with scores, and the merges that transformers makes of them."""

import json

from minicpm4_hf.shipped import shipped_checkpoint

SPECIAL = ("<|im_end|>", "<|im_start|>", "<|tool_call|>", "<|execute_start|>", "<|execute_end|>")
FILL = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
)
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Prepend", "prepend": "▁"}


def sentencepiece_merges(pieces):
    """Every way to put a piece together, best piece first: as `SentencePieceExtractor` lists them.

    Args:
        pieces: piece -> id, best piece first.
    """
    merges = []
    for piece in pieces:
        ways = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in pieces and piece[i:] in pieces]
        merges += sorted(ways, key=lambda way: (pieces[way[0]], pieces[way[1]]))
    return merges


def official_kind(**changes):
    """A tokenizer.json: the shipped vocabulary's pieces as a SentencePiece model, special tokens at the end.

    `changes` replace its parts.
    """
    shipped = json.loads((shipped_checkpoint() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    vocab = {piece: number for piece, number in sorted(shipped.items(), key=lambda item: item[1])}
    merges = sentencepiece_merges(vocab)
    specials = [*(("<unk>", 0), ("<s>", 1), ("</s>", 2)), *zip((*SPECIAL, *FILL), range(len(vocab), len(vocab) + 8))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": token, **flags} for token, number in specials],
        "normalizer": {"type": "Sequence", "normalizers": [PREFIX, SPACES]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
        **changes,
    }


def write_tokenizer(folder, content, *, chat_template=CHAT_TEMPLATE, **settings):
    """Put a tokenizer into a checkpoint folder."""
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True, "normalized": False},
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder
