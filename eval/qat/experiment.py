"""The runs: one in full precision, and from its checkpoints runs that go on with ternary weights to the same length.

All are the first stage of the shipped recipe `tunnel-1m` with `SETTINGS` in place of its own, and all read the same
number of tokens. The full-precision run is stable until its last tenth, in which it decays, and leaves a checkpoint at
each tenth. A run of share p goes on from the one at 100 - p percent: it warms up again from a tenth of its learning
rate, which is `RATE_SHARE` of the first one's, and decays in the last tenth of all tokens too; its text is in an order
of its own, the same for all shares. The run of 100 percent is ternary from the first step, with the initial weights,
the order of the text and the learning rate of the full-precision run.

MiniCPM4's report (arXiv:2506.07900, section on BitCPM4) varies the share with a model of 5M parameters, 2B tokens and
a WSD schedule; it trains with 1e-2 at first and 5e-3 with quantisation, after warming up again.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minicpm4_hf.eval.ablation.experiment import HELD_OUT, RESERVED, run_folder
from minicpm4_hf.quantization.ternary import ROW
from minicpm4_hf.training.qat import TernarySettings
from minicpm4_hf.training.recipe import Recipe, Stage, load_recipe, shipped_recipe

RECIPE = "tunnel-1m"
TENTHS = 10
# KEY=VALUE, as `minicpm4 train --set` takes them; the first is the length of every run. `buckets` cuts the books into
# pieces of a sequence and shuffles them.
SETTINGS = (
    "stages.0.num_steps=320",
    "stages.0.warmup_steps=12",
    "stages.0.floor_share=0.1",
    "stages.0.buckets=[512]",
    "stages.0.log_every=4",
    "stages.0.evaluate_every=0",
)
RATE_SHARE = 0.5  # of the learning rate, with quantisation: BitCPM4's 5e-3 of 1e-2
FULL, STABLE, DECAY, QAT = "full", "stable", "decay", "qat"
GROUP_SIZES = (ROW, 64, 32)
GROUPS_AT = 40  # percent, at which group sizes are compared: from this share on the report finds little difference


@dataclass(frozen=True)
class Variant:
    """A run with ternary weights.

    Args:
        percent: of the tokens, those that it learns from with ternary weights.
        group_size: inputs that share a scale, or -1 for a whole row.
    """

    percent: int
    group_size: int

    @property
    def name(self) -> str:
        return f"ternary-{self.percent}" + ("" if self.group_size == ROW else f"-g{self.group_size}")


_SHARES = [Variant(percent, ROW) for percent in range(10, 101, 10)]
_GROUPS = [Variant(GROUPS_AT, size) for size in GROUP_SIZES if size != ROW]
VARIANTS = {variant.name: variant for variant in (*_SHARES, *_GROUPS)}
NAMES = (FULL, *VARIANTS)


def build_recipe(
    name: str, seed: int, books: Path, work: Path, replaced: Iterable[str] = (), rate_share: float = RATE_SHARE
) -> Recipe:
    """The recipe of a run.

    Args:
        name: one of `NAMES`.
        books: folder of `*.txt` files; `HELD_OUT` are held out.
        work: folder of all runs; the run's own is in it, and the full-precision run's, which must be finished before.
        replaced: settings of all runs, KEY=VALUE, in place of those of `SETTINGS`.
        rate_share: of the learning rate, after full precision.

    Raises:
        ValueError: a setting that the ablation makes itself, is unknown or out of its range, or a number of steps that
            has no tenths.
    """
    replaced = list(replaced)
    for setting in replaced:
        key = setting.partition("=")[0]
        if (top := key.partition(".")[0]) in RESERVED or (top == "stages" and not key.startswith("stages.0.")):
            raise ValueError(f"The ablation chooses `{top}` itself, so {setting!r} cannot be set.")
    text = {"train": [str(books)], "held_out": [str(books / f"{book}.txt") for book in HELD_OUT]}
    fixed = [
        f"output={json.dumps(str(run_folder(work, name, seed)))}",
        f"text={json.dumps(text)}",
        f"tokenizer={json.dumps(str(work / 'tokenizer'))}",
        "vocab_size=null",
        f"seed={seed}",
    ]
    recipe = load_recipe(shipped_recipe(RECIPE), overrides=[*SETTINGS, *replaced, *fixed])
    stage = recipe.stages[0]
    tenth, rest = divmod(stage.num_steps, TENTHS)
    if rest:
        raise ValueError(f"`stages.0.num_steps` must be a multiple of {TENTHS}, got {stage.num_steps}.")
    stage = dataclasses.replace(stage, checkpoint_every=tenth)
    if name == FULL:
        return dataclasses.replace(recipe, stages=_full_stages(stage, tenth))
    variant = VARIANTS[name]
    steps = tenth * variant.percent // TENTHS
    ternary = dataclasses.replace(
        stage,
        name=QAT,
        num_steps=steps,
        decay_steps=min(tenth, max(steps - stage.warmup_steps, 0)),
        ternary=TernarySettings(group_size=variant.group_size),
    )
    if variant.percent == 100:
        return dataclasses.replace(recipe, stages=[ternary])
    ternary = dataclasses.replace(ternary, learning_rate=stage.learning_rate * rate_share)
    start = run_folder(work, FULL, seed) / STABLE / f"checkpoint-{stage.num_steps - steps}"
    # The order of the text that a second stage would have.
    return dataclasses.replace(recipe, stages=[ternary], model=str(start), architecture=None, seed=seed + 1)


def _full_stages(stage: Stage, tenth: int) -> list[Stage]:
    stable = dataclasses.replace(
        stage, name=STABLE, num_steps=stage.num_steps - tenth, decay_steps=0, keep_checkpoints=TENTHS
    )
    return [stable, dataclasses.replace(stage, name=DECAY, num_steps=tenth, warmup_steps=0, decay_steps=tenth)]


def vocab_size(replaced: Iterable[str] = ()) -> int:
    """Of the tokenizer that all runs share, with the same `replaced` as `build_recipe`'s."""
    return load_recipe(shipped_recipe(RECIPE), overrides=[*SETTINGS, *replaced]).vocab_size


def without_folders(recipe: dict) -> dict:
    """What `without_paths` gives, with the last part alone of the checkpoint that the run goes on from."""
    return {**recipe, "model": recipe["model"] and Path(recipe["model"]).name}
