"""The loss of one run's models on the held-out books, row by row, read densely and sparsely.

All readings are of the same rows, cut evenly from the books, so that two of them are compared row by row: how hard a
row is to predict, which differs far more than any two models do, is not in their difference.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.training.recipe import Recipe
from minicpm4_hf.training.shards import TokenShards

from .experiment import DENSE, HELD_OUT, SPARSE

DIGITS = 6  # of a row's loss in nats a token, behind the point: below the rounding of float32
BATCH_TOKENS = 8192  # that go through the model at once


def cut_rows(held_out: TokenShards, length: int, num_rows: int) -> torch.Tensor:
    """Rows of the held-out books, evenly spread over each, the same number of each.

    Returns:
        Token ids `[num_rows, length]`, int64, book by book.

    Raises:
        ValueError: the books do not share the rows evenly, or a book is shorter than a row.
    """
    if num_rows % held_out.num_documents:
        raise ValueError(
            f"`--rows` must be a multiple of the {held_out.num_documents} held-out books, got {num_rows}."
        )
    rows = []
    for number, size in enumerate(held_out.document_lengths.tolist()):
        if size < length:
            raise ValueError(
                f"The held-out book {HELD_OUT[number]!r} has {size} tokens; a row of the long stage needs {length}."
            )
        for start in np.linspace(0, size - length, num_rows // held_out.num_documents).astype(int).tolist():
            rows.append(held_out.document(number, start, start + length).astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def score_rows(model: MiniCPM4ForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row's tokens but the first, given all before them in the row.

    Args:
        rows: token ids `[N, T]`, int64.

    Returns:
        `[N]`, float64, nats a token, on the CPU.
    """
    losses = []
    for part in rows.split(max(1, BATCH_TOKENS // rows.shape[1])):
        part = part.to(model.device)
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        nats = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        losses.append(nats.view(len(part), -1).double().mean(1).cpu())
    return torch.cat(losses)


def load_model(folder, sparse_config: dict | None) -> MiniCPM4ForCausalLM:
    """A stage's model in float32, with another attention than its own where `sparse_config` says so."""
    config = AutoConfig.from_pretrained(folder)
    config.sparse_config = sparse_config
    model = MiniCPM4ForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    return model.to(torch.accelerator.current_accelerator() or "cpu")


def evaluate(recipe: Recipe, rows: torch.Tensor, sparse_config: dict) -> dict:
    """Read held-out rows with the models of a finished run.

    Args:
        rows: token ids `[N, T]`, int64, T the length of the long stage.
        sparse_config: of the sparse readings, whatever the run's own long stage had.

    Returns:
        The losses of each row in nats a token: `short`, cut to the short stage's length, dense, by the model at that
        stage's end; `switch`, whole, by the same model, with a list each for "dense" and "sparse"; and `end`, the same
        by the last model.
    """
    short, long = recipe.stages
    result = {}
    for moment, stage in (("switch", short), ("end", long)):
        readings = result[moment] = {}
        for attention, setting in ((DENSE, None), (SPARSE, sparse_config)):
            model = load_model(Path(recipe.output) / stage.name / "model", setting)
            readings[attention] = rounded(score_rows(model, rows))
            if (moment, attention) == ("switch", DENSE):
                result["short"] = rounded(score_rows(model, rows.view(-1, short.length)).view(len(rows), -1).mean(1))
    return result


def rounded(losses: torch.Tensor) -> list[float]:
    """The losses as a record keeps them."""
    return [round(loss, DIGITS) for loss in losses.tolist()]
