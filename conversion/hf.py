"""From the official layout to the minicpm4 layout and back: a new config, the same weights."""

import argparse
import json
import shutil
from pathlib import Path

from minicpm4_hf import configuration_minicpm4
from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.official_layout import from_official, is_official, to_official

from .card import model_card
from .keys import AUTO_MAP, CARD_FILE, CONFIG_FILE, REMOTE_CODE
from .output import in_words, open_output
from .source import Checkpoint, open_checkpoint, read_config

_METHOD = (
    "Only config.json is rewritten; the weights are the source's, byte for byte. The two layouts name the settings "
    "differently: `model_type` minicpm and `rope_scaling` in the official one, minicpm4 and `rope_parameters` in ours."
)
_USAGE = """```python
import minicpm4_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layouts have no settings."""


def run(args: argparse.Namespace) -> dict:
    """`to-hf`, `to-official`, or `legacy`, which goes from whichever layout IN has to the other."""
    to_hf = args.command == "to-hf"
    if args.command == "legacy":
        to_hf = is_official(read_config(args.source))
    return (convert_to_hf if to_hf else convert_to_official)(args.source, args.output, dry_run=args.dry_run)


def convert_to_hf(source: str | Path, output: str | Path, *, dry_run: bool = False) -> dict:
    """Write a MiniCPM4 checkpoint in the official layout as one in the minicpm4 layout.

    The config is rewritten and the remote-code files are put next to it, so that the folder loads with and without
    this package. Weights and all other files are copied byte for byte, a piece at a time.

    Args:
        source: folder with config.json and safetensors weights.
        output: folder to create; it appears complete or not at all.
        dry_run: check everything and say what would be written, but write nothing.

    Returns:
        `source`, `output`, `model_type`, the `files` written and their `num_bytes`.

    Raises:
        ValueError: `source` is not such a folder, a shard is missing or damaged, or `output` exists.
    """
    source = Path(source)
    config_dict = read_config(source)
    if not is_official(config_dict):
        raise ValueError(
            f"{source} is not in the official layout: its config.json says model type "
            f"{config_dict.get('model_type')!r}, and only 'minicpm' needs this conversion."
        )
    if from_official(config_dict)["model_type"] != MiniCPM4Config.model_type:
        raise ValueError(
            f"{source} is a 2024 MiniCPM, which has no minicpm4 layout; load it as it is with the Auto classes."
        )
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    config.architectures = config.architectures or ["MiniCPM4ForCausalLM"]
    config.auto_map = AUTO_MAP
    return _write(checkpoint, output, "to-hf", config.to_json_string(), REMOTE_CODE, config.model_type, dry_run)


def convert_to_official(source: str | Path, output: str | Path, *, dry_run: bool = False) -> dict:
    """Write a checkpoint in the minicpm4 layout as one in the official layout, the reverse of `convert_to_hf`.

    The result has no remote code and no `auto_map`: it loads with this package, and in libraries that know the
    official `model_type`.

    Args:
        source: folder with config.json and safetensors weights.
        output: folder to create; it appears complete or not at all.
        dry_run: check everything and say what would be written, but write nothing.

    Returns:
        As `convert_to_hf`.

    Raises:
        ValueError: as `convert_to_hf`, or a setting that the official layout cannot express.
    """
    source = Path(source)
    model_type = read_config(source).get("model_type")
    if model_type != MiniCPM4Config.model_type:
        raise ValueError(f"{source} is not in the minicpm4 layout: its config.json says model type {model_type!r}.")
    checkpoint = open_checkpoint(source)
    official = to_official(checkpoint.config.to_diff_dict())
    unofficial = _unofficial_setting(checkpoint.config, official)
    if unofficial is not None:
        raise ValueError(f"The official layout cannot express {unofficial}, which {source} has; keep its own layout.")
    text = json.dumps(official, indent=2, sort_keys=True) + "\n"
    return _write(checkpoint, output, "to-official", text, (), official["model_type"], dry_run)


def _write(
    checkpoint: Checkpoint,
    output: str | Path,
    command: str,
    config_text: str,
    remote_code: tuple[str, ...],
    model_type: str,
    dry_run: bool,
) -> dict:
    files = [*checkpoint.other_files(), *checkpoint.weight_files]
    head = {"source": str(checkpoint.folder), "output": str(output), "model_type": model_type}
    if dry_run:
        num_bytes = sum((checkpoint.folder / name).stat().st_size for name in files)
        return {
            **head,
            "files": sorted([*files, *remote_code, CONFIG_FILE, CARD_FILE]),
            "num_bytes": num_bytes,
            "summary": f"{output} would be {len(files)} copied files, {in_words(num_bytes)}, and a config",
        }
    with open_output(output, command=command, source=checkpoint) as out:
        out.write_text(CONFIG_FILE, config_text)
        package = Path(configuration_minicpm4.__file__).parent
        for name in remote_code:
            shutil.copyfile(package / name, out.folder / name)
        out.copy_files(checkpoint.folder, files)
        card = model_card(
            checkpoint.folder,
            command=command,
            method=_METHOD,
            settings={"model type": model_type},
            sizes={"weights": checkpoint.num_bytes},
            error="None: the weights are copied.",
            usage=_USAGE,
        )
        out.write_text(CARD_FILE, card)
    return head | out.summary()


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
