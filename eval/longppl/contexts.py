"""A text in windows of one context each, and the key tokens that an evaluator finds in a window."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minicpm4_hf.perplexity import score_tokens

from .metric import Span, find_key_tokens, merge_spans, trim


@dataclass(frozen=True)
class Encoded:
    """A text as tokens: `ids` `[T]`, `bos_token` first where there is one, and the places of the others in it."""

    ids: torch.Tensor
    offsets: list[Span]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """The tokens of a text, with their places.

    Raises:
        ValueError: a tokenizer that cannot tell places.
    """
    if not tokenizer.is_fast:
        raise ValueError("LongPPL needs a tokenizer that knows its tokens' places in the text (tokenizer.json).")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return Encoded(torch.tensor([*first, *found.input_ids]), trim(text, found.offset_mapping))


def split_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[str]:
    """The text in pieces of `length` tokens, a `bos_token` included; what is left in the end is dropped.

    Raises:
        ValueError: a text of fewer tokens.
    """
    found = encode(tokenizer, text)
    step = length - (len(found.ids) - len(found.offsets))
    begins = [found.offsets[place][0] for place in range(0, len(found.offsets), step)]
    ends = [found.offsets[place - 1][1] for place in range(step, len(found.offsets) + 1, step)]
    if not ends:
        raise ValueError(f"A text has only {len(found.ids)} tokens, and `--length` asks for {length}.")
    return [text[begin:end] for begin, end in zip(begins, ends)]


def short_context_nats(model: PreTrainedModel, ids: torch.Tensor, *, short: int, stride: int) -> torch.Tensor:
    """`-log P` of each token given no more than about `short` tokens before it.

    As in the paper's code, `stride` tokens share the beginning of their context, so that they have from `short` to
    `short + stride - 1` tokens before them.

    Args:
        ids: `[T]`.

    Returns:
        `[T - 1]` float32; entry i belongs to token i + 1, and is NaN where that has fewer than `short` before it.
    """
    nats = torch.full((len(ids) - 1,), float("nan"))
    for begin in range(0, len(ids) - short, stride):
        window = ids[begin : begin + short + stride]
        nats[begin + short - 1 : begin + len(window) - 1] = score_tokens(model, window)[short - 1 :]
    return nats


def key_spans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    short: int,
    stride: int,
    alpha: float,
    beta: float,
) -> list[Span]:
    """Where in a text the evaluator finds key tokens; neighbours are one span."""
    found = encode(tokenizer, text)
    long_nats = score_tokens(model, found.ids)
    is_key = find_key_tokens(
        long_nats, short_context_nats(model, found.ids, short=short, stride=stride), alpha=alpha, beta=beta
    )
    scored = found.offsets[len(found.offsets) - len(is_key) :]
    return merge_spans(text, [span for span, key in zip(scored, is_key.tolist()) if key and span[0] < span[1]])
