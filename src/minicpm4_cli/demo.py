"""Read a long text with the shipped checkpoint, dense and sparse, and compare the two.

minicpm4 demo
minicpm4 demo --tokens 8000 --new-tokens 32
minicpm4 demo --json > demo.json
"""

import argparse
import json
import sys
import time
from contextlib import contextmanager

from .generate import TokenClock, check_length, peak_memory_bytes
from .info import attention_backend
from .loading import (
    Loaded,
    check_weight_files,
    find_device,
    load_config,
    load_tokenizer,
    load_weights,
    positive_int,
    quiet,
)

_MIN_TOKENS = 16
_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minicpm4 demo`."""
    parser.add_argument(
        "--tokens", type=positive_int, metavar="N", help="read the first N tokens (default: all, 40,000)"
    )
    parser.add_argument("--new-tokens", type=positive_int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: a GPU where there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Compare dense and sparse attention on the shipped text."""
    from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt

    started = time.perf_counter()
    device = find_device(args.device)
    folder, excerpt = shipped_checkpoint(), shipped_excerpt()
    with quiet():
        check_weight_files(folder)
        # float32: on a CPU without bfloat16 arithmetic it is the faster one, and everywhere the exact one.
        model = load_weights(folder, load_config(folder), "float32").to(device).eval()
        loaded = Loaded(model, load_tokenizer(folder), folder.name)
        input_ids = read_excerpt(loaded, excerpt.read_text(encoding="utf-8"), args.tokens, args.new_tokens)
        results = compare(loaded, input_ids, args.new_tokens)
    results["excerpt"] = excerpt.name
    results["seconds"] = time.perf_counter() - started
    print(json.dumps(results, ensure_ascii=False, indent=2) if args.json else report(results))
    return 0


def read_excerpt(loaded: Loaded, text: str, num_tokens: int | None, new_tokens: int):
    """The first `num_tokens` tokens of the text, `[1, T]`.

    Raises:
        ValueError: the text has fewer tokens, or they do not fit the context.
    """
    input_ids = loaded.tokenizer(text.rstrip(), return_tensors="pt").input_ids
    available = input_ids.shape[1]
    num_tokens = num_tokens or available
    if not _MIN_TOKENS <= num_tokens <= available:
        raise ValueError(
            f"`--tokens` must be between {_MIN_TOKENS} and {available}, the excerpt's length, got {num_tokens}."
        )
    check_length(loaded.model.config, num_tokens, new_tokens)
    return input_ids[:, :num_tokens]


def compare(loaded: Loaded, input_ids, new_tokens: int) -> dict:
    """Score `input_ids [1, T]` and continue them, with dense and with sparse attention on the same weights.

    Returns:
        All figures of the demonstration, ready for JSON.
    """
    import torch

    from minicpm4_hf.attended import mean_attended_tokens
    from minicpm4_hf.perplexity import count_bytes

    model = loaded.model
    sparse = model.config.sparse_config
    num_tokens = input_ids.shape[1]
    num_bytes = count_bytes(loaded.tokenizer, input_ids[0, 1:].tolist())
    with torch.no_grad():
        model(input_ids=input_ids[:, :256].to(model.device))  # so that neither run pays for the first call
    modes = {}
    for mode, settings in (("dense", None), ("sparse", sparse)):
        with attention(model, settings):
            modes[mode] = measure(loaded, input_ids, num_bytes, new_tokens, mode)
        modes[mode]["attended_tokens_per_query"] = mean_attended_tokens(num_tokens - 1, settings)
    dense, sparse_run = modes["dense"], modes["sparse"]
    backend, reason = attention_backend(sparse, model.device.type)
    return {
        "model": loaded.name,
        "tokens": num_tokens,
        "bytes": num_bytes,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sparse_config": sparse,
        "backend": backend,
        "backend_reason": reason,
        "dense": dense,
        "sparse": sparse_run,
        "attended_share": sparse_run["attended_tokens_per_query"] / dense["attended_tokens_per_query"],
        "perplexity_ratio": sparse_run["perplexity"] / dense["perplexity"],
        "prefill_speedup": sparse_run["prefill_tokens_per_s"] / dense["prefill_tokens_per_s"],
        "decode_speedup": ratio(sparse_run["decode_tokens_per_s"], dense["decode_tokens_per_s"]),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }


@contextmanager
def attention(model, sparse_config: dict | None):
    """Run the model with other sparse settings (None: dense) while the context lasts."""
    original = model.config.sparse_config
    model.config.sparse_config = sparse_config
    try:
        yield
    finally:
        model.config.sparse_config = original


def measure(loaded: Loaded, input_ids, num_bytes: int, new_tokens: int, mode: str) -> dict:
    """One run: prefill, which scores every token, then decoding from the filled cache."""
    import torch
    from tqdm import tqdm
    from transformers import DynamicCache

    from minicpm4_hf.perplexity import TextScore, score_tokens

    model = loaded.model
    num_scored = input_ids.shape[1] - 1
    cache = DynamicCache(config=model.config)
    every = 0.2 if sys.stderr.isatty() else 10.0
    started = time.perf_counter()
    layers = model.model.layers
    with tqdm(total=num_scored, desc=f"{mode:6}", unit="tok", mininterval=every, file=sys.stderr) as bar:
        # One pass over the whole text, so that dense attention runs at its best: causal, without a mask. The progress
        # is therefore counted a layer at a time.
        def advance(*_) -> None:  # what a hook returns would replace the layer's output
            bar.update(num_scored // len(layers))

        hooks = [layer.register_forward_hook(advance) for layer in layers]
        try:
            nats = score_tokens(model, input_ids, past_key_values=cache, chunk_tokens=num_scored)
        finally:
            for hook in hooks:
                hook.remove()
        bar.update(num_scored - bar.n)
    seconds = time.perf_counter() - started
    score = TextScore(nats=nats.double().sum().item(), tokens=num_scored, bytes=num_bytes)

    settings = model.generation_config.__class__.from_model_config(model.config)
    settings.update(do_sample=True, temperature=0.8, top_p=0.8, max_new_tokens=new_tokens, eos_token_id=None)
    torch.manual_seed(_SEED)
    clock = TokenClock()
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=torch.ones_like(input_ids, device=model.device),
        past_key_values=cache,
        generation_config=settings,
        streamer=clock,
    )
    return {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "prefill_tokens_per_s": num_scored / seconds,
        "prefill_seconds": seconds,
        "decode_tokens_per_s": clock.tokens_per_s,
        "continuation": loaded.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True),
    }


def ratio(above: float | None, below: float | None) -> float | None:
    """`above / below`, None where either is."""
    return None if above is None or below is None else above / below


def report(results: dict) -> str:
    """The figures of `compare` as a page of text that ends with the table."""
    rows = [
        ("perplexity", "perplexity", ".2f", results["perplexity_ratio"]),
        ("bits per byte", "bits_per_byte", ".3f", None),
        ("prefill, tokens/s", "prefill_tokens_per_s", ",.0f", results["prefill_speedup"]),
        ("decode, tokens/s", "decode_tokens_per_s", ",.1f", results["decode_speedup"]),
        ("tokens attended per query", "attended_tokens_per_query", ",.0f", results["attended_share"]),
    ]
    lines = [
        "The text goes on, written with sparse attention:",
        "",
        results["sparse"]["continuation"].strip(),
        "",
        f"{results['tokens']:,} tokens ({results['bytes']:,} bytes) of {results['excerpt']} read by "
        f"{results['model']}, "
        f"{results['dtype']} on {results['device']}, {results['threads']} threads, {results['seconds']:.0f} s in all",
        f"sparse attention: {results['backend']} ({results['backend_reason']})",
        "",
        f"{'':27}{'dense':>10}{'sparse':>10}{'sparse/dense':>15}",
    ]
    for label, key, form, quotient in rows:
        dense, sparse = results["dense"][key], results["sparse"][key]
        cells = ["-" if value is None else format(value, form) for value in (dense, sparse)]
        lines.append(f"{label:27}{cells[0]:>10}{cells[1]:>10}{'' if quotient is None else f'{quotient:.3f}':>15}")
    return "\n".join(lines)
