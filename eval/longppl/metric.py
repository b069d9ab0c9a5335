"""The metric as pure functions of how surprising tokens are, and the way from one tokenizer's tokens to another's.

Source: "What is Wrong with Perplexity for Long-context Language Modeling?" (arXiv:2410.23771), section 3, and its
code, PKU-ML/LongPPL `longppl/longppl.py` at 1decd2a:

    LSD(x_i) = log P0(x_i | x_1..x_{i-1}) - log P0(x_i | x_{i-K}..x_{i-1})    P0: the evaluator model
    LCL(x_i) = log P0(x_i | x_1..x_{i-1})
    x_i is a key token where LSD(x_i) > alpha and LCL(x_i) > beta
    LongPPL = exp(- mean over the key tokens of log P(x_i | x_1..x_{i-1}))    P: the model that is evaluated
"""

import math
from collections.abc import Sequence

import torch

ALPHA, BETA = 2.0, -2.0  # nats; the paper's
SHORT_TOKENS, STRIDE_TOKENS = 4096, 1024  # K, and how many tokens share a short context; the paper's

Span = tuple[int, int]  # characters, the end not included


def find_key_tokens(
    long_nats: torch.Tensor, short_nats: torch.Tensor, *, alpha: float = ALPHA, beta: float = BETA
) -> torch.Tensor:
    """Which tokens the evaluator predicts well, and much better with the long context than with the short one.

    Args:
        long_nats: `[T]`, `-log P0` of each token given all before it.
        short_nats: `[T]`, the same given the last K tokens; NaN where there are not more than K, as such a token's
            contexts are the same.
        alpha: the least gain in nats, not reached by equality.
        beta: the least log-probability, as alpha.

    Returns:
        bool `[T]`.

    Raises:
        ValueError: shapes that differ.
    """
    if long_nats.shape != short_nats.shape:
        raise ValueError(
            "`long_nats` and `short_nats` must have one shape, got "
            f"{list(long_nats.shape)} and {list(short_nats.shape)}."
        )
    return (short_nats - long_nats > alpha) & (-long_nats > beta)


def longppl(nats: torch.Tensor, is_key: torch.Tensor) -> float | None:
    """`exp` of the mean of `nats` over the key tokens; None where there are none.

    Args:
        nats: `[T]`, `-log P` of each token given all before it, under the model that is evaluated.
        is_key: bool `[T]`.

    Raises:
        ValueError: shapes that differ.
    """
    if nats.shape != is_key.shape:
        raise ValueError(f"`nats` and `is_key` must have one shape, got {list(nats.shape)} and {list(is_key.shape)}.")
    return math.exp(nats[is_key].double().mean()) if is_key.any() else None


def trim(text: str, offsets: Sequence[Span]) -> list[Span]:
    """Tokens' places without the white space at their ends, which tokenizers count to different tokens."""
    trimmed = []
    for begin, end in offsets:
        while begin < end and text[begin].isspace():
            begin += 1
        while begin < end and text[end - 1].isspace():
            end -= 1
        trimmed.append((begin, end))
    return trimmed


def merge_spans(text: str, spans: Sequence[Span]) -> list[Span]:
    """Ascending spans with those joined between which there is nothing, or white space only."""
    merged: list[Span] = []
    for begin, end in spans:
        if merged and not text[merged[-1][1] : begin].strip():
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def tokens_within(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Whether each token lies in one of the spans as a whole; one of white space only does not.

    Args:
        offsets: as of `trim`, ascending.
        spans: as of `merge_spans`.
    """
    found, place = [], 0
    for begin, end in offsets:
        while place < len(spans) and spans[place][1] < end:
            place += 1
        found.append(begin < end and place < len(spans) and spans[place][0] <= begin)
    return found
