"""What the tensors of a draft head are called in each runtime, and what a draft must hold. Tables, and their reading.

Ours, for both kinds of draft; `h` is the hidden size, `a` that of all query heads, `V` the vocabulary:

    fc.weight [h, 2h] or [h, 3h]                  what joins the inputs; fc.bias [h] in some EAGLE drafts
    embed_norm.weight, hidden_norm.weight [h]     EAGLE: norms of the two inputs, embedding first
    layers.N.input_layernorm.weight [h]           N = 0, 1, ...: a decoder layer under transformers' own names; in
    layers.N.self_attn.q_proj.weight [a, h]       EAGLE-3 input_layernorm is the embedding's norm, hidden_norm that
    layers.N.hidden_norm.weight [h]               of the states, and q, k, v take both side by side, [a, 2h]
    norm.weight [h]                               EAGLE-3: before the head
    lm_head.weight [draft V, h]                   where the draft has a head of its own
    embed_tokens.weight [V, h]                    where the draft carries the embedding
    draft_token_ids [draft V]                     the target's token of each row of the head; integer
    t2d [V]                                       EAGLE-3: whether the draft knows a token; bool

CPM.cu keeps EAGLE-3's tokens as `d2t`, the difference draft_token_ids[i] - i. A quantised linear layer has the four
tensors of the GPTQ layout in place of `weight`.

Sources: CPM.cu `cpmcu/speculative/eagle.py` and `src/model/minicpm4/minicpm4_eagle.cuh`; vLLM
`model_executor/models/minicpm_eagle.py` and `llama_eagle3.py`, whose loader reads EAGLE-3 under the published names.
"""

from collections.abc import Iterable
from dataclasses import dataclass

FORMATS = ("cpmcu", "vllm", "ours")
GPTQ_PARTS = ("qweight", "scales", "qzeros", "g_idx")
# Kind of draft -> format -> our name (of a tensor or of what it begins with) -> theirs.
_SAME = ("fc", "embed_tokens", "norm", "lm_head")
_EAGLE3 = {**{name: name for name in _SAME}, "layers.0": "midlayer", "draft_token_ids": "d2t", "t2d": "t2d"}
NAMES = {
    "eagle": {
        "cpmcu": {
            "fc": "fc",
            "embed_norm": "input_norm1",
            "hidden_norm": "input_norm2",
            "layers": "layers",
            "embed_tokens": "embed_tokens",
            "draft_token_ids": "token_id_remap",
        },
        "vllm": {
            "fc": "model.fc",
            "embed_norm": "model.input_norm1",
            "hidden_norm": "model.input_norm2",
            "layers": "model.eagle_layers",
            "embed_tokens": "model.embed_tokens",
            "norm": "model.norm",
            "lm_head": "lm_head",
        },
        "ours": {name: name for name in (*_SAME, "embed_norm", "hidden_norm", "layers", "draft_token_ids")},
    },
    "eagle3": {
        "cpmcu": _EAGLE3,
        "vllm": _EAGLE3,
        "ours": {name: name for name in (*_SAME, "layers", "draft_token_ids", "t2d")},
    },
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model or draft, from its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int

    @classmethod
    def read(cls, config_dict: dict, where: str) -> "Sizes":
        """From the content of a config.json; `where` names it in errors.

        Raises:
            ValueError: a size that is missing or not a whole number above 0.
        """

        def size(name: str, default: int | None = None) -> int:
            value = config_dict.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{where} must give `{name}` as a whole number above 0, got {value!r}.")
            return value

        hidden, heads, vocab = size("hidden_size"), size("num_attention_heads"), size("vocab_size")
        return cls(
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocab_size=vocab,
            draft_vocab_size=size("draft_vocab_size", vocab),
        )


def detect(names: Iterable[str]) -> tuple[str, str]:
    """Kind ("eagle", "eagle3") and format of a draft by the names of its tensors.

    EAGLE-3 is called the same for CPM.cu and vLLM and counts as "cpmcu".

    Raises:
        ValueError: names of no draft, or of one packed for CPM.cu's Marlin kernel.
    """
    names = list(names)
    packed = next((name for name in names if "qkv_proj." in name or "gate_up_proj." in name), None)
    if packed is not None:
        raise ValueError(
            f"{packed} is packed for CPM.cu's Marlin kernel; unpack the draft first, with `marlin IN OUT --to gptq`."
        )
    if not any(_begins(name.removeprefix("model."), "fc") for name in names):
        raise ValueError("There is no `fc` among the tensors, so this is no EAGLE draft.")
    if any(name.endswith("layers.0.hidden_norm.weight") or _begins(name, "midlayer") for name in names):
        ours = "draft_token_ids" in names and "d2t" not in names
        return "eagle3", "ours" if ours else "cpmcu"
    if any("eagle_layers." in name for name in names):
        return "eagle", "vllm"
    return "eagle", "cpmcu" if any("input_norm" in name for name in names) else "ours"


def to_ours(name: str, kind: str, source: str) -> str | None:
    """Our name of a tensor, None for one that no draft of this kind has.

    Names of ours are read in every format: trainers keep norm and head where CPM.cu's loader has no place for them.
    """
    name = name.removeprefix("model.")  # optional: runtimes and trainers differ in whether they write it
    if kind == "eagle3" and source != "ours" and name.startswith("layers.0."):
        name = name.replace("layers.0.", "midlayer.", 1)  # as vLLM's own trainer writes it
    for ours, theirs in NAMES[kind][source].items():
        theirs = theirs.removeprefix("model.")
        if _begins(name, theirs):
            return ours + name.removeprefix(theirs)
    return name if any(_begins(name, ours) for ours in NAMES[kind]["ours"]) else None


def from_ours(name: str, kind: str, target: str) -> str | None:
    """The name of one of our tensors in another format, None where that has no place for it."""
    for ours, theirs in NAMES[kind][target].items():
        if _begins(name, ours):
            return theirs + name.removeprefix(ours)
    return None


def expected_shapes(kind: str, sizes: Sizes, group_size: int | None) -> dict[str, tuple[int, ...]]:
    """Our name -> shape of all that a draft may hold.

    Args:
        kind: "eagle" or "eagle3".
        sizes: of the draft.
        group_size: of a draft quantised as GPTQ, -1 for whole columns; None for one in full precision.
    """
    h, inner, vocab = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    attended, keys = (n * sizes.head_dim for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
    joined = 2 * h if kind == "eagle3" else h
    linears = {"fc": (h, 3 * h if kind == "eagle3" else 2 * h)}
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(sizes.num_hidden_layers):
        layer = f"layers.{index}"
        linears |= {f"{layer}.self_attn.{name}_proj": (n, joined) for name, n in zip("qkv", (attended, keys, keys))}
        linears |= {f"{layer}.self_attn.o_proj": (h, attended), f"{layer}.mlp.down_proj": (h, inner)}
        linears |= {f"{layer}.mlp.{name}_proj": (inner, h) for name in ("gate", "up")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        if kind == "eagle3":
            shapes[f"{layer}.hidden_norm.weight"] = (h,)
    for name, (outputs, inputs) in linears.items():
        if group_size is None:
            shapes[f"{name}.weight"] = (outputs, inputs)
        else:
            groups = 1 if group_size == -1 else inputs // group_size
            parts = ((inputs // 8, outputs), (groups, outputs), (groups, outputs // 8), (inputs,))
            shapes |= {f"{name}.{part}": shape for part, shape in zip(GPTQ_PARTS, parts, strict=True)}
    head = sizes.draft_vocab_size if kind == "eagle3" else vocab
    shapes |= {"norm.weight": (h,), "lm_head.weight": (head, h), "embed_tokens.weight": (vocab, h)}
    if kind == "eagle3":
        return shapes | {"draft_token_ids": (head,), "t2d": (vocab,)}
    return shapes | {"fc.bias": (h,), "embed_norm.weight": (h,), "hidden_norm.weight": (h,), "draft_token_ids": (-1,)}


def optional_names(kind: str, sizes: Sizes) -> set[str]:
    """Those of `expected_shapes` that a draft may lack."""
    if kind == "eagle3":
        optional = {"embed_tokens.weight", "t2d"}
        if sizes.draft_vocab_size == sizes.vocab_size:  # the target's own head and tokens may serve
            optional |= {"lm_head.weight", "draft_token_ids"}
        return optional
    norms = {f"layers.{index}.input_layernorm.weight" for index in range(sizes.num_hidden_layers)}
    return norms | {
        "fc.bias",
        "embed_norm.weight",
        "hidden_norm.weight",
        "norm.weight",
        "lm_head.weight",
        "embed_tokens.weight",
        "draft_token_ids",
    }


def _begins(name: str, head: str) -> bool:
    return name == head or name.startswith(f"{head}.")
