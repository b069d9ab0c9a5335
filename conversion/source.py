"""Read a checkpoint folder without trusting it.

Every header is checked when the folder is opened, every number when it is read. What does not fit is one sentence in a
`ValueError`. Pickles are never opened.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import minicpm4_hf  # noqa: F401  registers the model types
from minicpm4_hf.official_layout import from_official, is_official

from .keys import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    OFFICIAL_REMOTE_CODE,
    PICKLE_SUFFIXES,
    REMOTE_CODE,
    WEIGHT_FILE,
    WEIGHT_SUFFIX,
)

MODEL_TYPES = ("minicpm4", "minicpm", "llama")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a shard says of one tensor."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Checkpoint:
    """A checkpoint folder whose config and headers fit together; made by `open_checkpoint`.

    Attributes:
        folder: where it lies.
        config_dict: config.json as it stands in the file.
        config: the same, built; official files are translated.
        weight_files: names of the shards, with the index before them where there is one.
        tensors: name -> `TensorInfo`, in the order of the shards.
    """

    def __init__(self, folder: Path, config_dict: dict, config: PreTrainedConfig):
        self.folder, self.config_dict, self.config = folder, config_dict, config
        self.weight_files, self.tensors = _read_headers(folder)
        self._open: tuple[str, safe_open] | None = None
        _check_against_config(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor. It is a view of the file, read as it is used: do not change it in place.

        Raises:
            ValueError: there is none of that name, or it holds NaN or infinity.
        """
        if name not in self.tensors:
            raise ValueError(f"The weights in {self.folder} have no tensor {name}.")
        shard = self.tensors[name].shard
        if self._open is None or self._open[0] != shard:
            self._open = shard, safe_open(self.folder / shard, framework="pt")
        tensor = self._open[1].get_tensor(name)
        check_finite(tensor, f"{name} in {self.folder / shard}")
        return tensor

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one by one, all of them in the order of the shards unless `names` says otherwise.

        Raises:
            ValueError: as `tensor`.
        """
        for name in list(self.tensors if names is None else names):
            yield name, self.tensor(name)
        self._open = None

    def fingerprint(self) -> str:
        """A hash that changes with the config and with the shards' names, sizes and times of change."""
        digest = hashlib.sha256((self.folder / CONFIG_FILE).read_bytes())
        for name in self.weight_files:
            status = (self.folder / name).stat()
            digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def other_files(self) -> list[str]:
        """Names of what goes along with the weights: tokenizer, chat template, generation config, licence.

        Configs, cards, remote code, hidden files and weights in other formats are left out.
        """
        own = {CONFIG_FILE, CARD_FILE, INDEX_FILE, *REMOTE_CODE, *OFFICIAL_REMOTE_CODE}
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file()
            and path.name not in own
            and not path.name.startswith(".")
            and path.suffix not in (WEIGHT_SUFFIX, *PICKLE_SUFFIXES)
        )


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Check a checkpoint folder: its config, its index, the header of every shard, and whether they fit together.

    No tensor is read yet. Shapes and names are compared with what the config's model would have, where the checkpoint
    is a causal language model in full precision or in this package's ternary format.

    Raises:
        ValueError: anything that is missing, damaged, or of a model this package does not know.
    """
    folder = Path(folder)
    config_dict = read_config(folder)
    return Checkpoint(folder, config_dict, build_config(config_dict, folder))


def read_config(folder: str | Path) -> dict:
    """config.json of a checkpoint folder.

    Raises:
        ValueError: no folder, no such file, or no JSON object in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds config.json and the weights.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    config_dict = _read_json(path)
    if not isinstance(config_dict, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(config_dict).__name__}.")
    return config_dict


def build_config(config_dict: dict, folder: str | Path) -> PreTrainedConfig:
    """The config object of a config.json, official files translated; `folder` is named in errors.

    Raises:
        ValueError: a setting that is wrong, or a model type other than minicpm4, minicpm and llama.
    """
    if is_official(config_dict):
        config_dict = from_official(config_dict)
    model_type = config_dict.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{folder} holds a model of type {model_type!r}; the conversions know {', '.join(MODEL_TYPES)}."
        )
    content = {key: value for key, value in config_dict.items() if key != "auto_map"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def layer_of(name: str) -> tuple[int, str] | None:
    """("model.layers.3.mlp.up_proj.weight") -> (3, "mlp.up_proj.weight"); None for a tensor outside the layers."""
    found = None if name.startswith("mtp.") else _LAYER.search(name)
    return (int(found[1]), found[2]) if found else None


def check_finite(tensor: torch.Tensor, what: str) -> None:
    """Refuse NaN and infinity; `what` names the tensor in the sentence.

    Raises:
        ValueError: there is one; the sentence says where the first is.
    """
    if tensor.dtype not in (torch.float64, *FLOAT_WEIGHTS) or tensor.numel() == 0:
        return
    if all(bound.isfinite() for bound in torch.aminmax(tensor)):
        return
    first = (~tensor.isfinite()).nonzero()[0].tolist()
    raise ValueError(f"{what} holds NaN or infinity, first at {first}; the checkpoint is damaged, get it again.")


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); get the file again.") from error


def _read_headers(folder: Path) -> tuple[list[str], dict[str, TensorInfo]]:
    """The weight files, index first, and what their headers say."""
    if (folder / WEIGHT_FILE).is_file():
        files, weight_map, shards = [WEIGHT_FILE], None, [WEIGHT_FILE]
    elif (folder / INDEX_FILE).is_file():
        weight_map = _read_index(folder / INDEX_FILE)
        shards = sorted(set(weight_map.values()))
        files = [INDEX_FILE, *shards]
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if not pickles:
            raise ValueError(f"{folder} has no weights: neither {WEIGHT_FILE} nor {INDEX_FILE}.")
        raise ValueError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when opened and is not "
            "converted; load it with the Auto classes and `save_pretrained` it, which writes safetensors."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_header(folder, shard).items():
            if name in tensors:
                raise ValueError(f"{folder} has {name} twice, in {tensors[name].shard} and in {shard}.")
            tensors[name] = info
    for name, shard in (weight_map or {}).items():
        if name not in tensors or tensors[name].shard != shard:
            raise ValueError(f"{folder / INDEX_FILE} says that {name} is in {shard}, but it is not; get both again.")
    return files, tensors


def _read_index(path: Path) -> dict[str, str]:
    content = _read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path} is not a shard index: it must hold a `weight_map` of names; get the file again.")
    for shard in weight_map.values():
        if Path(shard).name != shard or "\\" in shard or shard == "..":
            raise ValueError(f"{path} lists {shard!r}, which is no file of this folder; get the file again.")
        if not shard.endswith(WEIGHT_SUFFIX):
            raise ValueError(f"{path} lists {shard!r}, which is no safetensors file; other formats are not opened.")
    return weight_map


def _read_header(folder: Path, shard: str) -> dict[str, TensorInfo]:
    path = folder / shard
    if not path.is_file():
        raise ValueError(f"{folder} lacks the shard {shard} that its index lists; get the file again.")
    try:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.offset_keys()}
            described = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); get the file again.") from error
    for name, (dtype, _) in described.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} in {path} is of type {dtype}, which the conversions do not read.")
    return {name: TensorInfo(shard, DTYPES[dtype], shape) for name, (dtype, shape) in described.items()}


def _check_against_config(checkpoint: Checkpoint) -> None:
    """Compare names, shapes and dtypes with those of the config's model."""
    folder, config, tensors = checkpoint.folder, checkpoint.config, checkpoint.tensors
    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"{folder}/config.json asks for {config.num_hidden_layers} layers, but the weights are {len(tensors)} "
            "tensors in all; the two do not belong together."
        )
    expected = expected_tensors(config)
    if expected is None:
        return
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise ValueError(
            f"The weights in {folder} lack {missing[0]} ({len(missing)} tensors missing in all); the config does not "
            "belong to them, or a file is missing."
        )
    for name, wanted in expected.items():
        info = tensors[name]
        if info.shape != tuple(wanted.shape):
            raise ValueError(
                f"{name} in {folder / info.shard} has shape {list(info.shape)}, but config.json asks for "
                f"{list(wanted.shape)}; the two do not belong together."
            )
        fits = info.dtype in FLOAT_WEIGHTS if wanted.is_floating_point() else info.dtype == wanted.dtype
        if not fits:
            raise ValueError(
                f"{name} in {folder / info.shard} is of type {info.dtype}, but should be "
                f"{'float32, float16 or bfloat16' if wanted.is_floating_point() else wanted.dtype}."
            )


def expected_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor] | None:
    """Name -> meta tensor of what a checkpoint with this config must hold, tied weights once.

    None where that is not known: no causal language model, or quantised by another library's method.
    """
    if (config.architectures or ["ForCausalLM"]) != ["ForCausalLM"] and not config.architectures[0].endswith(
        "ForCausalLM"
    ):
        return None
    if getattr(config, "quantization_config", None) is not None:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
