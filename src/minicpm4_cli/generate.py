"""Continue a prompt; the text streams to stdout, the figures go to stderr.

minicpm4 generate --prompt "It was a dark night, and"
minicpm4 generate --prompt-file book.txt --temperature 0 --json
cat question.txt | minicpm4 generate --model ./MiniCPM4-8B --chat --sparse topk=32 --context 131072
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .loading import Loaded, add_model_arguments, load, parse_sparse, positive_int, quiet

# A prompt of more chunks than this shows a progress bar.
_QUIET_CHUNKS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minicpm4 generate`."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 file with the prompt, - for stdin")
    parser.add_argument(
        "--chat", action="store_true", help="put the prompt into the chat template, as the user's turn"
    )
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    parser.add_argument(
        "--top-p", type=float, help="sample among this share of probability (default: the checkpoint's)"
    )
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    parser.add_argument(
        "--prefill-chunk",
        type=positive_int,
        default=2048,
        metavar="N",
        help="prompt tokens a pass (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the text")


def run(args: argparse.Namespace) -> int:
    """Read the prompt, load the model, continue it."""
    prompt = read_prompt(args.prompt, args.prompt_file)
    check_sampling(args.temperature, args.top_p)
    parse_sparse(args.sparse)  # before the wait for torch
    with quiet():
        loaded = load(args)
        input_ids = encode_prompt(loaded.tokenizer, prompt, chat=args.chat)
        check_length(loaded.model.config, input_ids.shape[1], args.max_new_tokens)
        settings = sampling_settings(loaded.model, args.max_new_tokens, args.temperature, args.top_p)
        figures = complete(loaded, input_ids, settings, chunk=args.prefill_chunk, seed=args.seed, stream=not args.json)
    if args.json:
        print(json.dumps(figures, ensure_ascii=False, indent=2))
    else:
        print(summary(figures), file=sys.stderr)
    return 0


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt of `--prompt`, `--prompt-file` or piped stdin.

    Raises:
        ValueError: none given, an empty one, or bytes that are not UTF-8.
    """
    if prompt is None:
        if prompt_file is None and sys.stdin.isatty():
            raise ValueError("There is no prompt: give `--prompt TEXT`, `--prompt-file FILE`, or pipe it in.")
        from_stdin = prompt_file in (None, "-")
        source = "stdin" if from_stdin else repr(prompt_file)
        raw = sys.stdin.buffer.read() if from_stdin else _read_file(prompt_file)
        try:
            prompt = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The prompt in {source} is not UTF-8 text (byte {error.start}); save it as UTF-8."
            ) from error
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # an argument with bytes that the terminal's encoding does not know
        raise ValueError("The prompt of `--prompt` is not UTF-8 text; use `--prompt-file`.") from error
    if not prompt.strip():
        raise ValueError("The prompt is empty; give at least one word.")
    return prompt


def _read_file(name: str) -> bytes:
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {name!r}; check `--prompt-file`.")
    return path.read_bytes()


def check_sampling(temperature: float | None, top_p: float | None) -> None:
    """Raises `ValueError` where `--temperature` or `--top-p` is out of its range."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"`--temperature` must be 0 (greedy) or more, got {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`--top-p` must be above 0 and at most 1, got {top_p}.")


def encode_prompt(tokenizer, prompt: str, *, chat: bool):
    """Token ids `[1, T]` of the prompt, as it is or in the chat template.

    Raises:
        ValueError: `chat` without a chat template.
    """
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    check_chat_template(tokenizer)
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def check_chat_template(tokenizer) -> None:
    """Raises `ValueError` where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "This checkpoint has no chat template (chat_template.jinja); use `minicpm4 generate` without `--chat`."
        )


def check_length(config, prompt_tokens: int, new_tokens: int) -> None:
    """Raises `ValueError` where prompt and new tokens do not fit the context."""
    total, limit = prompt_tokens + new_tokens, config.max_position_embeddings
    if total > limit:
        raise ValueError(
            f"The prompt ({prompt_tokens} tokens) and {new_tokens} new tokens make {total}, more than the context of "
            f"{limit}; "
            f"extend it with `--context {total}`, or shorten one of them."
        )


def sampling_settings(model, max_new_tokens: int, temperature: float | None, top_p: float | None):
    """The checkpoint's generation config with the command line's changes."""
    import copy

    settings = copy.deepcopy(model.generation_config)
    settings.max_length, settings.max_new_tokens = None, max_new_tokens
    if temperature == 0:
        settings.do_sample = False
    elif temperature is not None or top_p is not None:
        settings.do_sample = True
    if settings.do_sample:
        settings.temperature = settings.temperature if temperature is None else temperature
        settings.top_p = settings.top_p if top_p is None else top_p
    else:
        settings.temperature = settings.top_p = settings.top_k = None
    return settings


def prefill(model, input_ids, cache, *, chunk: int, progress=None) -> None:
    """Run all tokens of `input_ids [1, T]` but the last through the model, `chunk` at a time, into `cache`."""
    import torch

    with torch.no_grad():
        for begin in range(0, input_ids.shape[1] - 1, chunk):
            end = min(begin + chunk, input_ids.shape[1] - 1)
            model(input_ids=input_ids[:, begin:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
            if progress is not None:
                progress(end)


@dataclass
class TokenClock:
    """A streamer for `generate` that notes when each token came, and passes it on to `inner`."""

    inner: object = None
    times: list[float] = field(default_factory=list)
    _seen_prompt: bool = False

    def put(self, value) -> None:
        if self._seen_prompt:
            self.times.append(time.perf_counter())
        self._seen_prompt = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()

    @property
    def tokens_per_s(self) -> float | None:
        """Speed from the first token to the last; None where there was one token only."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def complete(loaded: Loaded, input_ids, settings, *, chunk: int, seed: int | None, stream: bool) -> dict:
    """Prefill in chunks, then decode, and measure both.

    Args:
        input_ids: `[1, T]`.
        settings: the generation config.
        stream: whether to write the text to stdout as it comes.

    Returns:
        The text and the figures, ready for JSON.
    """
    import torch
    from tqdm import tqdm
    from transformers import DynamicCache, TextStreamer

    from minicpm4_hf.attended import mean_attended_tokens

    model, tokenizer = loaded.model, loaded.tokenizer
    input_ids = input_ids.to(model.device)
    num_prompt = input_ids.shape[1]
    clock = TokenClock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None)
    cache = DynamicCache(config=model.config)
    if seed is not None:
        torch.manual_seed(seed)

    started = time.perf_counter()
    hidden = True if num_prompt <= _QUIET_CHUNKS * chunk else None  # None: hidden unless stderr is a terminal
    with tqdm(total=num_prompt, unit="tok", desc="prefill", disable=hidden, leave=False, file=sys.stderr) as bar:
        prefill(model, input_ids, cache, chunk=chunk, progress=lambda done: bar.update(done - bar.n))
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        generation_config=settings,
        streamer=clock,
    )
    new_ids = output[0, num_prompt:].tolist()
    seconds = clock.times[0] - started
    stops = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    sparse = getattr(model.config, "sparse_config", None)
    return {
        "text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "model": loaded.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_in_words(sparse, model.device.type),
        "prompt_tokens": num_prompt,
        "new_tokens": len(new_ids),
        "finish_reason": "stop" if new_ids[-1] in stops else "length",
        "time_to_first_token_s": seconds,
        "prefill_tokens_per_s": num_prompt / seconds,
        "decode_tokens_per_s": clock.tokens_per_s,
        "attended_tokens_per_query": mean_attended_tokens(num_prompt + len(new_ids) - 1, sparse),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }


def attention_in_words(sparse_config: dict | None, device_type: str) -> str:
    """What a model with these settings runs on a device."""
    from minicpm4_hf.kernels import resolve_backend

    return "dense" if sparse_config is None else f"InfLLM v2, {resolve_backend(device_type)[0]}"


def peak_memory_bytes(device) -> int | None:
    """Most memory held so far: on a GPU by tensors, else by the process; None where the system does not say."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def summary(figures: dict) -> str:
    """The figures of `complete` in two lines."""
    speed, peak = figures["decode_tokens_per_s"], figures["peak_memory_bytes"]
    parts = [
        f"prompt {figures['prompt_tokens']} tokens",
        f"first token after {figures['time_to_first_token_s']:.2f} s",
        f"prefill {figures['prefill_tokens_per_s']:.0f} tokens/s",
        f"decode {speed:.1f} tokens/s" if speed else f"decode {figures['new_tokens']} token",
    ]
    rest = [
        f"attention {figures['attention']}",
        f"{figures['attended_tokens_per_query']:.0f} tokens attended per query",
    ]
    if peak is not None:
        rest.append(f"peak memory {peak / 2**30:.2f} GiB")
    return "\n" + ", ".join(parts) + "\n" + ", ".join(rest)
