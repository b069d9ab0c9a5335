"""Load a checkpoint for the command line: every way it can be unfit is found here and said in one sentence."""

import argparse
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_TYPES = ("minicpm4", "minicpm", "llama")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What is fetched of a Hub repository: never a pickle.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, its tokenizer, and the name it was asked for by."""

    model: Any
    tokenizer: Any
    name: str


def positive_int(text: str) -> int:
    """argparse type of a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs a model of the user's choice."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder, Hub id or shipped name of a checkpoint (default: minicpm4-books)",
    )
    add_attention_arguments(parser)
    add_device_arguments(parser)


def add_attention_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that change how a checkpoint attends."""
    attention = parser.add_mutually_exclusive_group()
    attention.add_argument("--dense", action="store_true", help="dense attention, whatever the checkpoint says")
    attention.add_argument(
        "--sparse",
        nargs="*",
        metavar="KEY=VALUE",
        help="sparse attention, with these settings in place of the checkpoint's (or of the official ones)",
    )
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="extend the context to N tokens (the LongRoPE recipe)"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--dtype`."""
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: a GPU where there is one)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's; float32 is often faster on a CPU"
    )


def parse_sparse(pairs: list[str] | None) -> dict | None:
    """`["topk=32", "use_nope=true"]` as a dict with integers and booleans; None stays None.

    Raises:
        ValueError: not KEY=VALUE, or a value that is neither an integer nor true or false.
    """
    if pairs is None:
        return None
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if equals and key and value.lower() in ("true", "false"):
            settings[key] = value.lower() == "true"
        elif equals and key and re.fullmatch(r"-?\d+", value):
            settings[key] = int(value)
        else:
            raise ValueError(
                "`--sparse` takes KEY=VALUE pairs whose values are integers, true or false, such as topk=32; got "
                f"{pair!r}."
            )
    return settings


@contextmanager
def quiet():
    """Keep transformers' warnings and progress bars off stderr."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def find_device(name: str):
    """The `torch.device` of that name, "auto" being a CUDA GPU where there is one.

    Raises:
        ValueError: no such device, or it is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"`--device` must be a torch device such as cpu, cuda or cuda:1, got {name!r}.") from error
    if device.type == "cpu":
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != device.type:
        found = "none" if accelerator is None else accelerator.type
        raise ValueError(f"`--device {name}` is not available: torch finds {found} here; use `--device cpu`.")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise ValueError(
            f"`--device {name}` is not available: there are {torch.accelerator.device_count()} of its kind."
        )
    return device


def find_checkpoint(model: str | None) -> tuple[Path, str]:
    """The local folder of a checkpoint and the name to call it by: a folder, a shipped one's name, or a Hub id.

    A Hub id is downloaded; None is the first of those shipped.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder.
        OSError: the Hub has no such repository, or cannot be reached.
    """
    from minicpm4_hf.shipped import SHIPPED, shipped_checkpoint

    folder = shipped_checkpoint() if model is None else Path(model).expanduser()
    if model is None or folder.is_dir():
        return folder, model or folder.name
    if model in SHIPPED:
        return shipped_checkpoint(model), model
    if folder.exists():
        raise NotADirectoryError(f"`--model` must be a checkpoint's folder, but {model!r} is a file; name its folder.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
        raise FileNotFoundError(
            f"There is no model folder {model!r}, and it is no Hub id (owner/name) and no shipped checkpoint "
            f"({', '.join(SHIPPED)}) either; check `--model`."
        )
    return _download(model), model


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise OSError(
            f"There is no model folder {repository!r}, and it could not be fetched from the Hub ({reason}); check the "
            "name, "
            "or the connection."
        ) from error


def load_config(folder: Path, *, dense: bool = False, sparse: dict | None = None, context: int | None = None):
    """The checkpoint's config with the command line's changes.

    Raises:
        ValueError: not a model this program runs, or settings that do not fit.
        OSError: the folder has no config.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import minicpm4_hf  # noqa: F401  registers the model types

    content = _read_json(folder / "config.json", f"{str(folder)!r} is not a checkpoint: it has no config.json.")
    # Official files may leave it out; then the class is told by their `auto_map`.
    _check_model_type(folder, content.get("model_type", "minicpm"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        _check_model_type(folder, config.model_type)
        return change_config(config, dense=dense, sparse=sparse, context=context)
    except StrictDataclassError as error:
        raise ValueError(f"The config in {str(folder)!r} is not valid: {error.__cause__ or error}") from error


def _check_model_type(folder: Path, model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"The model in {str(folder)!r} is of type {model_type!r}; this program runs {', '.join(MODEL_TYPES)}."
        )


def change_config(config, *, dense: bool = False, sparse: dict | None = None, context: int | None = None):
    """Apply `--dense`, `--sparse` and `--context` to a config.

    Raises:
        ValueError: sparse settings that do not fit together, or that this model has no use for.
    """
    from minicpm4_hf import extend_context
    from minicpm4_hf.configuration_minicpm4 import complete_sparse_config

    can_be_sparse = hasattr(config, "sparse_config")
    if sparse is not None:
        if not can_be_sparse:
            raise ValueError(f"`--sparse` needs a MiniCPM4 model, and this one is of type {config.model_type!r}.")
        config.sparse_config = complete_sparse_config({**(config.sparse_config or {}), **sparse})
    if dense and can_be_sparse:
        config.sparse_config = None
    return config if context is None else extend_context(config, context)


def _read_json(path: Path, absent: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(absent)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(content).__name__}.")
    return content


def check_weight_files(folder: Path) -> None:
    """Check that every safetensors file of a checkpoint is there and whole.

    Raises:
        FileNotFoundError: no weights, or a missing shard.
        ValueError: only pickled weights, or a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        weight_map = _read_json(index, "").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{str(index)!r} names no weights: it must hold a `weight_map`.")
        names = sorted(set(weight_map.values()))
    elif pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        raise ValueError(
            f"{str(folder)!r} holds pickled weights only ({pickles[0]}), which can run code when loaded and are not "
            "read; "
            "if you trust them, convert them once with transformers: "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)` writes safetensors."
        )
    else:
        raise FileNotFoundError(f"{str(folder)!r} has no weights: neither model.safetensors nor {index.name}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{str(folder)!r} lacks {len(missing)} of its {len(names)} weight files, {missing[0]!r} first; download "
            "or copy "
            "it again."
        )
    for name in names:
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{str(folder / name)!r} is truncated or no safetensors file ({error}); download or copy it again."
            ) from error


def load_tokenizer(folder: Path):
    """The checkpoint's tokenizer.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{str(folder)!r} has no tokenizer (tokenizer.json); copy it from the original checkpoint."
        )
    if (folder / names[0]).is_file() and not {"model", "added_tokens"} <= set(_read_json(folder / names[0], "")):
        raise ValueError(f"{str(folder / names[0])!r} is no tokenizer; copy it from the original checkpoint again.")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"The tokenizer in {str(folder)!r} could not be loaded ({reason}).") from error


def load_weights(folder: Path, config, dtype: str):
    """The model with every weight taken from the checkpoint.

    Raises:
        ValueError: weights that are missing, of another shape, or do not load.
    """
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below in our own words
            output_loading_info=True,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The weights in {str(folder)!r} could not be loaded ({reason}).") from error
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"The weight {name!r} in {str(folder)!r} has shape {list(stored)}, but its config.json asks for "
            f"{list(wanted)}; "
            "the two do not belong together."
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"The checkpoint in {str(folder)!r} lacks {len(missing)} weights of the model, {missing[0]!r} first; it "
            "would run "
            "with random numbers in their place."
        )
    return model


def load(args: argparse.Namespace) -> Loaded:
    """The model and tokenizer that the flags of `add_model_arguments` ask for.

    Raises:
        ValueError, OSError: anything about them that the user can put right.
    """
    sparse = parse_sparse(args.sparse)
    device = find_device(args.device)
    folder, name = find_checkpoint(args.model)
    config = load_config(folder, dense=args.dense, sparse=sparse, context=args.context)
    check_weight_files(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer in {str(folder)!r} has {len(tokenizer)} tokens, but the model only {config.vocab_size}; "
            "the two "
            "do not belong together."
        )
    return Loaded(load_weights(folder, config, args.dtype).to(device).eval(), tokenizer, name)
