"""Make the record of a finished training run, small enough to commit.

    python -m minicpm4_hf.eval.training_record runs/minicpm4-books --output training.json
    python -m minicpm4_hf.eval.training_record runs/minicpm4-books --device "two CPU cores" --output training.json

Reads the folder that `minicpm4 train` wrote: the recipe, without this machine's paths; the texts by name, size and
SHA-256; the weights by SHA-256, with them those packed from them and those of the shipped checkpoint that the run
began with, if there are such; and for each stage its steps, tokens, held-out evaluations and log, of whose lines at
most --lines are kept, evenly spaced, the last among them. A run's folder does not say how long it took, on what it
ran, and which PyTorch it had: what is not given is null. A run that goes on from the model of an earlier one gets that
one's record by --after: its stages come first, in the recipe too, and steps and tokens are those of both.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from minicpm4_cli.loading import positive_int
from minicpm4_hf.kernels.bench.__main__ import write_atomically
from minicpm4_hf.shipped import SHIPPED, shipped_checkpoint

BENCHMARK = "training"
LOGGED = ("step", "loss", "selection_loss", "learning_rate")


def read_json(path: Path) -> dict:
    """A JSON file of the run.

    Raises:
        ValueError: it is missing, so that the run is not finished or none, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(path)!r} does not exist: give the folder of a run that `minicpm4 train` has finished."
        ) from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error


def portable_recipe(recipe: dict) -> dict:
    """A run's recipe without `output`, and of the paths of the texts and the tokenizer only the last component."""
    names = {key: [Path(path).name for path in recipe["text"][key] or []] for key in ("train", "held_out")}
    model, tokenizer = (value and Path(value).name for value in (recipe["model"], recipe["tokenizer"]))
    kept = {key: value for key, value in recipe.items() if key != "output"}
    return {**kept, "text": {**recipe["text"], **names}, "model": model, "tokenizer": tokenizer}


def describe_texts(run: Path) -> dict:
    """The texts of a run: `train` and, if there are any, `held_out`, with their size in tokens."""
    texts = {}
    for part in ("train", "held_out"):
        if part == "train" or (run / "shards" / part).is_dir():
            index = read_json(run / "shards" / part / "index.json")
            sources = [{key: source[key] for key in ("name", "bytes", "sha256")} for source in index["sources"]]
            texts[part] = {"tokens": sum(shard["num_tokens"] for shard in index["shards"]), "sources": sources}
    return texts


def thin(lines: list[dict], limit: int) -> list[dict]:
    """At most `limit` of the lines, evenly spaced, the last one among them."""
    spacing = -(-len(lines) // limit) or 1
    return lines[::-1][::spacing][::-1]


def describe_stage(folder: Path, lines: int) -> dict:
    """What `stage.json` says, the held-out loss over the steps, and `lines` of the log.

    The log has the held-out loss in nats a token. The bytes a token of the held-out sequences are the same all through
    a stage, so `stage.json`, which has the last of these losses in both units, converts them to bits a byte.
    """
    stage = read_json(folder / "stage.json")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = {}
    if "held_out_loss" in stage:
        ratio = stage["held_out_bits_per_byte"] / stage["held_out_loss"]
        # By step: the last step is evaluated twice, on a schedule and at the end.
        evaluations = {entry["step"]: entry["eval_loss"] * ratio for entry in log if "eval_loss" in entry}
    losses = [{key: entry[key] for key in LOGGED if key in entry} for entry in log if "loss" in entry]
    return {
        **stage,
        "evaluations": [{"step": step, "held_out_bits_per_byte": bits} for step, bits in evaluations.items()],
        "log": thin(losses, lines),
    }


def hash_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights in a folder, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def make_record(run: Path, *, lines: int, device: str | None, seconds: float | None, torch: str | None) -> dict:
    """The record of a run's folder.

    Args:
        lines: of each stage's log, at most.
        device, seconds, torch: what the folder does not say, or None.

    Raises:
        ValueError: the run is not finished, or the folder is none.
    """
    recipe = read_json(run / "recipe.json")
    stages = [describe_stage(run / stage["name"], lines) for stage in recipe["stages"]]
    config = read_json(run / "model" / "config.json")
    packed = {"packed": hash_weights(run / "ternary")} if (run / "ternary").is_dir() else {}
    shipped = recipe["model"] in SHIPPED
    return {
        "benchmark": BENCHMARK,
        "recipe": portable_recipe(recipe),
        "texts": describe_texts(run),
        **({"started_from": hash_weights(shipped_checkpoint(recipe["model"]))} if shipped else {}),
        "weights": hash_weights(run / "model"),
        **packed,
        "parameters": stages[-1]["parameters"],
        "steps": sum(stage["steps"] for stage in stages),
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": seconds,
        "device": device,
        "versions": {"torch": torch, "transformers": config.get("transformers_version")},
        "stages": stages,
    }


def join_records(earlier: dict, record: dict) -> dict:
    """The record of a run that went on from an earlier one's model, with the stages of both.

    The recipe is the earlier one's with the later stages behind; its seed gives a stage at that place the sequences
    that it had. What took how long is known only if both say so.

    Raises:
        ValueError: the runs differ in what does not belong to a stage.
    """
    first, later = earlier["recipe"], record["recipe"]
    begun = ("model", "architecture", "tokenizer", "vocab_size", "seed", "stages")
    differing = [key for key in first.keys() | later.keys() if key not in begun and first.get(key) != later.get(key)]
    if earlier["parameters"] != record["parameters"] or earlier["texts"] != record["texts"]:
        differing.append("texts or the number of parameters")
    if later["model"] is None:
        differing.append("model, which must be the earlier run's,")
    if later["seed"] != first["seed"] + len(first["stages"]):
        differing.append(f"seed, which must be {first['seed'] + len(first['stages'])},")
    if differing:
        raise ValueError(f"The runs are not one after another: they differ in {', '.join(sorted(differing))}.")
    seconds = [earlier["seconds"], record["seconds"]]
    return {
        **record,
        "recipe": {**first, "stages": [*first["stages"], *later["stages"]]},
        "steps": earlier["steps"] + record["steps"],
        "tokens": earlier["tokens"] + record["tokens"],
        "seconds": None if None in seconds else sum(seconds),
        "stages": [*earlier["stages"], *record["stages"]],
        "continued": {"stage": len(earlier["stages"]), "weights": earlier["weights"]},
    }


def main(argv: list[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.training_record",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that `minicpm4 train` wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="RECORD.json")
    parser.add_argument("--lines", type=positive_int, default=40, metavar="N", help="of each log (default: 40)")
    parser.add_argument("--device", metavar="TEXT", help="what the run used")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long the run took")
    parser.add_argument("--torch", metavar="VERSION", help="the run's PyTorch")
    parser.add_argument(
        "--after", type=Path, metavar="RECORD.json", help="of the run whose model this one went on from"
    )
    args = parser.parse_args(argv)
    try:
        record = make_record(args.run, lines=args.lines, device=args.device, seconds=args.seconds, torch=args.torch)
        if args.after:
            record = join_records(read_json(args.after), record)
        write_atomically(args.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
