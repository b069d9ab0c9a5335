"""Distillation: a stage in which a model learns the next-token distributions of a teacher.

    loss = (1 - weight) * next-token loss + weight * temperature^2 * KL(teacher || student)

with both distributions at the temperature, averaged over the same tokens as the next-token loss. The factor
temperature^2 keeps the gradient's size where the temperature changes (Hinton et al., arXiv:1503.02531, section 2).

BitCPM-CANN distils after quantisation-aware training and apart from it: first stages on the text alone, then a stage
with a teacher in full precision. A recipe does the same with `distill` in its last stage.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minicpm4_hf.training.models import find_model
from minicpm4_hf.training.packing import IGNORED

MODEL_INPUTS = ("input_ids", "position_ids", "attention_mask")


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """What a stage learns from a teacher.

    Args:
        teacher: folder or Hub name of a model with the same tokens, or "minicpm4-books", the shipped checkpoint.
        weight: of the teacher in the loss, above 0 and at most 1; the next-token loss has the rest.
        temperature: that both logits are divided by, above 0.

    Raises:
        ValueError: a setting out of its range.
    """

    teacher: str
    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        if not 0 < self.weight <= 1:
            raise ValueError(f"`distill.weight` must be above 0 and at most 1, got {self.weight}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`distill.temperature` must be a number above 0, got {self.temperature}.")


def divergence(
    logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, *, temperature: float = 1.0
) -> torch.Tensor:
    """`temperature^2 * KL(teacher || student)`, summed over the tokens that have a next-token loss.

    Args:
        logits: `[B, T, V]` of the student, any floating dtype; computed in float32.
        teacher_logits: `[B, T, V]`; gets no gradient.
        labels: `[B, T]`, -100 for tokens that are no target; position t is judged by the label of t + 1.

    Returns:
        A float32 scalar, nats.
    """
    scored = labels[:, 1:] != IGNORED
    student = F.log_softmax(logits[:, :-1][scored].float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits[:, :-1][scored].detach().float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2


class Teacher:
    """A model that is asked for logits only, loaded once, without gradients.

    Args:
        settings: of the stage.
        device: where it runs; each process has one of its own, unsharded.
        dtype: that it computes in.
    """

    def __init__(self, settings: DistillSettings, *, device: torch.device, dtype: torch.dtype):
        self.settings = settings
        source = find_model(settings.teacher)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
        self.model = model.requires_grad_(False).eval().to(device)

    def divergence(self, logits: torch.Tensor, inputs: dict) -> torch.Tensor:
        """`divergence` of a student's logits on a batch, by the student's inputs and `labels`."""
        with torch.no_grad():
            asked = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
            teacher_logits = self.model(**asked, use_cache=False).logits
        return divergence(logits, teacher_logits, inputs["labels"], temperature=self.settings.temperature)


__all__ = ["DistillSettings", "Teacher", "divergence"]
