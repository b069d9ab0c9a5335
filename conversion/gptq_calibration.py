"""What GPTQ learns the inputs of layers from: sequences of a text, and their hidden states between two layers."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from minicpm4_hf.training.documents import read_documents


def read_calibration(
    sources: list[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_sequences: int,
    length: int,
    with_bos: bool = True,
) -> torch.Tensor:
    """Sequences from all over the texts, each of consecutive tokens of one document.

    The documents are cut into windows of `length` tokens, `bos_token` included, and of all windows `num_sequences`
    that lie evenly are taken, so that the choice depends on nothing but the texts.

    Args:
        sources: what `minicpm4_hf.training.documents.read_documents` reads: `.txt`, `.jsonl`, `.parquet` or folders.
        with_bos: begin each sequence with the tokenizer's `bos_token`, where it has one.

    Returns:
        `[num_sequences, length]` int64.

    Raises:
        ValueError: texts that are too short; and as `read_documents`.
    """
    bos = [tokenizer.bos_token_id] if with_bos and tokenizer.bos_token_id is not None else []
    step = length - len(bos)
    if step < 1:
        raise ValueError(f"`--length` must be greater than {len(bos)}, got {length}.")
    windows, num_tokens = [], 0
    for text in read_documents(sources):
        ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int32)
        num_tokens += len(ids)
        windows += np.split(ids[: len(ids) // step * step], len(ids) // step) if len(ids) >= step else []
    if len(windows) < num_sequences:
        raise ValueError(
            f"The calibration text has {num_tokens} tokens, which make {len(windows)} sequences of {length}, but "
            f"{num_sequences} are asked for; give more text, or fewer or shorter ones (`--sequences`, `--length`)."
        )
    chosen = [windows[i * len(windows) // num_sequences] for i in range(num_sequences)]
    return torch.tensor([bos + window.tolist() for window in chosen])


def digest_sequences(sequences: torch.Tensor) -> str:
    """SHA-256 of the tokens, as hexadecimal digits."""
    return hashlib.sha256(sequences.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


class HiddenStates:
    """The hidden states of every sequence at one place of the model, in a file of `num * length * size * 4` bytes.

    Two such files exist at a time, of the layer before and of the one being run; one sequence is in memory.

    Args:
        path: of the file; float32, one sequence after the other.
        shape: number of sequences, tokens of each, hidden size.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, tuple(shape)

    @staticmethod
    def count_bytes(shape: tuple[int, int, int]) -> int:
        """Size of the file of states of this shape."""
        num, length, size = shape
        return num * length * size * 4

    def is_complete(self) -> bool:
        """Whether the file is there and as long as it must be."""
        return self.path.is_file() and self.path.stat().st_size == self.count_bytes(self.shape)

    def read(self, index: int) -> torch.Tensor:
        """Sequence `index`, `[length, size]` float32."""
        _, length, size = self.shape
        with open(self.path, "rb") as file:
            file.seek(index * length * size * 4)
            values = np.fromfile(file, dtype=np.float32, count=length * size)
        return torch.from_numpy(values.reshape(length, size))

    def write_all(self, sequences) -> None:
        """Write `[length, size]` tensors, in order, to a file that appears whole, and see it onto the disk."""
        partial = self.path.with_name(f"{self.path.name}.writing")
        with open(partial, "wb") as file:
            for states in sequences:
                file.write(states.to(torch.float32).cpu().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


class InputStatistics:
    """Sums over the inputs x of a linear layer: x x^T, |x|, and how many there were.

    Args:
        size: of x.
        device: where to sum, in float32.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        self.hessian = torch.zeros(size, size, device=device)
        self.sum_magnitudes = torch.zeros(size, device=device)
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs `[T, size]`."""
        inputs = inputs.float()
        self.hessian.addmm_(inputs.t(), inputs)
        self.sum_magnitudes += inputs.abs().sum(0)
        self.count += inputs.shape[0]

    @property
    def magnitudes(self) -> torch.Tensor:
        """Mean |x|, `[size]`."""
        return self.sum_magnitudes / max(self.count, 1)


__all__ = ["HiddenStates", "InputStatistics", "digest_sequences", "read_calibration"]
