"""A training run from a recipe: text to shards, a model, one stage after another, and a finished checkpoint.

    summary = run_recipe(load_recipe("recipe.json"))

The output folder holds `tokenizer/` and `shards/` (made once), a folder for each stage (checkpoints, `log.jsonl`,
`curve.svg`, and its finished `model/`), and `model/`, the last stage's; where that is ternary, `model/` has the latent
weights in float32, and `ternary/` is packed from them. A run that was cut off goes on with `resume=True`: from its
last checkpoint, with the losses of a run that was not.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.longrope import extend_context
from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.training.distillation import Teacher
from minicpm4_hf.training.documents import read_documents, resolve_sources
from minicpm4_hf.training.fsdp import MOMENTS, ShardedMoments
from minicpm4_hf.training.mixture import Mixture, SyntheticRows
from minicpm4_hf.training.models import check_models, check_teachers, find_model
from minicpm4_hf.training.mup import initialize_mup_, standard_parametrization
from minicpm4_hf.training.packing import IGNORED, PackedDataset, split_held_out
from minicpm4_hf.training.qat import use_ternary_linears_
from minicpm4_hf.training.recipe import Recipe, Stage, load_recipe
from minicpm4_hf.training.schedule import load_moments_
from minicpm4_hf.training.selection import SelectionObserver
from minicpm4_hf.training.shards import build_shards
from minicpm4_hf.training.synthetic import Prose
from minicpm4_hf.training.tokenizer import train_tokenizer
from minicpm4_hf.training.trainer import (
    STAGING,
    LocalLog,
    MiniCPM4Trainer,
    build_arguments,
    read_log,
    say,
    write_atomically,
)


def run_recipe(recipe: Recipe, *, resume: bool = False) -> dict:
    """Train, and return what was reached.

    Args:
        resume: go on with the run that `recipe.output` holds; the recipe must be the same but for what does not
            change the losses (how often is logged, evaluated and saved, and where to).

    Returns:
        `model`: the finished folder; `ternary`: the packed one, or None; `stages`: for each its last loss and
        evaluation; `seconds`.

    Raises:
        ValueError: the recipe does not fit the text, the machine, or the run that the folder holds; an unfit folder.
        TrainingStopped: a loss that is not finite, or no room for a checkpoint.
        ImportError: matplotlib is missing.
    """
    started = time.monotonic()
    _figure_class(), _sources(recipe)  # what is missing is said before the folder is taken
    check_models(recipe)
    disable_progress_bar()  # of every file that is written or read; the log tells of the progress
    output = Path(recipe.output)
    # The Trainer's settings join the group of processes; its state is what everything else asks.
    arguments = [build_arguments(recipe, stage, output / stage.name) for stage in recipe.stages]
    state = PartialState()
    with state.main_process_first():
        _claim(output, recipe, resume)
        tokenizer = _tokenizer(output, recipe)
        train, held_out = _text(output, recipe, tokenizer)
    check_teachers(recipe, tokenizer)
    stages, folder = [], None
    for number, stage in enumerate(recipe.stages):
        before, folder = folder, output / stage.name
        done = folder / "stage.json"
        if not done.is_file():
            _run_stage(recipe, number, arguments[number], before, tokenizer, train, held_out, state)
        stages.append(json.loads(done.read_text(encoding="utf-8")))
    ternary = recipe.stages[-1].ternary
    if state.is_main_process:
        # Latent weights stay in float32: rounded ones would have other codes.
        _publish(folder / "model", output / "model", torch.bfloat16 if ternary is None else torch.float32)
        if ternary is not None:
            _publish(folder / "model", output / "ternary", torch.bfloat16, quantization_config=ternary.quantization)
    state.wait_for_everyone()
    return {
        "model": str(output / "model"),
        "ternary": None if ternary is None else str(output / "ternary"),
        "stages": stages,
        "seconds": round(time.monotonic() - started, 1),
    }


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Write the recipe into the folder, or compare it with the one there."""
    path = output / "recipe.json"
    now = dataclasses.asdict(recipe)
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"{recipe.output!r} is not empty and holds no training run; choose another `output`.")
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(now, indent=2) + "\n")
        return
    if not resume and PartialState().is_main_process:
        raise ValueError(f"{recipe.output!r} already holds a run: go on with `--resume`, or choose another `output`.")
    before = dataclasses.asdict(load_recipe(path))  # with the defaults of settings that are newer than the run
    begun = sum((output / stage["name"]).is_dir() for stage in before["stages"])  # later ones may still be changed
    differing = _difference(*({**settings, "stages": settings["stages"][:begun]} for settings in (before, now)))
    if differing:
        raise ValueError(
            f"{recipe.output!r} holds a run with another {differing}; use the same recipe, or another `output`."
        )
    write_atomically(path, json.dumps(now, indent=2) + "\n")


# What may change when a run goes on: none of it decides a loss before the change.
_FREE = {"output", "report_to", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "embeddings"}


def _difference(before, now, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            found = (
                None if key in _FREE else _difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            )
            if found:
                return found
        return None
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return next(
            filter(None, (_difference(b, n, f"{name}.{i}") for i, (b, n) in enumerate(zip(before, now)))), None
        )
    return None if before == now else f"`{name}` ({before!r}, now {now!r})"


def _sources(recipe: Recipe) -> tuple[list, list]:
    """The files and Hub data sets to train on, and those held out."""

    def files(sources: list[str]) -> list:
        if not sources:
            return []
        return [
            path.resolve() if path else name for name, path in resolve_sources(sources, recipe.text.split_documents)
        ]

    held_out = files(recipe.text.held_out)
    train = [source for source in files(recipe.text.train) if source not in held_out]
    if not train:
        raise ValueError("`text.train` holds nothing but the held-out text.")
    return train, held_out


def _tokenizer(output: Path, recipe: Recipe):
    folder = output / "tokenizer"
    if not folder.is_dir():
        if recipe.vocab_size is None:
            tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer or find_model(recipe.model))
        else:
            say(f"training a tokenizer of {recipe.vocab_size} tokens")
            documents = read_documents(
                _sources(recipe)[0], text_field=recipe.text.text_field, split_documents=recipe.text.split_documents
            )
            tokenizer = train_tokenizer(documents, vocab_size=recipe.vocab_size)
        partial = output / ".tokenizer"
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    return AutoTokenizer.from_pretrained(folder)


def _text(output: Path, recipe: Recipe, tokenizer):
    """The documents to train on, and those held out or None."""
    train, held_out = _sources(recipe)
    settings = {"text_field": recipe.text.text_field, "split_documents": recipe.text.split_documents}
    shards = build_shards(train, tokenizer, output / "shards" / "train", **settings)
    if held_out:
        return shards, build_shards(held_out, tokenizer, output / "shards" / "held_out", **settings)
    if recipe.text.held_out_share:
        return split_held_out(shards, share=recipe.text.held_out_share, seed=recipe.seed)
    return shards, None


def build_model(recipe: Recipe, stage: Stage, source: str | Path | None, tokenizer) -> MiniCPM4ForCausalLM:
    """The model that a stage begins with: new, or from a folder, with the stage's attention and context.

    Raises:
        ValueError: the architecture does not fit, or the context cannot be extended.
    """
    if source is not None:
        source = find_model(source)
        config = AutoConfig.from_pretrained(source)
    else:
        # Long words stop at both: `</s>` ends a document, the tokenizer's own `eos` a chat turn.
        ends = sorted({2, tokenizer.eos_token_id})
        special = {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": 2}
        config = MiniCPM4Config(vocab_size=len(tokenizer), **{**special, **recipe.architecture})
        if not recipe.mup:
            config = standard_parametrization(config)
    if not isinstance(config, MiniCPM4Config):
        raise ValueError(f"{str(source)!r} is a {config.model_type} model; this trains MiniCPM4.")
    config.sparse_config, config.mtp_loss_weight = stage.sparse_config, recipe.mtp_loss_weight
    if stage.context is not None:
        config = extend_context(config, stage.context)
    if source is None:
        model = MiniCPM4ForCausalLM(config)
        model.generation_config = GenerationConfig(**special)
    else:
        has_head = recipe.mtp_loss_weight > 0 and config.num_mtp_layers is not None
        model = MiniCPM4ForCausalLM.from_pretrained(
            source, config=config, dtype=torch.float32, **({"with_mtp_head": True} if has_head else {})
        )
    if recipe.mtp_loss_weight and model.mtp is None:
        model.add_mtp_head_()
    if source is None:
        initialize_mup_(model, init_std=recipe.init_std)
    if stage.ternary is not None:
        use_ternary_linears_(model, group_size=stage.ternary.group_size)
    elif recipe.fp8:
        from minicpm4_hf.training.fp8 import use_fp8_linears_

        use_fp8_linears_(model)
    return model


def _run_stage(recipe: Recipe, number: int, arguments, before, tokenizer, train, held_out, state) -> None:
    stage, folder = recipe.stages[number], Path(arguments.output_dir)
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if state.is_main_process:
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / STAGING, ignore_errors=True)
    set_seed(recipe.seed)
    model = build_model(recipe, stage, recipe.model if before is None else before / "model", tokenizer)
    dataset = PackedDataset(
        train,
        stage.length,
        num_sequences=stage.num_steps * stage.sequences_per_step,
        buckets=stage.length_buckets,
        seed=recipe.seed + number,
    )
    if stage.synthetic is not None:
        rows = SyntheticRows(
            stage.synthetic, tokenizer, _prose(train, tokenizer), stage.length, seed=recipe.seed + number
        )
        dataset = Mixture(dataset, rows, stage.sequences_per_step)
    parameters = sum(weight.numel() for weight in model.parameters())
    attention = "dense" if stage.sparse_config is None else "sparse"
    weights = "" if stage.ternary is None else f"ternary weights (group size {stage.ternary.group_size}), "
    tokens = stage.num_steps * stage.sequences_per_step * stage.length
    passes = max(dataset.passes().values())
    say(
        f"stage {stage.name}: {parameters:,} parameters, {weights}{attention} attention, {tokens:,} tokens "
        f"({passes:.2g} passes over the text) in {stage.num_steps:,} steps"
        + (f", going on after step {checkpoint.rpartition('-')[2]}" if checkpoint else ""),
    )
    evaluation = None if held_out is None else _evaluation_set(held_out, stage)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    selection = None
    if stage.selection is not None:
        selection = SelectionObserver(model, stage.selection, stage.selection.sparse_config or stage.sparse_config)
    trainer = MiniCPM4Trainer(
        model,
        arguments,
        train_dataset=dataset,
        eval_dataset=evaluation,
        schedule=stage.schedule,
        selection=selection,
        teacher=stage.distill and Teacher(stage.distill, device=arguments.device, dtype=dtype),
        callbacks=[LocalLog(folder, stage.sequences_per_step * stage.length)],
    )
    if before is not None and stage.keep_moments and checkpoint is None:
        if recipe.fsdp:
            trainer.add_callback(ShardedMoments(_moments_file(before, MOMENTS)))
        else:
            moments = torch.load(_moments_file(before, "optimizer.pt"), map_location="cpu", weights_only=True)
            load_moments_(trainer.create_optimizer(), moments)
    trainer.train(resume_from_checkpoint=checkpoint)
    summary = {"name": stage.name, "steps": stage.num_steps, "tokens": tokens, "parameters": parameters}
    if stage.ternary is not None:
        summary["ternary_group_size"] = stage.ternary.group_size
    if evaluation is not None:
        loss = trainer.evaluate()["eval_loss"]
        counted, size = _count(evaluation, tokenizer)
        summary |= {"held_out_loss": loss, "held_out_bits_per_byte": loss * counted / math.log(2) / size}
    _finish(trainer, folder, tokenizer, summary, state)


def _moments_file(stage_folder: Path, name: str) -> Path:
    """Where the optimizer's state at the end of a stage is.

    Raises:
        ValueError: its last checkpoint has none of this name.
    """
    checkpoint = get_last_checkpoint(stage_folder)
    path = Path(checkpoint or stage_folder) / name
    if not path.is_file():
        raise ValueError(
            f"The last checkpoint of stage {stage_folder.name!r} has no {name}; set `keep_moments` of the next stage "
            "to false."
        )
    return path


def _prose(documents, tokenizer) -> Prose:
    """The documents that are trained on, to hide things in."""
    special = {*tokenizer.all_special_ids}
    books = []
    for number in range(documents.num_documents):
        ids = documents.document(number)
        books.append(ids[int(ids[0] in special) : len(ids) - int(ids[-1] in special)])
    return Prose(books, tokenizer)


def _evaluation_set(held_out, stage: Stage) -> PackedDataset:
    wanted = max(1, min(stage.evaluation_tokens, held_out.num_tokens) // stage.length)
    return PackedDataset(held_out, stage.length, num_sequences=wanted)


def _count(evaluation: PackedDataset, tokenizer) -> tuple[int, int]:
    """Tokens of the held-out sequences that have a loss, and the UTF-8 bytes of their text."""
    counted = size = 0
    for i in range(len(evaluation)):
        row = evaluation[i]
        counted += int((row["labels"][1:] != IGNORED).sum())
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size += len(text.encode("utf-8"))
    return counted, size


def _finish(trainer: MiniCPM4Trainer, folder: Path, tokenizer, summary: dict, state: PartialState) -> None:
    """Write the stage's `model/`, its curve, and last `stage.json`, which says that it is done."""
    partial = folder / ".model"
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    state.wait_for_everyone()
    trainer.save_model(str(partial))
    state.wait_for_everyone()
    if state.is_main_process:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here reads
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder / "model", ignore_errors=True)
        os.replace(partial, folder / "model")
        records = read_log(folder)
        losses = [record["loss"] for record in records if "loss" in record]
        summary["last_loss"] = losses[-1] if losses else None
        write_curve(records, folder / "curve.svg")
        write_atomically(folder / "stage.json", json.dumps(summary, indent=2) + "\n")
    state.wait_for_everyone()


def _figure_class():
    """matplotlib's `Figure`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing the loss needs matplotlib; it comes with `pip install minicpm4-hf[train]`."
        ) from error
    return Figure


def write_curve(records: list[dict], path: Path) -> None:
    """Draw the losses of a log as an SVG.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _figure_class()(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), label=label, marker="o" if key == "eval_loss" else None, markersize=3)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, path)


def _publish(source: Path, target: Path, dtype: torch.dtype, **options) -> None:
    """Write the last stage's model in a dtype; `options` of `from_pretrained` may pack it."""
    partial = target.with_name(f".{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    has_head = AutoConfig.from_pretrained(source).num_mtp_layers is not None
    model = MiniCPM4ForCausalLM.from_pretrained(
        source, dtype=dtype, **({"with_mtp_head": True} if has_head else {}), **options
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


__all__ = ["build_model", "run_recipe", "write_curve"]
