"""How well books are predicted: bits per byte over whole ones, and sparse against dense attention at long contexts.

A book is cut into windows as in `minicpm4_hf.eval.tasks.perplexity`: contiguous, each beginning with `bos_token`.
"""

from functools import partial

import torch

from minicpm4_hf.attended import mean_attended_tokens
from minicpm4_hf.perplexity import TextScore, score_tokens

from .cases import Case, Plan
from .subject import MODES, Subject, Text
from .tables import format_table

CHUNK_TOKENS = 4096  # a pass, whose logits are in memory at once


def plan_windows(
    subject: Subject, texts: list[Text], context: int, modes: list[str], max_tokens: int | None = None
) -> tuple[list[Case], dict[str, list[torch.Tensor]]]:
    """The windows of each text, as cases and as token ids by the text's SHA-256.

    Args:
        context: tokens a window, `bos_token` included.
        max_tokens: whole windows of at most so many tokens, and at least one, of each text; None for all of it, the
            last window being shorter.

    Raises:
        ValueError: the model has no such context, or a text has no whole window of it.
    """
    limit = subject.model.config.max_position_embeddings
    if not 2 <= context <= limit:
        raise ValueError(f"A context must be from 2 to the model's {limit} tokens, got {context}.")
    windows = {}
    for text in texts:
        encoded = subject.tokenizer(text.content.decode("utf-8"), add_special_tokens=False, verbose=False)
        ids = torch.tensor(encoded.input_ids)
        if max_tokens is not None:
            count = min(max(max_tokens // (context - 1), 1), len(ids) // (context - 1))
            if count == 0:
                raise ValueError(
                    f"A text must have {context - 1} tokens for a context of {context}; {text.name!r} has {len(ids)}."
                )
            ids = ids[: count * (context - 1)]
        bos = ids.new_tensor([subject.tokenizer.bos_token_id])
        windows[text.sha256] = [torch.cat((bos, part)) for part in ids.split(context - 1)]
    cases = [
        Case(
            {"mode": mode, "context": context, "text": sha256, "window": index},
            subject.estimate_work(0, len(window) - 1, mode),
        )
        for mode in modes
        for sha256, parts in windows.items()
        for index, window in enumerate(parts)
    ]
    return cases, windows


def score_window(subject: Subject, windows: dict[int, dict[str, list[torch.Tensor]]], keys: list[dict]) -> list[dict]:
    """The `nats` in a window, and its `tokens`; `windows` by context, text and index."""
    (key,) = keys
    ids = windows[key["context"]][key["text"]][key["window"]]
    with subject.attending(key["mode"]):
        nats = score_tokens(subject.model, ids, chunk_tokens=CHUNK_TOKENS)
    return [{"nats": nats.double().sum().item(), "tokens": len(nats)}]


def sum_scores(cases: list[Case], results: list[dict], num_bytes: int = 0, **wanted) -> tuple[TextScore, float]:
    """The score of all cases whose keys have the wanted values, and their seconds."""
    chosen = [result for case, result in zip(cases, results) if wanted.items() <= case.key.items()]
    score = TextScore(
        nats=sum(result["nats"] for result in chosen),
        tokens=sum(result["tokens"] for result in chosen),
        bytes=num_bytes,
    )
    return score, round(sum(result["seconds"] for result in chosen), 2)


def plan_bits_per_byte(subject: Subject, texts: list[Text], *, window: int, modes: list[str]) -> Plan:
    """Every token of every text, once in each mode.

    Raises:
        ValueError: a window that is longer than the model's context.
    """
    cases, windows = plan_windows(subject, texts, window, modes)

    def summarize(results: list[dict]) -> dict:
        rows = []
        for text in texts:
            for mode in modes:
                score, seconds = sum_scores(cases, results, len(text.content), mode=mode, text=text.sha256)
                rows.append(
                    {
                        "text": text.name,
                        "mode": mode,
                        "num_bytes": score.bytes,
                        "num_tokens": score.tokens,
                        "bits_per_byte": score.bits_per_byte,
                        "perplexity": score.perplexity,
                        "seconds": seconds,
                    }
                )
        return {"rows": rows}

    return Plan(cases, partial(score_window, subject, {window: windows}), summarize)


def describe_bits_per_byte(figures: dict) -> str:
    """A table, a line a text and mode."""
    return format_table(
        ("text", "attention", "tokens", "bits per byte", "perplexity"),
        [
            (r["text"], r["mode"], f"{r['num_tokens']:,}", f"{r['bits_per_byte']:.4f}", f"{r['perplexity']:.3f}")
            for r in figures["rows"]
        ],
    )


def plan_sparse_dense(subject: Subject, texts: list[Text], *, contexts: list[int], tokens: int) -> Plan:
    """The same windows in both modes, at each context.

    Args:
        tokens: of each text at each context: as many whole windows as that holds, at least one.

    Raises:
        ValueError: the model has no such context, or a text has not so many tokens.
    """
    cases, windows = [], {}
    for context in contexts:
        more, windows[context] = plan_windows(subject, texts, context, MODES, tokens)
        cases += more

    def summarize(results: list[dict]) -> dict:
        rows = []
        for context in contexts:
            dense, dense_seconds = sum_scores(cases, results, mode="dense", context=context)
            sparse, sparse_seconds = sum_scores(cases, results, mode="sparse", context=context)
            attended = {mode: mean_attended_tokens(context - 1, subject.settings_of(mode)) for mode in MODES}
            rows.append(
                {
                    "context": context,
                    "windows": dense.tokens // (context - 1),
                    "num_tokens": dense.tokens,
                    "perplexity_dense": dense.perplexity,
                    "perplexity_sparse": sparse.perplexity,
                    "ratio": sparse.perplexity / dense.perplexity,
                    "attended_tokens_dense": attended["dense"],
                    "attended_tokens_sparse": attended["sparse"],
                    "attended_share": attended["sparse"] / attended["dense"],
                    "seconds_dense": dense_seconds,
                    "seconds_sparse": sparse_seconds,
                }
            )
        return {"rows": rows}

    return Plan(cases, partial(score_window, subject, windows), summarize)


def describe_sparse_dense(figures: dict) -> str:
    """A table, a line a context."""
    return format_table(
        ("context", "tokens", "dense", "sparse", "sparse/dense", "tokens attended", "share"),
        [
            (
                f"{r['context']:,}",
                f"{r['num_tokens']:,}",
                f"{r['perplexity_dense']:.3f}",
                f"{r['perplexity_sparse']:.3f}",
                f"{r['ratio']:.4f}",
                f"{r['attended_tokens_sparse']:,.0f} of {r['attended_tokens_dense']:,.0f}",
                f"{r['attended_share']:.3f}",
            )
            for r in figures["rows"]
        ],
    )
