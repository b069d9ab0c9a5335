"""transformers' Trainer with what a MiniCPM4 run needs: muP groups, WSD, whole checkpoints, a stop at a bad loss."""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from minicpm4_hf.training.distillation import Teacher
from minicpm4_hf.training.fsdp import FSDPTrainer, fsdp_settings
from minicpm4_hf.training.mup import mup_parameter_groups
from minicpm4_hf.training.schedule import WSDSettings, build_scheduler
from minicpm4_hf.training.selection import SelectionObserver

STAGING = ".saving"  # a checkpoint is written here, and moved to its place when it is whole
LOG = "log.jsonl"
SECONDS_BETWEEN_LINES = 10  # of progress on stderr


class TrainingStopped(ValueError):
    """The run cannot go on; the message says where it stopped and what may help."""


class LocalLog(TrainerCallback):
    """Appends what the Trainer logs to `log.jsonl` of the run, one JSON object a line, and tells of the progress.

    A resumed run drops the lines behind its checkpoint first, so that the file is that of a run never interrupted.

    Args:
        folder: of the run.
        tokens_per_step: for the rate that is printed.
    """

    def __init__(self, folder: Path, tokens_per_step: int):
        self.path, self.tokens_per_step = folder / LOG, tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.started, self.first_step = time.monotonic(), state.global_step
        self.printed, self.loss = self.started, None
        kept = [record for record in read_log(self.path.parent) if record["step"] <= state.global_step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
            self.loss = logs.get("loss", self.loss)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        if not state.is_world_process_zero or now - self.printed < SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        pace = (now - self.started) / (state.global_step - self.first_step)
        loss = "" if self.loss is None else f"  loss {self.loss:.3f}"
        left = pace * (state.max_steps - state.global_step) / 60
        print(
            f"step {state.global_step:,}/{state.max_steps:,}{loss}  {self.tokens_per_step / pace:,.0f} tokens/s  "
            f"{left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )


def read_log(folder: Path) -> list[dict]:
    """The records of a run's log, without a last line that was cut off."""
    path = Path(folder) / LOG
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def say(line: str) -> None:
    """Tell the user on stderr, once for all processes."""
    if PartialState().is_main_process:
        print(line, file=sys.stderr, flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside `path`, then put it in place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


class MiniCPM4Trainer(FSDPTrainer):
    """A Trainer for MiniCPM4.

    Args:
        schedule: the learning rate over the steps.
        teacher: of a distillation; evaluation is on the text alone.
        selection: watches the model's attention for the loss of the selection.

    The peak learning rate and the weight decay are those of `args`, given to each kind of parameter as muP has it;
    with `hidden_size == dim_model_base` in the config that is the standard parametrisation. The data come in the order
    of the data set (`args.train_sampling_strategy="sequential"`), which resuming relies on.

    Raises:
        TrainingStopped: the loss is not finite, or a checkpoint could not be written (the one before is whole).
    """

    def __init__(
        self,
        *args,
        schedule: WSDSettings,
        teacher: Teacher | None = None,
        selection: SelectionObserver | None = None,
        **kwargs,
    ):
        self.schedule, self.teacher, self.selection = schedule, teacher, selection
        self._run_dir = None
        self._parts = {}  # of a loss that has several: sums since the last log, by name
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)  # its lines would be among the results on stdout

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = mup_parameter_groups(
                self.model, learning_rate=self.args.learning_rate, weight_decay=self.args.weight_decay
            )
            self.optimizer = torch.optim.AdamW(
                groups,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                fused=self.args.device.type in ("cpu", "cuda"),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = build_scheduler(optimizer or self.optimizer, self.schedule, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        # A cache would hide from transformers' masks where packed documents begin.
        inputs = {**inputs, "use_cache": False}
        if model.training and self.selection is not None:
            self.selection.prepare(inputs["position_ids"], inputs["labels"])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and outputs.get("mtp_loss") is not None:
            self._add_parts(ntp_loss=outputs["ntp_loss"], mtp_loss=outputs["mtp_loss"])
        if model.training and self.teacher is not None:
            # `loss` is this process's share times their number: DDP and FSDP take the mean of the gradients.
            processes = self.accelerator.num_processes
            distance = self.teacher.divergence(outputs["logits"], inputs) / kwargs["num_items_in_batch"]
            self._add_parts(ntp_loss=loss.detach() / processes, distill_loss=distance.detach())
            weight = self.teacher.settings.weight
            loss = (1 - weight) * loss + weight * processes * distance
        if model.training and self.selection is not None:
            # A mean; `loss` is a sum already divided by the tokens of the whole step.
            distance = self.selection.take() / self.args.gradient_accumulation_steps
            parts = {"selection_loss": distance}
            if self.teacher is None and outputs.get("mtp_loss") is None:
                parts["ntp_loss"] = loss
            self._add_parts(**{name: part.detach() / self.accelerator.num_processes for name, part in parts.items()})
            loss = loss + self.selection.settings.weight * distance
        return (loss, outputs) if return_outputs else loss

    def _add_parts(self, **parts):
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value

    def log(self, logs, start_time=None):
        if "loss" in logs and self._parts:
            steps = self.state.global_step - self._parts_since
            for name, value in self._parts.items():
                logs[name] = self.accelerator.reduce(value, "sum").item() / steps
            self._parts = {}
        super().log(logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(loss.item()):
            step = self.state.global_step
            per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            begin = step * per_step * self.args.world_size
            raise TrainingStopped(
                f"The loss is {loss.item()} at step {step + 1}, in the batch of sequences {begin} to "
                f"{begin + per_step * self.args.world_size - 1} of the training data (process "
                f"{self.args.process_index}). The last checkpoint is from before; go on from it with a lower "
                "`learning_rate`, or look at these sequences."
            )
        return loss

    def _get_output_dir(self, trial):
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        run = Path(super()._get_output_dir(trial))
        staging, name = run / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._run_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # RuntimeError: how torch and safetensors report a full disk
            shutil.rmtree(staging, ignore_errors=True)
            raise TrainingStopped(
                f"The checkpoint of step {self.state.global_step} could not be written to {str(run)!r} "
                f"({' '.join(str(error).split())}); the one before it is whole, so free some room and go on with "
                "`--resume`."
            ) from error
        finally:
            self._run_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in (staging / name).rglob("*"):
                if path.is_file():
                    _flush(path)
            final = run / name
            shutil.rmtree(final, ignore_errors=True)
            os.replace(staging / name, final)
            shutil.rmtree(staging, ignore_errors=True)
            rotate_checkpoints(output_dir=str(run), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


def _flush(path: Path) -> None:
    """Have the file's contents on the disk, so that the folder's new name cannot come before them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def build_arguments(recipe, stage, folder: Path) -> TrainingArguments:
    """The Trainer's settings for a stage.

    Raises:
        ValueError: the processes and the micro-batch do not divide the sequences of a step, or do not fit `fsdp`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's and accelerate's
    at_once = stage.micro_batch * world_size
    if stage.sequences_per_step % at_once:
        raise ValueError(
            f"`sequences_per_step` of stage {stage.name!r} ({stage.sequences_per_step}) must be a multiple of "
            f"`micro_batch` times the number of processes ({stage.micro_batch} x {world_size})."
        )
    evaluate, save = stage.evaluate_every, stage.checkpoint_every
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.num_steps,
        per_device_train_batch_size=stage.micro_batch,
        per_device_eval_batch_size=stage.micro_batch,
        gradient_accumulation_steps=stage.sequences_per_step // at_once,
        learning_rate=stage.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        max_grad_norm=recipe.clip_norm,
        bf16=recipe.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # said, or several processes on CPUs do not find each other
        seed=recipe.seed,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=evaluate or None,
        prediction_loss_only=True,
        save_strategy="steps" if save else "no",
        save_steps=save or 1,
        save_total_limit=stage.keep_checkpoints,
        use_cache=True,  # of the config that is saved; the default would make what is trained generate without a cache
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to=recipe.report_to or "none",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        **fsdp_settings(recipe.fsdp, world_size),
    )


__all__ = ["LocalLog", "MiniCPM4Trainer", "TrainingStopped", "build_arguments", "read_log", "say", "write_atomically"]
