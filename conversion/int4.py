"""Int4 weights by GPTQ and its relatives: the conversion `int4`.

    python -m minicpm4_hf.conversion int4 MiniCPM4-8B MiniCPM4-8B-int4 --calibration books/
    python -m minicpm4_hf.conversion int4 MiniCPM4-8B OUT --calibration text.jsonl --method s-p-gptq --rotate
    python -m minicpm4_hf.conversion int4 MiniCPM4-8B OUT --method rtn --format compressed-tensors

The linear layers of the decoder become symmetric int4 in groups; embeddings, head and norms keep their dtype. One
decoder layer is in memory at a time. After a kill the same command goes on after the last finished layer and ends with
the same bytes.
"""

import argparse
from pathlib import Path

import torch

from minicpm4_cli.loading import find_device, load_tokenizer, positive_int
from minicpm4_hf.quantization.prefix import Prefix

from .gptq_calibration import HiddenStates, digest_sequences, read_calibration
from .gptq_card import int4_card
from .gptq_checks import GROUP_SIZES, check_model, check_sequences, check_settings, linear_of
from .gptq_layer import INPUT_GROUPS, LINEARS
from .gptq_layout import LAYOUTS
from .gptq_model import (
    METHODS,
    PREFIX_TENSORS,
    STATES_FOLDER,
    Int4Settings,
    Weights,
    layer_weight,
    quantize_layers,
    step_name,
)
from .gptq_rotation import EMBEDDINGS, HEAD
from .keys import CARD_FILE, CONFIG_FILE, OFFICIAL_REMOTE_CODE, REMOTE_CODE
from .output import Output, Plan, in_words, open_output, plan_bytes
from .source import Checkpoint, layer_of, open_checkpoint

# `--prefix` without a text: the first full stop and line break are, after the first token, those that draw attention
# and carry massive activations (Sun et al., arXiv:2402.17762).
DEFAULT_PREFIX = ".\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `int4` beside IN and OUT."""
    parser.add_argument(
        "--calibration",
        nargs="+",
        metavar="TEXT",
        help=".txt, .jsonl or .parquet files, or folders of them; every method but rtn needs them",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="p-gptq",
        help="round to nearest; GPTQ; p-: leaves the first 4 positions out; s-: smooths first (default: %(default)s)",
    )
    parser.add_argument(
        "--sequences", type=positive_int, default=128, metavar="N", help="calibration sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=positive_int, default=2048, metavar="N", help="tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-positions", type=int, metavar="N", help="leave out N first positions in place of the method's number"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=128,
        help="inputs that share a scale, -1 for all of a row (default: %(default)s)",
    )
    parser.add_argument(
        "--act-order", action="store_true", help="quantise inputs by falling energy; the files' layout is the same"
    )
    parser.add_argument(
        "--rotate", action="store_true", help="fold Hadamard rotations into the weights first; unties the head"
    )
    parser.add_argument(
        "--prefix",
        nargs="?",
        const=DEFAULT_PREFIX,
        metavar="TEXT",
        help="store keys and values of the first token and TEXT, which then stand before every text "
        "(default: a full stop and a line break)",
    )
    parser.add_argument("--format", choices=LAYOUTS, default="gptq", help="file layout (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")


def run(args: argparse.Namespace) -> dict:
    """`int4`; see `quantize_checkpoint`.

    Raises:
        ValueError, OSError: wrong input.
    """
    if METHODS[args.method] is None and args.calibration:
        raise ValueError("`--method rtn` rounds to nearest without calibration; leave out `--calibration`.")
    if METHODS[args.method] is not None and not args.calibration:
        raise ValueError(f"`--method {args.method}` needs `--calibration TEXT`; only rtn does without.")
    checkpoint, device = open_checkpoint(args.source), find_device(args.device)
    sequences, prefix_ids = None, ()
    if args.calibration or args.prefix is not None:
        tokenizer = load_tokenizer(checkpoint.folder)
    if args.prefix is not None:
        prefix_ids = tuple(encode_prefix(tokenizer, args.prefix))
    if args.calibration:
        sequences = read_calibration(
            args.calibration,
            tokenizer,
            num_sequences=args.sequences,
            length=args.length,
            with_bos=not prefix_ids,
        )
    settings = Int4Settings(
        method=args.method,
        group_size=args.group_size,
        act_order=args.act_order,
        rotate=args.rotate,
        skip_positions=args.skip_positions,
        prefix_ids=prefix_ids,
        layout=args.format,
    )
    return quantize_checkpoint(checkpoint, args.output, settings, sequences, device=device, dry_run=args.dry_run)


def encode_prefix(tokenizer, text: str) -> list[int]:
    """The tokenizer's `bos_token` and then the tokens of `text`.

    Raises:
        ValueError: neither gives a token.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = bos + tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError("`--prefix` needs a text, as this tokenizer has no `bos_token`.")
    return ids


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: str | Path,
    settings: Int4Settings,
    sequences: torch.Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    dry_run: bool = False,
) -> dict:
    """Write a checkpoint with its decoder's linear layers in int4.

    Args:
        checkpoint: in full precision, of a Llama-like causal language model without biases.
        output: folder to create; it appears complete or not at all.
        sequences: calibration tokens `[num, length]` int64, None for the method rtn.
        dry_run: check everything and say the sizes, but write nothing.

    Returns:
        `source`, `output`, `files`, `num_bytes`, the `settings`, and each layer's `errors`; with `dry_run` what would
        be needed.

    Raises:
        ValueError: a model or settings that cannot be quantised.
        OSError: the disk is full.
    """
    check_model(checkpoint)
    check_settings(checkpoint, settings)
    check_sequences(checkpoint, settings, sequences)
    weights = Weights(checkpoint, settings.rotate, device)
    plan = _plan_output(checkpoint, settings, weights.is_head_added)
    described = settings.describe()
    if sequences is not None:
        described |= {"sequences": len(sequences), "length": sequences.shape[1]}
    files = [*checkpoint.other_files(), *_remote_code(checkpoint)]
    head = {"source": str(checkpoint.folder), "output": str(output), "settings": described}
    needs = _needs(checkpoint, plan, sequences)
    if dry_run:
        names = sorted([*files, CONFIG_FILE, CARD_FILE, "*.safetensors"])
        summary = (
            f"{output} would have {in_words(needs['num_bytes'])} of weights in place of "
            f"{in_words(checkpoint.num_bytes)}; making it takes {in_words(needs['disk_bytes'])} of disk and about "
            f"{in_words(needs['memory_bytes'])} of memory"
        )
        return {**head, "files": names, **needs, "summary": summary}
    key = {**described, "calibration": None if sequences is None else digest_sequences(sequences)}
    with open_output(output, command="int4", settings=key, source=checkpoint, resumable=True) as out:
        done = sum(path.stat().st_size for path in (out.partial / STATES_FOLDER).glob("*"))  # by an interrupted run
        out.require_space(needs["disk_bytes"] - done)
        records = quantize_layers(weights, out, settings, sequences, device)
        prefix = _write_weights(out, weights, plan, settings)
        if prefix is not None:
            prefix.save(out.folder)
        out.write_json(CONFIG_FILE, _config(checkpoint, settings))
        out.copy_files(checkpoint.folder, files)
        out.write_text(CARD_FILE, int4_card(checkpoint, settings, described, plan, records))
    return {**head, **out.summary(), "layers": records}


def _write_weights(out: Output, weights: Weights, plan: Plan, settings: Int4Settings) -> Prefix | None:
    """Write the finished layers and all other tensors; returns the prefix, where there is one."""
    left, parts = dict(plan), []
    with out.shards(plan) as shards:
        for index in range(weights.checkpoint.config.num_hidden_layers):
            tensors = out.load_step(step_name(index))[0]
            parts.append([tensors.get(name) for name in PREFIX_TENSORS])
            for name in tensors.keys() & plan.keys():
                shards.write(name, tensors[name])
                del left[name]
        for name, (dtype, _) in left.items():
            shards.write(name, weights.get(name).to(dtype))
    if not settings.prefix_ids:
        return None
    keys, values = (torch.stack(tensors) for tensors in zip(*parts))
    return Prefix(torch.tensor(settings.prefix_ids), keys, values)


def _plan_output(checkpoint: Checkpoint, settings: Int4Settings, is_head_added: bool) -> Plan:
    """Every tensor of the result, in the order of the source's shards."""
    plan: Plan = {}
    for name, info in checkpoint.tensors.items():
        if linear_of(name) is None:
            plan[name] = info.dtype, info.shape
            continue
        num_rows, num_columns = info.shape
        num_groups = 1 if settings.group_size == -1 else num_columns // settings.group_size
        parts = LAYOUTS[settings.layout].plan(num_rows, num_columns, num_groups)
        plan |= {f"{name.removesuffix('.weight')}.{part}": entry for part, entry in parts.items()}
    if is_head_added:
        plan[HEAD] = plan[EMBEDDINGS]
    return plan


def _needs(checkpoint: Checkpoint, plan: Plan, sequences: torch.Tensor | None) -> dict[str, int]:
    """Bytes of the result, of disk while it is made, of hidden states and of memory.

    On disk: the result, the finished layers, and the hidden states before and after a layer. In memory: a layer in
    float32; for the largest group of linears with the same K inputs and N outputs together the Hessian, its factor in
    float64 and three copies of the weights, 32 K^2 + 12 N K; and about 1 GB of program.
    """
    config = checkpoint.config
    states = 0
    if sequences is not None:
        states = 2 * HiddenStates.count_bytes((*sequences.shape, config.hidden_size))
    shapes = {name: checkpoint.tensors[layer_weight(0, f"{name}.weight")].shape for name in LINEARS}
    groups = [(sum(shapes[name][0] for name in names), shapes[names[0]][1]) for names in INPUT_GROUPS.values()]
    largest = max((0 if sequences is None else 32 * k * k) + 12 * n * k for n, k in groups)
    steps = plan_bytes({name: entry for name, entry in plan.items() if layer_of(name)})
    return {
        "num_bytes": plan_bytes(plan),
        "disk_bytes": plan_bytes(plan) + steps + states,
        "hidden_state_bytes": states,
        "memory_bytes": 4 * sum(n * k for n, k in groups) + largest + 10**9,
    }


def _remote_code(checkpoint: Checkpoint) -> list[str]:
    """Files that the source's `auto_map` leads to: the result's config still has it."""
    return [name for name in (*REMOTE_CODE, *OFFICIAL_REMOTE_CODE) if (checkpoint.folder / name).is_file()]


def _config(checkpoint: Checkpoint, settings: Int4Settings) -> dict:
    damping = settings.damping if settings.is_calibrated else None
    describe = LAYOUTS[settings.layout].describe
    content = dict(checkpoint.config_dict)
    if settings.rotate:
        content["tie_word_embeddings"] = False
    return content | {"quantization_config": describe(settings.group_size, settings.act_order, damping)}


__all__ = ["add_arguments", "encode_prefix", "quantize_checkpoint", "run"]
