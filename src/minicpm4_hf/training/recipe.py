"""What a training run is made of, as dataclasses that a JSON file fills: `minicpm4 train recipe.json`.

    recipe = load_recipe("recipe.json", overrides=["stages.0.num_steps=200", "output=run-2"])

A recipe says where the text is, what model begins, and one stage after another: each has a sequence length, an
attention (dense, or InfLLM v2), a schedule and a number of steps. MiniCPM4's short-to-long training is two stages.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config, complete_sparse_config
from minicpm4_hf.training.distillation import DistillSettings
from minicpm4_hf.training.mixture import SyntheticSettings
from minicpm4_hf.training.packing import LengthBuckets
from minicpm4_hf.training.qat import TernarySettings
from minicpm4_hf.training.schedule import WSDSettings
from minicpm4_hf.training.selection import SelectionSettings

PRECISIONS = ("bf16", "fp32")
TAKEN_NAMES = ("model", "ternary", "tokenizer", "shards")  # folders of a run besides its stages'


@dataclass(frozen=True, kw_only=True)
class Text:
    """Where the text comes from.

    Args:
        train: sources as `read_documents` takes them: `.txt`, `.jsonl` and `.parquet` files, folders, `hub:NAME`.
        held_out: the same, for evaluation; never trained on, even where a folder of `train` has it.
        held_out_share: of the training documents, held out in place of `held_out`.
        text_field: field of a record that has the text.
        split_documents: what a document of a `.txt` file is: "file", "paragraph" or "line".
    """

    train: list[str]
    held_out: list[str] = field(default_factory=list)
    held_out_share: float = 0.0
    text_field: str = "text"
    split_documents: str = "file"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Args:
        name: folder of the stage in the run's output.
        num_steps: optimizer steps.
        length: tokens of a sequence.
        sequences_per_step: sequences of an optimizer step, over all processes and micro-batches.
        micro_batch: sequences that go through the model at once, in each process.
        learning_rate: peak, of the embeddings; muP divides it for the matrices.
        warmup_steps, decay_steps, decay_type, floor_share: the schedule, see `WSDSettings`; no decay leaves the stage
            stable.
        sparse_config: InfLLM v2 settings from this stage on, or None for dense attention.
        context: positions that the model reaches from this stage on, by LongRoPE extension; None leaves them.
        synthetic: steps on generated sequences among those on text, see `SyntheticSettings`; None for none.
        selection: train the choice of blocks directly, see `SelectionSettings`; None for not.
        ternary: quantisation-aware training from this stage on, see `TernarySettings`; None for full precision.
        distill: learn from a teacher, see `DistillSettings`; None for the text alone.
        buckets: draw the lengths of documents in equal shares of 0-4K, 4-12K, 12-24K and 24-32K tokens, as the paper's
            long stage does; or the bounds.
        keep_moments: go on with the optimizer's averages of the stage before.
        log_every, evaluate_every, checkpoint_every: steps between; 0 for none but the last.
        keep_checkpoints: how many of the newest stay.
        evaluation_tokens: of the held-out text, at most.
    """

    name: str
    num_steps: int
    length: int
    sequences_per_step: int
    micro_batch: int = 1
    learning_rate: float = 1e-2
    warmup_steps: int = 100
    decay_steps: int = 0
    decay_type: str = "exponential"
    floor_share: float = 0.05
    sparse_config: dict | None = None
    context: int | None = None
    synthetic: SyntheticSettings | None = None
    selection: SelectionSettings | None = None
    ternary: TernarySettings | None = None
    distill: DistillSettings | None = None
    buckets: list[int] | None = None
    keep_moments: bool = True
    log_every: int = 10
    evaluate_every: int = 0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    evaluation_tokens: int = 100_000

    def __post_init__(self):
        for name in ("num_steps", "sequences_per_step", "micro_batch", "log_every", "keep_checkpoints"):
            _at_least(f"{self.name}.{name}", getattr(self, name), 1)
        for name in ("evaluate_every", "checkpoint_every"):
            _at_least(f"{self.name}.{name}", getattr(self, name), 0)
        _at_least(f"{self.name}.length", self.length, 2)
        if not self.name or self.name.startswith(".") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"A stage's `name` becomes a folder and must be a plain word, got {self.name!r}.")
        if self.name in TAKEN_NAMES:
            raise ValueError(
                f"A stage's `name` must not be one of {', '.join(TAKEN_NAMES)}, which a run has for other folders, "
                f"got {self.name!r}."
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"`checkpoint_every` of stage {self.name!r} must be a multiple of `log_every` ({self.log_every}), so "
                f"that a resumed run logs the same means, got {self.checkpoint_every}."
            )
        if self.num_steps < self.warmup_steps + self.decay_steps:
            raise ValueError(
                f"`num_steps` of stage {self.name!r} must be at least its {self.warmup_steps} steps of warm-up and "
                f"{self.decay_steps} of decay together, got {self.num_steps}."
            )
        if self.sparse_config is not None:
            complete_sparse_config(self.sparse_config)
        elif self.selection is not None and self.selection.sparse_config is None:
            raise ValueError(
                f"`selection` of the dense stage {self.name!r} needs a `sparse_config` of its own, to train for."
            )
        self.schedule  # noqa: B018  (its checks)
        self.length_buckets  # noqa: B018

    @property
    def schedule(self) -> WSDSettings:
        return WSDSettings(
            num_warmup_steps=self.warmup_steps,
            num_decay_steps=self.decay_steps,
            decay_type=self.decay_type,
            floor_share=self.floor_share,
        )

    @property
    def length_buckets(self) -> LengthBuckets | None:
        if self.buckets is None:
            return None
        return LengthBuckets(tuple(self.buckets), (1,) * len(self.buckets))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    Args:
        output: folder of the run.
        text: the text.
        stages: one after another, at least one.
        model: a folder or Hub name to go on training, or "minicpm4-books", the checkpoint that is shipped; or
        architecture: fields of `MiniCPM4Config` of a new model.
        tokenizer: a folder or Hub name; by default the model's own; or
        vocab_size: of a new tokenizer, trained on the text.
        seed: of the weights and of the order of the text.
        mup: muP's initial weights and learning rates (`minicpm4_hf.training.mup`); False for the standard ones.
        init_std: of the new model's embeddings.
        mtp_loss_weight: of the loss of a head that predicts a second token; 0 for no head.
        fp8: linear layers in FP8 (`minicpm4_hf.training.fp8`), but in ternary stages.
        precision: "bf16" (matrix products under autocast, float32 weights) or "fp32".
        fsdp: shard weights, gradients and moments over the processes (`minicpm4_hf.training.fsdp`, which also says
            what "bf16" means then); False gives every process all of them.
        weight_decay, beta1, beta2, epsilon, clip_norm: AdamW; the defaults are those of MiniCPM4's scripts.
        report_to: trackers of transformers' Trainer ("tensorboard", "wandb", ...), besides the local log and curve.

    Raises:
        ValueError: a setting out of its range, or settings that do not fit together.
    """

    output: str
    text: Text
    stages: list[Stage]
    model: str | None = None
    architecture: dict | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    seed: int = 0
    mup: bool = True
    init_std: float = 0.1
    mtp_loss_weight: float = 0.0
    fp8: bool = False
    precision: str = "bf16"
    fsdp: bool = False
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-6
    clip_norm: float = 1.0
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self):
        if (self.model is None) == (self.architecture is None):
            raise ValueError("Give exactly one of `model` (to go on training) and `architecture` (of a new model).")
        if self.model is None and (self.tokenizer is None) == (self.vocab_size is None):
            raise ValueError(
                "A new model needs exactly one of `tokenizer` (a folder) and `vocab_size` (to train one)."
            )
        if self.model is not None and self.vocab_size is not None:
            raise ValueError("A model that goes on training keeps its tokenizer: leave out `vocab_size`.")
        if self.architecture is not None:
            _check_architecture(self.architecture)
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
        if not self.stages:
            raise ValueError("`stages` must name at least one stage.")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"The stages' names must differ, got {', '.join(names)}.")
        for before, stage in zip(self.stages, self.stages[1:]):
            if stage.keep_moments and not before.checkpoint_every:
                raise ValueError(
                    f"Stage {stage.name!r} keeps the optimizer's averages of {before.name!r}, which saves none: give "
                    f"{before.name!r} a `checkpoint_every`, or set `keep_moments` of {stage.name!r} to false."
                )
            if before.ternary is not None and stage.ternary is None:
                raise ValueError(
                    f"Stage {stage.name!r} follows the ternary {before.name!r} and must be ternary as well: give it "
                    "the same `ternary`."
                )
        if self.fsdp and self.precision == "bf16" and self.stages[-1].ternary is not None:
            raise ValueError(
                "With `fsdp` and `precision` bf16 the layers get weights that are rounded to bfloat16 and have other "
                "ternary codes than those that are saved: set `precision` to fp32, or `fsdp` to false."
            )
        if self.mtp_loss_weight and any(stage.distill is not None for stage in self.stages):
            raise ValueError("`distill` is for the next token alone: set `mtp_loss_weight` to 0, or leave it out.")
        if self.text.held_out and self.text.held_out_share:
            raise ValueError("Give `text.held_out` or `text.held_out_share`, not both.")
        if any(stage.evaluate_every for stage in self.stages) and not (self.text.held_out or self.text.held_out_share):
            raise ValueError("`evaluate_every` needs held-out text: give `text.held_out` or `text.held_out_share`.")


# Fields of `MiniCPM4Config` that other settings decide.
_DECIDED = {"vocab_size": "the tokenizer", "sparse_config": "a stage", "mtp_loss_weight": "the recipe"}


def _check_architecture(architecture: dict) -> None:
    known = {field.name for field in dataclasses.fields(MiniCPM4Config)}
    for name in architecture:
        if name in _DECIDED:
            raise ValueError(f"`architecture.{name}` cannot be set: {_DECIDED[name]} decides it.")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"`architecture.{name}` is no field of MiniCPM4Config"
                + (f"; did you mean {close[0]}?" if close else ".")
            )
    try:
        MiniCPM4Config(**architecture)
    except StrictDataclassError as error:
        raise ValueError(f"`architecture`: {' '.join(str(error).split())}") from error


def _at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Read a recipe, with settings replaced by `KEY=VALUE`: KEY may be `stages.0.length`, VALUE is JSON or text.

    Raises:
        ValueError: no JSON, an unknown key, a wrong type, or a setting out of its range.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}.") from error
    for override in overrides:
        _override(content, override)
    return _build(Recipe, content, "")


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package.

    Raises:
        ValueError: there is none of that name.
    """
    folder = Path(__file__).with_name("recipes")
    names = sorted(file.stem for file in folder.glob("*.json"))
    if name not in names:
        raise ValueError(f"There is no recipe {name!r}: give a .json file, or one of {', '.join(names)}.")
    return folder / f"{name}.json"


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"A setting is replaced by KEY=VALUE, got {override!r}.")
    try:
        value = json.loads(value)
    except json.JSONDecodeError:
        pass  # text needs no quotes
    *path, last = key.split(".")
    place = content
    for depth, part in enumerate(path):
        name = ".".join(path[: depth + 1])
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise ValueError(f"There is no {name!r}: it must be a number below {len(place)}.")
            place = place[int(part)]
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise ValueError(f"{name!r} has no settings of its own, so {key!r} cannot be set.")
    if isinstance(place, list):
        raise ValueError(f"{key!r} is an entry of a list; replace one of its settings, or the whole list.")
    place[last] = value


def _build(kind, value, name: str):
    """A value of the annotated type `kind` from JSON's.

    Raises:
        ValueError: another type, an unknown or a missing key.
    """
    label = f"`{name}`" if name else "the recipe"
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{label} must be an object, got {value!r}.")
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        unknown = sorted(set(value) - set(fields))
        if unknown:
            raise ValueError(f"{label} has no setting {unknown[0]!r}; there are {', '.join(fields)}.")
        missing = dataclasses.MISSING
        required = [n for n, f in fields.items() if f.default is missing and f.default_factory is missing]
        absent = [n for n in required if n not in value]
        if absent:
            raise ValueError(f"{label} lacks {absent[0]!r}.")
        prefix = f"{name}." if name else ""
        return kind(**{key: _build(hints[key], item, prefix + key) for key, item in value.items()})
    if isinstance(kind, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _build(options[0], value, name)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{label} must be a list, got {value!r}.")
        return [_build(typing.get_args(kind)[0], item, f"{name}.{i}") for i, item in enumerate(value)]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        words = {int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object"}
        raise ValueError(f"{label} must be {words[kind]}, got {value!r}.")
    return float(value) if kind is float else value


__all__ = ["PRECISIONS", "Recipe", "Stage", "Text", "load_recipe", "shipped_recipe"]
