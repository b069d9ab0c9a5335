"""Texts, tokenised once into memory-mapped shards.

    shards = build_shards("books", tokenizer, "books-tokens")   # a second call reuses what the first one wrote
    shards = TokenShards("books-tokens")                        # needs neither the texts nor the tokenizer

A folder of shards holds `index.json`, written last, and `shard-00000.safetensors` and so on. A shard has the tensors
`tokens` (uint16 or uint32), `lengths` (uint32, tokens of each document; a document never lies in two shards) and
`checks` (uint32, CRC-32 of each 64 KiB of `tokens`); the SHA-256 of `lengths` and `checks` is in its header and in the
index.

Opening reads and verifies `lengths` and `checks` alone. A block of tokens is verified when a process first reads from
it: no open pays for a pass over the corpus, and no token of a damaged block is ever handed out. At 64 KiB CRC-32 was
measured at 6.5 GB/s and SHA-256 at 1.9 GB/s on one core, so a sequence of 4,096 tokens costs tens of microseconds.
"""

import bisect
import hashlib
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from minicpm4_hf.training.documents import pin_revision, read_sources, resolve_sources

BLOCK_BYTES = 1 << 16  # tokens that share a checksum
BATCH_CHARACTERS = 1 << 20  # texts tokenised in one call: enough for every core, some hundred MB of encodings
BATCH_DOCUMENTS = 1024


def build_shards(
    sources: str | Path | Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    text_field: str = "text",
    split_documents: str = "file",
    shard_tokens: int = 1 << 25,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    parse_special_tokens: bool = False,
    progress: bool = True,
) -> "TokenShards":
    """Tokenise `sources` into `folder`, or reuse what it holds of the same sources, tokenizer and settings.

    A build that was killed goes on after its last whole shard when it is called again, and ends with the same bytes
    as one that was not. Of several processes that call this one builds, and the others wait for it. A tokenised
    document must fit into memory.

    Args:
        sources, text_field, split_documents: as for `read_documents`.
        tokenizer: a fast tokenizer; its batch call uses every core.
        shard_tokens: a shard is closed by the document that brings it to so many tokens. Two or four bytes a token are
            held in memory, and as much again while a shard is written.
        bos, eos: tokens put before and after each document, None for no token. The defaults are those of MiniCPM4's
            pretraining; its chat tokenizers name `<|im_end|>` as their `eos_token`.
        parse_special_tokens: whether a special token that is spelled out in a text (`</s>`, `<|im_start|>`) becomes
            that token; by default it is text like any other.
        progress: print a line on stderr every ten seconds.

    Raises:
        ValueError: the folder holds shards of other sources, of another tokenizer or with other settings; one of its
            shards is damaged; the sources hold no text; a token or the tokenizer cannot be used; and as
            `read_documents`, which also tells of the other errors.
    """
    folder = Path(folder)
    resolved = [
        (name if path else pin_revision(name), path) for name, path in resolve_sources(sources, split_documents)
    ]
    if shard_tokens < 1:
        raise ValueError(f"`shard_tokens` must be at least 1, got {shard_tokens}.")
    if not tokenizer.is_fast:
        raise ValueError(f"`tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}.")
    vocab = tokenizer.get_vocab()
    ends = []
    for name, token in (("bos", bos), ("eos", eos)):
        if token is not None and token not in vocab:
            raise ValueError(
                f"`{name}` is {token!r}, which the tokenizer does not have; its own are {tokenizer.bos_token!r} and "
                f"{tokenizer.eos_token!r}, and None puts no token."
            )
        ends.append([] if token is None else [vocab[token]])
    settings = {"text_field": text_field, "split_documents": split_documents, "shard_tokens": shard_tokens}
    settings |= {"bos": bos, "eos": eos, "parse_special_tokens": parse_special_tokens}
    vocab_size = max(vocab.values()) + 1
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    index_file, started_file = folder / "index.json", folder / "building.json"

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "build.lock"):
        before = next((_read_json(file) for file in (index_file, started_file) if file.is_file()), {})
        identity = {
            "tokenizer": _tokenizer_sha256(tokenizer),
            "settings": settings,
            "sources": _identify(resolved, before.get("sources", [])),
        }
        entries = _finished_shards(folder)
        if not entries:
            index_file.unlink(missing_ok=True)  # of nothing that is still there
        elif not before:
            raise ValueError(f"{str(folder)!r} holds shards without an index; use another folder, or delete this one.")
        elif difference := _difference(before, identity):
            raise ValueError(f"{str(folder)!r} holds shards with {difference}; use another folder or delete this one.")
        elif index_file.is_file() and len(entries) >= len(before["shards"]):
            return TokenShards(folder)
        _write_json(started_file, identity)
        texts = read_sources(resolved, text_field, split_documents)
        for _ in itertools.islice(texts, sum(entry["num_documents"] for entry in entries)):
            pass  # tokenised before
        total = sum(source["bytes"] for source in identity["sources"]) if all(path for _, path in resolved) else None
        documents = _tokenise(texts, tokenizer, *ends, parse_special_tokens)
        if progress:
            documents = _report(documents, total)
        entries += _write_shards(folder, len(entries), (ids for ids, _ in documents), shard_tokens, dtype)
        if not entries:
            raise ValueError("The sources hold no text at all.")
        _write_json(index_file, {**identity, "dtype": dtype, "vocab_size": vocab_size, "shards": entries})
        started_file.unlink()
        return TokenShards(folder)


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides the ids of a text; the parts that only truncate, pad, decorate or decode are left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    decisive = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _identify(resolved, known: list[dict]) -> list[dict]:
    """Name, size and SHA-256 of each file; one with the name, size and time of a known one is not read for it."""
    known = {(source["name"], source["bytes"], source["mtime_ns"]): source for source in known if "bytes" in source}
    sources = []
    for name, path in resolved:
        if path is None:
            sources.append({"name": name})
            continue
        status = path.stat()
        source = known.get((name, status.st_size, status.st_mtime_ns))
        if source is None:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            source = {"name": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            source["sha256"] = digest.hexdigest()
        sources.append(source)
    return sources


def _difference(before: dict, now: dict) -> str | None:
    """The first thing in which two identities differ, or None; a file's time is no difference."""
    if before["tokenizer"] != now["tokenizer"]:
        return "another tokenizer"
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            return f"`{name}` {before['settings'].get(name)!r} instead of {value!r}"
    old, new = ([(s["name"], s.get("sha256")) for s in identity["sources"]] for identity in (before, now))
    for (old_name, old_sha256), (new_name, new_sha256) in zip(old, new):
        if old_name != new_name:
            return f"the source {old_name!r} where {new_name!r} is now"
        if old_sha256 != new_sha256:
            return f"another content of the source {old_name!r}"
    return f"{len(old)} sources instead of {len(new)}" if len(old) != len(new) else None


def _tokenise(texts, tokenizer, first: list[int], last: list[int], parse_special_tokens: bool):
    """Token ids of each document, and the place that `_read` gave with it."""
    texts = iter(texts)
    while True:
        batch, characters = [], 0
        for item in texts:
            batch.append(item)
            characters += len(item[0])
            if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
                break
        if not batch:
            return
        texts_alone, literal = [text for text, _ in batch], not parse_special_tokens
        encoded = tokenizer(texts_alone, add_special_tokens=False, split_special_tokens=literal, verbose=False)
        for ids, (_, place) in zip(encoded["input_ids"], batch):
            yield first + ids + last, place


def _report(documents, total_bytes: int | None):
    """Pass `documents` on, and say every ten seconds how fast and, where the total is known, for how long still."""
    started = printed = time.monotonic()
    start = None
    num_documents = num_tokens = 0
    for ids, place in documents:
        start = place if start is None else start
        num_documents += 1
        num_tokens += len(ids)
        yield ids, place
        now = time.monotonic()
        if now - printed > 10:
            printed = now
            line = f"{num_documents:,} documents  {num_tokens:,} tokens  {num_tokens / (now - started):,.0f} tokens/s"
            if total_bytes is not None and place > start:
                line += f"  {(total_bytes - place) * (now - started) / (place - start) / 60:.0f} min left"
            print(line, file=sys.stderr, flush=True)


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _write_shards(folder: Path, number: int, documents, shard_tokens: int, dtype: str) -> list[dict]:
    """Write shards from `number` on and return their entries in the index."""
    entries, pending, num_tokens = [], [], 0
    for ids in itertools.chain(documents, [None]):
        if ids is not None:
            pending.append(np.array(ids, dtype=dtype))
            num_tokens += len(ids)
        if num_tokens >= shard_tokens or (ids is None and pending):
            path = _shard_file(folder, number + len(entries))
            _write_shard(path, np.concatenate(pending), np.array([len(ids) for ids in pending], np.uint32))
            entries.append(_Shard(path).entry)
            pending, num_tokens = [], 0
    return entries


def _write_shard(path: Path, tokens: np.ndarray, lengths: np.ndarray):
    raw = tokens.view(np.uint8)
    checks = np.array([zlib.crc32(raw[i : i + BLOCK_BYTES]) for i in range(0, raw.size, BLOCK_BYTES)], np.uint32)
    tensors = {"tokens": tokens, "lengths": lengths, "checks": checks}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"sha256": _tables_sha256(lengths, checks)})
    _put_in_place(partial, path)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}); delete its folder and build the shards anew."
        ) from error


def _write_json(path: Path, content: dict):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    _put_in_place(partial, path)


def _put_in_place(partial: Path, path: Path):
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _tables_sha256(lengths: np.ndarray, checks: np.ndarray) -> str:
    return hashlib.sha256(lengths.tobytes() + checks.tobytes()).hexdigest()


def _finished_shards(folder: Path) -> list[dict]:
    """Entries of the shards that are there, up to the first that is not."""
    entries = []
    while (path := _shard_file(folder, len(entries))).is_file():
        entries.append(_Shard(path).entry)
    return entries


def _damaged(path: Path, why) -> ValueError:
    return ValueError(
        f"The shard {str(path)!r} is damaged ({why}); delete it and call `build_shards` again, which writes it anew."
    )


class _Shard:
    """One shard file: its tables in memory, its tokens mapped (by safetensors, which keeps no file descriptor)."""

    def __init__(self, path: Path):
        self.path = path
        try:
            file = safe_open(path, framework="np")
        except SafetensorError as error:
            raise _damaged(path, error) from error
        metadata = file.metadata() or {}
        if {"tokens", "lengths", "checks"} != set(file.keys()) or "sha256" not in metadata:
            raise _damaged(path, "it is not what `build_shards` writes")
        self.tokens, self.lengths, self.checks = (
            file.get_slice("tokens"),
            file.get_tensor("lengths"),
            file.get_tensor("checks"),
        )
        if _tables_sha256(self.lengths, self.checks) != metadata["sha256"]:
            raise _damaged(path, "the lengths of its documents or the checksums do not have their SHA-256")
        self.verified = np.zeros(len(self.checks), bool)
        self.block = BLOCK_BYTES // {"U16": 2, "U32": 4}[self.tokens.get_dtype()]  # tokens
        num_tokens = self.tokens.get_shape()[0]
        self.entry = {
            "file": path.name,
            "num_tokens": num_tokens,
            "num_documents": len(self.lengths),
            "sha256": metadata["sha256"],
        }

    def read(self, start: int, stop: int) -> np.ndarray:
        self.verify(start, stop)
        return self.tokens[start:stop]

    def verify(self, start: int, stop: int):
        """Compare the blocks that hold the tokens `[start, stop)` with their checksums, each block once."""
        for block in range(start // self.block, -(-stop // self.block)):
            if not self.verified[block]:
                last = min((block + 1) * self.block, self.entry["num_tokens"])
                if zlib.crc32(self.tokens[block * self.block : last]) != self.checks[block]:
                    raise _damaged(self.path, f"block {block} of {BLOCK_BYTES} bytes of tokens has another checksum")
                self.verified[block] = True


class TokenShards:
    """The documents in a folder that `build_shards` wrote.

    Attributes:
        num_documents, num_tokens: of all shards, `bos` and `eos` counted.
        document_lengths: tokens of each document, `[num_documents]`, uint32.
        vocab_size: the highest id of the tokenizer, plus 1.
        index: what `index.json` holds: the tokenizer's SHA-256, the sources, the settings and the shards.
        sha256: of all the tokens and lengths, by way of the shards' own.

    Sixteen bytes a document are held in memory. A copy for another process opens the folder again.

    Raises:
        FileNotFoundError: no index (the build was not finished), or a shard of the index is missing.
        ValueError: a shard is damaged or is not the one of the index; the tokens are verified as they are read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index_file = self.folder / "index.json"
        if not index_file.is_file():
            what = "an unfinished build" if (self.folder / "building.json").is_file() else "no shards"
            raise FileNotFoundError(f"{str(self.folder)!r} holds {what} (no index.json); call `build_shards` first.")
        self.index = _read_json(index_file)
        self.vocab_size = self.index["vocab_size"]
        self._shards = []
        for entry in self.index["shards"]:
            path = self.folder / entry["file"]
            if not path.is_file():
                raise FileNotFoundError(f"The shard {str(path)!r} is missing; call `build_shards` again.")
            shard = _Shard(path)
            if shard.entry != entry:
                raise _damaged(path, "it is not the shard of the index")
            self._shards.append(shard)
        self.document_lengths = np.concatenate([shard.lengths for shard in self._shards])
        self.num_documents = len(self.document_lengths)
        self._ends = np.cumsum(self.document_lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1])
        self._shard_ends = list(itertools.accumulate(entry["num_tokens"] for entry in self.index["shards"]))
        self.sha256 = hashlib.sha256("".join(entry["sha256"] for entry in self.index["shards"]).encode()).hexdigest()

    def __reduce__(self):
        return type(self), (self.folder,)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tokens `[start, stop)` of a document, uint16 or uint32.

        Raises:
            IndexError: there is no such document.
            ValueError: the shard is damaged there.
        """
        if not 0 <= index < self.num_documents:
            raise IndexError(f"There is no document {index}: the folder holds {self.num_documents}, counted from 0.")
        length = int(self.document_lengths[index])
        first = int(self._ends[index]) - length
        number = bisect.bisect_right(self._shard_ends, first)
        first -= self._shard_ends[number - 1] if number else 0
        start, stop, _ = slice(start, stop).indices(length)
        return self._shards[number].read(first + start, first + max(start, stop))

    def verify(self):
        """Read every token once against its checksum.

        Raises:
            ValueError: a shard is damaged; the first such is named.
        """
        for shard in self._shards:
            shard.verify(0, shard.entry["num_tokens"])
