"""Train the small MiniCPM4 checkpoint that the package ships.

    python -m minicpm4_hf.training.reference_checkpoint --books books --output reference
    python -m minicpm4_hf.training.reference_checkpoint --books books --output reference --steps 200

`--books` holds one UTF-8 `*.txt` file a book; the validation books are never trained on. A run that was cut off goes
on from its last checkpoint when the same command is given again, and ends with the same weights as one that was not.
The finished model is in the folder `model` of `--output`: weights, tokenizer and the record of the training.

Set OMP_WAIT_POLICY=PASSIVE where other programs share the processor: otherwise the threads wait by spinning, and a
run was measured to be five times slower.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from minicpm4_hf.configuration_minicpm4 import MiniCPM4Config
from minicpm4_hf.longrope import longrope_factors
from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.training.tokenizer import train_tokenizer

IGNORED = -100  # label of a token whose loss is not counted

# Of the exported model only; training is dense. The official values with a quarter of the window and of the blocks and
# an eighth of `dense_len`, so that a prompt of a few thousand tokens already is sparse.
SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 512,
    "topk": 16,
    "use_nope": False,
    "dense_len": 1024,
}


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, besides the books.

    Shape: the published LongRoPE list used here is for `head_dim` 64; `hidden_size` is `dim_model_base`, so the muP
    width factors are 1. Scales and initialisation are MiniCPM's (arXiv:2404.06395): embedding x12, residual branches
    1.4 / sqrt(layers), matrices of standard deviation 0.1.
    Schedule: warm-up, stable, decay (WSD, arXiv:2404.06395); the long sequences belong to the decay, as MiniCPM4's
    long stages follow its stable stage.
    Positions: `skip_share` of the sequences are pieces of one book at their true distances (PoSE, arXiv:2309.10400),
    so that distances up to `max_distance` are seen at the price of short sequences.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 65536  # 0.5B's original length; above every distance trained on
    validation_books: tuple[str, ...] = ("dracula", "emma")
    seed: int = 0
    steps: int = 1200
    tokens_per_step: int = 8192
    micro_batch_tokens: int = 2048  # what fits the caches of the CPU it was measured on
    short_length: int = 512  # attention is half of the time at 1024, and as long again at 512 for the same tokens
    long_length: int = 8192
    long_every: int = 4  # in the decay, one step in so many is made of long sequences
    skip_share: float = 0.3
    max_distance: int = 49152
    peak_lr: float = 1e-2  # base rate of MiniCPM under muP; ahead of 6e-3 and 3e-3 in trials of 30 steps
    final_lr_share: float = 0.05
    warmup_steps: int = 100  # of the Megatron script of MiniCPM4
    decay_share: float = 0.25
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip_norm: float = 1.0
    autocast: bool = True  # bf16 matrix products on fp32 weights
    threads: int = 2  # a different count sums in a different order
    checkpoint_every: int = 50
    evaluations: int = 20
    evaluation_bytes: int = 100_000
    excerpt_length: int = 1024
    evaluation_length: int = 4096

    @property
    def decay_start(self) -> int:
        return self.steps - round(self.steps * self.decay_share)


def build_config(recipe: Recipe, stop_ids: list[int]) -> MiniCPM4Config:
    """The dense model configuration that is trained; `export_config` adds sparse attention."""
    factors = longrope_factors("MiniCPM4-0.5B") if recipe.head_dim == 64 else [1.0] * (recipe.head_dim // 2)
    return MiniCPM4Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_position_embeddings,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": recipe.max_position_embeddings,
            "factor": 1.0,
        },
        initializer_range=0.1 / math.sqrt(recipe.hidden_size / 256),
        tie_word_embeddings=True,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
        bos_token_id=1,
        eos_token_id=stop_ids,
        pad_token_id=2,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """WSD: linear warm-up, constant, exponential decay to `final_lr_share` of the peak at the last step."""
    if step < recipe.warmup_steps:
        return recipe.peak_lr * (step + 1) / recipe.warmup_steps
    if step < recipe.decay_start:
        return recipe.peak_lr
    done = (step + 1 - recipe.decay_start) / (recipe.steps - recipe.decay_start)
    return recipe.peak_lr * recipe.final_lr_share**done


class Batches:
    """The training sequences: what a step sees depends on the seed and the step alone.

    Every sequence is `<s>` at position 0, then tokens of one book at their distances, the first of them at position 1.
    """

    def __init__(self, books: list[np.ndarray], recipe: Recipe):
        self.books = books
        self.recipe = recipe
        self.sizes = np.array([len(book) for book in books])

    def step(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Micro-batches of `input_ids`, `position_ids` and `labels`, each `[B, T]`."""
        recipe = self.recipe
        is_long = step >= recipe.decay_start and step % recipe.long_every == 0
        length = recipe.long_length if is_long else recipe.short_length
        num_sequences = max(1, recipe.tokens_per_step // length)
        windows = self._windows(step, num_sequences, length)
        rng = np.random.default_rng([recipe.seed, 1, step])
        rows = []
        for book, start in windows:
            if rng.random() < recipe.skip_share:
                rows.append(self._skipping(rng, length))
            else:
                rows.append(self._row(book, np.arange(start, start + length)))
        size = max(1, recipe.micro_batch_tokens // length)
        return [self._stack(rows[i : i + size]) for i in range(0, num_sequences, size)]

    def _windows(self, step: int, count: int, length: int) -> list[tuple[int, int]]:
        """Book and first token of each window: passes over all books, each in an order and a phase of its own."""
        slots = (self.sizes - 2 * length) // length
        ends = np.cumsum(slots)
        windows = []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, int(ends[-1]))
            rng = np.random.default_rng([self.recipe.seed, 2, length, epoch])
            phase = int(rng.integers(length))
            slot = int(rng.permutation(int(ends[-1]))[place])
            book = int(np.searchsorted(ends, slot, side="right"))
            windows.append((book, phase + (slot - int(ends[book] - slots[book])) * length))
        return windows

    def _skipping(self, rng: np.random.Generator, length: int) -> dict[str, np.ndarray]:
        """Two to four pieces of one book, spread over up to `max_distance` tokens."""
        book = int(rng.choice(len(self.books), p=self.sizes / self.sizes.sum()))
        reach = min(self.recipe.max_distance, len(self.books[book]) - 1)
        span = int(rng.integers(min(2 * length, reach), reach + 1))
        start = int(rng.integers(len(self.books[book]) - span))
        pieces = int(rng.integers(2, 5))
        cuts = np.sort(rng.choice(np.arange(1, length), pieces - 1, replace=False))
        skips = np.sort(rng.integers(0, span - length + 1, pieces - 1))
        offsets = np.arange(length)
        for cut, skip in zip(cuts, np.diff(skips, prepend=0), strict=True):
            offsets[cut:] += skip
        return self._row(book, start + offsets)

    def _row(self, book: int, places: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self.books[book][places].astype(np.int64)
        positions = np.concatenate(([0], places[:-1] - places[0] + 1))
        labels = tokens.copy()
        labels[1:][np.diff(places) != 1] = IGNORED  # the first token after a skip cannot be known
        return {"input_ids": np.concatenate(([1], tokens[:-1])), "position_ids": positions, "labels": labels}

    @staticmethod
    def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class TrainingError(Exception):
    """What the user can put right; `main` prints it as one sentence."""


@dataclass(frozen=True)
class Corpus:
    """The tokenised books, `uint16`, by name, and the size and SHA-256 of each text."""

    tokenizer: PreTrainedTokenizerFast
    tokens: dict[str, np.ndarray]
    sources: dict[str, dict]

    def validation(self, recipe: Recipe) -> dict[str, np.ndarray]:
        return {name: self.tokens[name] for name in recipe.validation_books}

    def training(self, recipe: Recipe) -> list[np.ndarray]:
        return [tokens for name, tokens in self.tokens.items() if name not in recipe.validation_books]


def read_books(folder: Path, recipe: Recipe) -> dict[str, str]:
    """The texts of `folder` by name, in the order of the names, line ends as they are."""
    if not folder.is_dir():
        raise TrainingError(f"`--books` must be a folder of *.txt files, and {str(folder)!r} is not a folder.")
    texts = {}
    for path in sorted(folder.glob("*.txt")):
        try:
            texts[path.stem] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise TrainingError(f"{str(path)!r} is not UTF-8 text (byte {error.start}).") from error
    missing = [name for name in recipe.validation_books if name not in texts]
    if missing:
        raise TrainingError(f"{str(folder)!r} lacks the validation book {missing[0]}.txt.")
    if len(texts) == len(recipe.validation_books):
        raise TrainingError(f"{str(folder)!r} holds no book to train on besides the validation books.")
    return texts


def prepare_corpus(books: Path, folder: Path, recipe: Recipe) -> Corpus:
    """Train the tokenizer and tokenise every book, or reuse what `folder` holds of the same books."""
    texts = read_books(books, recipe)
    sources = {}
    for name, text in texts.items():
        raw = text.encode("utf-8")
        role = "validation" if name in recipe.validation_books else "training"
        sources[name] = {"role": role, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    identity = {"vocab_size": recipe.vocab_size, "books": sources}
    identity_file = folder / "corpus.json"
    if not identity_file.is_file() or json.loads(identity_file.read_text()) != identity:
        say("Training the tokenizer and tokenising the books.")
        try:
            tokenizer = train_tokenizer(
                (texts[name] for name, source in sources.items() if source["role"] == "training"),
                vocab_size=recipe.vocab_size,
            )
        except ValueError as error:
            raise TrainingError(str(error)) from error
        tokenizer.save_pretrained(folder / "tokenizer")
        for name, text in texts.items():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            write_atomically(folder / f"{name}.npy", lambda path, ids=ids: _save_array(path, ids))
        # last, so that its presence means that all the others are whole
        write_atomically(identity_file, lambda path: path.write_text(json.dumps(identity)))
    corpus = Corpus(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        tokens={name: np.load(folder / f"{name}.npy") for name in texts},
        sources=sources,
    )
    needed = 3 * recipe.long_length
    for name, tokens in corpus.tokens.items():
        if sources[name]["role"] == "training" and len(tokens) < needed:
            raise TrainingError(
                f"{name}.txt is too short to train on: it has {len(tokens)} tokens and needs {needed}."
            )
    return corpus


def _save_array(path: Path, ids: list[int]):
    with path.open("wb") as file:
        np.save(file, np.array(ids, dtype=np.uint16))


def say(line: str):
    """One line to the log on stderr."""
    print(line, file=sys.stderr, flush=True)


def write_atomically(path: Path, write):
    """Call `write` on a path beside `path`, then put the result in place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def token_losses(model, batch: dict[str, torch.Tensor], *, autocast: bool, reduction: str) -> torch.Tensor:
    """Cross-entropy in nats over the labels of `batch`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            # without a mask transformers would take a skip in the positions for the start of another sequence
            attention_mask=torch.ones_like(batch["input_ids"]),
            use_cache=False,
        ).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction=reduction)


@torch.no_grad()
def total_nats(model, tokens: np.ndarray, length: int, *, autocast: bool) -> float:
    """The information in `tokens`: every token counted once, in contiguous windows that each begin with `<s>`."""
    total = 0.0
    for start in range(0, len(tokens), length):
        labels = torch.from_numpy(tokens[start : start + length].astype(np.int64))[None]
        batch = {
            "input_ids": F.pad(labels[:, :-1], (1, 0), value=1),
            "position_ids": torch.arange(labels.shape[1])[None],
            "labels": labels,
        }
        total += token_losses(model, batch, autocast=autocast, reduction="sum").item()
    return total


def build_optimizer(model, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps, fused=True)


@dataclass
class Progress:
    """What a resumed run must know besides the tensors."""

    step: int = 0
    loss_sum: float = 0.0  # since the last record
    loss_steps: int = 0
    seconds: float = 0.0


def save_checkpoint(path: Path, model, optimizer, progress: Progress, identity: dict):
    """One file, so that weights, optimizer state and step cannot come from different moments."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"weight.{name}"] = weight.detach()
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[weight][key]
    metadata = {"progress": json.dumps(dataclasses.asdict(progress)), "identity": json.dumps(identity)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=metadata))


@torch.no_grad()
def load_checkpoint(path: Path, model, optimizer, recipe: Recipe, identity: dict) -> Progress:
    """Restore `model` and `optimizer` in place.

    Before the decay a step does not depend on the number of steps, so that one number may still change there.

    Raises:
        TrainingError: the checkpoint is of another recipe or of other books.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        stored = json.loads(metadata["identity"])
        differing = sorted(key for key in identity | stored if identity.get(key) != stored.get(key))
        progress = Progress(**json.loads(metadata["progress"]))
        if differing == ["steps"]:
            stored_recipe = dataclasses.replace(recipe, steps=stored["steps"])
            if progress.step <= min(recipe.decay_start, stored_recipe.decay_start):
                differing = []
        if differing:
            raise TrainingError(
                f"{str(path.parent)!r} holds a run with another {', '.join(differing)}; use another `--output`."
            )
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            optimizer.state[weight] = {
                "step": torch.tensor(float(progress.step)),
                "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
            }
    return progress


def train_step(model, optimizer, batches: list[dict[str, torch.Tensor]], recipe: Recipe, step: int) -> float:
    """One optimizer step over the micro-batches; returns the mean loss of its tokens in nats."""
    counted = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = token_losses(model, batch, autocast=recipe.autocast, reduction="sum") / counted
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise TrainingError(f"The loss is not finite at step {step + 1}; a lower `peak_lr` may help.")
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def excerpt(text_tokens: np.ndarray, tokenizer: PreTrainedTokenizerFast, size_bytes: int) -> tuple[np.ndarray, int]:
    """About `size_bytes` from the middle of a book, and how many bytes they are."""
    middle = len(text_tokens) // 2
    tokens = text_tokens[middle : middle + size_bytes // 3]
    return tokens, len(tokenizer.decode(tokens).encode("utf-8"))


class Run:
    """One training run in an output folder."""

    def __init__(self, books: Path, output: Path, recipe: Recipe):
        torch.set_num_threads(recipe.threads)
        self.recipe = recipe
        self.output = output
        self.corpus = prepare_corpus(books, output / "corpus", recipe)
        self.stop_ids = [2, self.corpus.tokenizer.eos_token_id]
        self.batches = Batches(self.corpus.training(recipe), recipe)
        self.excerpts = {
            name: excerpt(tokens, self.corpus.tokenizer, recipe.evaluation_bytes)
            for name, tokens in self.corpus.validation(recipe).items()
        }
        torch.manual_seed(recipe.seed)
        self.model = MiniCPM4ForCausalLM(build_config(recipe, self.stop_ids)).train()
        self.optimizer = build_optimizer(self.model, recipe)
        self.identity = dataclasses.asdict(recipe)
        self.identity["validation_books"] = list(recipe.validation_books)
        self.identity["books"] = {name: source["sha256"] for name, source in self.corpus.sources.items()}
        self.checkpoint = output / "checkpoint.safetensors"
        self.log = output / "log.jsonl"
        self.progress = Progress()
        if self.checkpoint.is_file():
            self.progress = load_checkpoint(self.checkpoint, self.model, self.optimizer, recipe, self.identity)
            say(f"Going on after step {self.progress.step}.")
        records = [record for record in self.records() if record["step"] <= self.progress.step]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(self.log, lambda path: path.write_text(lines))

    def records(self) -> list[dict]:
        """The records of the log; a last line that was cut off is left out."""
        if not self.log.is_file():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def train(self):
        """Train to the last step, with records and checkpoints on the way."""
        recipe, progress = self.recipe, self.progress
        record_every = max(1, recipe.steps // recipe.evaluations)
        started, first_step, earlier = time.monotonic(), progress.step, progress.seconds
        printed = started
        while progress.step < recipe.steps:
            loss = train_step(self.model, self.optimizer, self.batches.step(progress.step), recipe, progress.step)
            progress.step += 1
            progress.loss_sum += loss
            progress.loss_steps += 1
            progress.seconds = earlier + time.monotonic() - started
            if time.monotonic() - printed > 10:
                printed = time.monotonic()
                pace = (printed - started) / (progress.step - first_step)
                speed, minutes = recipe.tokens_per_step / pace, pace * (recipe.steps - progress.step) / 60
                done = f"step {progress.step}/{recipe.steps}"
                say(f"{done}  loss {loss:.3f}  {speed:.0f} tokens/s  {minutes:.0f} min left")
            if progress.step % record_every == 0 or progress.step == recipe.steps:
                self._record()
            if progress.step % recipe.checkpoint_every == 0 or progress.step == recipe.steps:
                save_checkpoint(self.checkpoint, self.model, self.optimizer, progress, self.identity)

    def _record(self):
        progress = self.progress
        bits = {
            name: total_nats(self.model, tokens, self.recipe.excerpt_length, autocast=self.recipe.autocast)
            / (math.log(2) * size)
            for name, (tokens, size) in self.excerpts.items()
        }
        record = {
            "step": progress.step,
            "tokens": progress.step * self.recipe.tokens_per_step,
            "seconds": round(progress.seconds, 1),
            "lr": learning_rate(self.recipe, progress.step - 1),
            "loss": progress.loss_sum / progress.loss_steps,
            "excerpt_bits_per_byte": bits,
        }
        progress.loss_sum, progress.loss_steps = 0.0, 0
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        say(json.dumps(record))

    def export(self) -> dict:
        """Write OUTPUT/model and return the record of the training; the books are scored with the bf16 weights."""
        folder = self.output / "model"
        model = MiniCPM4ForCausalLM(build_config(self.recipe, self.stop_ids))
        model.load_state_dict(self.model.state_dict())
        model = model.to(torch.bfloat16)
        say("Scoring the validation books in full.")
        bits = {
            name: total_nats(model, tokens, self.recipe.evaluation_length, autocast=False)
            / (math.log(2) * self.corpus.sources[name]["bytes"])
            for name, tokens in self.corpus.validation(self.recipe).items()
        }
        model.config.sparse_config = dict(SPARSE_CONFIG)
        model.config.dtype = torch.bfloat16
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.8, top_p=0.8, bos_token_id=1, eos_token_id=self.stop_ids, pad_token_id=2
        )
        model.save_pretrained(folder)
        for file in (self.output / "corpus" / "tokenizer").iterdir():
            shutil.copyfile(file, folder / file.name)
        tokens = self.progress.step * self.recipe.tokens_per_step
        record = {
            "recipe": dataclasses.asdict(self.recipe),
            "books": self.corpus.sources,
            "parameters": sum(weight.numel() for weight in self.model.parameters()),
            "tokens": tokens,
            "seconds": round(self.progress.seconds, 1),
            "tokens_per_second": round(tokens / max(self.progress.seconds, 1e-9), 1),
            "torch": torch.__version__,
            "curve": self.records(),
            "bits_per_byte": bits,
        }
        write_atomically(
            folder / "training_record.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n")
        )
        return record


def main(argv: list[str] | None = None, recipe: Recipe = Recipe()) -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.training.reference_checkpoint",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--books", type=Path, required=True, help="folder of UTF-8 *.txt files, one a book")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="optimizer steps (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"`--steps` must be at least 1, got {args.steps}.")
    try:
        run = Run(args.books, args.output, dataclasses.replace(recipe, steps=args.steps))
        run.train()
        record = run.export()
    except TrainingError as error:
        say(f"error: {error}")
        return 2
    print(json.dumps({"bits_per_byte": record["bits_per_byte"], "seconds": record["seconds"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
