"""From a checkpoint to the bytes of a GGUF file: what each tensor becomes, checked before anything is written."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import gguf
import numpy as np
import torch

from minicpm4_hf.quantization.ternary import ROW, quantize_ternary

from .gguf_metadata import ARCHITECTURES, add_rotary, add_scales, add_sizes, rotary_factors
from .gguf_tensors import Entry, check_tensors, model_entries, named, read_entry, storage
from .gguf_tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from .gguf_types import (
    TERNARY_TYPES,
    CodedRows,
    NotTernaryError,
    as_ternary,
    block_columns,
    decode,
    encode,
    file_type,
    ggml_type,
    row_bytes,
)
from .source import Checkpoint

# What `quantization_config` may say; None is full precision.
_METHODS = (None, "bitcpm", "gptq")
_TYPE_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class SquaredError:
    """The sum of squared changes beside the sum of squared weights."""

    change: float = 0.0
    total: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count some weights, both float32."""
        change, before = (after - before).flatten(), before.flatten()
        self.change += torch.dot(change, change).item()
        self.total += torch.dot(before, before).item()

    def relative(self) -> float:
        """Root mean square of the change over that of the weights."""
        return math.sqrt(self.change / self.total) if self.total else 0.0


@dataclass(frozen=True)
class Plan:
    """What is going to be written.

    Attributes:
        checkpoint: the source.
        layer_type, embedding_type: names of types.
        method: how the layers' weights come to their type: "rounded"; "exact codes", where the checkpoint has ternary
            or 4-bit codes that the type takes over; "quantised", where full precision is made ternary.
        group_size: columns that share a scale where `method` is "quantised".
        round_scales: whether ternary scales may be rounded.
        entries: the tensors, LongRoPE factors left out.
        rotary: those, by name in the file.
        attention_factor: factor on the rotary cosine and sine.
        vocabulary: the tokenizer, or None.
        left_out: tensors of the checkpoint that have no place in the file.
        errors: filled as the tensors are encoded.
    """

    checkpoint: Checkpoint
    layer_type: str
    embedding_type: str
    method: str
    group_size: int
    round_scales: bool
    entries: list[Entry]
    rotary: dict[str, torch.Tensor]
    attention_factor: float
    vocabulary: Vocabulary | None
    left_out: list[str]
    errors: dict[str, SquaredError] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the model."""
        return ARCHITECTURES[self.checkpoint.config.model_type]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors; metadata and padding add a little."""
        return sum(self.entry_bytes(entry) for entry in self.entries) + sum(
            factors.nbytes for factors in self.rotary.values()
        )

    def type_of(self, entry: Entry) -> str:
        """Name of the type that an entry gets."""
        if not entry.is_matrix:
            return "f32"
        return self.embedding_type if entry.is_embedding else self.layer_type

    def entry_bytes(self, entry: Entry) -> int:
        """Bytes of an entry in the file."""
        rows = entry.shape[0] if entry.is_matrix else 1
        return rows * row_bytes(entry.shape[-1], self.type_of(entry))


def make_plan(
    checkpoint: Checkpoint,
    layer_type: str,
    embedding_types: dict[str, str],
    embedding_type: str | None = None,
    *,
    group_size: int | None = None,
    round_scales: bool = False,
    tokenizer: bool = True,
) -> Plan:
    """Look through a checkpoint's config, headers and tokenizer, and at one of its matrices.

    Args:
        layer_type: name of a type, or "auto".
        embedding_types: layer type -> embedding type where `embedding_type` is None.

    Raises:
        ValueError: what the file cannot hold.
    """
    config = checkpoint.config
    _check_config(checkpoint)
    entries = model_entries(config)
    left_out = check_tensors(checkpoint, entries)
    first = next(entry for entry in entries if entry.is_matrix and not entry.is_embedding)
    stored = storage(checkpoint, first)
    if layer_type == "auto":
        dtype = checkpoint.tensors[f"{first.module}.weight"].dtype if stored == "plain" else None
        layer_type = {"ternary": "tq2_0", "gptq": "q4_0"}.get(stored) or _TYPE_OF_DTYPE[dtype]
    method = _method(checkpoint, first, stored, layer_type)
    if group_size is not None and method != "quantised":
        raise ValueError(
            "`group_size` is for full-precision checkpoints that are made ternary (tq1_0, tq2_0); leave it out here."
        )
    if round_scales and layer_type not in TERNARY_TYPES:
        raise ValueError(f"`round_scales` is for ternary types, not for {layer_type}; leave it out here.")
    rotary, attention_factor = rotary_factors(config)
    plan = Plan(
        checkpoint=checkpoint,
        layer_type=layer_type,
        embedding_type=embedding_type or embedding_types[layer_type],
        method=method,
        group_size=ROW if group_size is None else group_size,
        round_scales=round_scales or method == "quantised",
        entries=entries,
        rotary=rotary,
        attention_factor=attention_factor,
        vocabulary=read_vocabulary(checkpoint.folder, config) if tokenizer else None,
        left_out=left_out,
    )
    for entry in entries:
        block = block_columns(plan.type_of(entry))
        if entry.shape[-1] % block:
            raise ValueError(
                f"{entry.module} has rows of {entry.shape[-1]} weights, which is no multiple of the {block} that "
                f"{plan.type_of(entry)} takes at a time; choose f16, bf16 or f32 for it."
            )
    return plan


def _check_config(checkpoint: Checkpoint) -> None:
    config, folder = checkpoint.config, checkpoint.folder
    if config.architectures and not config.architectures[0].endswith("ForCausalLM"):
        raise ValueError(f"{folder} holds a {config.architectures[0]}; only causal language models are converted.")
    if config.hidden_act != "silu":
        raise ValueError(f"{folder} has the activation {config.hidden_act!r}; llama.cpp computes 'silu' here.")
    quantization = checkpoint.config_dict.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in _METHODS:
        raise ValueError(
            f"{folder} is quantised by {method!r}, which this conversion does not read; give it the full-precision "
            "checkpoint, or one in the GPTQ layout."
        )
    if method == "gptq" and quantization.get("bits", 4) != 4:
        raise ValueError(f"{folder} has GPTQ weights of {quantization['bits']} bits; only 4 bits are converted.")


def _method(checkpoint: Checkpoint, first: Entry, stored: str, layer_type: str) -> str:
    if layer_type == "q4_0":
        return "exact codes" if stored == "gptq" else "rounded"
    if layer_type not in TERNARY_TYPES:
        return "rounded"
    if stored == "gptq":
        raise ValueError(
            f"{checkpoint.folder} has 4-bit weights, and {layer_type} holds ternary ones; choose q4_0 or f16."
        )
    if stored == "ternary":
        return "exact codes"
    try:
        for rows in read_entry(checkpoint, first):
            as_ternary(rows, first.module, layer_type)
    except NotTernaryError:
        return "quantised"
    return "exact codes"


def make_writer(plan: Plan) -> gguf.GGUFWriter:
    """A writer with all metadata and tensor infos, and no file yet."""
    config = plan.checkpoint.config
    writer = gguf.GGUFWriter(None, plan.architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(plan.checkpoint.folder.resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(file_type(plan.layer_type))
    add_sizes(writer, config)
    if plan.architecture == "minicpm":
        add_scales(writer, config)
    add_rotary(writer, config, plan.attention_factor)
    if plan.vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        add_vocabulary(writer, plan.vocabulary)
    for entry in plan.entries:
        name = plan.type_of(entry)
        writer.add_tensor_info(
            f"{entry.name}.{entry.part}", entry.shape, np.dtype(np.float32), plan.entry_bytes(entry), ggml_type(name)
        )
    for name, factors in plan.rotary.items():
        writer.add_tensor_info(name, factors.shape, np.dtype(np.float32), factors.nbytes)
    return writer


def encode_tensors(plan: Plan) -> Iterator[Iterator[np.ndarray]]:
    """The bytes of each tensor in the writer's order, in pieces, all of a tensor before the next; fills `plan.errors`.

    Raises:
        ValueError: weights that are damaged, or that the type cannot hold.
    """
    for entry in plan.entries:
        yield _encode_entry(plan, entry)
    for factors in plan.rotary.values():
        yield iter([factors.numpy()])


def _encode_entry(plan: Plan, entry: Entry) -> Iterator[np.ndarray]:
    name, what = plan.type_of(entry), f"{entry.module}.{entry.part} in {plan.checkpoint.folder}"
    part = "embeddings" if entry.is_embedding else "layers" if entry.is_matrix else "norms"
    error = plan.errors.setdefault(part, SquaredError())
    for rows in read_entry(plan.checkpoint, entry):
        before = rows.values() if isinstance(rows, CodedRows) else rows.float()
        if name in TERNARY_TYPES:
            rows = _as_codes(plan, rows, what)
        elif plan.method == "exact codes" and part == "layers" and not isinstance(rows, CodedRows):
            raise ValueError(
                f"{what} has 4-bit weights in groups of columns that are not neighbours (act-order), which q4_0 does "
                "not have; choose another type, such as q8_0."
            )
        octets = encode(rows, name, what)
        after = rows.values() if name in TERNARY_TYPES else decode(octets, name)
        error.add(before, after)
        yield octets


def _as_codes(plan: Plan, rows: torch.Tensor | CodedRows, what: str) -> CodedRows:
    if isinstance(rows, torch.Tensor) and plan.method == "quantised":
        with named(what):
            rows = CodedRows(*quantize_ternary(rows, plan.group_size), bits=2)
    elif isinstance(rows, torch.Tensor):
        rows = as_ternary(rows, what, plan.layer_type)
    elif rows.bits != 2:
        raise ValueError(f"{what} has 4-bit weights, though the layers before it are ternary.")
    if plan.round_scales:
        rows = CodedRows(rows.codes, rows.scales.to(torch.float16).float(), bits=2)
    return rows
