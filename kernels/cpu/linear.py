"""Linear layers in bfloat16 with what stands around them in a decoder layer; weights in bfloat16 or packed.

At one to eight rows the product itself is native, straight from the weights as they are stored; above, torch's matrix
product runs (the native one for packed weights), and the norm, rotation, activation and residual sum are one native
pass each.
"""

import torch

from minicpm4_hf.kernels.cpu.attention import LIBRARY
from minicpm4_hf.kernels.cpu.library import LINEAR_CALL, ROWWISE_ARGS, check_result, load_library
from minicpm4_hf.kernels.cpu.packed import PackedWeight, matmul, pack_weights

MAX_ROWS = 8


def serves(x: torch.Tensor, weight: torch.Tensor | PackedWeight, max_rows: int | None = MAX_ROWS) -> bool:
    """Whether the native code takes `x [..., K]` and `weight [N, K]`: bfloat16, CPU, no gradient, few rows."""
    is_packed = isinstance(weight, PackedWeight)
    return (
        x.dtype == torch.bfloat16
        and (is_packed or weight.dtype == torch.bfloat16)
        and x.numel() > 0
        and (max_rows is None or x.numel() <= max_rows * x.shape[-1])
        and x.device.type == "cpu"
        and (is_packed or weight.is_contiguous())
        and not (torch.is_grad_enabled() and (x.requires_grad or (not is_packed and weight.requires_grad)))
    )


def linear(
    x: torch.Tensor,
    *weights: torch.Tensor | PackedWeight,
    gate: torch.Tensor | PackedWeight | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: tuple[torch.Tensor, float] | None = None,
    rope: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """`x @ weight.T` for up to three weights side by side, and what stands around it in a decoder layer.

    Sums are float32; each step rounds to bfloat16 where torch's own operators would.

    Args:
        x: bfloat16 `[..., K]`, any number of rows.
        weights: bfloat16 `[N, K]`, contiguous, or packed ones of one kind.
        gate: a weight like the only other one; the result is `silu(x @ gate.T) * (x @ weight.T)`.
        norm: RMSNorm's weight `[K]` and epsilon, applied to `x` first.
        residual: `[..., N]` and a factor; the result is `residual + result * factor`.
        rope: cosine and sine, float32 `[..., D]`, with a row for each of `x` or repeating after fewer (a batch at the
            same positions), and how many heads to rotate.

    Returns:
        bfloat16 `[..., N1 + N2 + N3]`.
    """
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if residual is not None:
        residual = residual[0].reshape(rows.shape[0], -1).contiguous(), residual[1]
    if rows.shape[0] > MAX_ROWS:
        return _many_rows(rows, weights, gate, norm, residual, rope).view(*x.shape[:-1], -1)
    out = x.new_empty(*x.shape[:-1], sum(map(count_outputs, weights)))
    layer = pack_weights(
        weights,
        gate=gate,
        norm=norm,
        residual_scale=0.0 if residual is None else residual[1],
        rope=(0, 0) if rope is None else (rope[2], rope[0].shape[-1]),
    )
    tables = None if rope is None else rope_tables(rope)
    arguments = pack_call(rows, out, None if residual is None else residual[0], tables) + layer
    check_result(load_library().mc_linear(arguments, 1))
    return out


def count_outputs(weight: torch.Tensor | PackedWeight) -> int:
    """N of a weight `[N, K]`."""
    return weight.out_features if isinstance(weight, PackedWeight) else weight.shape[0]


def pack_call(x, out, residual=None, tables=None) -> bytes:
    """What changes from call to call: `x` and `residual` `[rows, K]`, `out`, and what `rope_tables` gave."""
    return LINEAR_CALL.pack(
        x.data_ptr(),
        out.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        *((0, 0, 0) if tables is None else (tables[0].data_ptr(), tables[1].data_ptr(), tables[0].shape[0])),
        x.shape[0],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        torch.get_num_threads(),
    )


def rope_tables(rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine as contiguous float32 `[rows, D]`; row i of the input takes row i modulo their number."""
    return tuple(table.flatten(0, -2).float().contiguous() for table in rope[:2])


def _many_rows(x, weights, gate, norm, residual, rope) -> torch.Tensor:
    """`linear` over `[rows, K]` with torch's matrix product, or the native one for packed weights."""
    if norm is not None:
        x = _rowwise(_NORM, x, norm[0], torch.empty_like(x, memory_format=torch.contiguous_format), number=norm[1])
    gates = None
    if isinstance(weights[0], PackedWeight):
        out = matmul(x, *weights, *([] if gate is None else [gate]))  # x is brought into order once
        if gate is not None:
            out, gates = out.chunk(2, -1)
    elif len(weights) == 1:
        out = x @ weights[0].mT
    else:
        out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
        begin = 0
        for weight in weights:
            torch.mm(x, weight.mT, out=out[:, begin : begin + weight.shape[0]])
            begin += weight.shape[0]
    if gate is not None:
        out = _rowwise(_GATE, x @ gate.mT if gates is None else gates, out, out)
    if residual is not None:
        out = _rowwise(_ADD, residual[0], out, out, number=residual[1])
    if rope is not None:
        cosine, sine = rope_tables(rope)
        rotation = (cosine.data_ptr(), sine.data_ptr(), cosine.shape[0], cosine.shape[1])
        _rowwise(_ROTATE, out, out, out, rotation=rotation, features=rope[2] * cosine.shape[1])
    return out


_NORM, _GATE, _ADD, _ROTATE = range(4)


def _rowwise(kind, x, y, out, *, number=0.0, rotation=(0,) * 4, features=None) -> torch.Tensor:
    """One native pass over the rows of `x`; see `mc_rowwise_args` in csrc/abi.h."""
    arguments = ROWWISE_ARGS.pack(
        x.data_ptr(),
        y.data_ptr(),
        out.data_ptr(),
        kind,
        x.shape[0],
        features or x.shape[1],
        x.stride(0),
        y.stride(0),
        out.stride(0),
        torch.get_num_threads(),
        number,
        *rotation,
    )
    check_result(load_library().mc_rowwise(arguments))
    return out


LIBRARY.define("cpu_linear(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("cpu_linear", linear, "CPU")
torch.library.register_fake(
    "minicpm4_hf::cpu_linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=LIBRARY
)
