"""Draft heads for speculative decoding under the names of another runtime: the conversion `draft`.

    python -m minicpm4_hf.conversion draft MiniCPM4-8B-Eagle-FRSpec OUT --to ours
    python -m minicpm4_hf.conversion draft MiniCPM4-8B-Eagle-FRSpec OUT --to vllm --base MiniCPM4-8B
    python -m minicpm4_hf.conversion draft MiniCPM4-8B-Eagle-vLLM OUT --to cpmcu --dry-run

EAGLE and EAGLE-3 drafts go between CPM.cu, vLLM and this package; the format of IN is read off its tensors' names, and
`draft_names` lists them all. No number changes. What goes along:

    FR-Spec    `freq_V.pt` for CPM.cu, `freq_V.safetensors` for ours; vLLM drafts over the whole vocabulary
    the head   vLLM's EAGLE wants embedding, norm and head in the draft, which CPM.cu takes from the target: `--base`
               names the target they are copied from, and for CPM.cu norm and head are left out
    GPTQ       tensors of a quantised draft are renamed for ours and for CPM.cu, whose kernel they reach by the
               conversion `marlin`; vLLM cannot load them

The two runtimes do not scale a draft alike (`_SCALES`), which no renaming can mend; the card says it.
"""

import argparse
from pathlib import Path

import torch

from .card import model_card
from .draft_names import FORMATS, from_ours
from .draft_reader import KIND_NAMES, Draft, open_draft
from .frequency_files import check_ids, save_frequencies
from .keys import CARD_FILE, CONFIG_FILE, OFFICIAL_REMOTE_CODE
from .output import Plan, in_words, open_output, plan_bytes
from .source import Checkpoint, open_checkpoint

# What vLLM's EAGLE for MiniCPM must find in the file, and where the target model has it.
_VLLM_FROM_BASE = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_SHARED_SETTINGS = ("hidden_size", "vocab_size", "scale_emb", "scale_depth", "dim_model_base")
_VLLM_PREFIX = "Eagle"
_LEFT_OUT = {
    "cpmcu": "CPM.cu uses the target's",
    "vllm": "vLLM drafts over the whole vocabulary",
}
_USAGE = {
    "cpmcu": "```\npython examples/minicpm4/test_generate.py --model-path TARGET --draft-model-path FOLDER "
    "--frspec-path FOLDER\n```",
    "vllm": '```\nvllm serve TARGET --speculative-config \'{"method": "METHOD", "model": "FOLDER", '
    '"num_speculative_tokens": 3}\'\n```',
    "ours": "```python\nfrom safetensors.torch import load_file\n\nweights = "
    'load_file("FOLDER/model.safetensors")\n```',
}
_METHOD = (
    "The tensors of an {kind} draft were renamed from the layout of {source} to that of {target}; no number changes. "
    "{scales} That changes how many drafted tokens are accepted, never which text comes out."
)
_SCALES = {
    "eagle": "CPM.cu scales the draft's residual branches by scale_depth / sqrt(layers of the target + 1) and leaves "
    "the states before the head as they are; vLLM scales by scale_depth / sqrt(mup_denominator) and divides them.",
    "eagle3": "CPM.cu scales the draft's residual branches by scale_depth / sqrt(layers of the target + 1), vLLM "
    "does not.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `draft`."""
    parser.add_argument("--to", choices=FORMATS, required=True, help="whose names OUT is to have")
    parser.add_argument(
        "--base", metavar="FOLDER", help="the target model; vLLM's EAGLE takes embedding, norm and head from it"
    )


def run(args: argparse.Namespace) -> dict:
    """`draft`; see `convert_draft`."""
    return convert_draft(args.source, args.output, to=args.to, base=args.base, dry_run=args.dry_run)


def convert_draft(
    source: str | Path, output: str | Path, *, to: str, base: str | Path | None = None, dry_run: bool = False
) -> dict:
    """Write a draft head under the names of another runtime.

    Args:
        source: folder with config.json and safetensors weights.
        output: folder to create; it appears complete or not at all.
        to: "cpmcu", "vllm" or "ours".
        base: folder of the target model; its settings are compared with the draft's, and for vLLM's EAGLE what the
            draft lacks is copied from it.
        dry_run: check everything but the numbers and say what would be written, but write nothing.

    Returns:
        `source`, `output`, `kind`, `source_format`, `to`, the `files` written, their `num_bytes` and `notes` (what is
        left out).

    Raises:
        ValueError: the folder cannot be read, holds a tensor that no draft has or lacks one, or the runtime cannot
            load such a draft.
    """
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}, got {to!r}.")
    draft = open_draft(source)
    target = None if base is None else open_checkpoint(base)
    if target is not None:
        _check_base(draft, target)
    config_dict, borrowed, notes = _requirements(draft, to, target)
    plan, sources = _plan(draft, to, borrowed, target, notes)
    folder = draft.checkpoint.folder
    code = [name for name in OFFICIAL_REMOTE_CODE if (folder / name).is_file()]
    files = [*draft.checkpoint.other_files(), *code]
    frequencies = {} if to == "vllm" else draft.frequencies
    if draft.frequencies and to == "vllm":
        notes.append("FR-Spec's frequency files are left out: vLLM drafts over the whole vocabulary.")
    head = {"source": str(folder), "output": str(output), "kind": draft.kind, "source_format": draft.source, "to": to}
    head["notes"] = notes
    if dry_run:
        size = plan_bytes(plan)
        summary = f"{output} would be an {KIND_NAMES[draft.kind]} draft of {len(plan)} tensors, {in_words(size)}."
        suffix = "pt" if to == "cpmcu" else "safetensors"
        files = sorted([*files, CONFIG_FILE, CARD_FILE, *(f"freq_{size}.{suffix}" for size in frequencies)])
        return head | {"files": files, "num_bytes": size, "summary": " ".join([summary, *notes])}
    settings = {"to": to, "base": None if target is None else target.fingerprint()}
    with open_output(output, command="draft", settings=settings, source=draft.checkpoint) as out:
        with out.shards(plan) as shards:
            for name, ours in sources.items():
                if ours in borrowed:
                    shards.write(name, target.tensor(borrowed[ours]))
                    continue
                tensor = draft.tensor(ours)
                if name == "d2t":
                    tensor = tensor - torch.arange(len(tensor), dtype=tensor.dtype)
                shards.write(name, tensor)
        for size, ids in frequencies.items():
            check_ids(ids, draft.sizes.vocab_size, f"freq_{size} in {folder}")
            save_frequencies(out.folder, ids, suffixes=(".pt",) if to == "cpmcu" else (".safetensors",))
        out.write_json(CONFIG_FILE, config_dict)
        out.copy_files(folder, files)
        out.write_text(CARD_FILE, _card(draft, to, notes, plan))
    result = head | out.summary()
    summary = f"{output}: {len(result['files'])} files, {in_words(result['num_bytes'])}."
    return result | {"summary": " ".join([summary, *notes])}


def _check_base(draft: Draft, target: Checkpoint) -> None:
    for name in _SHARED_SETTINGS:
        mine, theirs = draft.checkpoint.config_dict.get(name), getattr(target.config, name, None)
        if mine is not None and mine != theirs:
            raise ValueError(
                f"{draft.checkpoint.folder} has `{name}` {mine}, but the target {target.folder} has {theirs}; this "
                "draft belongs to another model."
            )


def _requirements(draft: Draft, to: str, target: Checkpoint | None) -> tuple[dict, dict[str, str], list[str]]:
    """config.json, what is borrowed from the target (our name -> its name), and notes.

    Raises:
        ValueError: the runtime cannot load this draft.
    """
    folder, config_dict = draft.checkpoint.folder, dict(draft.checkpoint.config_dict)
    config_dict.pop("draft_type", None)
    architectures = config_dict.get("architectures")
    if draft.kind == "eagle" and architectures:
        bare = [name.removeprefix(_VLLM_PREFIX) for name in architectures]
        config_dict["architectures"] = [_VLLM_PREFIX + name for name in bare] if to == "vllm" else bare
    if to == "ours":
        return {**config_dict, "draft_type": draft.kind}, {}, []
    if to == "cpmcu":
        return config_dict, {}, []
    if draft.quantised:
        raise ValueError(f"{folder} is quantised, and vLLM loads such a draft in full precision only.")
    if draft.kind == "eagle3":
        return {"architectures": ["LlamaForCausalLMEagle3"], **config_dict}, {}, []
    config_dict.setdefault("architectures", ["EagleMiniCPMForCausalLM"])
    if "fc.bias" in draft.names:
        raise ValueError(f"{folder} has fc.bias, and vLLM's EAGLE for MiniCPM has no bias there.")
    layer_norms = [f"layers.{index}.input_layernorm.weight" for index in range(draft.sizes.num_hidden_layers)]
    for name in ("embed_norm.weight", "hidden_norm.weight", *layer_norms):
        if name not in draft.names:
            raise ValueError(f"{folder} lacks {name}, which vLLM's EAGLE for MiniCPM always applies.")
    if config_dict.get("mup_denominator") is None:  # vLLM would take the draft's own number of layers
        if target is None:
            raise ValueError(
                f"{folder}/config.json gives no `mup_denominator`, by which vLLM scales the residual branches; name "
                "the target model by `--base`."
            )
        denominator = getattr(target.config, "mup_denominator", None)
        config_dict["mup_denominator"] = denominator or target.config.num_hidden_layers
    borrowed = {}
    for name, theirs in _VLLM_FROM_BASE.items():
        if name in draft.names or (name == "lm_head.weight" and config_dict.get("tie_word_embeddings")):
            continue
        if target is None:
            raise ValueError(
                f"{folder} lacks {name}, which vLLM's EAGLE for MiniCPM must find in the draft; name the target model "
                "by `--base`, and it is copied from there."
            )
        tied = theirs not in target.tensors and theirs == "lm_head.weight"
        borrowed[name] = "model.embed_tokens.weight" if tied else theirs
        if borrowed[name] not in target.tensors:
            raise ValueError(f"The target {target.folder} has no {theirs} in full precision to copy.")
    return config_dict, borrowed, [f"Copied from the target: {', '.join(borrowed)}."] if borrowed else []


def _plan(
    draft: Draft, to: str, borrowed: dict[str, str], target: Checkpoint | None, notes: list[str]
) -> tuple[Plan, dict[str, str]]:
    """The tensors to write and our name of each; what has no place is added to `notes`."""
    plan, sources = {}, {}
    for ours in (*draft.names, *borrowed):
        name = from_ours(ours, draft.kind, to)
        if name is None:
            notes.append(f"{ours} is left out: {_LEFT_OUT[to]}.")
            continue
        if draft.quantised and to == "cpmcu" and draft.kind == "eagle" and name.startswith(("layers.", "embed_")):
            name = f"model.{name}"  # the spelling that `marlin` and CPM.cu's own converter read
        info = target.tensors[borrowed[ours]] if ours in borrowed else draft.checkpoint.tensors[draft.names[ours]]
        plan[name], sources[name] = (info.dtype, info.shape), ours
    return plan, sources


def _card(draft: Draft, to: str, notes: list[str], plan: Plan) -> str:
    labels = {"cpmcu": "CPM.cu", "vllm": "vLLM", "ours": "minicpm4-hf"}
    kind, scales = KIND_NAMES[draft.kind], _SCALES[draft.kind]
    method = _METHOD.format(kind=kind, source=labels[draft.source], target=labels[to], scales=scales)
    return model_card(
        draft.checkpoint.folder,
        command="draft",
        method=" ".join([method, *notes]),
        settings={"kind": kind, "layout": labels[to]},
        sizes={"source": draft.checkpoint.num_bytes, "output": plan_bytes(plan)},
        error="None: the tensors are the source's.",
        usage=_USAGE[to].replace("METHOD", draft.kind),
        tags=("eagle", "speculative-decoding"),
        library={"cpmcu": "cpm.cu", "vllm": "vllm", "ours": "minicpm4-hf"}[to],
    )
