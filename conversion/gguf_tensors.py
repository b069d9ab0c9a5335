"""Which tensors a GGUF file has, and their rows as a checkpoint stores them: numbers, ternary codes or 4-bit codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from minicpm4_hf.quantization.int4 import FIELDS, dequantize_int4, unpack_gptq, unpack_int4
from minicpm4_hf.quantization.ternary import CODES_PER_BYTE, unpack_ternary

from .gguf_types import CodedRows
from .source import FLOAT_WEIGHTS, Checkpoint

# GGUF name -> name in a decoder layer. Source: llama.cpp's `llama-arch.cpp`.
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
EMBEDDING, HEAD = "token_embd", "output"
_GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# Weights that are read at a time.
_CHUNK_WEIGHTS = 2**22


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file, without ".weight" or ".bias".
        part: "weight" or "bias".
        module: what it is called in the checkpoint, without the same.
        shape: `(rows, columns)`, or `(columns,)` of a norm or bias.
        num_heads: of a query or key projection, whose rows are put in another order; None for all others.
    """

    name: str
    part: str
    module: str
    shape: tuple[int, ...]
    num_heads: int | None = None

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding or the head."""
        return self.name in (EMBEDDING, HEAD)

    @property
    def is_matrix(self) -> bool:
        """Whether it has the type that was asked for; norms and biases are float32."""
        return len(self.shape) == 2


def model_entries(config) -> list[Entry]:
    """The tensors of a model with this config (MiniCPM4's, MiniCPM's or Llama's), LongRoPE factors left out."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    has_bias = {"attn": config.attention_bias, "ffn": config.mlp_bias}
    entries = [Entry(EMBEDDING, "weight", "model.embed_tokens", (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        prefix, module = f"blk.{layer}", f"model.layers.{layer}"
        entries += [Entry(f"{prefix}.{name}", "weight", f"{module}.{own}", (hidden,)) for name, own in NORMS.items()]
        for name, own in MATRICES.items():
            place = f"{prefix}.{name}", f"{module}.{own}"
            entries.append(Entry(place[0], "weight", place[1], shapes[name], heads.get(name)))
            if has_bias[name.partition("_")[0]]:
                entries.append(Entry(place[0], "bias", place[1], shapes[name][:1], heads.get(name)))
    entries.append(Entry("output_norm", "weight", "model.norm", (hidden,)))
    if not config.tie_word_embeddings:
        entries.append(Entry(HEAD, "weight", "lm_head", (config.vocab_size, hidden)))
    return entries


def rotary_order(num_rows: int, num_heads: int) -> torch.Tensor:
    """For each row of a query or key projection in llama.cpp the row it has here, int64 `[num_rows]`.

    Llama's code turns the first half of a head against the second, llama.cpp's `minicpm` and `llama` turn neighbours.
    """
    return torch.arange(num_rows).view(num_heads, 2, -1).transpose(1, 2).flatten()


def check_tensors(checkpoint: Checkpoint, entries: list[Entry]) -> list[str]:
    """Check that the checkpoint has all entries in a form that can be read, and nothing without a place in the file.

    Returns:
        The names of tensors that are left out: an MTP head, a head that is tied to the embedding, rotary tables.

    Raises:
        ValueError: a tensor that is missing, of a wrong shape or dtype, or unknown.
    """
    used: set[str] = set()
    for entry in entries:
        used.update(_check_entry(checkpoint, entry))
    rest = [name for name in checkpoint.tensors if name not in used]
    unused = ("mtp.", "lm_head.") if checkpoint.config.tie_word_embeddings else ("mtp.",)
    for name in rest:
        if not name.startswith(unused) and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{checkpoint.folder} has the tensor {name}, for which a GGUF file of this architecture has no place."
            )
    return rest


def _check_entry(checkpoint: Checkpoint, entry: Entry) -> list[str]:
    """Names of the tensors that make up one entry, after a look at their headers."""
    parts = _parts(checkpoint, entry)
    for name, (shape, dtypes) in parts.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            raise ValueError(f"The weights in {checkpoint.folder} lack {name}; the config does not belong to them.")
        if info.shape != tuple(shape):
            raise ValueError(
                f"{name} in {checkpoint.folder / info.shard} has shape {list(info.shape)}, but config.json asks for "
                f"{list(shape)}; the two do not belong together."
            )
        if info.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} in {checkpoint.folder / info.shard} is {info.dtype}, but must be {allowed}.")
    return list(parts)


def _parts(checkpoint: Checkpoint, entry: Entry) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and allowed dtypes of the tensors that make up an entry, for the number of groups that it has."""
    kind, name = storage(checkpoint, entry), f"{entry.module}.{entry.part}"
    if kind == "plain":
        return {name: (entry.shape, FLOAT_WEIGHTS)}
    rows, columns = entry.shape
    scale = f"{entry.module}.scales" if kind == "gptq" else f"{name}_scale"
    by_row = kind in ("ternary", "int8")  # the GPTQ layout has the groups first
    info = checkpoint.tensors.get(scale)
    groups = info.shape[1 if by_row else 0] if info is not None and len(info.shape) == 2 else 1
    if not groups or columns % groups or (kind == "int8" and groups != 1):
        raise ValueError(
            f"{name} in {checkpoint.folder} has {columns} columns and {groups} scales a row, which do not fit."
        )
    codes = {
        "gptq": (f"{entry.module}.qweight", (columns // FIELDS, rows), torch.int32),
        "int4": (name, (columns // FIELDS, rows), torch.int32),
        "int8": (name, (rows, columns), torch.int8),
        "ternary": (name, (rows, columns // CODES_PER_BYTE), torch.uint8),
    }[kind]
    parts = {codes[0]: (codes[1], codes[2:]), scale: ((rows, groups) if by_row else (groups, rows), FLOAT_WEIGHTS)}
    for part, shape in (("qzeros", (groups, rows // FIELDS)), ("g_idx", (columns,))):
        if kind == "gptq" and f"{entry.module}.{part}" in checkpoint.tensors:
            parts[f"{entry.module}.{part}"] = shape, (torch.int32,)
    return parts


def storage(checkpoint: Checkpoint, entry: Entry) -> str:
    """How an entry is stored: "plain", "ternary", "int8" and "int4" (packed embeddings), or "gptq".

    Raises:
        ValueError: there is no such tensor, or it is of a dtype that is none of these.
    """
    name = f"{entry.module}.{entry.part}"
    if entry.is_matrix and f"{entry.module}.qweight" in checkpoint.tensors:
        return "gptq"
    if name not in checkpoint.tensors:
        raise ValueError(f"The weights in {checkpoint.folder} lack {name}; the config does not belong to them.")
    dtype = checkpoint.tensors[name].dtype
    if dtype in FLOAT_WEIGHTS:
        return "plain"
    packed = {torch.uint8: "ternary", torch.int8: "int8", torch.int32: "int4"}.get(dtype)
    if packed is None or not entry.is_matrix:
        raise ValueError(f"{name} in {checkpoint.folder} is of type {dtype}, which this conversion does not read.")
    return packed


def read_entry(checkpoint: Checkpoint, entry: Entry) -> Iterator[torch.Tensor | CodedRows]:
    """The rows of an entry in the file's order, some at a time; a norm or bias as one row.

    Plain weights come in the checkpoint's dtype. 4-bit weights whose groups do not lie in order come as numbers.

    Raises:
        ValueError: damaged codes, or NaN or infinity.
    """
    name, kind = f"{entry.module}.{entry.part}", storage(checkpoint, entry)
    order = None if entry.num_heads is None else rotary_order(entry.shape[0], entry.num_heads)
    if not entry.is_matrix:
        vector = checkpoint.tensor(name)
        yield (vector if order is None else vector[order]).unsqueeze(0)
        return
    rows, columns = entry.shape
    take = _reader(checkpoint, entry, kind)
    step = max(1, _CHUNK_WEIGHTS // columns)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield take(slice(begin, end) if order is None else order[begin:end])


def _reader(checkpoint: Checkpoint, entry: Entry, kind: str):
    """A function from row numbers to rows."""
    name = f"{entry.module}.{entry.part}"
    if kind == "gptq":
        parts = {part: f"{entry.module}.{part}" for part in _GPTQ_PARTS}
        tensors = {part: checkpoint.tensor(key) for part, key in parts.items() if key in checkpoint.tensors}
        with named(entry.module):
            codes, scales, g_idx = unpack_gptq(**tensors)
        scales = scales.float()
        if g_idx is not None:
            return lambda rows: dequantize_int4(codes[rows], scales[rows], g_idx)
        return lambda rows: CodedRows(codes[rows], scales[rows], bits=4)
    weight = checkpoint.tensor(name)
    if kind == "plain":
        return lambda rows: weight[rows]
    scale = checkpoint.tensor(f"{name}_scale").float()
    if kind == "ternary":

        def ternary(rows) -> CodedRows:
            with named(name):
                return CodedRows(unpack_ternary(weight[rows].contiguous()), scale[rows], bits=2)

        return ternary
    if kind == "int8":
        return lambda rows: weight[rows] * scale[rows]
    return lambda rows: CodedRows(unpack_int4(weight[:, rows]), scale[:, rows].T.contiguous(), bits=4)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Put the name of a tensor before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
