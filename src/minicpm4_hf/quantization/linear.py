"""Modules that hold packed weights, and the operators they call.

The operators are registered in torch's namespace `minicpm4_hf` with plain PyTorch code, which dequantises and
multiplies; the package's kernels register faster code for the devices they serve. Packed weights get no gradient,
inputs do.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .int4 import (
    FIELDS,
    check_zero_points,
    dequantize_int4,
    group_index,
    pack_int4,
    quantize_int4,
    quantize_int8,
    unordered_groups,
    unpack_int4,
)
from .ternary import CODES_PER_BYTE, ROW, dequantize_ternary, pack_ternary, quantize_ternary, unpack_checked

LIBRARY = torch.library.Library("minicpm4_hf", "FRAGMENT")
LIBRARY.define("ternary_linear(Tensor x, Tensor weight, Tensor scales) -> Tensor")
LIBRARY.define("int4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor? g_idx) -> Tensor")
LIBRARY.define("int8_linear(Tensor x, Tensor weight, Tensor scales) -> Tensor")

# Up to here torch's int8 product beats dequantising and multiplying on a CPU.
_INT8_PRODUCT_ROWS = 16
# A head's rows are dequantised this many at a time.
_HEAD_ROWS = 8192


def ternary_linear_reference(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x [..., K]` times a ternary weight, uint8 `[N, K / 4]` and scales `[N, K / g]`: `[..., N]` in x's dtype."""
    return F.linear(x, dequantize_ternary(unpack_checked(weight), scales, x.dtype))


def int4_linear_reference(
    x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None
) -> torch.Tensor:
    """`x [..., K]` times a 4-bit weight in the GPTQ layout: `[..., N]` in x's dtype.

    Args:
        qweight: int32 `[K / 8, N]`.
        scales: `[K / g, N]`.
        g_idx: the group of each input `[K]`, or None where groups lie in order.
    """
    return F.linear(x, dequantize_int4(unpack_int4(qweight), scales.T, g_idx, x.dtype))


def int8_linear_reference(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x [..., K]` times int8 codes `[N, K]` with a scale a row `[N, 1]`: `[..., N]` in x's dtype."""
    parts = zip(weight.split(_HEAD_ROWS), scales.split(_HEAD_ROWS))
    return torch.cat([F.linear(x, (codes * scale).to(x.dtype)) for codes, scale in parts], dim=-1)


def _int8_linear(x, weight, scales):
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not 0 < len(rows) <= _INT8_PRODUCT_ROWS:
        return int8_linear_reference(x, weight, scales)
    out = torch._weight_int8pack_mm(rows.contiguous(), weight, scales.flatten().to(x.dtype))
    return out.view(*x.shape[:-1], -1)


def _register(name, implementation, reference_weight, num_outputs):
    """One operator: its code, its shape for tracing, and its gradient with respect to `x`."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])

    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        grad_x = grad @ reference_weight(*tensors, grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, *(None for _ in tensors)

    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"minicpm4_hf::{name}",
        lambda x, weight, *rest: x.new_empty(*x.shape[:-1], weight.shape[num_outputs]),
        lib=LIBRARY,
    )
    torch.library.register_autograd(f"minicpm4_hf::{name}", backward, setup_context=setup_context, lib=LIBRARY)


_register(
    "ternary_linear",
    ternary_linear_reference,
    lambda weight, scales, dtype: dequantize_ternary(unpack_checked(weight), scales, dtype),
    0,
)
_register(
    "int4_linear",
    int4_linear_reference,
    lambda qweight, scales, g_idx, dtype: dequantize_int4(unpack_int4(qweight), scales.T, g_idx, dtype),
    1,
)
_register("int8_linear", _int8_linear, lambda weight, scales, dtype: (weight * scales).to(dtype), 0)


class PackedModule(nn.Module):
    """Holds a packed weight, which never gets a gradient, and scales, which `model.to(torch.bfloat16)` does not round.

    The packed weight is a parameter, so that it can be offloaded; the scales are buffers, so that they do not decide
    what `model.dtype` is.
    """

    def _apply(self, fn, recurse=True):
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            if before is not None and self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def _set_bias(self, bias: bool, outputs: int, device=None, dtype=None) -> None:
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None

    def _add_bias(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.bias is None else out + self.bias


def _packed(*shape, dtype, device=None) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)


def _num_groups(columns: int, group_size: int, unit: int) -> int:
    size = columns if group_size == ROW else group_size
    if columns % unit:
        raise ValueError(f"A packed layer's inputs must be a multiple of {unit}, got {columns}.")
    if size < 1 or columns % size:
        raise ValueError(f"`group_size` must be -1 (a whole row) or divide the {columns} inputs, got {group_size}.")
    return columns // size


class TernaryLinear(PackedModule):
    """A linear layer with ternary weights at two bits each.

    State: `weight` uint8 `[N, K / 4]` (`pack_ternary`), `weight_scale` `[N, K / g]`, and `bias` where there is one.

    Args:
        in_features: K, a multiple of 4.
        out_features: N.
        bias: whether there is a bias, of dtype `dtype`.
        group_size: inputs that share a scale, or -1 for all.
        scale_dtype: dtype of the scales, kept whatever the model is cast to.

    Raises:
        ValueError: K is no multiple of 4 or of the group size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        group_size: int = ROW,
        scale_dtype: torch.dtype = torch.float32,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        num_groups = _num_groups(in_features, group_size, CODES_PER_BYTE)
        self.weight = _packed(out_features, in_features // CODES_PER_BYTE, dtype=torch.uint8, device=device)
        self.weight_scale = nn.Buffer(torch.ones(out_features, num_groups, dtype=scale_dtype, device=device))
        self._set_bias(bias, out_features, device, dtype)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = ROW, scale_dtype: torch.dtype = torch.float32
    ) -> "TernaryLinear":
        """A layer with the quantised weight of another, which should be the latent one (see `quantize_ternary`)."""
        weight = linear.weight.detach()
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            group_size=group_size,
            scale_dtype=scale_dtype,
            device=weight.device,
            dtype=weight.dtype,
        )
        codes, scales = quantize_ternary(weight, group_size)
        new.weight.copy_(pack_ternary(codes))
        new.weight_scale.copy_(scales)
        if linear.bias is not None:
            new.bias.data.copy_(linear.bias)
        return new

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight `[N, K]` that the layer multiplies with."""
        return dequantize_ternary(unpack_checked(self.weight), self.weight_scale, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._add_bias(torch.ops.minicpm4_hf.ternary_linear(x, self.weight, self.weight_scale))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, bias={self.bias is not None}"


class Int4Linear(PackedModule):
    """A linear layer with symmetric 4-bit weights; its state is the GPTQ layout (see `int4.py`).

    Args:
        in_features, out_features: multiples of 8.
        bias: whether there is a bias, of dtype `dtype`.
        group_size: inputs that share a scale, or -1 for all.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        group_size: int = 128,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = _num_groups(in_features, group_size, FIELDS)
        if out_features % FIELDS:
            raise ValueError(f"The GPTQ layout needs outputs that are a multiple of 8, got {out_features}.")
        self.qweight = _packed(in_features // FIELDS, out_features, dtype=torch.int32, device=device)
        self.scales = nn.Buffer(torch.ones(groups, out_features, dtype=torch.float16, device=device))
        self.qzeros = nn.Buffer(torch.zeros(groups, out_features // FIELDS, dtype=torch.int32, device=device))
        self.g_idx = nn.Buffer(group_index(in_features, groups).to(device))
        self.act_order = False  # whether `g_idx` says anything
        self._set_bias(bias, out_features, device, dtype)

    def check_loaded_(self) -> None:
        """Read the zero points and the group index once; call this after loading.

        Raises:
            ValueError: zero points or a group index that this layer does not compute with.
        """
        check_zero_points(self.qzeros)
        self.act_order = unordered_groups(self.g_idx, len(self.scales)) is not None

    def load_tensors_(self, tensors: dict[str, torch.Tensor]) -> "Int4Linear":
        """Take the tensors of `pack_gptq`, in place.

        Raises:
            ValueError: as `check_loaded_`.
        """
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            getattr(self, name).copy_(tensors[name])
        self.check_loaded_()
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight `[N, K]` that the layer multiplies with."""
        g_idx = self.g_idx if self.act_order else None
        return dequantize_int4(unpack_int4(self.qweight), self.scales.T, g_idx, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        g_idx = self.g_idx if self.act_order else None
        return self._add_bias(torch.ops.minicpm4_hf.int4_linear(x, self.qweight, self.scales, g_idx))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group_size={self.group_size}, bias={self.bias is not None}"


def pack_rows(weight: torch.Tensor, bits: int, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding's or head's weight `[V, D]` as `PackedEmbedding` and `PackedHead` hold it.

    Returns:
        8 bits: int8 `[V, D]` and float32 `[V, 1]`. 4 bits, the GPTQ layout: int32 `[D / 8, V]`, float16 `[D / g, V]`.

    Raises:
        ValueError: sizes that do not fit, NaN or infinity.
    """
    if bits == 8:
        return quantize_int8(weight)
    codes, scales = quantize_int4(weight, group_size)
    return pack_int4(codes), scales.T.contiguous()


class _PackedTable(PackedModule):
    """The weight `[V, D]` of an embedding or a head at 8 bits, a scale a row, or at 4 bits in the GPTQ layout.

    State: `weight` and `weight_scale` as `pack_rows` gives them.
    """

    def __init__(self, rows: int, columns: int, *, bits: int, group_size: int = 128, device=None):
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"`bits` of an embedding or head must be 4 or 8, got {bits}.")
        self.bits, self.group_size = bits, group_size if bits == 4 else ROW
        groups = _num_groups(columns, self.group_size, FIELDS if bits == 4 else 1)
        if bits == 8:
            self.weight = _packed(rows, columns, dtype=torch.int8, device=device)
            scale = torch.ones(rows, 1, dtype=torch.float32, device=device)
        else:
            self.weight = _packed(columns // FIELDS, rows, dtype=torch.int32, device=device)
            scale = torch.ones(groups, rows, dtype=torch.float16, device=device)
        self.weight_scale = nn.Buffer(scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight `[V, D]`."""
        if self.bits == 8:
            return (self.weight * self.weight_scale).to(dtype or self.weight_scale.dtype)
        return dequantize_int4(unpack_int4(self.weight), self.weight_scale.T, dtype=dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., D]` times the weight: `[..., V]` in x's dtype."""
        if self.bits == 8:
            return torch.ops.minicpm4_hf.int8_linear(x, self.weight, self.weight_scale)
        return torch.ops.minicpm4_hf.int4_linear(x, self.weight, self.weight_scale, None)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}"


class PackedEmbedding(_PackedTable):
    """An embedding whose lookup dequantises the rows it is asked for; its result has the dtype of the model.

    Args:
        num_embeddings, embedding_dim: V and D.
        bits: 4 or 8.
        group_size: at 4 bits the columns that share a scale, or -1 for all.
        dtype: of the result; follows `model.to(...)`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group_size: int = 128,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, bits=bits, group_size=group_size, device=device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids = input_ids.flatten()
        if self.bits == 8:
            rows = (self.weight[ids] * self.weight_scale[ids]).to(self.dtype)
        else:
            scales = self.weight_scale.index_select(1, ids).T
            rows = dequantize_int4(unpack_int4(self.weight.index_select(1, ids)), scales, dtype=self.dtype)
        return rows.view(*input_ids.shape, self.embedding_dim)


class PackedHead(_PackedTable):
    """A head without bias: `[..., D]` to `[..., V]`.

    Args:
        in_features, out_features: D and V.
        bits: 4 or 8.
        group_size: at 4 bits the columns that share a scale, or -1 for all.
    """

    def __init__(self, in_features: int, out_features: int, *, bits: int, group_size: int = 128, device=None):
        super().__init__(out_features, in_features, bits=bits, group_size=group_size, device=device)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x)


class TiedHead(nn.Module):
    """A head that multiplies with the weight of a `PackedEmbedding` and has none of its own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that its tensors are not this module's too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._embedding[0].multiply(x.to(self._embedding[0].weight.device))
