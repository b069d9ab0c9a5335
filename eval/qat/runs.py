"""What is trained and kept: a folder a run, as `minicpm4_hf.eval.ablation.runs` has it, whose parts this uses."""

import json
import sys
import time
from pathlib import Path

import torch

from minicpm4_hf.eval.ablation.experiment import num_tokens, without_paths
from minicpm4_hf.eval.ablation.held_out import load_model, rounded, score_rows
from minicpm4_hf.eval.ablation.runs import RESULT, find_result, identify_books, prepare, read_curve, versions
from minicpm4_hf.kernels.bench.__main__ import describe_machine, write_atomically
from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.quantization import BitCPMConfig
from minicpm4_hf.training.recipe import Recipe
from minicpm4_hf.training.run import run_recipe

from .experiment import DECAY, FULL, GROUP_SIZES, NAMES, VARIANTS, build_recipe, vocab_size, without_folders


def evaluate(name: str, folder: Path, rows: torch.Tensor) -> dict:
    """Read held-out rows with a finished run's model: the packed one where it is ternary.

    Args:
        rows: token ids `[N, T]`, int64.

    Returns:
        Losses of each row in nats a token: `short`, by the finished model, and of the run in full precision
        `after_training`, by its weights rounded to ternary ones, by the group size.
    """
    if name != FULL:
        return {"short": rounded(score_rows(load_model(folder / "ternary", None), rows))}
    model = folder / DECAY / "model"
    return {
        "short": rounded(score_rows(load_model(model, None), rows)),
        "after_training": {str(size): rounded(score_rows(_load_rounded(model, size), rows)) for size in GROUP_SIZES},
    }


def _load_rounded(folder: Path, group_size: int) -> MiniCPM4ForCausalLM:
    model = MiniCPM4ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitCPMConfig(group_size=group_size)
    ).eval()
    return model.to(torch.accelerator.current_accelerator() or "cpu")


def run_one(name: str, seed: int, recipe: Recipe, rows: torch.Tensor) -> dict:
    """Train a run, or go on with it, and evaluate it.

    Returns:
        The run for the record, as `minicpm4_hf.eval.ablation.runs.run_one` has it; `percent` and `group_size` are 0
        and None in full precision.

    Raises:
        ValueError, OSError, ImportError: see `run_recipe`.
    """
    folder = Path(recipe.output)
    resumed = (folder / "recipe.json").is_file()
    trained = run_recipe(recipe, resume=resumed)
    started = time.perf_counter()
    held_out = evaluate(name, folder, rows)
    variant = VARIANTS.get(name)
    result = {
        "name": name,
        "seed": seed,
        "percent": variant.percent if variant else 0,
        "group_size": variant.group_size if variant else None,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "recipe": without_folders(without_paths(recipe)),
        "tokens": num_tokens(recipe),
        "parameters": trained["stages"][0]["parameters"],
        "seconds": None if resumed else trained["seconds"],
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "curves": {stage.name: read_curve(folder / stage.name) for stage in recipe.stages},
        "held_out": held_out,
    }
    write_atomically(folder / RESULT, json.dumps(result, allow_nan=False) + "\n")
    return result


def run_all(
    names: list[str], seeds: int, books: Path, work: Path, replaced: list[str], rate_share: float, num_rows: int
) -> tuple[dict, dict, list[dict]]:
    """Train the runs `names` that the folder does not hold yet, and the one in full precision before them.

    Returns:
        The identity of the books, the size of the held-out rows, and all finished runs of these settings, of `names`
        or not, seed by seed.

    Raises:
        ValueError, OSError, ImportError: wrong input, a run that cannot go on, or matplotlib is missing.
    """
    identity = identify_books(books)
    books, work = books.resolve(), work.resolve()
    recipes = {
        (name, seed): build_recipe(name, seed, books, work, replaced, rate_share)
        for seed in range(seeds)
        for name in NAMES
    }
    length = recipes[FULL, 0].stages[0].length
    rows, size = prepare(work, books, identity, vocab_size(replaced), length, num_rows)
    found = {key: find_result(recipe, num_rows) for key, recipe in recipes.items()}  # what does not fit is said first
    wanted = [key for key in recipes if key[0] in (FULL, *names)]
    for number, key in enumerate(wanted, 1):
        if found[key] is None:
            print(f"[{number}/{len(wanted)}] {key[0]}, seed {key[1]}", file=sys.stderr, flush=True)
            found[key] = run_one(*key, recipes[key], rows)
    return identity, size, [result for result in found.values() if result is not None]
