"""What is measured, and on what: a checkpoint, the ways it attends, and books that it was not trained on."""

import argparse
import hashlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minicpm4_cli.demo import attention
from minicpm4_cli.loading import find_checkpoint, load
from minicpm4_hf.attended import attended_tokens
from minicpm4_hf.eval.tasks.perplexity import read_text

MODES = ("dense", "sparse")


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint.

    Args:
        sparse_config: what "sparse" means; None for a checkpoint that is dense only.
        identity: what results depend on besides the settings, ready for JSON: weights by their SHA-256, and the like.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    sparse_config: dict | None
    identity: dict

    def settings_of(self, mode: str) -> dict | None:
        """The `sparse_config` of a mode."""
        return self.sparse_config if mode == "sparse" else None

    def attending(self, mode: str) -> AbstractContextManager:
        """Run the model in a mode while the context lasts."""
        return attention(self.model, self.settings_of(mode))

    def estimate_work(self, begin: int, end: int, mode: str) -> float:
        """Multiplications for tokens `begin` to `end` of a text, in the layers; for the time that is left."""
        config = self.model.config
        attended = attended_tokens(torch.arange(begin, end), self.settings_of(mode)).sum().item()
        weights = sum(parameter.numel() for parameter in self.model.model.layers.parameters())
        heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        return (end - begin) * weights + 2 * heads * attended


@dataclass(frozen=True)
class Text:
    """A book in UTF-8."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def read_texts(paths: list[Path]) -> list[Text]:
    """The books, in the order given.

    Raises:
        ValueError: two of the same name, or a file that is empty or not UTF-8.
        OSError: a file cannot be read.
    """
    names = [path.name for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"`--text` must name each book once, got {name!r} twice.")
    return [Text(path.name, read_text(path)) for path in paths]


def load_subject(
    model: str | None, *, sparse: list[str] | None, device: str, dtype: str, context: int | None = None
) -> Subject:
    """A checkpoint by its folder or Hub id, the shipped one where None.

    Args:
        sparse: `["topk=32"]`, in place of the checkpoint's own settings.
        device, dtype: as on the command line, "auto" among them.
        context: tokens to extend the checkpoint's context to.

    Raises:
        ValueError, OSError: anything about them that the user can put right.
    """
    flags = {"model": model, "dense": False, "sparse": sparse, "context": context, "device": device, "dtype": dtype}
    loaded = load(argparse.Namespace(**flags))
    config = loaded.model.config
    if not hasattr(config, "sparse_config"):
        raise ValueError(
            f"This evaluation needs a MiniCPM4 model, and {loaded.name!r} is of type {config.model_type!r}."
        )
    if loaded.tokenizer.bos_token_id is None or loaded.tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of {loaded.name!r} must have a `bos_token` and a `pad_token`.")
    folder, _ = find_checkpoint(model)
    identity = {
        "weights": {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))},
        "tokenizer": {path.name: sha256_of(path) for path in sorted(folder.glob("tokenizer.*"))},
        "num_parameters": loaded.model.num_parameters(),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "sparse_config": config.sparse_config,
        **({} if context is None else {"context": context}),
    }
    return Subject(loaded.model, loaded.tokenizer, Path(loaded.name).name, config.sparse_config, identity)


def sha256_of(path: Path) -> str:
    """Of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
