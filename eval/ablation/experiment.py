"""The five runs: a baseline with every choice of MiniCPM4's training in it, and four runs that undo one each.

All are the shipped recipe `tunnel-1m` with the settings of `BASELINE` in place of its own: the same model, fewer
steps, and a decay at the end of the short stage, after which the long stage goes on at the rate that the decay ended
at, as the models of InfLLM-V2 were trained (arXiv:2509.24663). A run has the initial weights and the order of the text
of every other run with its seed, but for the head of "mtp", whose weights are drawn before the others are.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minicpm4_hf.configuration_minicpm4 import complete_sparse_config
from minicpm4_hf.training.recipe import Recipe, Stage, load_recipe, shipped_recipe

RECIPE = "tunnel-1m"
HELD_OUT = ("dracula", "emma")  # the books that no checkpoint of this package is trained on
DENSE, SPARSE = "dense", "sparse"

# KEY=VALUE, as `minicpm4 train --set` takes them. `buckets` cuts the books into pieces of a sequence and shuffles
# them; without it a step would read one book. The decay is the last tenth of the short stage, which is enough
# (MiniCPM, arXiv:2404.06395), to a tenth of the peak, where a cosine usually ends (Chinchilla, arXiv:2203.15556).
BASELINE = (
    "stages.0.num_steps=140",
    "stages.0.warmup_steps=14",
    "stages.0.decay_steps=14",
    "stages.0.floor_share=0.1",
    "stages.0.buckets=[512]",
    "stages.0.log_every=5",
    "stages.0.evaluate_every=0",
    "stages.0.checkpoint_every=35",
    "stages.1.num_steps=24",
    "stages.1.learning_rate=0.0004",
    "stages.1.decay_steps=0",
    "stages.1.buckets=[2048]",
    "stages.1.log_every=1",
    "stages.1.checkpoint_every=8",
)
# Lambda; MiniCPM4 gives none, and DeepSeek-V3 (arXiv:2412.19437) trained mostly with this one.
MTP_LOSS_WEIGHT = 0.3
RESERVED = ("output", "text", "model", "tokenizer", "seed", "mup", "mtp_loss_weight")


@dataclass(frozen=True)
class Variant:
    """A run that differs from the baseline in one choice.

    Args:
        says: what is different.
        caution: what has to be known to read its difference, or "".
    """

    says: str
    caution: str = ""


VARIANTS = {
    "baseline": Variant("muP, WSD, sparse long stage, no multi-token prediction"),
    "standard": Variant(
        "standard parametrisation in place of muP",
        "both have the baseline's learning rate, which need not be the best of either",
    ),
    "cosine": Variant("a cosine from the warm-up to the end of the short stage in place of WSD"),
    "dense": Variant("a dense long stage in place of a sparse one"),
    "mtp": Variant(
        f"multi-token prediction, weight {MTP_LOSS_WEIGHT}",
        "its initial weights are other draws, and its training takes more time a token",
    ),
}


def overrides_of(name: str, baseline: Recipe) -> list[str]:
    """The settings, KEY=VALUE, in which a run differs from the baseline's recipe."""
    short = baseline.stages[0]
    return {
        "baseline": [],
        "standard": ["mup=false"],
        "cosine": ["stages.0.decay_type=cosine", f"stages.0.decay_steps={short.num_steps - short.warmup_steps}"],
        "dense": ["stages.1.sparse_config=null"],
        "mtp": [f"mtp_loss_weight={MTP_LOSS_WEIGHT}"],
    }[name]


def build_recipe(name: str, seed: int, books: Path, work: Path, replaced: Iterable[str] = ()) -> Recipe:
    """The recipe of a run.

    Args:
        name: one of `VARIANTS`.
        books: folder of `*.txt` files; `HELD_OUT` are held out.
        work: folder of the whole ablation; the run's own is in it.
        replaced: settings of all runs, KEY=VALUE, in place of those of `BASELINE`.

    Raises:
        ValueError: a setting that the ablation makes itself, is unknown or out of its range, or stages that are not
            the two that are compared.
    """
    replaced = list(replaced)
    for setting in replaced:
        if (top := setting.partition("=")[0].partition(".")[0]) in RESERVED:
            raise ValueError(f"The ablation chooses `{top}` itself, so {setting!r} cannot be set.")
    fixed = [
        f"output={json.dumps(str(run_folder(work, name, seed)))}",
        f"text={json.dumps({'train': [str(books)], 'held_out': [str(books / f'{book}.txt') for book in HELD_OUT]})}",
        f"tokenizer={json.dumps(str(work / 'tokenizer'))}",
        "vocab_size=null",
        f"seed={seed}",
    ]
    path = shipped_recipe(RECIPE)
    baseline = load_recipe(path, overrides=[*BASELINE, *replaced, *fixed])
    _check_stages(baseline.stages)
    return load_recipe(path, overrides=[*BASELINE, *replaced, *fixed, *overrides_of(name, baseline)])


def _check_stages(stages: list[Stage]) -> None:
    if len(stages) != 2 or stages[0].sparse_config is not None or stages[1].sparse_config is None:
        given = ", ".join(f"{stage.name} ({DENSE if stage.sparse_config is None else SPARSE})" for stage in stages)
        raise ValueError(f"`stages` of the ablation must be a dense one and then a sparse one, got {given}.")
    short, long = stages
    if long.length % short.length:
        raise ValueError(
            f"`length` of the second stage must be a multiple of the first's ({short.length}), so that both read the "
            f"same held-out tokens, got {long.length}."
        )
    dense_len = complete_sparse_config(long.sparse_config)["dense_len"]
    if dense_len >= long.length:
        raise ValueError(
            f"`stages.1.sparse_config.dense_len` must be less than the stage's `length` ({long.length}), or its rows "
            f"are read densely, got {dense_len}."
        )


def vocab_size(replaced: Iterable[str] = ()) -> int:
    """Of the tokenizer that all runs share, with the same `replaced` as `build_recipe`'s."""
    return load_recipe(shipped_recipe(RECIPE), overrides=[*BASELINE, *replaced]).vocab_size


def run_folder(work: Path, name: str, seed: int) -> Path:
    """Where a run is kept."""
    return work / f"{name}-{seed}"


def num_tokens(recipe: Recipe) -> int:
    """That a run is trained on, over all stages."""
    return sum(stage.num_steps * stage.sequences_per_step * stage.length for stage in recipe.stages)


def without_paths(recipe: Recipe) -> dict:
    """The recipe for a record, as JSON has it, of each path the last part."""
    content = dataclasses.asdict(recipe)
    for key in ("output", "tokenizer"):
        content[key] = Path(content[key]).name
    for key in ("train", "held_out"):
        content["text"][key] = [Path(source).name for source in content["text"][key]]
    return content
