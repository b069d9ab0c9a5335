"""A tokenizer.json as the tokenizer of a GGUF file, and what of it llama.cpp cannot do the same way.

MiniCPM4's tokenizer is a SentencePiece model in the form of byte-pair merges with byte fallback. llama.cpp has that
kind under the name "llama": pieces with scores, where of two neighbours that form a piece those with the highest score
are joined first. The score of a piece is minus the rank of the first merge that makes it.

Source: llama.cpp's `llama-vocab.cpp`; transformers' `SentencePieceExtractor`, which makes the merges from scores.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import gguf

SPACE = "▁"  # stands for a space in a piece
_BYTES = {f"<0x{value:02X}>" for value in range(256)}
# Texts by which llama.cpp knows an end of generation, whatever the metadata say.
_KNOWN_ENDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
_END_OF_TURN = "<|im_end|>"
_FILL_IN_MIDDLE = {"fim_pre": "<|fim_prefix|>", "fim_mid": "<|fim_middle|>", "fim_suf": "<|fim_suffix|>"}


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        tokens, types, scores: one a token id.
        ids: "bos", "eos", "eot", "unk", ... -> token id.
        add_space_prefix: whether a space is put before a text, and after each special token.
        add_bos, add_eos: whether these are put around a text.
        chat_template: a Jinja template, or None.
        differences: in which cases llama.cpp cuts a text otherwise, in words; empty where it never does.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    ids: dict[str, int]
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    chat_template: str | None = None
    differences: list[str] = field(default_factory=list)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """Write a vocabulary's metadata."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    for name, token_id in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{_KEYS[name]}_token_id", token_id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


# llama.cpp's words.
_KEYS = {name: name for name in ("bos", "eos", "eot", "eom", *_FILL_IN_MIDDLE)} | {
    "unk": "unknown",
    "pad": "padding",
}


def read_vocabulary(folder: Path, config) -> Vocabulary:
    """The tokenizer of a checkpoint folder: tokenizer.json, tokenizer_config.json, and the chat template.

    Raises:
        ValueError: there is none, it is damaged, or of a kind that llama.cpp's "llama" tokenizer is not.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; load its tokenizer with AutoTokenizer and `save_pretrained` it there, "
            "or convert without a tokenizer (`--no-tokenizer`)."
        )
    content = _read_object(path)
    settings_path = folder / "tokenizer_config.json"
    settings = _read_object(settings_path) if settings_path.is_file() else {}
    try:
        return _build(content, settings, folder, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer that can be read ({error!r}); get the file again.") from error


def _read_object(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); get the file again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _build(content: dict, settings: dict, folder: Path, config) -> Vocabulary:
    model, path = content["model"], folder / "tokenizer.json"
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            f"{path} is of type {model.get('type')} {'without' if model.get('type') == 'BPE' else 'and not BPE with'} "
            "byte fallback; only SentencePiece-like tokenizers such as MiniCPM's are converted."
        )
    vocab: dict[str, int] = model["vocab"]
    missing = sorted(_BYTES - set(vocab))
    if missing:
        raise ValueError(f"{path} lacks the byte token {missing[0]}, without which no text can be cut into bytes.")
    added = _added_tokens(content, settings)
    tokens, types = _tokens(vocab, added, path, config.vocab_size)
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    scores, differences = _scores(vocab, merges, len(tokens))
    prefix, more = _spaces(content, path)
    differences += [*more, *_added_differences(added)]
    token_ids = {token: number for number, token in enumerate(tokens)}
    ids, more = _special_ids(folder, settings, config, token_ids)
    add_bos, add_eos = _around(
        content, settings, [tokens[ids[name]] if name in ids else None for name in ("bos", "eos")]
    )
    unk = model.get("unk_token")
    if unk in token_ids:
        ids["unk"] = token_ids[unk]
        types[ids["unk"]] = gguf.TokenType.UNKNOWN
    return Vocabulary(
        tokens, types, scores, ids, prefix, add_bos, add_eos, _chat_template(folder, settings), differences + more
    )


def _added_tokens(content: dict, settings: dict) -> dict[int, dict]:
    """Token id -> what is said of a token outside the merges, in tokenizer.json or tokenizer_config.json."""
    added = {int(number): entry for number, entry in (settings.get("added_tokens_decoder") or {}).items()}
    return added | {entry["id"]: entry for entry in content.get("added_tokens") or []}


def _tokens(vocab: dict[str, int], added: dict[int, dict], path: Path, size: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in vocab.items()}
    if len(by_id) != len(vocab):
        raise ValueError(f"{path} gives the same id to two pieces; get the file again.")
    by_id |= {number: entry["content"] for number, entry in added.items()}
    if min(by_id) < 0 or max(by_id) >= size:
        raise ValueError(
            f"{path} has token ids from {min(by_id)} to {max(by_id)}, but the model's vocabulary ends at {size - 1}; "
            "the two do not belong together."
        )
    tokens, types, seen = [], [], set()
    for number in range(size):
        token = by_id.get(number)
        if token is None:  # the embedding has more rows than the tokenizer has tokens
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number].get("special") else gguf.TokenType.USER_DEFINED
        else:
            kind = gguf.TokenType.BYTE if token in _BYTES else gguf.TokenType.NORMAL
        if not token or token in seen or "\0" in token or not _is_unicode(token):
            raise ValueError(f"{path} has {token!r} as token {number}, which is empty, no text, or there twice.")
        seen.add(token)
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _is_unicode(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _scores(vocab: dict[str, int], merges: list[tuple[str, str]], size: int) -> tuple[list[float], list[str]]:
    """Scores, and whether joining by scores can differ from joining by merges."""
    first: dict[str, int] = {}
    in_order, last = True, None
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece not in vocab:
            raise ValueError(f"The merge of {left!r} and {right!r} in tokenizer.json makes no known piece.")
        in_order &= piece == last or piece not in first
        first.setdefault(piece, rank)
        last = piece
    scores = [0.0] * size
    for piece, rank in first.items():
        scores[vocab[piece]] = -float(rank + 1)
    known = set(merges)
    splits = ((piece[:i], piece[i:]) for piece in vocab if piece not in _BYTES for i in range(1, len(piece)))
    complete = all(split in known for split in splits if split[0] in vocab and split[1] in vocab)
    if in_order and complete:
        return scores, []
    return scores, ["its merges do not allow every way to put a piece together, and llama.cpp does"]


def _spaces(content: dict, path: Path) -> tuple[bool, list[str]]:
    """Whether a space is put before a text, and what of normalizer and pre-tokenizer cannot be expressed."""
    prefix = maps_spaces = False
    differences = []
    for step in _steps(content.get("normalizer"), "normalizers"):
        pattern = step.get("pattern") or {}
        if step["type"] == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif step["type"] == "Replace" and pattern.get("String") == " " and step.get("content") == SPACE:
            maps_spaces = True
        elif step["type"] == "Replace" and pattern.get("String"):
            differences.append(f"it replaces {pattern['String']!r} in texts, which llama.cpp does not")
        else:
            differences.append(f"it normalises texts ({step['type']}), which llama.cpp does not")
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            maps_spaces, scheme = True, step.get("prepend_scheme", "always")
            prefix |= scheme != "never"
            if scheme == "first":
                differences.append("it puts a space before a text only, llama.cpp also after each special token")
            if scheme != "never":
                differences.append("it puts no space before a text that begins with one, llama.cpp does")
            if not step.get("split", True):
                continue
        elif step["type"] == "ByteLevel":
            raise ValueError(f"{path} works on bytes (ByteLevel); only SentencePiece-like tokenizers are converted.")
        differences.append(
            "it cuts a text by a pattern before it joins pieces, llama.cpp does not: runs of spaces, and apostrophes "
            "beside letters, may be cut otherwise"
        )
    if not maps_spaces:
        raise ValueError(f"{path} does not write spaces as {SPACE!r}; only SentencePiece-like ones are converted.")
    return prefix, differences


def _steps(step: dict | None, key: str) -> list[dict]:
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _steps(part, key)]
    return [step]


def _added_differences(added: dict[int, dict]) -> list[str]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    odd = [entry["content"] for entry in added.values() if any(entry.get(flag) for flag in flags)]
    return [f"its token {odd[0]!r} takes in spaces around it, or is looked for in normalised text"] if odd else []


def _special_ids(folder: Path, settings: dict, config, token_ids: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """Ids of the special tokens, and which ends of a text llama.cpp will not know."""
    ids = {}
    for name in ("bos", "eos", "pad"):
        entry = settings.get(f"{name}_token")
        token = entry.get("content") if isinstance(entry, dict) else entry
        number = token_ids.get(token) if token is not None else getattr(config, f"{name}_token_id")
        if isinstance(number, list):
            number = number[-1]
        if number is not None:
            ids[name] = number
    generation = folder / "generation_config.json"
    stops = _read_object(generation).get("eos_token_id") if generation.is_file() else None
    stops = config.eos_token_id if stops is None else stops
    stops = stops if isinstance(stops, list) else [stops]
    unknown = [number for number in stops if number is not None and not 0 <= number < len(token_ids)]
    if unknown:
        raise ValueError(f"{folder} stops at token {unknown[0]}, beyond its vocabulary of {len(token_ids)}.")
    if _END_OF_TURN in token_ids:
        ids["eot"] = token_ids[_END_OF_TURN]
    known = {ids.get("eos"), ids.get("eot"), *(token_ids.get(text) for text in _KNOWN_ENDS)}
    left = [number for number in stops if number is not None and number not in known]
    for slot in ("eos", "eot", "eom"):
        if left and slot not in ids:
            ids[slot] = left.pop(0)
    ids |= {name: token_ids[text] for name, text in _FILL_IN_MIDDLE.items() if text in token_ids}
    return ids, [f"it stops at token {number}, which llama.cpp takes for an ordinary one" for number in left]


def _around(content: dict, settings: dict, ends: list[str | None]) -> tuple[bool, bool]:
    """Whether the first and the last of `ends` are put around a text, as `TokenizersBackend` of transformers does."""
    if "add_bos_token" in settings or "add_eos_token" in settings:
        return bool(settings.get("add_bos_token", False)), bool(settings.get("add_eos_token", False))
    templates = [step["single"] for step in _steps(content.get("post_processor"), "processors") if "single" in step]
    around = [template[place].get("SpecialToken", {}).get("id") for template in templates[:1] for place in (0, -1)]
    return tuple(end is not None and end == put for end, put in zip(ends, around or (None, None)))


def _chat_template(folder: Path, settings: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}); get the file again.") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template
