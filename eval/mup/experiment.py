"""What both experiments train: a small MiniCPM4 of a given width on the bytes of books, the same bytes at every width.

Only the width differs between models: the head dimension, the two key heads, the number of layers and the ratio of
the MLP are the same, as between MiniCPM4-0.5B and -8B. The width grows with the number of query heads.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.training.mup import initialize_mup_, mup_parameter_groups, standard_parametrization
from minicpm4_hf.training.schedule import WSDSettings, build_scheduler

PARAMETRIZATIONS = ("mup", "standard")
VOCAB_SIZE = 256  # bytes
VALIDATION_BOOKS = ("dracula", "emma")  # of the shipped checkpoint
NUM_KEY_VALUE_HEADS = 2  # of every official MiniCPM4
HELD_OUT_SHARE = 0.05  # the end of each book, which no model is trained on
HELD_OUT_WINDOWS = 128


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of an experiment."""

    parametrization: str
    width: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides an experiment's figures, besides the books.

    Args:
        length: bytes a sequence; `batch` sequences are a step.
        dtype: of matrix products; weights and optimizer are float32.
        threads: of the CPU; another number sums in another order.

    Raises:
        ValueError: a setting out of its range.
    """

    experiment: str
    parametrizations: tuple[str, ...]
    widths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    num_warmup_steps: int
    num_decay_steps: int
    floor_share: float
    num_hidden_layers: int
    head_dim: int
    length: int
    batch: int
    dtype: str
    threads: int
    init_std: float = 0.1  # MiniCPM's (arXiv:2404.06395), as are the scales in the model
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("parametrizations", "widths", "learning_rates", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or not values:
                raise ValueError(f"`{name}` must be different values, at least one, got {list(values)}.")
        unit = NUM_KEY_VALUE_HEADS * self.head_dim
        wrong = [width for width in self.widths if width % unit or width <= 0]
        if wrong:
            raise ValueError(
                f"`widths` must be multiples of {unit} ({NUM_KEY_VALUE_HEADS} key heads of {self.head_dim}), got "
                f"{wrong[0]}."
            )
        if len(self.widths) < 2:
            raise ValueError(f"`widths` must be at least two, to compare, got {list(self.widths)}.")
        build_scheduler(torch.optim.SGD([torch.zeros(1)]), self.schedule, self.steps)  # checks the numbers of steps

    @property
    def schedule(self) -> WSDSettings:
        """Of every run."""
        return WSDSettings(
            num_warmup_steps=self.num_warmup_steps,
            num_decay_steps=self.num_decay_steps,
            floor_share=self.floor_share,
        )

    def cells(self) -> Iterator[Cell]:
        """Every run: seed by seed, the narrow ones first."""
        for seed in self.seeds:
            for width in self.widths:
                for parametrization in self.parametrizations:
                    for rate in self.learning_rates:
                        yield Cell(parametrization=parametrization, width=width, learning_rate=rate, seed=seed)


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, `uint8` both, and what they were made of."""

    training: np.ndarray
    held_out: np.ndarray
    sources: dict[str, dict]

    def batch(self, settings: Settings, seed: int, step: int) -> torch.Tensor:
        """The sequences `[batch, length + 1]`, int64, of a step: the same for every width and learning rate."""
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(0, len(self.training) - settings.length, settings.batch)
        return _windows(self.training, starts, settings.length)

    def held_out_windows(self, settings: Settings) -> torch.Tensor:
        """Sequences `[128, length + 1]`, int64, spread evenly over what is held out."""
        starts = np.linspace(0, len(self.held_out) - settings.length - 1, HELD_OUT_WINDOWS).astype(int)
        return _windows(self.held_out, starts, settings.length)


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> torch.Tensor:
    return torch.from_numpy(text[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def read_corpus(folder: Path, settings: Settings) -> Corpus:
    """The books of a folder, `*.txt` in the order of the names, without the shipped checkpoint's validation books.

    Raises:
        ValueError: no folder, no book in it, or too little text.
    """
    if not folder.is_dir():
        raise ValueError(f"`--books` must be a folder of *.txt files, and {str(folder)!r} is not a folder.")
    paths = [path for path in sorted(folder.glob("*.txt")) if path.stem not in VALIDATION_BOOKS]
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no *.txt file to train on.")
    training, held_out, sources = [], [], {}
    for path in paths:
        text = path.read_bytes()
        cut = len(text) - round(len(text) * HELD_OUT_SHARE)
        training.append(text[:cut])
        held_out.append(text[cut:])
        sources[path.stem] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    corpus = Corpus(*(np.frombuffer(b"".join(part), np.uint8) for part in (training, held_out)), sources)
    if len(corpus.held_out) <= settings.length:
        needed = math.ceil((settings.length + 1) / HELD_OUT_SHARE)
        raise ValueError(
            f"The books in {str(folder)!r} have {sum(map(len, training + held_out))} bytes, and sequences of "
            f"{settings.length} need {needed}."
        )
    return corpus


def build_model(settings: Settings, cell: Cell) -> MiniCPM4ForCausalLM:
    """The untrained model of a cell; its weights depend on the cell's seed."""
    config = MiniCPM4Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=cell.width,
        intermediate_size=cell.width * 5 // 2,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=cell.width // settings.head_dim,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        head_dim=settings.head_dim,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    if cell.parametrization == "standard":
        config = standard_parametrization(config)
    generator = torch.Generator().manual_seed(cell.seed)
    return initialize_mup_(MiniCPM4ForCausalLM(config), init_std=settings.init_std, generator=generator)


def loss_of(model: MiniCPM4ForCausalLM, sequences: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Mean cross-entropy in nats a byte over sequences `[B, length + 1]`."""
    autocast = torch.autocast("cpu", torch.bfloat16) if settings.dtype == "bfloat16" else nullcontext()
    with autocast:
        logits = model(input_ids=sequences[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), sequences[:, 1:].flatten())


def train(
    settings: Settings, cell: Cell, corpus: Corpus, observe: Callable[[MiniCPM4ForCausalLM], None] | None = None
) -> tuple[MiniCPM4ForCausalLM, dict]:
    """Train the model of a cell.

    Args:
        observe: called on the model before the first step and after each.

    Returns:
        The trained model, and what is said of any cell: its `parameters`, the training `losses` in nats a byte, one a
        step (None where not a number), and `seconds`.
    """
    started = time.perf_counter()
    model = build_model(settings, cell)
    groups = mup_parameter_groups(model, learning_rate=cell.learning_rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=settings.betas)
    scheduler = build_scheduler(optimizer, settings.schedule, settings.steps)
    losses = []
    for step in range(settings.steps):
        if observe:
            observe(model)
        loss = loss_of(model, corpus.batch(settings, cell.seed, step), settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(finite_or_none(loss.item()))
    if observe:
        observe(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, {"parameters": parameters, "losses": losses, "seconds": round(time.perf_counter() - started, 1)}


def finite_or_none(value: float) -> float | None:
    """A number for a JSON record, of six digits, or None for what JSON has no number for."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
