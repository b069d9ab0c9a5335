"""Train a model by a recipe, from raw text to a checkpoint.

minicpm4 train tunnel-1m --text books/ --held-out books/emma.txt --output runs/tunnel
minicpm4 train recipe.json --set stages.0.num_steps=200 --set stages.0.learning_rate=3e-3
minicpm4 train recipe.json --resume --json
"""

import json
import os
import sys


def add_arguments(parser):
    """The flags of `minicpm4 train`."""
    parser.add_argument("recipe", help="JSON file; `tunnel-1m` names the one that comes with the package")
    parser.add_argument("--text", nargs="+", metavar="PATH", help="what to train on, in place of the recipe's")
    parser.add_argument("--held-out", nargs="+", metavar="PATH", help="text to evaluate on, never trained on")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the run, in place of the recipe's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a setting; repeatable, JSON or text"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run that the output folder holds")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line")


def run(args) -> int:
    """Train, and print what each stage reached; 0 as exit code."""
    from minicpm4_hf.training.recipe import load_recipe, shipped_recipe

    path = args.recipe if args.recipe.endswith(".json") else shipped_recipe(args.recipe)
    overrides = [*args.set]
    overrides += [f"text.train={json.dumps(args.text)}"] if args.text else []
    overrides += [f"text.held_out={json.dumps(args.held_out)}", "text.held_out_share=0"] if args.held_out else []
    overrides += [f"output={json.dumps(args.output)}"] if args.output else []
    recipe = load_recipe(path, overrides)

    from minicpm4_hf.training.run import run_recipe

    result = run_recipe(recipe, resume=args.resume)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if args.json:
        print(json.dumps(result))
        return 0
    for stage in result["stages"]:
        held_out = stage.get("held_out_bits_per_byte")
        reached = f"loss {stage['last_loss']:.3f}" + (f", held out {held_out:.3f} bits per byte" if held_out else "")
        print(f"{stage['name']}: {stage['steps']:,} steps, {stage['tokens']:,} tokens, {reached}")
    print(f"{result['model']} after {result['seconds']:.0f} s", file=sys.stderr)
    return 0
