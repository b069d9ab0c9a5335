"""Read a draft head's folder without trusting it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from .draft_names import Sizes, detect, expected_shapes, from_ours, optional_names, to_ours
from .frequency_files import check_ids, list_frequency_files, read_frequencies
from .source import FLOAT_WEIGHTS, Checkpoint, read_config

INTEGERS = (torch.int32, torch.int64)
KIND_NAMES = {"eagle": "EAGLE", "eagle3": "EAGLE-3"}


@dataclass(frozen=True)
class Draft:
    """A draft whose names and shapes are checked; made by `open_draft`.

    Attributes:
        checkpoint: its folder.
        kind: "eagle" or "eagle3".
        source: its format.
        sizes: from its config.
        names: our name -> the name in the file.
        quantised: whether its layers are in the GPTQ layout.
        frequencies: V -> ids of its FR-Spec files.
    """

    checkpoint: Checkpoint
    kind: str
    source: str
    sizes: Sizes
    names: dict[str, str]
    quantised: bool
    frequencies: dict[int, torch.Tensor]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor by our name, checked; `draft_token_ids` as absolute ids whatever the file holds."""
        tensor = self.checkpoint.tensor(self.names[name])
        if name == "draft_token_ids":
            if self.names[name].rpartition(".")[2] == "d2t":
                tensor = tensor + torch.arange(len(tensor), dtype=tensor.dtype)
            check_ids(tensor, self.sizes.vocab_size, f"{self.names[name]} in {self.checkpoint.folder}")
        elif name == "t2d" and "draft_token_ids" in self.names:
            known = self.tensor("draft_token_ids").long().sort().values
            if not torch.equal(tensor.nonzero().flatten(), known):
                raise ValueError(f"`t2d` and `d2t` in {self.checkpoint.folder} do not name the same tokens.")
        return tensor


def open_draft(folder: str | Path) -> Draft:
    """Check a draft's folder: its names, shapes and dtypes; no number is read yet but those of FR-Spec's files.

    Raises:
        ValueError: anything that is missing, damaged, or of no draft.
    """
    folder = Path(folder)
    config_dict = read_config(folder)
    sizes = Sizes.read(config_dict, f"{folder}/config.json")
    checkpoint = read_draft_headers(folder, config_dict)
    try:
        kind, source = detect(checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read as a draft. {error}") from error
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        ours = to_ours(name, kind, source)
        if ours in names:
            raise ValueError(f"{folder} holds {name} and {names[ours]}, which are the same tensor of a draft.")
        names[ours or name] = name
    quantised = any(name.endswith(".qweight") for name in names)
    _check_tensors(checkpoint, kind, sizes, names, quantised)
    frequencies = {}
    for size, paths in list_frequency_files(folder).items():
        ids = [read_frequencies(path) for path in paths]
        if len(ids) == 2 and not torch.equal(*ids):
            raise ValueError(f"{paths[0]} and {paths[1].name} hold different ids; remove the wrong one.")
        frequencies[size] = ids[0]
    return Draft(checkpoint, kind, source, sizes, names, quantised, frequencies)


def read_draft_headers(folder: Path, config_dict: dict) -> Checkpoint:
    """A checkpoint folder whose headers are checked, but not against the names of a whole model.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    # `Checkpoint` looks for the weights of a causal language model where the architecture says that it is one.
    return Checkpoint(folder, config_dict, PreTrainedConfig(architectures=["DraftHead"], num_hidden_layers=1))


def _check_tensors(checkpoint: Checkpoint, kind: str, sizes: Sizes, names: dict[str, str], quantised: bool) -> None:
    folder, group_size = checkpoint.folder, None
    if quantised:
        group_size = (checkpoint.config_dict.get("quantization_config") or {}).get("group_size")
        if not isinstance(group_size, int) or not (group_size == -1 or group_size > 0):
            raise ValueError(f"{folder} holds quantised tensors, but its config.json gives no `group_size` for them.")
    shapes = expected_shapes(kind, sizes, group_size)
    for ours, name in names.items():
        if ours not in shapes:
            raise ValueError(
                f"{folder} holds {name}, which is no tensor of an {KIND_NAMES[kind]} draft with "
                f"{sizes.num_hidden_layers} layer{'s' * (sizes.num_hidden_layers > 1)}; it would be lost, so nothing "
                "is converted."
            )
        info = checkpoint.tensors[name]
        if info.shape != shapes[ours] and not (shapes[ours] == (-1,) and len(info.shape) == 1 and info.shape[0]):
            raise ValueError(
                f"{name} in {folder / info.shard} has shape {list(info.shape)}, but config.json asks for "
                f"{list(shapes[ours])}; the two do not belong together."
            )
        allowed = FLOAT_WEIGHTS
        if ours == "t2d":
            allowed = (torch.bool,)
        elif ours == "draft_token_ids" or ours.endswith((".qweight", ".qzeros", ".g_idx")):
            allowed = INTEGERS
        if info.dtype not in allowed:
            raise ValueError(
                f"{name} in {folder / info.shard} is of type {info.dtype}, which is not that of a draft's."
            )
    optional = optional_names(kind, sizes)
    if ("embed_norm.weight" in names) != ("hidden_norm.weight" in names):
        optional -= {"embed_norm.weight", "hidden_norm.weight"}
    missing = sorted(set(shapes) - set(names) - optional)
    if missing:
        theirs = from_ours(missing[0], kind, "cpmcu") or missing[0]
        raise ValueError(
            f"The weights in {folder} lack {missing[0]} ({theirs} for CPM.cu; {len(missing)} tensors missing in all); "
            "the config does not belong to them, or a file is missing."
        )
