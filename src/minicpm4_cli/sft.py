"""Fine-tune a model on chats, with loss on what the assistant writes.

minicpm4 sft --model openbmb/MiniCPM4-0.5B --data chats.jsonl --output runs/chat
minicpm4 sft --model ./MiniCPM4-8B --data chats/ --held-out held.jsonl --lora 16 --epochs 2 --output runs/lora
minicpm4 sft --model ./MiniCPM4-8B --data chats/ --held-out held.jsonl --lora 16 --epochs 2 --output runs/lora --resume
"""

import json
import os
import sys

from .loading import positive_int

DEFAULT_LENGTH = 4096


def add_arguments(parser):
    """The flags of `minicpm4 sft`."""
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="folder or Hub id to begin with")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help=".jsonl or .parquet files with `messages`, folders of them, or hub:OWNER/NAME",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder of the run; model/ is the result")
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="PATH", help="chats to evaluate on, never trained on"
    )
    duration = parser.add_mutually_exclusive_group()
    duration.add_argument("--epochs", type=positive_int, metavar="N", help="passes over the data (default: 3)")
    duration.add_argument("--steps", type=positive_int, metavar="N", help="optimizer steps, in place of passes")
    parser.add_argument(
        "--length",
        type=positive_int,
        metavar="N",
        help=f"tokens of a packed row; longer chats are cut (default: {DEFAULT_LENGTH:,}, or the model's context)",
    )
    parser.add_argument("--batch", type=positive_int, default=8, metavar="N", help="rows of a step (default: 8)")
    parser.add_argument(
        "--learning-rate", type=float, metavar="X", help="peak, before muP divides it (default: 3e-4; LoRA: 2e-4)"
    )
    parser.add_argument("--lora", type=positive_int, metavar="RANK", help="train LoRA adapters of this rank only")
    parser.add_argument("--resume", action="store_true", help="go on with the run that the output folder holds")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args) -> int:
    """Fine-tune, and print what was reached; 0 as exit code."""
    from minicpm4_hf.training.sft import SFTSettings, fine_tune

    from .loading import check_weight_files, find_checkpoint, load_config, load_tokenizer, load_weights

    folder, name = find_checkpoint(args.model)
    config = load_config(folder)
    settings = SFTSettings(
        model=name,
        data=args.data,
        output=args.output,
        held_out=args.held_out,
        length=args.length or min(DEFAULT_LENGTH, config.max_position_embeddings),
        num_epochs=args.epochs,
        num_steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        lora_rank=args.lora,
    )
    check_weight_files(folder)
    result = fine_tune(
        settings,
        tokenizer=load_tokenizer(folder),
        load_model=lambda dtype: load_weights(folder, config, dtype),
        resume=args.resume,
    )
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.json:
        print(json.dumps(result))
        return 0
    before, after = result["held_out_loss_before"], result["held_out_loss"]
    held_out = "" if after is None else f", held out {before:.3f} before and {after:.3f} after"
    print(f"{result['steps']:,} steps on {result['chats']:,} chats, loss {result['last_loss']:.3f}{held_out}")
    print(f"{result['model']} after {result['seconds']:.0f} s", file=sys.stderr)
    return 0
