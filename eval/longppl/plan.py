"""The two halves of a measurement as cases: key tokens by the evaluator, then the model that is evaluated."""

import argparse
import gc
import math
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from minicpm4_cli.loading import load
from minicpm4_hf.eval.memory.cases import Case, Plan
from minicpm4_hf.eval.memory.subject import Subject, sha256_of
from minicpm4_hf.eval.memory.tables import format_table
from minicpm4_hf.perplexity import score_tokens

from .contexts import encode, key_spans
from .metric import longppl, tokens_within


class Evaluator:
    """The model that finds key tokens, with dense attention; its weights are loaded when they are first needed.

    Args:
        folder: the checkpoint's.
        model, device, dtype, context: as on the command line.
    """

    def __init__(self, folder: Path, *, model: str | None, device: str, dtype: str, context: int | None):
        self.flags = {"model": model, "device": device, "dtype": dtype, "dense": True, "sparse": None}
        self.flags["context"] = context
        self.loaded = None
        self.identity = {
            "name": folder.name,
            "weights": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
            "dtype": dtype,
            "context": context,
        }

    def find(self, text: str, settings: dict) -> list:
        """Spans of key tokens; see `key_spans`."""
        if self.loaded is None:
            self.loaded = load(argparse.Namespace(**self.flags))
        return key_spans(self.loaded.model, self.loaded.tokenizer, text, **settings)

    def unload(self) -> None:
        """Give its memory back."""
        self.loaded = None
        gc.collect()


def plan_keys(evaluator: Evaluator, windows: list[str], settings: dict, shared: dict) -> Plan:
    """The key tokens' spans in each window; `shared` is what else sets a case apart."""
    identity = {name: value for name, value in evaluator.identity.items() if name != "name"}
    owned = {**shared, **settings, "evaluator": identity}
    cases = [Case({**owned, "window": number}, len(text)) for number, text in enumerate(windows)]

    def run(keys: list[dict]) -> list[dict]:
        return [{"spans": evaluator.find(windows[key["window"]], settings)} for key in keys]

    return Plan(cases, run, lambda results: {"spans": [result["spans"] for result in results]})


def plan_longppl(subject: Subject, windows: list[str], spans: list[list], modes: list[str], shared: dict) -> Plan:
    """How well the model predicts each window and its key tokens, in each mode.

    Raises:
        ValueError: a window that is longer than the model's context.
    """
    limit = subject.model.config.max_position_embeddings
    lengths = [len(encode(subject.tokenizer, text).ids) for text in windows]
    if max(lengths) > limit:
        raise ValueError(
            f"A window has {max(lengths)} tokens of the model's tokenizer, and its context is {limit}; choose a "
            "smaller `--length`, or extend it with `--context`."
        )
    cases = [
        Case({**shared, "window": number, "mode": mode}, subject.estimate_work(0, lengths[number], mode))
        for mode in modes
        for number in range(len(windows))
    ]

    def run(keys: list[dict]) -> list[dict]:
        (key,) = keys
        found = encode(subject.tokenizer, windows[key["window"]])
        with subject.attending(key["mode"]):
            nats = score_tokens(subject.model, found.ids).double()
        is_key = nats.new_tensor(tokens_within(found.offsets, spans[key["window"]]))[-len(nats) :].bool()
        return [
            {
                "nats": nats.sum().item(),
                "tokens": len(nats),
                "key_nats": nats[is_key].sum().item(),
                "key_tokens": int(is_key.sum()),
                "longppl": longppl(nats, is_key),
            }
        ]

    def summarize(results: list[dict]) -> dict:
        rows = []
        for mode in modes:
            found = [result for case, result in zip(cases, results) if case.key["mode"] == mode]
            nats, tokens, key_nats, key_tokens = (
                sum(result[name] for result in found) for name in ("nats", "tokens", "key_nats", "key_tokens")
            )
            rows.append(
                {
                    "mode": mode,
                    "longppl": math.exp(key_nats / key_tokens) if key_tokens else None,
                    "perplexity": math.exp(nats / tokens),
                    "key_tokens": key_tokens,
                    "tokens": tokens,
                    "windows": len(found),
                }
            )
        return {"rows": rows}

    return Plan(cases, run, summarize)


def count_tokens(tokenizer: PreTrainedTokenizerBase, windows: list[str]) -> int:
    """Of the longest window."""
    return max(len(encode(tokenizer, text).ids) for text in windows)


def describe_longppl(figures: dict) -> str:
    """A table, a line a mode."""
    return format_table(
        ("attention", "LongPPL", "perplexity", "key tokens", "tokens"),
        [
            (
                row["mode"],
                "no key token" if row["longppl"] is None else f"{row['longppl']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{row['key_tokens']:,}",
                f"{row['tokens']:,}",
            )
            for row in figures["rows"]
        ],
    )
