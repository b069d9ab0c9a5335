"""Training sequences of one length out of tokenised documents, without attention across documents and without padding.

    data = PackedDataset(TokenShards("books-tokens"), 4096, seed=1)
    data[7]   # the same for ever: it depends on the shards, the settings, the seed and 7 alone

The documents stand one after the other in an order of their own each epoch, and are cut every `length` tokens. A
document that is cut goes on in the next sequence as a segment of its own. In every segment `position_ids` count from
0, from which the model knows where one begins when it gets neither an attention mask nor a cache.

Several sources, and the length buckets of each, are streams of such sequences; sequence i belongs to one of them. A
run is resumed by going on with the next i, on any number of processes. With transformers' `Trainer` set
`train_sampling_strategy="sequential"`: the order is a random one already.
"""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from minicpm4_hf.training.shards import TokenShards

IGNORED = -100  # label of a token whose loss is not counted
WINDOW = 64  # sequences among which the order of the streams is shuffled
SHARE_BITS = 32  # shares are multiples of 2**-32, so that counting with them is exact
ORDER, SCHEDULE, HELD_OUT = range(3)  # what a random stream is for


@dataclass(frozen=True)
class LengthBuckets:
    """Shares of the tokens by the length of the documents that they come from.

    The default is the long stage of InfLLM-V2 (arXiv:2509.24663): documents of 0-4K, 4-12K, 12-24K and 24-32K tokens,
    1:1:1:1. A document longer than the last bound is cut into pieces of the last bound, and the rest is a piece too.

    Args:
        bounds: the longest document of each bucket in tokens, ascending.
        weights: the share of each bucket's tokens, in any unit; 0 leaves the bucket out.

    Raises:
        ValueError: the bounds do not ascend from above 0, or the weights do not fit.
    """

    bounds: tuple[int, ...] = (4096, 12288, 24576, 32768)
    weights: tuple[float, ...] = (1, 1, 1, 1)

    def __post_init__(self):
        bounds = tuple(self.bounds)
        if not bounds or bounds[0] < 1 or any(low >= high for low, high in itertools.pairwise(bounds)):
            raise ValueError(f"`bounds` must ascend from above 0, got {bounds}.")
        if len(self.weights) != len(bounds):
            raise ValueError(f"`weights` must be one for each of the {len(bounds)} bounds, got {len(self.weights)}.")
        _check_weights(self.weights)

    def label(self, number: int) -> str:
        """The lengths of a bucket, for a message: `4097-12288`."""
        return f"{(0, *self.bounds)[number] + 1}-{self.bounds[number]}"


@dataclass(frozen=True)
class DocumentSubset:
    """Some documents of `shards`: what `split_held_out` returns, with the same members as `TokenShards`."""

    shards: TokenShards
    indices: np.ndarray

    @property
    def document_lengths(self) -> np.ndarray:
        return self.shards.document_lengths[self.indices]

    @property
    def num_documents(self) -> int:
        return len(self.indices)

    @property
    def num_tokens(self) -> int:
        return int(self.document_lengths.sum(dtype=np.int64))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.shards.sha256.encode() + self.indices.astype("<i8").tobytes()).hexdigest()

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tokens `[start, stop)` of the document at `indices[index]`."""
        return self.shards.document(int(self.indices[index]), start, stop)


def split_held_out(
    shards: TokenShards, *, share: float | None = None, count: int | None = None, seed: int = 0
) -> tuple[DocumentSubset, DocumentSubset]:
    """Split off random documents that training does not see.

    Args:
        share: of the documents to hold out, at least one is; or
        count: how many.

    Returns:
        The documents to train on and those held out, each in the order of the shards.

    Raises:
        ValueError: not exactly one of `share` and `count`, or one of the two parts would be empty.
    """
    if (share is None) == (count is None):
        raise ValueError("Give exactly one of `share` and `count`.")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}.")
    count = max(1, round(share * shards.num_documents)) if count is None else count
    if not 0 < count < shards.num_documents:
        raise ValueError(f"{count} of {shards.num_documents} documents cannot be held out; at least one must stay.")
    order = _permutation(shards.num_documents, seed, HELD_OUT)
    return DocumentSubset(shards, np.sort(order[count:])), DocumentSubset(shards, np.sort(order[:count]))


def cu_seqlens(position_ids: torch.Tensor) -> torch.Tensor:
    """Where the segments of packed rows begin, the rows laid one after the other, and last the number of all tokens.

    A segment begins with each row and wherever a position is not above the one before, as in the model.

    Args:
        position_ids: `[T]` or `[B, T]`, integers.

    Returns:
        `[N + 1]` int32 for N segments, on the same device.

    Raises:
        ValueError: another number of dimensions, or no token.
    """
    if position_ids.ndim not in (1, 2) or position_ids.numel() == 0:
        raise ValueError(f"`position_ids` must be [T] or [B, T] and not empty, got {list(position_ids.shape)}.")
    rows = position_ids if position_ids.ndim == 2 else position_ids[None]
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[:, 1:] = rows.diff(dim=1) <= 0
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([rows.numel()])]).to(torch.int32)


class PackedDataset(Dataset):
    """Packed sequences as `input_ids`, `position_ids` and `labels`, each `[length]` int64.

    `labels` are the `input_ids` (the model shifts them) with -100 at the first token of each segment, which would be
    predicted from another document.

    A sequence comes from one source, or from one bucket of one source. Over any stretch of a run each has its share of
    the sequences to within a few, and goes through its documents in passes of its own: in a pass every token comes
    exactly once. Where a pass ends inside a sequence the next begins there.

    Memory: 16 bytes a document and pass in each process that reads (two passes are kept), 24 more with `buckets`.

    Args:
        sources: a `TokenShards` or a `DocumentSubset`, or several as pairs `(source, weight)`.
        length: tokens of a sequence.
        num_sequences: `len()` of the data set; more than one pass over the documents is fine. By default as many as
            hold the tokens of all sources once.
        buckets: shares by the length of the documents, the same in each source.
        seed: 0 or above.

    Attributes:
        identity: all that decides the sequences, for JSON: to compare before a run is resumed.

    Raises:
        ValueError: a setting is out of range, the weights do not fit, or a bucket has no document.
    """

    def __init__(
        self,
        sources: TokenShards | DocumentSubset | Sequence[tuple[TokenShards | DocumentSubset, float]],
        length: int,
        *,
        num_sequences: int | None = None,
        buckets: LengthBuckets | None = None,
        seed: int = 0,
    ):
        pairs = [(sources, 1)] if isinstance(sources, (TokenShards, DocumentSubset)) else list(sources)
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
            raise ValueError("`sources` must be one source, or pairs (source, weight) where there are several.")
        _check_weights([weight for _, weight in pairs])
        if length < 2:
            raise ValueError(f"`length` must be at least 2, got {length}.")
        if seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {seed}.")
        if buckets is not None and buckets.bounds[-1] > length:
            raise ValueError(f"The last bound of `buckets`, {buckets.bounds[-1]}, must be at most `length`, {length}.")
        if num_sequences is None:
            num_sequences = -(-sum(source.num_tokens for source, weight in pairs if weight) // length)
        if num_sequences < 1:
            raise ValueError(f"`num_sequences` must be at least 1, got {num_sequences}.")
        self.length, self.seed, self.num_sequences = length, seed, num_sequences

        self._streams, weights = [], []
        for number, (source, weight) in enumerate(pairs):
            parts = [(None, 1, "")] if buckets is None else _cut_into_buckets(source.document_lengths, buckets)
            total = sum(part_weight for _, part_weight, _ in parts)
            for pieces, part_weight, label in parts:
                if weight * part_weight == 0:
                    continue
                if pieces is not None and not len(pieces[0]):
                    raise ValueError(
                        f"`buckets`: no document of sources[{number}] has {label} tokens; add such documents, give "
                        "the bucket weight 0, or join it with the next by leaving out its bound."
                    )
                self._streams.append(
                    _Stream(f"sources[{number}] {label}".strip(), source, pieces, (seed, ORDER, len(self._streams)))
                )
                weights.append(weight * part_weight / total)
        # Stream k takes its share of what the streams before it leave.
        self._shares = [round(weight / sum(weights[k:]) * (1 << SHARE_BITS)) for k, weight in enumerate(weights)]
        self.identity = {
            "length": length,
            "seed": seed,
            "buckets": None if buckets is None else [list(buckets.bounds), list(buckets.weights)],
            "sources": [[source.sha256, weight] for source, weight in pairs],
        }

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"There is no sequence {index}: the data set holds {self.num_sequences}, counted from 0.")
        number, place = self._locate(int(index))
        segments = self._streams[number].read(place * self.length, self.length)
        starts = np.cumsum([0] + [len(segment) for segment in segments[:-1]])
        lengths = [len(segment) for segment in segments]
        input_ids = torch.from_numpy(np.concatenate(segments).astype(np.int64))
        labels = input_ids.clone()
        labels[starts] = IGNORED
        position_ids = torch.from_numpy(np.arange(self.length) - np.repeat(starts, lengths))
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}

    def passes(self) -> dict[str, float]:
        """How often each source, or each bucket of a source, is read through in the whole run."""
        counts = self._counts(self.num_sequences)
        return {s.name: count * self.length / s.num_tokens for s, count in zip(self._streams, counts)}

    def _locate(self, index: int) -> tuple[int, int]:
        """Stream of a sequence, and which of the stream's sequences it is."""
        if len(self._streams) == 1:
            return 0, index
        window, place = divmod(index, WINDOW)
        turn = window * WINDOW + int(_permutation(WINDOW, self.seed, SCHEDULE, window)[place])
        before, after = self._counts(turn), self._counts(turn + 1)
        number = next(k for k, (low, high) in enumerate(zip(before, after)) if high > low)
        return number, before[number]

    def _counts(self, turns: int) -> list[int]:
        """How many of the first `turns` sequences each stream has; with one more turn one stream has one more."""
        counts = []
        for share in self._shares:
            counts.append(turns * share + (1 << SHARE_BITS - 1) >> SHARE_BITS)
            turns -= counts[-1]
        return counts


class _Stream:
    """Documents, or pieces of documents, one after the other without end, in another order each epoch."""

    def __init__(self, name: str, source, pieces: tuple[np.ndarray, np.ndarray, np.ndarray] | None, key):
        self.name, self.source, self.pieces, self.key = name, source, pieces, key
        self.lengths = source.document_lengths if pieces is None else pieces[2]
        self.num_tokens = int(self.lengths.sum(dtype=np.int64))
        self._epochs = {}

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces in the order of an epoch and where each ends; two epochs are kept, for a sequence in both."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            order = _permutation(len(self.lengths), *self.key, epoch)
            self._epochs[epoch] = order, np.cumsum(self.lengths[order], dtype=np.int64)
        return self._epochs[epoch]

    def read(self, start: int, count: int) -> list[np.ndarray]:
        """The tokens `[start, start + count)` of the stream, an array for each piece."""
        segments = []
        while count:
            epoch, place = divmod(start, self.num_tokens)
            order, ends = self._order(epoch)
            rank = int(np.searchsorted(ends, place, side="right"))
            piece = int(order[rank])
            length = int(self.lengths[piece])
            first = place - (int(ends[rank]) - length)
            taken = min(count, length - first)
            document, offset = (piece, 0) if self.pieces is None else (int(part[piece]) for part in self.pieces[:2])
            segments.append(self.source.document(document, offset + first, offset + first + taken))
            start, count = start + taken, count - taken
        return segments


def _permutation(size: int, *key: int) -> np.ndarray:
    """A random order of `range(size)`; from raw bits, which numpy keeps the same in all its versions (NEP 19)."""
    return np.argsort(np.random.PCG64(key).random_raw(size), kind="stable")


def _cut_into_buckets(lengths: np.ndarray, buckets: LengthBuckets) -> list[tuple]:
    """For each bucket its pieces (document, first token, length; int64 arrays), its weight and its label."""
    longest = buckets.bounds[-1]
    counts = -(-lengths.astype(np.int64) // longest)
    documents = np.repeat(np.arange(len(lengths)), counts)
    firsts = (np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)) * longest
    sizes = np.minimum(lengths[documents] - firsts, longest)
    numbers = np.searchsorted(buckets.bounds, sizes, side="left")
    parts = []
    for number, weight in enumerate(buckets.weights):
        chosen = np.flatnonzero(numbers == number)
        parts.append(((documents[chosen], firsts[chosen], sizes[chosen]), weight, buckets.label(number)))
    return parts


def _check_weights(weights):
    if not weights or any(not 0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}.")
