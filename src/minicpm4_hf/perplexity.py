"""How well a model predicts a text: one pass in chunks over a cache, so that memory does not grow with the square."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextScore:
    """The information in a text under a model.

    Args:
        nats: total over the scored tokens.
        tokens: how many tokens were scored.
        bytes: UTF-8 bytes that these tokens stand for.
    """

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """`exp(nats / tokens)`; depends on the tokenizer."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """`nats / ln 2 / bytes`; comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    chunk_tokens: int = 1024,
    past_key_values: Cache | None = None,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """The information of each token given all before it, in nats.

    The model runs over `chunk_tokens` tokens at a time and keeps their keys and values, so the whole sequence is one
    context and only one chunk of logits exists at a time.

    Args:
        model: a causal language model.
        input_ids: `[T]` or `[1, T]`, at least two tokens; the first, usually `<s>`, is only conditioned on.
        past_key_values: an empty cache to fill, for the caller to go on with: afterwards it holds all tokens but the
            last. One is made, and dropped, where None.
        progress: called with the number of tokens done after each chunk.

    Returns:
        `[T - 1]` float32 on the CPU; entry i belongs to token i + 1.

    Raises:
        ValueError: fewer than two tokens, more than one row, or `chunk_tokens` below 1.
    """
    input_ids = input_ids.reshape(1, -1) if input_ids.dim() == 1 else input_ids
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"`input_ids` must be one row of at least 2 tokens, got shape {list(input_ids.shape)}.")
    if chunk_tokens < 1:
        raise ValueError(f"`chunk_tokens` must be at least 1, got {chunk_tokens}.")
    input_ids = input_ids.to(model.device)
    cache = DynamicCache(config=model.config) if past_key_values is None else past_key_values
    nats = []
    for begin in range(0, input_ids.shape[1] - 1, chunk_tokens):
        end = min(begin + chunk_tokens, input_ids.shape[1] - 1)
        logits = model(input_ids=input_ids[:, begin:end], past_key_values=cache, use_cache=True).logits[0]
        nats.append(F.cross_entropy(logits.float(), input_ids[0, begin + 1 : end + 1], reduction="none").cpu())
        if progress is not None:
            progress(end)
    return torch.cat(nats)


def score_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    chunk_tokens: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> TextScore:
    """Score a whole text as one context; see `score_tokens`.

    Where the tokenizer puts no special token first, the text's own first token cannot be scored and its bytes are not
    counted.

    Raises:
        ValueError: the text has too few tokens.
    """
    input_ids = tokenizer(text, return_tensors="pt").input_ids[0]
    nats = score_tokens(model, input_ids, chunk_tokens=chunk_tokens, progress=progress)
    scored = input_ids[1:].tolist()
    size = (
        count_bytes(tokenizer, scored)
        if int(input_ids[0]) not in tokenizer.all_special_ids
        else len(text.encode("utf-8"))
    )
    return TextScore(nats=nats.double().sum().item(), tokens=len(scored), bytes=size)


def count_bytes(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> int:
    """UTF-8 bytes of the text of `token_ids`."""
    return len(tokenizer.decode(token_ids, skip_special_tokens=True).encode("utf-8"))


__all__ = ["TextScore", "count_bytes", "score_text", "score_tokens"]
