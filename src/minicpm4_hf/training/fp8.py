"""FP8 mixed precision for the linear projections of the decoder layers, as MiniCPM4 was pre-trained.

    from minicpm4_hf.training.fp8 import use_fp8_linears_, use_plain_linears_

    use_fp8_linears_(model)  # before torch.compile and before adapters; the optimizer may exist already
    ...                      # train as before
    use_plain_linears_(model)

For `y = x W'`, `x [M, K]` and `W [N, K]`:

| product                  | first operand                 | second operand             | sums    |
|--------------------------|-------------------------------|----------------------------|---------|
| forward, `x W'`          | `x`, e4m3, a scale per 1x128  | `W`, e4m3, per 128x128     | float32 |
| input gradient, `dy W`   | `dy`, e4m3, per 1x128         | `W`, the same codes        | float32 |
| weight gradient, `dy' x` | `dy`, bfloat16                | `x`, bfloat16              | float32 |

A block is 128 neighbours along the dimension that is summed over; a 128x128 block of `W` is one whichever way `W` is
read. A scale is the block's largest magnitude / 448, the largest e4m3 number, found anew at each step. Master weights,
embedding, LM head, norms and attention stay as they are. Source: MiniCPM4 report, arXiv:2506.07900, pre-training
engineering (what is in FP8, block sizes, bfloat16 weight gradient), after DeepSeek-V3, arXiv:2412.19437, section 3.3.

Gradients are e4m3 too, which the MiniCPM4 report leaves open: with a scale per 128 numbers the wider range of e5m2 is
not needed, and its precision is half (DeepSeek-V3, section 3.3.2, and the default of NVIDIA Transformer Engine's
block-scaling recipe).

A layer that was replaced computes in FP8 in `eval()` and without gradients too: what is evaluated is what is trained.
Fused inference kernels take plain `nn.Linear` only, so they leave it alone; `use_plain_linears_` gives them back.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8_DTYPE).max  # 448
BLOCK = 128
# With torch 2.11 a compiled layer returns gradients of zero, outside autocast.
COMPILES = torch.__version__ >= "2.13"
BACKENDS = ("auto", "scaled_mm", "emulated")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# A scale below it would be a denormal, and 1 / scale infinite; a block that small has fewer bits instead.
MIN_SCALE = torch.finfo(torch.float32).tiny


def quantize_blocks(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix to e4m3 with one scale a block: `x` is about `codes * scale of the block`.

    The last block of a row or column may be partial. A block of zeros has codes 0. In a block that holds an infinity
    or a NaN every number becomes NaN, so that an overflow is not hidden.

    Args:
        x: `[R, C]`, any floating dtype; computed in float32.
        block: rows and columns of a block.

    Returns:
        codes `[R, C]`, `torch.float8_e4m3fn`, rounded to nearest even, and scales `[ceil(R / rows),
        ceil(C / columns)]`, float32: the block's largest magnitude / 448, at least 2^-126.
    """
    blocks = _blocks(x.float(), block)
    scales = (blocks.abs().amax(dim=(1, 3)) / FP8_MAX).clamp_min(MIN_SCALE)
    codes = (blocks / scales[:, None, :, None]).to(FP8_DTYPE)
    return _matrix(codes, x.shape), scales


def dequantize_blocks(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The float32 matrix `[R, C]` that `quantize_blocks(x, block)` stands for."""
    return _matrix(_blocks(codes.float(), block) * scales[:, None, :, None], codes.shape)


def _blocks(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """`[R, C]` as `[row blocks, rows, column blocks, columns]`, filled up with zeros."""
    (rows, columns), (height, width) = block, x.shape
    if height % rows or width % columns:
        x = F.pad(x, (0, -width % columns, 0, -height % rows))
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def _matrix(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `_blocks`."""
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def why_not_scaled_mm(device: torch.device) -> str | None:
    """Why the backend "scaled_mm" cannot run on a device; None where it can.

    Source: `_check_deepseek_support` in PyTorch's ScaledBlas.cpp: compute capability 9 only (not above), and
    cuBLASLt 12.9, which comes with CUDA 12.9.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs an NVIDIA GPU, and the tensors are on {device.type!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return f"it needs compute capability 9 (Hopper), and this GPU has {capability[0]}.{capability[1]}"
    if tuple(map(int, torch.version.cuda.split("."))) < (12, 9):
        return f"it needs PyTorch built for CUDA 12.9 or newer, and this one is for {torch.version.cuda}"
    return None


def fp8_product(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """`x @ weight.mT` with both quantised to e4m3: `x` in blocks of 1x128, `weight` of 128x128. Not differentiable.

    Args:
        x: `[M, K]`, float32, bfloat16 or float16.
        weight: `[N, K]`, any of these dtypes and strides.
        backend: "scaled_mm" is torch's own block-scaled product on a Hopper GPU; "emulated" multiplies what the codes
            stand for in float32 and runs anywhere; "auto" is the first where it can run.

    Returns:
        `[M, N]` in the dtype of `x`, sums in float32.

    Raises:
        ValueError: unknown backend.
        RuntimeError: `backend="scaled_mm"` where it cannot run.
    """
    _check_backend(backend)
    obstacle = None if backend == "emulated" else why_not_scaled_mm(x.device)
    if backend == "scaled_mm" and obstacle is not None:
        raise RuntimeError(
            f"FP8 backend 'scaled_mm' cannot run here: {obstacle}. Use backend='emulated', or 'auto' to choose."
        )
    product = _emulated_product if backend == "emulated" or obstacle is not None else _scaled_mm_product
    return product(x, weight)


def _emulated_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x_values = dequantize_blocks(*quantize_blocks(x, (1, BLOCK)), (1, BLOCK))
    weight_values = dequantize_blocks(*quantize_blocks(weight, (BLOCK, BLOCK)), (BLOCK, BLOCK))
    return (x_values @ weight_values.mT).to(x.dtype)


def _scaled_mm_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.scaled_mm(a [M, K], b [K, N], ...)`, the same in torch 2.11 to 2.13.

    It asks for `a` row-major and `b` column-major; for the scales of `a`, `[M, K / 128]` with strides `(1, M)`; and
    for those of `b`, `[L, N / 128]` with strides `(1, L)`, where L is K / 128 rounded up to a multiple of 4. cuBLASLt
    wants M to be a multiple of 4. K and N are filled up with zeros to whole blocks.

    Source: `_scaled_block1x128_block128x128` in PyTorch's ScaledBlas.cpp, and the cuBLAS documentation on 128-element
    and 128x128 block scaling factors.
    """
    (num_rows, features), num_outputs = x.shape, weight.shape[0]
    x_codes, x_scales = quantize_blocks(F.pad(x, (0, -features % BLOCK, 0, -num_rows % 4)), (1, BLOCK))
    padded = F.pad(weight, (0, -features % BLOCK, 0, -num_outputs % BLOCK))
    weight_codes, weight_scales = quantize_blocks(padded, (BLOCK, BLOCK))
    weight_scales = F.pad(weight_scales, (0, -weight_scales.shape[1] % 4))
    out = F.scaled_mm(
        x_codes.contiguous(),
        weight_codes.contiguous().mT,
        x_scales.mT.contiguous().mT,
        F.ScalingType.BlockWise1x128,
        weight_scales.contiguous().mT,
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32,
    )
    return out[:num_rows, :num_outputs].to(x.dtype)


class _FP8Product(torch.autograd.Function):
    """`fp8_product` with gradients; what is rounded passes its gradient on as if it were not.

    It saves the input and the parameter itself, as `F.linear` does, so sharded training can free the weight between
    forward and backward. Autocast is off inside: it would round the operands of the products to its own dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        with torch.autocast(x.device.type, enabled=False):
            return fp8_product(x, weight, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = fp8_product(grad, weight.mT, backend=ctx.backend)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.mT @ x).to(weight.dtype)
        return grad_x, grad_weight, None


def fp8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str = "auto"
) -> torch.Tensor:
    """`F.linear` with forward and input gradient in FP8; gradients once, no second derivative.

    The compute dtype is autocast's where autocast is on, and that of `x` otherwise: of the result, and of the product
    for the weight gradient, so run it in bfloat16 (or under autocast) to train as the report does.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`; quantised from its own dtype, so float32 master weights are rounded once.
        bias: `[N]`, added in the compute dtype.
        backend: see `fp8_product`.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: unknown backend, or sizes that do not fit.
        RuntimeError: `backend="scaled_mm"` where it cannot run; in `torch.compile` before PyTorch 2.13.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"`x` must have {weight.shape[1]} features as `weight` has, got {x.shape[-1]}.")
    if torch.compiler.is_compiling() and not COMPILES:
        raise RuntimeError(
            "FP8 layers compile with PyTorch 2.13 or newer; with this older one compiled gradients would be zero. "
            "Update it, or leave `torch.compile` away."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _FP8Product.apply(x.reshape(-1, x.shape[-1]), weight, backend)
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias.to(out.dtype)


class FP8Linear(nn.Linear):
    """`nn.Linear` that computes with `fp8_linear`; made from one by `use_fp8_linears_`, with the same parameters."""

    fp8_backend = "auto"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, self.weight, self.bias, backend=self.fp8_backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8_backend={self.fp8_backend}"


def use_fp8_linears_(model: nn.Module, *, backend: str = "auto") -> list[str]:
    """Let the seven projections of every decoder layer compute in FP8, in place.

    Only the class of a module changes: parameters, their names and order, hooks, state dict and what `save_pretrained`
    writes stay the same, and an optimizer goes on with the same tensors. Nothing of it is saved, so call it again
    after loading. Calling it again with another backend switches.

    Args:
        model: a MiniCPM4 or Llama model of transformers, or any module around their decoder layers.
        backend: see `fp8_product`; "auto" decides at each call, by the device of the input.

    Returns:
        Names of the layers that now compute in FP8.

    Raises:
        ValueError: unknown backend; no decoder layer; or a projection that is not a plain `nn.Linear` (an adapter, a
            quantised layer, or one whose `forward` was replaced, as `device_map` does). The model is then unchanged.
    """
    _check_backend(backend)
    found = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LlamaDecoderLayer):
            for name, module in layer.named_modules(prefix=layer_name):
                if name.rpartition(".")[2] in PROJECTIONS:
                    found[name] = module
    if not found:
        raise ValueError(
            f"`model` must hold MiniCPM4 or Llama decoder layers, got {type(model).__name__} without any."
        )
    for name, module in found.items():
        if type(module) not in (nn.Linear, FP8Linear) or "forward" in module.__dict__:
            what = type(module).__name__ + (" with a `forward` of its own" if "forward" in module.__dict__ else "")
            raise ValueError(
                f"{name!r} must be a plain nn.Linear, got {what}; call this before adapters, quantisation and "
                "`device_map`."
            )
    for module in found.values():
        module.__class__ = FP8Linear
        module.fp8_backend = backend
    return list(found)


def use_plain_linears_(model: nn.Module) -> list[str]:
    """Undo `use_fp8_linears_` in place; the parameters keep what training made of them.

    Returns:
        Names of the layers that were in FP8.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is FP8Linear}
    for module in found.values():
        del module.fp8_backend
        module.__class__ = nn.Linear
    return list(found)


def _check_backend(backend: str):
    if backend not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}.")


__all__ = [
    "FP8Linear",
    "dequantize_blocks",
    "fp8_linear",
    "fp8_product",
    "quantize_blocks",
    "use_fp8_linears_",
    "use_plain_linears_",
    "why_not_scaled_mm",
]
