"""LongPPL over several texts, from lists of numbers."""

from collections.abc import Sequence

import torch

from minicpm4_hf.eval.longppl import ALPHA, BETA, find_key_tokens, longppl

from .normalise import check_pairs

Rows = Sequence[Sequence[float]]


def longppl_of_texts(
    nats: Rows, long_nats: Rows, short_nats: Rows, *, alpha: float = ALPHA, beta: float = BETA
) -> dict[str, float | int | None]:
    """LongPPL over the key tokens of all texts together.

    Args:
        nats: a text's `-log P` of each token, under the model.
        long_nats: the same under the evaluator, given all before.
        short_nats: the same given the short context; NaN where it is all before.
        alpha: as of `find_key_tokens`.
        beta: as of `find_key_tokens`.

    Returns:
        "longppl", None without key tokens, and "num_key_tokens".

    Raises:
        ValueError: no texts, or rows that differ in number or length.
    """
    check_pairs(nats, long_nats)
    check_pairs(nats, short_nats)
    own, long, short = (
        [torch.tensor(row, dtype=torch.float64) for row in rows] for rows in (nats, long_nats, short_nats)
    )
    keys = [find_key_tokens(*pair, alpha=alpha, beta=beta) for pair in zip(long, short)]
    for row, is_key in zip(own, keys):
        longppl(row, is_key)  # checks the shapes
    is_key = torch.cat(keys)
    return {"longppl": longppl(torch.cat(own), is_key), "num_key_tokens": int(is_key.sum())}
