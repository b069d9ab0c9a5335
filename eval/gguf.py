"""Compare GGUF files, as llama.cpp runs them, with the checkpoint that they are made of, as this package runs it.

    python -m minicpm4_hf.eval.gguf --ternary 256 --output eval/results/gguf.json
    python -m minicpm4_hf.eval.gguf --model ./MiniCPM4-0.5B --text book.txt --types f32 q8_0 q4_0
    python -m minicpm4_hf.eval.gguf --model ./BitCPM4-0.5B --text book.txt --types tq1_0 tq2_0 --keep ./files

For each type the checkpoint is converted, and the logits of both programs after each token of a text are compared,
three times: with ours of the checkpoint's own weights; of the weights that the file's bytes stand for, which leaves
out what rounding to the type does; and of those with llama.cpp's arithmetic, which rounds what it multiplies with
F16, BF16 and quantised weights as well, to 16 or 8 bits. Both attend densely. Needs the extra `llama_cpp`.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from minicpm4_cli.loading import find_checkpoint, load_config, load_tokenizer, load_weights, positive_int, quiet
from minicpm4_hf.conversion.gguf import TYPES, convert_to_gguf
from minicpm4_hf.eval.tasks.perplexity import read_text
from minicpm4_hf.shipped import shipped_excerpt

VERSIONS = ("minicpm4-hf", "torch", "transformers", "tokenizers", "gguf", "llama-cpp-python")
# Texts of many kinds, one a line: spaces, languages, symbols, code, special tokens.
TEXTS = Path(__file__).with_name("gguf_texts.jsonl")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.gguf",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text (default: the shipped excerpt)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="default: all")
    parser.add_argument("--tokens", type=positive_int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=positive_int, default=50, metavar="N", help="of the greedy continuation (%(default)s)"
    )
    parser.add_argument(
        "--ternary",
        type=int,
        metavar="GROUP",
        help="compare also a copy whose layers are made ternary, in groups of so many columns (-1: rows)",
    )
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="of llama.cpp (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the files here; it must exist")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON document")
    parser.add_argument("--output", type=Path, metavar="RECORD.json", help="also write the record to this file")
    return parser


def compare(
    model: str | None,
    content: str,
    types: list[str],
    folder: Path,
    *,
    num_tokens: int = 200,
    num_new: int = 50,
    ternary_group: int | None = None,
    threads: int = 1,
) -> dict:
    """Convert a checkpoint to each type and compare both programs.

    Args:
        model: folder or Hub id; None is the shipped checkpoint.
        content: a text of at least `num_tokens` tokens.
        types: names of types.
        folder: where the files are written.
        num_tokens: whose logits are compared.
        num_new: tokens of the greedy continuation.
        ternary_group: make the layers ternary first, in groups of so many columns (-1: rows), with bfloat16 scales.
        threads: of llama.cpp.

    Returns:
        The record: `tokenizer` (see `compare_tokenizers`), `rotary_error` (see `rotary_error`) and `types`, a dict by
        name (see `compare_logits`; and `layers`, `embedding_type`, `file_bytes` and `weight_errors`, see
        `convert_to_gguf`).

    Raises:
        ValueError, OSError: wrong input.
    """
    from .gguf_reference import greedy_of, logits_of, make_ternary_

    source, _ = find_checkpoint(model)
    name = stem = source.resolve().name
    with quiet():
        config = load_config(source, dense=True)
        if getattr(config, "quantization_config", None):
            raise ValueError(f"{source} has packed weights; give the checkpoint that it was made of.")
        tokenizer = load_tokenizer(source)
        ids = tokenizer(content).input_ids[:num_tokens]
        if len(ids) < num_tokens:
            raise ValueError(
                f"The text has {len(ids)} tokens, and {num_tokens} are to be compared; give a longer one."
            )
        if ternary_group is not None:
            stem = f"{name}-ternary"
            ternary = load_weights(source, config, "bfloat16")
            make_ternary_(ternary, ternary_group)
            source = folder / stem
            ternary.save_pretrained(source)
            tokenizer.save_pretrained(source)
        ours = load_weights(source, config, "float32").eval()
    expected = logits_of(ours, ids), greedy_of(ours, ids, num_new)
    record = {"model": name, "ternary_group": ternary_group, "types": {}}
    for layer_type in types:
        path = folder / f"{stem}-{layer_type}.gguf"
        # Full precision is made ternary with scales that float16 holds; published ternary weights have such scales.
        result = convert_to_gguf(source, path, type=layer_type)
        if "tokenizer" not in record:
            record["tokenizer"] = compare_tokenizers(tokenizer, path, content, stops=_stops(config))
            record["rotary_error"] = rotary_error(ours, path)
        record["types"][layer_type] = {
            "layers": result["layers"],
            "embedding_type": result["embedding_type"],
            "file_bytes": result["num_bytes"],
            "weight_errors": result["errors"],
            **compare_logits(ours, path, ids, expected, num_new, threads),
        }
        print(f"{stem}, {layer_type}: {record['types'][layer_type]}", file=sys.stderr)
    return record


def _stops(config) -> list[int]:
    stops = config.eos_token_id
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def compare_logits(model, path: Path, ids: list[int], expected, num_new: int, threads: int) -> dict:
    """Run a file in llama.cpp and compare its logits with ours.

    Args:
        model: ours in float32; given back with the weights it came with.
        path: the file.
        ids: tokens of a text.
        expected: our logits `[tokens, vocab]` after each of them, and the greedy continuation.
        num_new: tokens of the continuation.
        threads: of llama.cpp.

    Returns:
        `difference`, `same_weights_difference` and `same_arithmetic_difference`: `max` and `mean` of the absolute
        difference of the logits, to ours with the checkpoint's weights, with the file's, and with the file's and
        llama.cpp's rounding of what is multiplied with them; `logits_std`, the spread of our logits; `same_top`, the
        share of tokens after which both programs find the same next one most likely; and `greedy_equal`, how many
        tokens of the continuation come before the first that differs.
    """
    from .gguf_reference import load_file_weights_, logits_of, rounded_inputs
    from .llama_cpp_model import LlamaCppModel

    with LlamaCppModel(path, context_tokens=-(-(len(ids) + num_new) // 256) * 256, threads=threads) as engine:
        found, new = torch.from_numpy(engine.logits(ids)), engine.greedy(ids, num_new)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_file_weights_(model, path)
    same_weights = logits_of(model, ids)
    with rounded_inputs(model, path):
        same_arithmetic = logits_of(model, ids)
    model.load_state_dict(original)
    equal = [a == b for a, b in zip(new, expected[1], strict=True)]
    return {
        "difference": _difference(found, expected[0]),
        "same_weights_difference": _difference(found, same_weights),
        "same_arithmetic_difference": _difference(found, same_arithmetic),
        "logits_std": expected[0].std().item(),
        "same_top": (found.argmax(-1) == expected[0].argmax(-1)).float().mean().item(),
        "greedy_equal": [*equal, False].index(False),
    }


def _difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    difference = (found - expected).abs()
    return {"max": difference.max().item(), "mean": difference.mean().item()}


def rotary_error(model, path: Path) -> dict[str, float]:
    """Largest relative difference between the rotary frequencies of our model and those that a file's factors give.

    Returns:
        The difference by name of the tensor of factors; empty where the file has none.

    Source: llama.cpp divides `rope.freq_base ** (-2i / n)` by factor i.
    """
    from gguf import GGUFReader

    reader, ours = GGUFReader(path), model.model.rotary_emb.inv_freq
    base = reader.fields[f"{reader.fields['general.architecture'].contents()}.rope.freq_base"].contents()
    frequencies = float(base) ** -(torch.arange(len(ours), dtype=torch.float64) / len(ours))
    errors = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_"):
            theirs = frequencies / torch.tensor(tensor.data, dtype=torch.float64)
            errors[tensor.name.removesuffix(".weight")] = (theirs / ours - 1).abs().max().item()
    return errors


def compare_tokenizers(tokenizer, path: Path, content: str, stops: list[int]) -> dict:
    """Cut texts of many kinds into tokens with both programs.

    Args:
        tokenizer: the checkpoint's.
        path: a file made of the same checkpoint.
        content: a text, compared by paragraphs beside `TEXTS`.
        stops: tokens after which generation must end.

    Returns:
        Counts of `texts` and `tokens` compared and of `different_texts`; `first_different`, up to three of those with
        both lists of pieces; `special_tokens`, and `found_special_tokens`, how many of them llama.cpp finds in a text
        as one token with the same id; whether the `chat_template` is the same; and `stops`, whether llama.cpp ends at
        all of them.
    """
    from .llama_cpp_model import LlamaCppModel

    texts = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").split("\n")[:-1]]
    texts += content.split("\n\n")
    different, num_tokens = [], 0
    with LlamaCppModel(path, vocabulary_only=True) as engine:
        for text in texts:
            ours, theirs = tokenizer(text).input_ids, engine.tokenize(text)
            num_tokens += len(ours)
            if ours != theirs:
                pieces = (tokenizer.convert_ids_to_tokens(ids) for ids in (ours, theirs))
                different.append(dict(zip(("text", "ours", "theirs"), (text, *pieces))))
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        return {
            "texts": len(texts),
            "tokens": num_tokens,
            "different_texts": len(different),
            "first_different": different[:3],
            "special_tokens": len(added),
            "found_special_tokens": sum(number in engine.tokenize(token) for number, token in added.items()),
            "chat_template": engine.chat_template() == tokenizer.chat_template,
            "stops": all(engine.is_end(token) for token in stops),
        }


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    record = {"task": "gguf", "num_tokens": args.tokens, "num_new_tokens": args.new_tokens}
    groups = [None] if args.ternary is None else [None, args.ternary]
    try:
        missing = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"Comparing GGUF files needs the package {missing[0]}; install both with "
                "`pip install llama-cpp-python gguf`."
            )
        for path in (args.keep, args.output and args.output.absolute().parent):
            if path and not path.is_dir():
                raise ValueError(f"The folder {str(path)!r} does not exist; make it, or name another.")
        content = read_text(args.text or shipped_excerpt()).decode()
        with tempfile.TemporaryDirectory() as temporary:
            record["checkpoints"] = [
                compare(
                    args.model,
                    content,
                    args.types,
                    args.keep or Path(temporary),
                    num_tokens=args.tokens,
                    num_new=args.new_tokens,
                    ternary_group=group,
                    threads=args.threads,
                )
                for group in groups
            ]
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    from .llama_cpp_model import system

    record |= {
        "text": (args.text or shipped_excerpt()).name,
        "llama_cpp_system": system(),
        "versions": {package: version(package) for package in VERSIONS},
    }
    if args.output:
        partial = args.output.with_name(f".{args.output.name}.{os.getpid()}")
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(args.output)
    print(json.dumps(record) if args.json else summarise(record))
    return 0


def summarise(record: dict) -> str:
    """A table for each checkpoint, largest differences of the logits, and a line on the tokenizer."""
    head = ("type", "file", "difference", "same weights", "same arithmetic", "same top", "greedy equal")
    lines = []
    for part in record["checkpoints"]:
        rows = [
            (
                name,
                f"{found['file_bytes'] / 1e6:.2f} MB",
                *(f"{found[f'{kind}difference']['max']:.2g}" for kind in ("", "same_weights_", "same_arithmetic_")),
                f"{found['same_top']:.1%}",
                f"{found['greedy_equal']} of {record['num_new_tokens']}",
            )
            for name, found in part["types"].items()
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows)]
        group = part["ternary_group"]
        lines.append(part["model"] + ("" if group is None else f", made ternary in groups of {group}"))
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (head, *rows)]
        tokens = part["tokenizer"]
        lines.append(f"{tokens['different_texts']} of {tokens['texts']} texts are cut into other tokens")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
