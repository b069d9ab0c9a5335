"""How often a text uses each token, and the files that FR-Spec drafts by: the conversion `freq`.

    python -m minicpm4_hf.conversion freq wikitext.txt chats.jsonl OUT --tokenizer MiniCPM4-8B
    python -m minicpm4_hf.conversion freq 'hub:Salesforce/wikitext?config=wikitext-103-raw-v1' OUT --tokenizer F
    python -m minicpm4_hf.conversion freq text/ OUT --tokenizer MiniCPM4-0.5B --sizes 4096 8192

A draft that scores only the V most frequent tokens saves most of the head's work. OUT gets `freq_V.safetensors` and
`freq_V.pt` for each V. Each file holds exactly V different ids, most frequent first. The tokens that begin and end a
text or an answer (bos, every eos, `<|im_end|>`) are always among them; where the text has fewer than V different
tokens, others fill up by id. After a kill the same command goes on where it was.

Source: FR-Spec (arXiv:2502.14856). The scripts of CPM.cu (`scripts/fr_spec/gen_fr_index.py`) and FR-Spec
(`fr/fr.py`) add all that `encode` gives for the eos, bos included, and then drop every file whose length is no longer
V; and the second writes to a folder that it did not make.
"""

import argparse
import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from minicpm4_cli.loading import load_tokenizer, positive_int
from minicpm4_hf.training.documents import pin_revision, read_sources, resolve_sources

from .card import model_card
from .frequency_files import SUFFIXES, choose_ids, save_frequencies
from .keys import CARD_FILE
from .output import Output, Progress, in_words, open_output

SOURCE_NARGS = "+"  # of IN on the command line: several texts
SIZES = (8192, 16384, 32768)
SPECIAL_TOKENS = ("<|im_end|>", "</s>")
STEP_CHARACTERS = 2**27  # of text between two steps that a killed run does not repeat
_PIECE_CHARACTERS = 2**16
_BATCH_PIECES = 64
_BLOCK_BYTES = 2**20
_METHOD = (
    "The tokens of {num_characters:,} characters of text were counted, without special tokens being added. Each file "
    "holds the V most frequent ones, most frequent first; {forced} always among them."
)
_USAGE = """```
python examples/minicpm4/test_generate.py --model-path TARGET --draft-model-path DRAFT --frspec-path FOLDER
```"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `freq`."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with the model's tokenizer")
    parser.add_argument(
        "--sizes",
        type=positive_int,
        nargs="+",
        default=list(SIZES),
        metavar="V",
        help=f"tokens in each file (default: {' '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--text-field", default="text", help="the field of the text in all but .txt (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> dict:
    """`freq`; see `write_frequencies`."""
    return write_frequencies(
        args.source,
        args.output,
        tokenizer=args.tokenizer,
        sizes=args.sizes,
        text_field=args.text_field,
        dry_run=args.dry_run,
    )


def write_frequencies(
    sources: str | Path | Iterable[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path,
    sizes: Iterable[int] = SIZES,
    text_field: str = "text",
    dry_run: bool = False,
) -> dict:
    """Count the tokens of texts and write FR-Spec's frequency files.

    Args:
        sources: one or several files (.txt, .jsonl, .parquet), folders of them, or data sets of the Hub, as
            `minicpm4_hf.training.documents.read_documents` takes them.
        output: folder to create; it appears complete or not at all.
        tokenizer: folder of the model's tokenizer; its config.json and generation_config.json are asked for eos
            tokens too.
        sizes: V of each file.
        text_field: the field of the text in all but .txt.
        dry_run: check everything and say what would be written, but read no text and write nothing.

    Returns:
        `output`, the `files` written, their `num_bytes`, `num_tokens` of the text, `num_different` tokens, `coverage`
        (V -> share of the text's tokens that the file holds) and `forced` (id -> text of the tokens always held).

    Raises:
        ValueError: a size that the vocabulary cannot fill, a text that cannot be read, or one without tokens.
        FileNotFoundError: a source that does not exist.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    resolved = resolve_sources(sources, "file")
    loaded = load_tokenizer(Path(tokenizer))
    if not loaded.is_fast:
        raise ValueError(f"{tokenizer} has no tokenizer.json; copy it from the original checkpoint.")
    forced, sizes = forced_ids(loaded, Path(tokenizer)), sorted(set(sizes))
    if not sizes or sizes[-1] > len(loaded) or sizes[0] <= len(forced):
        raise ValueError(
            f"`--sizes` must lie between {len(forced) + 1}, for one token beside those that are always held, and "
            f"{len(loaded)}, the tokens of {tokenizer}; got {' '.join(map(str, sizes))}."
        )
    names = {str(id_): loaded.convert_ids_to_tokens(id_) for id_ in forced}
    files = [f"freq_{size}{suffix}" for size in sizes for suffix in SUFFIXES]
    if dry_run:
        total = sum(path.stat().st_size for _, path in resolved if path is not None)
        return {
            "output": str(output),
            "files": sorted([*files, CARD_FILE]),
            "num_bytes": sum(17 * size for size in sizes),  # 12 an id in .safetensors, about 5 in .pt
            "forced": names,
            "summary": f"{output} would hold {', '.join(files)}, from {in_words(total)} of files",
        }
    backend, vocab_size = loaded.backend_tokenizer, max(loaded.get_vocab().values()) + 1
    backend.no_truncation()
    backend.no_padding()
    resolved = [(name if path else pin_revision(name), path) for name, path in resolved]
    settings = {
        "sources": [[name, *_state(path)] for name, path in resolved],
        "text_field": text_field,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "sizes": sizes,
    }
    with open_output(output, command="freq", settings=settings, resumable=True) as out:
        counts, num_characters = _count(resolved, text_field, backend, vocab_size, out)
        num_tokens = int(counts.sum())
        if not num_tokens:
            raise ValueError("There is no token in the text, so there are no frequencies; give other files.")
        coverage = {}
        for size in sizes:
            ids = choose_ids(counts, size, forced)
            coverage[str(size)] = int(counts[ids.long()].sum()) / num_tokens
            save_frequencies(out.folder, ids, counts)
        shares = {f"tokens of the text that are not in freq_{size}": f"{1 - s:.3%}" for size, s in coverage.items()}
        card = model_card(
            tokenizer,
            command="freq",
            method=_METHOD.format(num_characters=num_characters, forced=", ".join(names.values()) + " are"),
            settings={"tokens": f"{num_tokens:,}", "different tokens": f"{int((counts > 0).sum()):,}"},
            sizes={f"freq_{size}.pt": (out.folder / f"freq_{size}.pt").stat().st_size for size in sizes},
            error=shares,
            usage=_USAGE,
            tags=("fr-spec", "speculative-decoding"),
            library="cpm.cu",
        )
        out.write_text(CARD_FILE, card)
    shown = ", ".join(f"{size} tokens cover {share:.2%}" for size, share in coverage.items())
    return out.summary() | {
        "num_tokens": num_tokens,
        "num_different": int((counts > 0).sum()),
        "coverage": coverage,
        "forced": names,
        "summary": f"{output}: of {num_tokens:,} tokens of text, {shown}",
    }


def forced_ids(tokenizer, folder: Path) -> list[int]:
    """Ids that every file holds: bos, eos, `</s>` and `<|im_end|>`, and the eos ids of the folder's configs."""
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary.get(token) for token in SPECIAL_TOKENS}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            for key in ("bos_token_id", "eos_token_id"):
                value = content.get(key)
                ids |= set(value) if isinstance(value, list) else {value}
    return sorted(id_ for id_ in ids if isinstance(id_, int) and 0 <= id_ < len(tokenizer))


def _count(resolved, text_field: str, backend, vocab_size: int, out: Output) -> tuple[torch.Tensor, int]:
    """Tokens by id, int64 `[V]`, and characters read; takes up the last step of a run that was killed."""
    counts, done, num_characters = np.zeros(vocab_size, dtype=np.int64), 0, 0
    if out.num_steps:
        tensors, record = out.load_step(_step_name(out.num_steps))
        counts, done, num_characters = tensors["counts"].numpy(), record["pieces"], record["characters"]
    total = sum(path.stat().st_size for _, path in resolved if path is not None)
    progress = Progress(total, "GB read") if total else None
    saved, index, place, batch = num_characters, 0, 0, []

    def flush() -> None:
        nonlocal num_characters
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            np.add(counts, np.bincount(encoding.ids, minlength=vocab_size), out=counts)
        num_characters += sum(map(len, batch))
        batch.clear()

    for piece, position in _read_pieces(resolved, text_field):
        index += 1
        if progress is not None:
            progress.advance(position - place, "freq")
            place = position
        if index <= done:
            continue
        batch.append(piece)
        if len(batch) == _BATCH_PIECES:
            flush()
            if num_characters - saved >= STEP_CHARACTERS:
                saved = num_characters
                record = {"pieces": index, "characters": num_characters}
                out.save_step(_step_name(out.num_steps + 1), {"counts": torch.from_numpy(counts)}, record)
    flush()
    return torch.from_numpy(counts), num_characters


def _step_name(number: int) -> str:
    return f"{number:06}"


def _read_pieces(resolved, text_field: str) -> Iterator[tuple[str, int]]:
    """Pieces of the texts, cut behind white space, and the bytes of files read so far."""
    finished = 0
    for name, path in resolved:
        if path is not None and path.suffix == ".txt":
            pieces = _cut(_read_txt(path))
        else:
            rows = read_sources([(name, path)], text_field, "file")
            pieces = (piece for text, place in rows for piece in _cut([(text, place)]))
        for piece, place in pieces:
            yield piece, finished + place
        finished += 0 if path is None else path.stat().st_size


def _read_txt(path: Path) -> Iterator[tuple[str, int]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            try:
                yield decoder.decode(block), file.tell()
            except UnicodeDecodeError as error:
                raise _not_utf8(path, file.tell()) from error
        try:
            yield decoder.decode(b"", final=True), file.tell()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, file.tell()) from error


def _not_utf8(path: Path, place: int) -> ValueError:
    return ValueError(f"{str(path)!r} is not UTF-8 text (before byte {place}); convert it to UTF-8 first.")


def _cut(blocks: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Join and cut blocks of a text into pieces of `_PIECE_CHARACTERS` at most, behind a line end or a space."""
    rest, place = "", 0
    for block, place in blocks:
        rest += block
        begin = 0
        while len(rest) - begin > _PIECE_CHARACTERS:
            end = begin + _PIECE_CHARACTERS
            cut = max(rest.rfind("\n", begin, end), rest.rfind(" ", end - _PIECE_CHARACTERS // 16, end)) + 1
            end = cut if cut > begin else end
            yield rest[begin:end], place
            begin = end
        rest = rest[begin:]
    if rest:
        yield rest, place


def _state(path: Path | None) -> tuple[int, int]:
    """Size and time of change; (0, 0) for a data set of the Hub, whose name says its revision."""
    status = None if path is None else path.stat()
    return (0, 0) if status is None else (status.st_size, status.st_mtime_ns)
