"""Perplexity: how well a model predicts a text.

Data: any UTF-8 file. Metric: bits per byte, which compares models whatever their tokenizers, and perplexity a token.
Every token of the text is scored once, in contiguous windows that each begin with the tokenizer's `bos_token`.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minicpm4_hf.perplexity import TextScore, score_tokens


def read_text(path: Path) -> bytes:
    """The bytes of a text file, checked to be UTF-8 and not empty.

    Raises:
        ValueError: they are not.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The text {str(path)!r} is not UTF-8: byte {error.start} cannot be decoded.") from error
    if not content:
        raise ValueError(f"The text {str(path)!r} is empty.")
    return content


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    content: bytes,
    *,
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Score a text.

    Args:
        content: the text in UTF-8.
        context: tokens a window, `bos_token` included.
        progress: called after each window with the tokens done and all of them.

    Returns:
        What was scored (`sha256`, `num_bytes`, `num_tokens`, `context`) and how well (`nats` in all, `bits_per_byte`,
        `perplexity`).

    Raises:
        ValueError: a context that the model does not have, or a tokenizer without `bos_token`.
    """
    if not 2 <= context <= model.config.max_position_embeddings:
        raise ValueError(
            f"`context` must be from 2 to the model's {model.config.max_position_embeddings}, got {context}."
        )
    if tokenizer.bos_token_id is None:
        raise ValueError("The tokenizer has no `bos_token` for the windows to begin with.")
    ids = torch.tensor(tokenizer(content.decode("utf-8"), add_special_tokens=False, verbose=False).input_ids)
    bos, nats, num_done = ids.new_tensor([tokenizer.bos_token_id]), 0.0, 0
    for window in ids.split(context - 1):
        nats += score_tokens(model, torch.cat((bos, window))).double().sum().item()
        num_done += len(window)
        if progress is not None:
            progress(num_done, len(ids))
    score = TextScore(nats=nats, tokens=len(ids), bytes=len(content))
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "num_bytes": score.bytes,
        "num_tokens": score.tokens,
        "context": context,
        "nats": score.nats,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
    }
