"""From the official layout to the minicpm4 layout and back: a new config, the same weights."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from minicpm4_hf import configuration_minicpm4
from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.official_layout import from_official, is_official, to_official

from .keys import (
    AUTO_MAP,
    CONFIG_FILE,
    HEAD_WEIGHT,
    INDEX_FILE,
    LAYER_WEIGHTS,
    OFFICIAL_REMOTE_CODE,
    PICKLE_SUFFIXES,
    REMOTE_CODE,
    WEIGHT_FILE,
    WEIGHTS,
)

_CHUNK_BYTES = 16 * 2**20
_PROGRESS_SECONDS = 2.0


def convert_to_hf(source: str | Path, output: str | Path) -> dict:
    """Write a MiniCPM4 checkpoint in the official layout as one in the minicpm4 layout.

    The config is rewritten and the remote-code files are put next to it, so that the folder loads with and without
    this package. Weights and all other files are copied byte for byte, a piece at a time.

    Args:
        source: folder with config.json and safetensors weights.
        output: folder to create; it appears complete or not at all.

    Returns:
        `source`, `output`, `model_type`, the `files` written and their `num_bytes`.

    Raises:
        ValueError: `source` is not such a folder, a shard is missing or damaged, or `output` exists.
    """
    source, output = Path(source), Path(output)
    config_dict = _read_config(source)
    if not is_official(config_dict):
        raise ValueError(
            f"{source} is not in the official layout: its config.json says model type "
            f"{config_dict.get('model_type')!r}, and only 'minicpm' needs this conversion."
        )
    config_dict = from_official(config_dict)
    if config_dict["model_type"] != MiniCPM4Config.model_type:
        raise ValueError(
            f"{source} is a 2024 MiniCPM, which has no minicpm4 layout; load it as it is with the Auto classes."
        )
    config = _build_config(config_dict)
    config.architectures = config.architectures or ["MiniCPM4ForCausalLM"]
    config.auto_map = AUTO_MAP
    weight_files = _check_weights(source, config)
    with _new_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(config.to_json_string(), encoding="utf-8")
        package = Path(configuration_minicpm4.__file__).parent
        for name in REMOTE_CODE:
            shutil.copyfile(package / name, folder / name)
        _copy_files(source, folder, weight_files)
    return _summary(source, output, config.model_type)


def convert_to_official(source: str | Path, output: str | Path) -> dict:
    """Write a checkpoint in the minicpm4 layout as one in the official layout, the reverse of `convert_to_hf`.

    The result has no remote code and no `auto_map`: it loads with this package, and in libraries that know the
    official `model_type`.

    Args:
        source: folder with config.json and safetensors weights.
        output: folder to create; it appears complete or not at all.

    Returns:
        As `convert_to_hf`.

    Raises:
        ValueError: as `convert_to_hf`, or a setting that the official layout cannot express.
    """
    source, output = Path(source), Path(output)
    config_dict = _read_config(source)
    if config_dict.get("model_type") != MiniCPM4Config.model_type:
        raise ValueError(
            f"{source} is not in the minicpm4 layout: its config.json says model type "
            f"{config_dict.get('model_type')!r}."
        )
    config = _build_config(config_dict)
    official = to_official(config.to_diff_dict())
    unofficial = _unofficial_setting(config, official)
    if unofficial is not None:
        raise ValueError(f"The official layout cannot express {unofficial}, which {source} has; keep its own layout.")
    weight_files = _check_weights(source, config)
    with _new_folder(output) as folder:
        text = json.dumps(official, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        _copy_files(source, folder, weight_files)
    return _summary(source, output, official["model_type"])


def _read_config(source: Path) -> dict:
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the folder that holds config.json and the weights.")
    path = source / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{source} has no config.json, so it is not a checkpoint folder.")
    try:
        config_dict = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); get the file again.") from error
    if not isinstance(config_dict, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(config_dict).__name__}.")
    return config_dict


def _build_config(config_dict: dict) -> MiniCPM4Config:
    config_dict.pop("auto_map", None)
    try:
        return MiniCPM4Config.from_dict(config_dict)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _unofficial_setting(config: MiniCPM4Config, official: dict) -> str | None:
    """What of `config` is lost in the official code, in words, or None."""
    if "head_dim" in official:
        return f"`head_dim` {config.head_dim} (it uses hidden_size / num_attention_heads)"
    if config.mlp_bias:
        return "`mlp_bias`"
    rope = official["rope_scaling"] or {}
    if rope.get("rope_type") == "longrope":
        ratio = max(1.0, config.max_position_embeddings / rope["original_max_position_embeddings"])
        if "attention_factor" in rope or config.rope_parameters["factor"] not in (1.0, ratio):
            return "a LongRoPE attention factor that does not follow from the lengths"
    return None


def _check_weights(source: Path, config: MiniCPM4Config) -> list[str]:
    """The weight files of `source`, index first, after reading the header of every shard."""
    names, found = _weight_files(source), set()
    for name in names:
        if name == INDEX_FILE:
            continue
        path = source / name
        if not path.is_file():
            raise ValueError(f"{source} lacks the shard {name} that its index lists; get the file again.")
        try:
            with safe_open(path, framework="pt") as shard:
                found.update(shard.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut off ({error}); get the file again.") from error
    if getattr(config, "quantization_config", None) is None:  # quantized layers have other names
        expected = {*WEIGHTS, *(key.format(layer=i) for i in range(config.num_hidden_layers) for key in LAYER_WEIGHTS)}
        if not config.tie_word_embeddings:
            expected.add(HEAD_WEIGHT)
        missing = sorted(expected - found)
        if missing and config.architectures == ["MiniCPM4ForCausalLM"]:
            raise ValueError(
                f"The weights in {source} lack {missing[0]} ({len(missing)} tensors missing in all); the config does "
                "not belong to them, or a file is missing."
            )
    return names


def _weight_files(source: Path) -> list[str]:
    index = source / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a shard index ({error!r}); get the file again.") from error
        for name in shards:
            if Path(name).name != name:
                raise ValueError(f"{index} lists {name!r}, which is no file of this folder; get the file again.")
        return [INDEX_FILE, *shards]
    if (source / WEIGHT_FILE).is_file():
        return [WEIGHT_FILE]
    pickles = sorted(path.name for path in source.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{source} has its weights in {pickles[0]}, a pickle, which can run code when opened and is not "
            "converted; load it with the Auto classes and `save_pretrained` it, which writes safetensors."
        )
    raise ValueError(f"{source} has no weights: neither {WEIGHT_FILE} nor {INDEX_FILE}.")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, and is removed if anything goes wrong."""
    if output.exists() or output.is_symlink():
        raise ValueError(f"{output} already exists; name a folder that does not.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"{output.absolute().parent}, where {output.name} is to be created, is not a folder.")
    folder = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # gone already where all went well


def _copy_files(source: Path, folder: Path, weight_files: list[str]) -> None:
    """Copy the weights, and everything else that is no config, remote code, hidden file or other weights."""
    written = {CONFIG_FILE, *REMOTE_CODE, *OFFICIAL_REMOTE_CODE, *weight_files}
    others = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in written
        and not path.name.startswith(".")
        and path.suffix not in (".safetensors", *PICKLE_SUFFIXES)
    ]
    names = [*others, *weight_files]
    total, done = sum((source / name).stat().st_size for name in names), 0
    last = time.monotonic()
    for name in names:
        with open(source / name, "rb") as reader, open(folder / name, "xb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                writer.write(chunk)
                done += len(chunk)
                if time.monotonic() - last > _PROGRESS_SECONDS:
                    last = time.monotonic()
                    print(f"{name}: {done / 1e9:.2f} of {total / 1e9:.2f} GB copied", file=sys.stderr, flush=True)


def _summary(source: Path, output: Path, model_type: str) -> dict:
    files = sorted(output.iterdir())
    return {
        "source": str(source),
        "output": str(output),
        "model_type": model_type,
        "files": [path.name for path in files],
        "num_bytes": sum(path.stat().st_size for path in files),
    }
