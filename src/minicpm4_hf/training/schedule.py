"""The WSD learning-rate schedule: warm-up, stable, decay, and what may follow a stable checkpoint.

With W warm-up, D decay and N training steps, the factor on every group's learning rate at step s (s steps are done) is

    s < W              floor_share + (1 - floor_share) * s / W
    W <= s < N - D     1
    N - D <= s <= N    the decay, from 1 to its end
    s > N              the decay's end

and the decay is one of

    exponential    0.5 ** ((s - (N - D)) / half_life_steps), or with the half-life that ends at `floor_share`
    linear, cosine, 1-sqrt    transformers' `get_wsd_schedule`, ending at `floor_share`

A run without decay stays at 1 for as long as it goes on; one of its checkpoints can go on in two ways, both with
`Trainer.train(resume_from_checkpoint=...)` or the same by hand:

    the same settings and more steps           stable as before
    decay_branch(settings, scheduler_state=..., num_decay_steps=...)    a decay of any length, from here on

Training that is continued after a decay, on other data or with quantisation, is a stage of its own that counts its
steps from 0: its warm-up begins at `floor_share`, so with the floor that the decay ended at the rate rises from where
it was. `load_moments_` takes over what the optimizer has learned about the gradients, but not the old rates.

Sources: MiniCPM (arXiv:2404.06395), section on the WSD scheduler, for the phases and the exponential decay. The
model of the InfLLM-V2 paper ends at 3e-4 of 7.5e-3, a `floor_share` of 0.04.
"""

import dataclasses
import math
import sys
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_wsd_schedule

DECAY_TYPES = ("exponential", "linear", "cosine", "1-sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSDSettings:
    """What decides the schedule, besides the number of training steps.

    Args:
        num_warmup_steps: steps of linear warm-up.
        num_decay_steps: steps of decay, the last of the run; 0 leaves the run stable.
        decay_type: one of `DECAY_TYPES`.
        floor_share: what warm-up begins at and decay ends at, as a share of the peak, in [0, 1).
        half_life_steps: of an exponential decay, in place of `floor_share`; warm-up then begins at 0.

    Raises:
        ValueError: a setting out of its range, or settings that do not fit together.
    """

    num_warmup_steps: int
    num_decay_steps: int = 0
    decay_type: str = "exponential"
    floor_share: float = 0.0
    half_life_steps: float | None = None

    def __post_init__(self):
        for name in ("num_warmup_steps", "num_decay_steps"):
            _check_count(name, getattr(self, name), 0)
        if self.decay_type not in DECAY_TYPES:
            raise ValueError(f"`decay_type` must be one of {', '.join(DECAY_TYPES)}, got {self.decay_type!r}.")
        if not 0 <= self.floor_share < 1:
            raise ValueError(f"`floor_share` must be at least 0 and less than 1, got {self.floor_share}.")
        if self.half_life_steps is not None:
            if self.decay_type != "exponential" or self.floor_share:
                raise ValueError(
                    "`half_life_steps` is for an exponential decay and takes the place of `floor_share`; got it with "
                    f"`decay_type` {self.decay_type!r} and `floor_share` {self.floor_share}."
                )
            if not (self.half_life_steps > 0 and math.isfinite(self.half_life_steps)):
                raise ValueError(f"`half_life_steps` must be a number greater than 0, got {self.half_life_steps}.")
        elif self.decay_type == "exponential" and self.num_decay_steps and not self.floor_share:
            raise ValueError(
                "An exponential decay does not reach 0: give `floor_share`, the share of the peak that it ends at, or "
                "`half_life_steps`."
            )


def _check_count(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def _exponential_factor(
    step: int,
    *,
    num_warmup_steps: int,
    num_stable_steps: int,
    num_decay_steps: int,
    floor_share: float,
    half_life_steps: float,
) -> float:
    if step < num_warmup_steps:
        return floor_share + (1 - floor_share) * step / num_warmup_steps
    decayed = max(0, step - num_warmup_steps - num_stable_steps)
    return 0.5 ** (min(decayed, num_decay_steps) / half_life_steps)


def build_scheduler(optimizer: Optimizer, settings: WSDSettings, num_training_steps: int) -> LambdaLR:
    """The schedule on an optimizer, whose groups' rates are the peaks (`initial_lr` where it had a schedule before).

    The factor depends on the step alone, so that a run that was saved and resumed has the rates of one that was not.
    The settings are not part of `state_dict`: a state that was saved under others loads, and these go on.

    Args:
        num_training_steps: optimizer steps of the run, counted from its first one.

    Raises:
        ValueError: fewer training steps than warm-up and decay take together.
    """
    _check_count("num_training_steps", num_training_steps, 1)
    num_stable_steps = num_training_steps - settings.num_warmup_steps - settings.num_decay_steps
    if num_stable_steps < 0:
        raise ValueError(
            f"`num_training_steps` must be at least the {settings.num_warmup_steps} steps of warm-up and the "
            f"{settings.num_decay_steps} of decay together, got {num_training_steps}."
        )
    if settings.num_decay_steps == 0:
        # The rate of a finished stable run, which its last checkpoint holds, is the one to go on with.
        num_stable_steps = sys.maxsize
    phases = {
        "num_warmup_steps": settings.num_warmup_steps,
        "num_stable_steps": num_stable_steps,
        "num_decay_steps": settings.num_decay_steps,
    }
    if settings.decay_type != "exponential":
        return get_wsd_schedule(optimizer, **phases, decay_type=settings.decay_type, min_lr_ratio=settings.floor_share)
    half_life_steps = settings.half_life_steps or math.inf
    if settings.num_decay_steps and settings.half_life_steps is None:
        half_life_steps = settings.num_decay_steps / math.log2(1 / settings.floor_share)
    # A partial, not an object of ours: LambdaLR saves an object's attributes, and loading would bring back the old.
    factor = partial(_exponential_factor, **phases, floor_share=settings.floor_share, half_life_steps=half_life_steps)
    return LambdaLR(optimizer, factor)


def decay_branch(settings: WSDSettings, *, scheduler_state: dict, num_decay_steps: int) -> tuple[WSDSettings, int]:
    """The settings and the training steps of a run that goes on from a stable checkpoint and decays at once.

    Args:
        settings: of the run that the checkpoint is of.
        scheduler_state: `state_dict()` of its scheduler at the checkpoint; `scheduler.pt` of a Trainer's.
        num_decay_steps: length of the decay, which may be another for every branch.

    Returns:
        What `build_scheduler` takes: the settings with this decay, and the checkpoint's step plus `num_decay_steps`.

    Raises:
        ValueError: the checkpoint is from the warm-up or from a decay, the settings cannot decay, or the state is not
            a scheduler's.
    """
    _check_count("num_decay_steps", num_decay_steps, 1)
    missing = {"last_epoch", "_last_lr", "base_lrs"} - set(scheduler_state)
    if missing:
        raise ValueError(
            f"`scheduler_state` must be the `state_dict()` of what `build_scheduler` gave, and lacks {min(missing)!r}."
        )
    step, rates = scheduler_state["last_epoch"], scheduler_state["_last_lr"]
    if step < settings.num_warmup_steps or rates != scheduler_state["base_lrs"]:
        raise ValueError(
            f"A decay must begin at a checkpoint of the stable phase, and at step {step} the learning rates are "
            f"{rates}, of peaks {scheduler_state['base_lrs']}; take a checkpoint from between warm-up and decay."
        )
    return dataclasses.replace(settings, num_decay_steps=num_decay_steps), step + num_decay_steps


def load_moments_(optimizer: Optimizer, state_dict: dict) -> None:
    """Load an optimizer's state of an earlier stage into the optimizer of a new one, which keeps its own settings.

    `load_state_dict` would also bring back the groups' decayed learning rates, and their old peaks, which a scheduler
    takes before the new ones. Call this before or after `build_scheduler`.

    Raises:
        ValueError: the groups do not have the same parameters.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state_dict)
    for group, settings in zip(optimizer.param_groups, own):
        params = group["params"]
        group.clear()
        group.update(settings, params=params)


__all__ = ["DECAY_TYPES", "WSDSettings", "build_scheduler", "decay_branch", "load_moments_"]
