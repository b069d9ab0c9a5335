"""Supervised fine-tuning on chats with TRL: loss on what the assistant writes, packed rows, muP's learning rates.

    fine_tune(SFTSettings(model="openbmb/MiniCPM4-0.5B", data=["chats.jsonl"], output="runs/chat"))

`minicpm4_hf.training.chats` says what a chat is. The template's `{% generation %}` marks say which tokens the
assistant writes, its end token among them, and only these have a loss. Chats are packed into rows of `length` tokens
without attention across them: `position_ids` count from 0 in each.

The output folder holds `run.json` (the settings), checkpoints, `log.jsonl`, the finished `model/` with the tokenizer,
`adapter/` from LoRA, and last `result.json`. A run that was cut off goes on with `resume=True` and has the losses of
one that was not.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.training.chats import digest_of, encode_chat, load_chats, read_chats, read_columns
from minicpm4_hf.training.packing import IGNORED
from minicpm4_hf.training.schedule import WSDSettings
from minicpm4_hf.training.trainer import (
    LOG,
    STAGING,
    LocalLog,
    MiniCPM4Trainer,
    read_log,
    say,
    write_atomically,
)

try:
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer, pack_dataset
except ModuleNotFoundError as error:
    if error.name not in ("datasets", "peft", "trl"):
        raise
    raise ImportError(
        f"Supervised fine-tuning needs {error.name}; it comes with `pip install minicpm4-hf[sft]`."
    ) from error

WARMUP_SHARE, DECAY_SHARE, FLOOR_SHARE = 0.05, 0.2, 0.05  # of the steps, of the steps, of the peak; see `schedule`
WEIGHT_DECAY, CLIP_NORM, BETAS = 0.1, 1.0, (0.9, 0.95)  # as in `minicpm4 train`; adapters do not decay
POINTS = 10  # checkpoints and evaluations of a run


@dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """What decides a run.

    Args:
        model: folder or Hub id of the checkpoint to begin with.
        data: `.jsonl` and `.parquet` files, folders of them, or `hub:OWNER/NAME?split=...`.
        output: folder of the run.
        held_out: as `data`; evaluated before, during and after, and never trained on.
        length: tokens of a packed row. A longer chat is cut at its end.
        num_epochs: passes over the data, 3 if neither this nor `num_steps` is given; or
        num_steps: optimizer steps.
        batch: rows of an optimizer step, over all processes. Each goes through the model by itself.
        learning_rate: peak; by default 3e-4, a thirtieth of MiniCPM's for pretraining, which muP divides for the
            matrices (by 16 at MiniCPM4-8B). With LoRA 2e-4, the same for all adapters.
        lora_rank: train LoRA adapters of this rank on every linear layer but the head, in place of the model.
        seed: of the order of the rows and of new adapters.

    Raises:
        ValueError: a setting out of its range, or both `num_epochs` and `num_steps`.
    """

    model: str
    data: list[str]
    output: str
    held_out: list[str] = dataclasses.field(default_factory=list)
    length: int = 4096
    num_epochs: int | None = None
    num_steps: int | None = None
    batch: int = 8
    learning_rate: float | None = None
    lora_rank: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.num_epochs is not None and self.num_steps is not None:
            raise ValueError("Give `num_epochs` or `num_steps`, not both.")
        if self.num_steps is None and self.num_epochs is None:
            object.__setattr__(self, "num_epochs", 3)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 3e-4 if self.lora_rank is None else 2e-4)
        for name, minimum in (("length", 2), ("num_epochs", 1), ("num_steps", 1), ("batch", 1), ("lora_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"`learning_rate` must be a number greater than 0, got {self.learning_rate}.")


class MiniCPM4SFTTrainer(MiniCPM4Trainer, SFTTrainer):
    """TRL's `SFTTrainer` with what `MiniCPM4Trainer` has: its groups, schedule, checkpoints and stop at a bad loss.

    Args:
        schedule: the learning rate over the steps.

    Adapters all learn at `args.learning_rate`: muP's rules are about widths, which an adapter's inner size does not
    follow. The loss of a step is the mean over its scored tokens, and so is that of an evaluation with
    `args.per_device_eval_batch_size=1`, whatever the rows they lie in. A head for multi-token prediction is not
    trained.
    """

    def create_optimizer(self, model=None):
        if is_peft_model(self.model):
            return Trainer.create_optimizer(self)
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # TRL's loss, which gives `use_cache=False` too and does not hold all logits at once; not our Trainer's.
        return SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        num_scored = sum(int((labels != IGNORED).sum()) for _, labels in read_columns(dataloader.dataset, "labels"))
        self._scored_per_row = num_scored / len(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.args.per_device_eval_batch_size == 1:
            # The evaluation takes the mean over rows; so weighted it is the one over tokens.
            loss = loss * ((inputs["labels"] != IGNORED).sum() / self._scored_per_row)
        return loss, logits, labels

    def _send_telemetry(self):
        pass  # TRL would tell its makers of each run

    def create_model_card(self, *args, **kwargs):
        pass  # TRL's would stand beside each checkpoint


def fine_tune(
    settings: SFTSettings,
    *,
    tokenizer=None,
    load_model: Callable[[str], MiniCPM4ForCausalLM] | None = None,
    resume: bool = False,
) -> dict:
    """Train, and return what was reached.

    Args:
        tokenizer: that of `settings.model` by default.
        load_model: gives the model in the dtype it is called with; called when the data have been found sound. By
            default `settings.model` is loaded, from safetensors alone.
        resume: go on with the run that `settings.output` holds, which must have the same settings and data.

    Returns:
        `model` and `adapter` (None without LoRA): the finished folders; `steps`, `chats`; `last_loss`,
        `held_out_loss_before` and `held_out_loss`: nats a scored token, the latter None without held-out chats;
        `seconds`, of this call.

    Raises:
        ValueError: unfit data, settings, model or folder.
        FileNotFoundError: a source does not exist.
        TrainingStopped: a loss that is not finite, or no room for a checkpoint.
    """
    started = time.monotonic()
    disable_progress_bar(), datasets.disable_progress_bars()  # the log tells of the progress
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(settings.model)
    chats = load_chats(settings.data, tokenizer, length=settings.length, without=settings.held_out)
    held_out = load_chats(settings.held_out, tokenizer, length=settings.length) if settings.held_out else None
    rows, batch, num_steps = _plan(chats, settings)
    output = Path(settings.output)
    arguments = _build_arguments(settings, num_steps, batch, evaluate=held_out is not None)
    state = PartialState()  # the arguments have joined the group of processes
    identity = {**dataclasses.asdict(settings), "data": digest_of(chats), "held_out": digest_of(held_out)}
    _check_folder(output, identity, resume)
    done = output / "result.json"
    if not done.is_file():
        model = _load(settings, load_model, tokenizer)
        state.wait_for_everyone()  # all have looked into the folder
        if state.is_main_process:
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / "run.json", json.dumps(identity, indent=2) + "\n")
        trainer = _train(settings, model, tokenizer, arguments, rows, held_out, len(chats))
        if state.is_main_process:
            _publish(trainer, output, tokenizer, chats)
            records = read_log(output)
            held_out_losses = [record["eval_loss"] for record in records if "eval_loss" in record] or [None]
            result = {
                "model": str(output / "model"),
                "adapter": str(output / "adapter") if settings.lora_rank else None,
                "steps": num_steps,
                "chats": len(chats),
                "last_loss": [record["loss"] for record in records if "loss" in record][-1],
                "held_out_loss_before": held_out_losses[0],
                "held_out_loss": held_out_losses[-1],
            }
            write_atomically(done, json.dumps(result, indent=2) + "\n")
        state.wait_for_everyone()
    return {**json.loads(done.read_text(encoding="utf-8")), "seconds": round(time.monotonic() - started, 1)}


def _plan(chats: datasets.Dataset, settings: SFTSettings) -> tuple[datasets.Dataset, int, int]:
    """The packed rows of all steps in order, each pass over them in another; how many a step has; and the steps."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's and accelerate's
    if settings.batch % world_size:
        raise ValueError(f"`batch` must be a multiple of the {world_size} processes, got {settings.batch}.")
    packed = pack_dataset(chats.shuffle(seed=settings.seed), settings.length)
    batch = min(settings.batch, max(len(packed) // world_size, 1) * world_size)
    if batch < settings.batch:
        say(f"the chats fill only {len(packed)} rows of {settings.length:,} tokens, so a step has {batch}")
    num_steps = settings.num_steps or math.ceil(settings.num_epochs * len(packed) / batch)
    passes = range(math.ceil(num_steps * batch / len(packed)))
    orders = [np.random.default_rng((settings.seed, number)).permutation(len(packed)) for number in passes]
    return packed.select(np.concatenate(orders)[: num_steps * batch]), batch, num_steps


def _build_arguments(settings: SFTSettings, num_steps: int, batch: int, *, evaluate: bool) -> SFTConfig:
    every = math.ceil(num_steps / POINTS)
    has_accelerator = torch.accelerator.is_available()
    return SFTConfig(
        output_dir=settings.output,
        max_steps=num_steps,
        packing=True,
        max_length=settings.length,
        dataset_kwargs={"skip_prepare_dataset": True},  # tokens, labels and rows are made here
        per_device_train_batch_size=1,  # TRL joins the rows of a batch to one, and dense masks grow with its square
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=batch // int(os.environ.get("WORLD_SIZE", "1")),
        learning_rate=settings.learning_rate,
        weight_decay=0.0 if settings.lora_rank else WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP_NORM,
        bf16=has_accelerator,
        use_cpu=not has_accelerator,
        gradient_checkpointing=None,  # off: TRL's default is on, and False is a deprecated word for it
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=every,
        prediction_loss_only=True,
        save_steps=every,
        save_total_limit=1,
        use_cache=True,  # of the config that is saved; the default would make what is tuned generate without a cache
        train_sampling_strategy="sequential",  # of an order that is made beforehand
        report_to="none",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def _check_folder(output: Path, identity: dict, resume: bool) -> None:
    """Raise where the folder holds something else than the run to go on with."""
    path = output / "run.json"
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"{str(output)!r} is not empty and holds no such run; choose another `output`.")
        return
    if not resume:
        raise ValueError(f"{str(output)!r} already holds a run: go on with `--resume`, or choose another `output`.")
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in identity.items():
        if name != "output" and before.get(name) != value:
            old = "" if name in ("data", "held_out") else f" ({before.get(name)!r}, now {value!r})"
            raise ValueError(f"{str(output)!r} holds a run with another `{name}`{old}; choose another `output`.")


def _load(settings: SFTSettings, load_model, tokenizer) -> MiniCPM4ForCausalLM:
    # A frozen model keeps its checkpoint's dtype on a GPU; what learns is float32.
    dtype = "auto" if settings.lora_rank and torch.accelerator.is_available() else "float32"
    if load_model is None:
        model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, use_safetensors=True)
    else:
        model = load_model(dtype)
    config = model.config
    if not isinstance(config, MiniCPM4Config):
        raise ValueError(f"{settings.model!r} is a {config.model_type} model; this trains MiniCPM4.")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size}.")
    if settings.length > config.max_position_embeddings:
        context = f"the model's context of {config.max_position_embeddings} tokens"
        raise ValueError(f"`length` must be at most {context}, got {settings.length}.")
    if config.num_mtp_layers is not None:
        say("the checkpoint's head for multi-token prediction is not trained and will not be in the result")
    return model


def _train(settings, model, tokenizer, arguments, rows, held_out, num_chats) -> MiniCPM4SFTTrainer:
    """Run all steps, from the last checkpoint where there is one."""
    output, num_steps, state = Path(settings.output), arguments.max_steps, PartialState()
    checkpoint = get_last_checkpoint(output)
    state.wait_for_everyone()
    if state.is_main_process:
        shutil.rmtree(output / STAGING, ignore_errors=True)
        if checkpoint is None:
            (output / LOG).unlink(missing_ok=True)
    arguments.eval_on_start = held_out is not None and checkpoint is None
    num_tokens = sum(int(lengths.sum()) for lengths, _ in read_columns(rows, "input_ids"))
    num_parameters, rank = model.num_parameters(), settings.lora_rank
    lora = rank and LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = MiniCPM4SFTTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=None if held_out is None else pack_dataset(held_out, settings.length),
        processing_class=tokenizer,
        schedule=WSDSettings(
            num_warmup_steps=round(WARMUP_SHARE * num_steps),
            num_decay_steps=round(DECAY_SHARE * num_steps),
            floor_share=FLOOR_SHARE,
        ),
        peft_config=lora,
        callbacks=[LocalLog(output, num_tokens // num_steps)],
    )
    learning = trainer.model.num_parameters(only_trainable=True)
    say(
        f"{num_chats:,} chats, {num_tokens:,} tokens in {num_steps:,} steps; {learning:,} of {num_parameters:,} "
        "parameters learn" + (f"; going on after step {checkpoint.rpartition('-')[2]}" if checkpoint else "")
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def _publish(trainer: MiniCPM4SFTTrainer, output: Path, tokenizer, chats: datasets.Dataset) -> None:
    """Write `model/` in bfloat16, as `minicpm4 train` does, adapters merged into it, and `adapter/`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model):
        _replace(output / "adapter", model.save_pretrained)
        model = model.merge_and_unload()
    # It learned to end its turn with a token that a base model may not know as an end.
    end = next(label for label in reversed(chats[0]["labels"]) if label != IGNORED)
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else [*(ends or ())]
    if end in tokenizer.added_tokens_decoder and end not in ends:
        model.generation_config.eos_token_id = [*ends, end]
    _replace(output / "model", model.to(torch.bfloat16).save_pretrained, tokenizer.save_pretrained)


def _replace(folder: Path, *writers: Callable[[Path], object]) -> None:
    """Put a folder in place when all of it is written."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for write in writers:
        write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


__all__ = ["MiniCPM4SFTTrainer", "SFTSettings", "encode_chat", "fine_tune", "load_chats", "read_chats"]
