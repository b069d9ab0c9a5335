"""What is trained and kept: a folder a run, which a killed run goes on from, and the record made of the finished ones.

The folder of an ablation holds `text.json` (the books that it is of), `tokenizer/` and `held_out/` (tokens of the
held-out books), which the runs share, and for each run NAME-SEED/: what `run_recipe` leaves, and `result.json`, which
is written last.
"""

import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer

from minicpm4_hf.kernels.bench.__main__ import describe_machine, write_atomically
from minicpm4_hf.perplexity import count_bytes
from minicpm4_hf.training.documents import read_documents
from minicpm4_hf.training.recipe import Recipe, load_recipe
from minicpm4_hf.training.run import run_recipe
from minicpm4_hf.training.shards import build_shards
from minicpm4_hf.training.tokenizer import train_tokenizer
from minicpm4_hf.training.trainer import read_log

from .experiment import HELD_OUT, VARIANTS, build_recipe, num_tokens, vocab_size, without_paths
from .held_out import cut_rows, evaluate

PACKAGES = ("minicpm4-hf", "torch", "transformers", "accelerate", "tokenizers", "numpy")
CURVE_POINTS = 100  # of a stage, at most
RESULT = "result.json"


def identify_books(folder: Path) -> dict[str, dict]:
    """Bytes and SHA-256 of the books of a folder, `*.txt` in the order of the names.

    Raises:
        ValueError: no folder, a held-out book is missing, or there is no other.
    """
    if not folder.is_dir():
        raise ValueError(f"`--books` must be a folder of *.txt files, and {str(folder)!r} is not a folder.")
    books = {}
    for path in sorted(folder.glob("*.txt")):
        text = path.read_bytes()
        books[path.stem] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    missing = [name for name in HELD_OUT if name not in books]
    if missing:
        raise ValueError(
            f"{str(folder)!r} has no {missing[0] + '.txt'!r}, which is held out; put it there (the held-out books are "
            f"{', '.join(HELD_OUT)})."
        )
    if len(books) == len(HELD_OUT):
        raise ValueError(f"{str(folder)!r} holds no *.txt file to train on besides the held-out ones.")
    return books


def prepare(
    work: Path, books: Path, identity: dict, pieces: int, length: int, num_rows: int
) -> tuple[torch.Tensor, dict]:
    """Make the folder of an ablation, with the tokenizer and the held-out tokens that all its runs share.

    Args:
        identity: of the books, see `identify_books`.
        pieces: in the tokenizer.

    Returns:
        The held-out rows `[num_rows, length]`, int64, and for the record their size: `rows`, `length`, and over all
        the tokens that have a loss `tokens` and `bytes`.

    Raises:
        ValueError: the folder is another's: of other books, another `vocab_size` or no ablation's; and as
            `cut_rows`.
    """
    path, text = work / "text.json", {"vocab_size": pieces, "books": identity}
    if not path.is_file():
        if work.is_dir() and any(work.iterdir()):
            raise ValueError(f"{str(work)!r} is not empty and holds no ablation; choose another --work.")
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(text, indent=2) + "\n")
    elif (before := read_json(path)) != text:
        differing = next(key for key in text if before.get(key) != text[key])
        raise ValueError(
            f"{str(work)!r} holds an ablation with different `{differing}`; give the same, or another --work."
        )
    if not (work / "tokenizer").is_dir():
        sources = [books / f"{name}.txt" for name in identity if name not in HELD_OUT]
        train_tokenizer(read_documents(sources), vocab_size=pieces).save_pretrained(work / ".tokenizer")
        (work / ".tokenizer").rename(work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    sources = [books / f"{name}.txt" for name in HELD_OUT]
    rows = cut_rows(build_shards(sources, tokenizer, work / "held_out", progress=False), length, num_rows)
    size = sum(count_bytes(tokenizer, row) for row in rows[:, 1:].tolist())
    return rows, {"rows": num_rows, "length": length, "tokens": rows[:, 1:].numel(), "bytes": size}


def read_json(path: Path):
    """What a JSON file holds.

    Raises:
        ValueError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error


def versions() -> dict[str, str]:
    """Of the packages that decide a loss."""
    return {package: version(package) for package in PACKAGES}


def find_result(recipe: Recipe, num_rows: int) -> dict | None:
    """The result that a run's folder holds, or None where the run is not finished.

    Raises:
        ValueError: it is of another recipe, of other rows or from other versions.
    """
    folder = Path(recipe.output)
    if not (folder / RESULT).is_file():
        return None
    advice = "give the same settings, or another --work"
    if load_recipe(folder / "recipe.json") != recipe:
        raise ValueError(f"{recipe.output!r} holds a finished run of another recipe; {advice}.")
    result = read_json(folder / RESULT)
    rows = len(result["held_out"]["short"])
    if rows != num_rows:
        raise ValueError(f"{recipe.output!r} holds a run that read {rows} held-out rows, not {num_rows}; {advice}.")
    for package, now in versions().items():
        if (was := result["versions"].get(package)) != now:
            raise ValueError(
                f"{recipe.output!r} was trained with {package} {was}, and this is {now}; take another --work."
            )
    return result


def run_one(name: str, seed: int, recipe: Recipe, sparse_config: dict, rows: torch.Tensor) -> dict:
    """Train a run, or go on with it, and evaluate it.

    Args:
        sparse_config: of the sparse readings of the held-out rows; the baseline's.
        rows: see `evaluate`.

    Returns:
        The run for the record. `seconds` of training are None for a run that was cut off; `curves` has for each stage
        the means of the training loss up to a step, `[step, loss]`, of the next token alone.

    Raises:
        ValueError, OSError, ImportError: see `run_recipe`.
    """
    folder = Path(recipe.output)
    resumed = (folder / "recipe.json").is_file()
    trained = run_recipe(recipe, resume=resumed)
    started = time.perf_counter()
    held_out = evaluate(recipe, rows, sparse_config)
    result = {
        "name": name,
        "seed": seed,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine("cpu"),
        "versions": versions(),
        "recipe": without_paths(recipe),
        "tokens": num_tokens(recipe),
        "parameters": trained["stages"][0]["parameters"],
        "seconds": None if resumed else trained["seconds"],
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "curves": {stage.name: read_curve(folder / stage.name) for stage in recipe.stages},
        "held_out": held_out,
    }
    write_atomically(folder / RESULT, json.dumps(result, allow_nan=False) + "\n")
    return result


def read_curve(stage: Path) -> list[list[float]]:
    """The logged training losses of a stage, thinned to `CURVE_POINTS`, the first and the last kept."""
    lines = [line for line in read_log(stage) if "loss" in line]
    points = [[line["step"], round(line.get("ntp_loss", line["loss"]), 5)] for line in lines]
    if len(points) <= CURVE_POINTS:
        return points
    places = torch.linspace(0, len(points) - 1, CURVE_POINTS).round().long().unique().tolist()
    return [points[place] for place in places]


def run_all(
    names: list[str], seeds: int, books: Path, work: Path, replaced: list[str], num_rows: int
) -> tuple[dict, dict, list[dict]]:
    """Train the runs `names` that the folder does not hold yet.

    Returns:
        The identity of the books, the size of the held-out rows, and all finished runs of these settings, of `names`
        or not, seed by seed.

    Raises:
        ValueError, OSError, ImportError: wrong input, a run that cannot go on, or matplotlib is missing.
    """
    identity = identify_books(books)
    books, work = books.resolve(), work.resolve()
    recipes = {
        (name, seed): build_recipe(name, seed, books, work, replaced) for seed in range(seeds) for name in VARIANTS
    }
    long = recipes["baseline", 0].stages[1]
    rows, size = prepare(work, books, identity, vocab_size(replaced), long.length, num_rows)
    found = {key: find_result(recipe, num_rows) for key, recipe in recipes.items()}  # what does not fit is said first
    wanted = [key for key in recipes if key[0] in names]
    for number, key in enumerate(wanted, 1):
        if found[key] is None:
            print(f"[{number}/{len(wanted)}] {key[0]}, seed {key[1]}", file=sys.stderr, flush=True)
            found[key] = run_one(*key, recipes[key], long.sparse_config, rows)
    return identity, size, [result for result in found.values() if result is not None]
