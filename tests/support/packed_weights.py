"""Random packed weights of every kind, and what they stand for in float64, computed apart from the library."""

from dataclasses import dataclass

import torch

OPERATIONS = {"ternary": "ternary_linear", "int4": "int4_linear", "int8": "int8_linear"}
LOWEST = {"ternary": (-1, 2), "int4": (-8, 8), "int8": (-128, 128)}


@dataclass(frozen=True)
class Packed:
    kind: str
    tensors: tuple  # what the operation takes after x
    weight: torch.Tensor  # float64 [N, K]


def make_packed(kind, outputs, columns, group_size, *, scale_dtype=torch.float32, act_order=False, seed=0):
    """Codes and scales of both signs, all codes alike; `group_size` -1 for whole rows."""
    generator = torch.Generator().manual_seed(seed)
    group_size = columns if group_size == -1 else group_size
    codes = torch.randint(*LOWEST[kind], (outputs, columns), generator=generator)
    scales = torch.rand(outputs, columns // group_size, generator=generator) + 0.5
    scales = (scales * (torch.randint(0, 2, scales.shape, generator=generator) * 2 - 1)).to(scale_dtype)
    groups = torch.arange(columns) // group_size
    if act_order:
        groups = groups[torch.randperm(columns, generator=generator)]
    weight = codes.double() * scales.double()[:, groups]
    if kind == "int8":
        return Packed(kind, (codes.to(torch.int8), scales), weight)
    if kind == "ternary":
        fields = (codes + 1).view(outputs, -1, 4) << torch.tensor([0, 2, 4, 6])
        return Packed(kind, (fields.sum(-1).to(torch.uint8), scales), weight)
    words = ((codes + 8).view(outputs, -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    index = (groups.to(torch.int32),) if act_order else (None,)
    return Packed(kind, (words.T.contiguous(), scales.T.contiguous(), *index), weight)


def make_rows(rows, columns, dtype, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_exact(out, x, packed, *, rounds_inputs=False):
    """Nothing but the order of float32 sums and one rounding to x's dtype stand between `out` and float64.

    With `rounds_inputs`, also up to eight bfloat16 rows times ternary codes: 16 neighbouring inputs are rounded to
    multiples of the largest of them over 32,512.
    """
    exact = x.double() @ packed.weight.T
    size = x.double().abs() @ packed.weight.abs().T
    assert out.dtype == x.dtype and out.shape == exact.shape
    # Half a step of the dtype, and of float32 as many as terms are added one after another, at worst.
    terms = max(x.shape[-1], 1) ** 0.5 * 4
    step = torch.finfo(x.dtype).smallest_normal
    allowed = 0.501 * torch.finfo(x.dtype).eps * exact.abs() + terms * 2**-24 * size + step
    if rounds_inputs and packed.kind == "ternary" and x.dtype == torch.bfloat16 and x.numel() <= 8 * x.shape[-1]:
        padded = torch.nn.functional.pad(x.double().abs(), (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
        largest = padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[..., : x.shape[-1]]
        allowed += (largest / (2 * 32512)) @ packed.weight.abs().T
    excess = ((out.double() - exact).abs() - allowed).max().item() if out.numel() else 0.0
    assert excess <= 0, f"{packed.kind}: above the allowed error by {excess:.2e}"
