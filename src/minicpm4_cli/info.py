"""Show what a model is, what memory a context takes, and what would run its attention.

minicpm4 info
minicpm4 info --preset MiniCPM4-8B --sparse --context 131072
minicpm4 info --model ./MiniCPM4-8B --json
"""

import argparse
import json

from .loading import (
    add_attention_arguments,
    add_device_arguments,
    change_config,
    find_checkpoint,
    find_device,
    load_config,
    parse_sparse,
    quiet,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minicpm4 info`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder, Hub id or shipped name of a checkpoint (default: minicpm4-books)",
    )
    source.add_argument("--preset", metavar="NAME", help="an official model, without its weights")
    add_attention_arguments(parser)
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the facts of `describe`."""
    changes = {"dense": args.dense, "sparse": parse_sparse(args.sparse), "context": args.context}
    with quiet():
        if args.preset is None:
            folder, name = find_checkpoint(args.model)
            config = load_config(folder, **changes)
        else:
            from minicpm4_hf import build_config

            name = args.preset
            config = change_config(build_config(name), **changes)
        facts = describe(
            config, name, context=args.context, dtype=args.dtype, device_type=find_device(args.device).type
        )
    print(json.dumps(facts, indent=2) if args.json else table(facts))
    return 0


def describe(config, name: str, *, context: int | None = None, dtype: str = "auto", device_type: str = "cpu") -> dict:
    """All that `minicpm4 info` shows, ready for JSON.

    Args:
        context: tokens that the memory is worked out for; the model's own context where None.
        dtype: name of the weights' and the cache's dtype; "auto" is the config's, or bfloat16.
    """
    import platform

    import torch
    import transformers

    from minicpm4_hf import __version__
    from minicpm4_hf.attended import attended_tokens, mean_attended_tokens

    resolved = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.bfloat16
    tokens = context or config.max_position_embeddings
    sparse = getattr(config, "sparse_config", None)
    parameters = count_parameters(config)
    memory = {"weights": parameters * resolved.itemsize, **cache_bytes(config, tokens, resolved.itemsize)}
    backend, reason = attention_backend(sparse, device_type)
    return {
        "model": name,
        "model_type": config.model_type,
        "parameters": parameters,
        "dtype": str(resolved).removeprefix("torch."),
        "max_context_tokens": config.max_position_embeddings,
        "context_tokens": tokens,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "sparse_config": sparse,
        "attended_tokens_last_query": int(attended_tokens(torch.tensor(tokens - 1), sparse)),
        "attended_tokens_per_query": mean_attended_tokens(tokens, sparse),
        "device": device_type,
        "backend": backend,
        "backend_reason": reason,
        "versions": {
            "minicpm4-hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def count_parameters(config) -> int:
    """Parameters of the causal language model, tied ones once; nothing is allocated for it."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(config, num_tokens: int, itemsize: int) -> dict[str, int]:
    """Bytes that the cache of one sequence holds, by what holds them."""
    from minicpm4_hf.sparse_attention import COARSE, count_pooled

    key = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize  # of one token
    sizes = {"key_value_cache": 2 * key * num_tokens}
    sparse = getattr(config, "sparse_config", None)
    if sparse is not None:
        size, stride = sparse["kernel_size"], sparse["kernel_stride"]
        sizes["compressed_keys_k1"] = key * count_pooled(num_tokens, size, stride)
        sizes["compressed_keys_k2"] = key * count_pooled(num_tokens, COARSE * size, COARSE * stride)
        if sparse["use_nope"]:
            sizes["unrotated_keys"] = key * num_tokens
    return sizes


def attention_backend(sparse_config: dict | None, device_type: str) -> tuple[str, str]:
    """What would run the attention, and why."""
    from minicpm4_hf.kernels import resolve_backend

    backend, reason = resolve_backend(device_type)
    if sparse_config is not None:
        return backend, reason
    dense = "dense attention: the config has no sparse_config (`--sparse` sets the official one)"
    return ("cpu", f"{reason}; {dense}") if backend == "cpu" else ("sdpa", f"{dense}; {reason}")


def table(facts: dict) -> str:
    """The facts of `describe` as lines of text."""
    memory = facts["memory_bytes"]
    sparse = facts["sparse_config"]
    settings = "none (dense)" if sparse is None else ", ".join(f"{key} {value}" for key, value in sparse.items())
    rows = [
        ("model", f"{facts['model']} ({facts['model_type']})"),
        ("parameters", f"{facts['parameters']:,} ({facts['dtype']})"),
        ("context", f"{facts['context_tokens']:,} of at most {facts['max_context_tokens']:,} tokens"),
        *((f"memory: {part.replace('_', ' ')}", size_in_words(size)) for part, size in memory.items()),
        ("sparse settings", settings),
        (
            "attended tokens per query",
            f"{facts['attended_tokens_per_query']:,.0f} on average, {facts['attended_tokens_last_query']:,} for the "
            "last",
        ),
        ("attention backend", f"{facts['backend']} on {facts['device']}: {facts['backend_reason']}"),
        ("versions", ", ".join(f"{package} {number}" for package, number in facts["versions"].items())),
    ]
    return "\n".join(f"{label:27}{value}" for label, value in rows)


def size_in_words(num_bytes: int) -> str:
    """`num_bytes` in GiB, or in MiB below one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"
