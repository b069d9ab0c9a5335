"""Texts to shards: what is read, what is written, what is reused, and that damage is named."""

import builtins
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minicpm4_hf.training import documents as documents_module
from minicpm4_hf.training import shards as shards_module
from minicpm4_hf.training.documents import read_documents
from minicpm4_hf.training.shards import TokenShards, build_shards

HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def build_tokenizer(num_words=50, first=0):
    """`<unk> <s> </s> < / s >` are 0-6, the word `wN` is N + 7: ids that a test can work out by itself."""
    vocab = {token: number for number, token in enumerate(("<unk>", "<s>", "</s>", "<", "/", "s", ">"))}
    vocab |= {f"w{first + n}": 7 + n for n in range(num_words)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def naive_ids(text):
    """What `build_tokenizer` and the default `bos` and `eos` make of a text of words."""
    return [1] + [int(word[1:]) + 7 for word in text.split()] + [2]


def write_lines(path, count, *, seed=0, longest=20):
    """A file of `count` lines of 1 to `longest` words; returns the lines."""
    rng = random.Random(seed)
    lines = [" ".join(f"w{rng.randrange(50)}" for _ in range(rng.randint(1, longest))) for _ in range(count)]
    path.write_text("".join(line + "\n" for line in lines))
    return lines


def contents(folder):
    """Bytes of every file that is part of the result."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


@pytest.fixture
def corpus(tmp_path):
    """`corpus(**settings)`: 60 lines built into shards of about 100 tokens; also the lines."""
    lines = write_lines(tmp_path / "lines.txt", 60)

    def build(**settings):
        settings = {"shard_tokens": 100, "split_documents": "line", **settings}
        return build_shards(tmp_path / "lines.txt", build_tokenizer(), tmp_path / "shards", **settings)

    return types.SimpleNamespace(build=build, lines=lines, folder=tmp_path / "shards", path=tmp_path)


# Reading


def test_txt_is_a_file_paragraphs_or_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\r\n one\r\ntwo  \r\n \t\r\n\r\nthree\u2028four\n\n\nfünf".encode())
    assert list(read_documents(path)) == ["\r\n one\r\ntwo  \r\n \t\r\n\r\nthree\u2028four\n\n\nfünf"]
    assert list(read_documents(path, split_documents="paragraph")) == [" one\r\ntwo  ", "three\u2028four", "fünf"]
    assert list(read_documents(path, split_documents="line")) == [" one", "two  ", "three\u2028four", "fünf"]


def test_folders_are_read_by_name_and_blank_documents_left_out(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "a.txt": "A", "sub/c.txt": "C", "blank.txt": " \n", "notes.md": "no"}.items():
        (tmp_path / name).write_text(text)
    assert list(read_documents(tmp_path)) == ["A", "B", "C"]
    assert list(read_documents([tmp_path / "b.txt", str(tmp_path)])) == ["B", "A", "B", "C"]


def test_jsonl_texts_come_out_as_they_are(tmp_path):
    texts = ["2020-01-01", "a\nb", "\U0001f600 \u00e9", "12", "null"]
    lines = [json.dumps({"id": n, "body": text}) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert list(read_documents(tmp_path / "a.jsonl", text_field="body")) == texts


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"text {n}" for n in range(10)]
    path = tmp_path / "a[1].parquet"
    parquet.write_table(pyarrow.table({"text": texts, "n": list(range(10))}), path, row_group_size=3)
    assert list(read_documents(path)) == texts
    with pytest.raises(ValueError, match=r"a\[1\].parquet: there is no field 'body'; .* one of text, n"):
        list(read_documents(path, text_field="body"))
    with pytest.raises(ValueError, match="row 1: 'n' must be text, got int"):
        list(read_documents(path, text_field="n"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"not a whole \.parquet file"):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xc3\xa9 \xff", r"a.txt' is not UTF-8 text \(byte 6\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl' is not UTF-8 text \(byte 24\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl', line 2: not JSON \("),
        ("a.jsonl", b'["a"]', "line 1: must be a JSON object with a field 'text', got list"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a", "id": 1}', "line 2: there is no field 'text'; .* one of body, id"),
        ("a.jsonl", b'{"text": null}', "line 1: 'text' must be text, got NoneType"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "line 1: 'text' holds half of a surrogate pair"),
        ("a.md", b"a", r"ends in '.md'; what can be read is .txt, .jsonl, .parquet"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / name))


def test_byte_position_counts_from_the_start_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(ValueError, match=r"byte 8"):
        list(read_documents(tmp_path / "a.txt", split_documents="line"))


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*gone.txt'; a data set of the Hub is written"):
        read_documents(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"holds no file that ends in .txt or .jsonl or .parquet"):
        read_documents(tmp_path)
    with pytest.raises(ValueError, match="`sources` is empty"):
        read_documents([])
    with pytest.raises(ValueError, match="`split_documents` must be one of file, paragraph, line, got 'page'"):
        read_documents(tmp_path, split_documents="page")
    with pytest.raises(ValueError, match="'splits' is none of them"):
        read_documents("hub:owner/name?splits=test")
    with pytest.raises(ValueError, match="must be 'hub:OWNER/NAME'"):
        read_documents("hub:")


@pytest.mark.parametrize(("source", "package"), [("hub:owner/name", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, source, package):
    (tmp_path / "a.parquet").write_bytes(b"")
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=rf"needs {package}; .*pip install minicpm4-hf\[train\]"):
        list(read_documents(source if source.startswith("hub:") else tmp_path / source))


def test_hub_is_read_at_the_commit_of_the_build(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.IterableDataset.from_generator(lambda: iter([{"body": "w1 w2"}, {"body": "w3"}]))

    def dataset_info(self, name, revision=None):
        return types.SimpleNamespace(sha=HUB_COMMIT if (name, revision) == ("owner/name", None) else "f" * 40)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(documents_module.HfApi, "dataset_info", dataset_info)
    source = "hub:owner/name?config=en&split=test"
    assert list(read_documents(source, text_field="body")) == ["w1 w2", "w3"]
    assert calls == [(("owner/name", "en"), {"split": "test", "revision": None, "streaming": True})]
    built = build_shards(source, build_tokenizer(), tmp_path / "shards", text_field="body")
    assert [built.document(n).tolist() for n in range(2)] == [naive_ids("w1 w2"), naive_ids("w3")]
    assert calls[1] == (("owner/name", "en"), {"split": "test", "revision": HUB_COMMIT, "streaming": True})
    # a commit that is named needs no question to the Hub, and is the same source
    again = build_shards(f"{source}&revision={HUB_COMMIT}", build_tokenizer(), tmp_path / "shards", text_field="body")
    assert again.sha256 == built.sha256 and len(calls) == 2
    with pytest.raises(ValueError, match=r"row 1: there is no field 'text'; .* one of body"):
        list(read_documents(source))


# Building


def test_round_trip(corpus):
    built = corpus.build()
    wanted = [naive_ids(line) for line in corpus.lines]
    assert built.num_documents == 60 and built.num_tokens == sum(map(len, wanted)) and built.vocab_size == 57
    assert built.document_lengths.tolist() == [len(ids) for ids in wanted]
    assert [built.document(n).tolist() for n in range(60)] == wanted
    assert built.document(7).dtype == np.uint16
    assert built.document(7, 1, 3).tolist() == wanted[7][1:3] and built.document(7, 2, 2).tolist() == []
    entries = built.index["shards"]
    assert len(entries) > 3 and all(100 <= entry["num_tokens"] < 122 for entry in entries[:-1])
    assert sorted(path.name for path in corpus.folder.glob("shard-*")) == [entry["file"] for entry in entries]
    copy = pickle.loads(pickle.dumps(built))
    assert copy.document(59).tolist() == wanted[59] and copy.sha256 == built.sha256
    built.verify()
    for index in (-1, 60):
        with pytest.raises(IndexError, match=f"no document {index}: the folder holds 60"):
            built.document(index)


def test_ids_above_16_bits(tmp_path):
    (tmp_path / "a.txt").write_text("w0 w65528 w65529 w69999")
    wide = build_shards(tmp_path / "a.txt", build_tokenizer(70_000), tmp_path / "wide")
    assert wide.document(0).tolist() == [1, 7, 65535, 65536, 70006, 2] and wide.document(0).dtype == np.uint32
    narrow = build_shards(tmp_path / "a.txt", build_tokenizer(65_529), tmp_path / "narrow")
    assert narrow.vocab_size == 65536 and narrow.document(0).tolist() == [1, 7, 65535, 0, 0, 2]
    assert narrow.document(0).dtype == np.uint16


def test_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("w1 </s> w2")
    literal, parsed = [8, 3, 4, 5, 6, 9], [8, 2, 9]
    for settings, wanted in (
        ({}, [1, *literal, 2]),
        ({"bos": None}, [*literal, 2]),
        ({"bos": "</s>", "eos": None}, [2, *literal]),
        ({"parse_special_tokens": True}, [1, *parsed, 2]),
    ):
        folder = tmp_path / "-".join(map(str, settings))
        assert build_shards(tmp_path / "a.txt", build_tokenizer(), folder, **settings).document(0).tolist() == wanted
    with pytest.raises(ValueError, match="`eos` is '<end>', which the tokenizer does not have; its own are '<s>' and"):
        build_shards(tmp_path / "a.txt", build_tokenizer(), tmp_path / "x", eos="<end>")


def test_batches_of_texts_leave_no_trace(corpus, monkeypatch):
    built = corpus.build()
    first = contents(corpus.folder)
    for path in corpus.folder.iterdir():
        path.unlink()
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 90)
    monkeypatch.setattr(shards_module, "BATCH_DOCUMENTS", 3)
    assert corpus.build().num_tokens == built.num_tokens and contents(corpus.folder) == first


def test_same_call_reuses_and_another_is_refused(corpus, monkeypatch):
    corpus.build()
    first = contents(corpus.folder)
    os.utime(corpus.path / "lines.txt", ns=(1, 1))  # another time alone is no other source

    def no_tokenising(*args):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "_tokenise", no_tokenising)
        assert corpus.build().num_documents == 60
    assert contents(corpus.folder) == first

    with pytest.raises(ValueError, match=r"holds shards with `split_documents` 'line' instead of 'file'; use another"):
        corpus.build(split_documents="file")
    lines, tokenizer, settings = corpus.path / "lines.txt", build_tokenizer(), {"shard_tokens": 100}
    settings["split_documents"] = "line"
    with pytest.raises(ValueError, match="holds shards with another tokenizer"):
        build_shards(lines, build_tokenizer(first=1), corpus.folder, **settings)
    with pytest.raises(ValueError, match="with 1 sources instead of 2"):
        build_shards([lines, lines], tokenizer, corpus.folder, **settings)
    lines.rename(corpus.path / "other.txt")
    with pytest.raises(ValueError, match=r"the source 'lines.txt' where 'other.txt' is now"):
        build_shards(corpus.path / "other.txt", tokenizer, corpus.folder, **settings)
    lines.write_text("w1")
    with pytest.raises(ValueError, match=r"another content of the source 'lines.txt'"):
        build_shards(lines, tokenizer, corpus.folder, **settings)
    assert contents(corpus.folder) == first


# A child that builds the corpus, and is killed while it writes its third shard, if asked to.
CHILD = """
import os, pickle, signal, sys
from minicpm4_hf.training import shards

def save_and_die(tensors, partial, metadata, save_file=shards.save_file):
    save_file(tensors, partial, metadata)
    if "00002" in partial.name:
        os.kill(os.getpid(), signal.SIGKILL)

source, tokenizer, folder = pickle.load(sys.stdin.buffer)
shards.save_file = save_and_die
shards.build_shards(source, tokenizer, folder, shard_tokens=100, split_documents="line")
"""


def test_a_killed_build_goes_on_with_the_same_bytes(corpus, monkeypatch):
    killed = corpus.path / "killed"
    arguments = pickle.dumps((corpus.path / "lines.txt", build_tokenizer(), killed))
    child = subprocess.run([sys.executable, "-c", CHILD], input=arguments, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert {path.name for path in killed.iterdir()} - {"build.lock"} == {
        "building.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors.partial",
    }
    with pytest.raises(FileNotFoundError, match=r"holds an unfinished build \(no index.json\)"):
        TokenShards(killed)
    finished = {path.name: path.stat().st_mtime_ns for path in killed.glob("*.safetensors")}
    tokenised, tokenise = [], shards_module._tokenise
    monkeypatch.setattr(
        shards_module, "_tokenise", lambda *args: (tokenised.append(item) or item for item in tokenise(*args))
    )
    resumed = build_shards(
        corpus.path / "lines.txt", build_tokenizer(), killed, shard_tokens=100, split_documents="line"
    )
    assert {name: (killed / name).stat().st_mtime_ns for name in finished} == finished
    assert len(tokenised) == 60 - sum(entry["num_documents"] for entry in resumed.index["shards"][:2])
    corpus.build()
    assert contents(killed) == contents(corpus.folder)


def test_two_builds_at_a_time_wait_for_each_other(corpus):
    corpus.folder.mkdir()
    built = []
    with FileLock(corpus.folder / "build.lock"):
        thread = threading.Thread(target=lambda: built.append(corpus.build()))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not list(corpus.folder.glob("*.json"))
    thread.join()
    assert built[0].num_documents == 60


def test_what_cannot_be_built(tmp_path, corpus):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="The sources hold no text at all"):
        build_shards(tmp_path / "blank.txt", build_tokenizer(), tmp_path / "x")
    with pytest.raises(ValueError, match="`shard_tokens` must be at least 1, got 0"):
        corpus.build(shard_tokens=0)
    slow = types.SimpleNamespace(is_fast=False)
    with pytest.raises(ValueError, match="must be a fast tokenizer, got SimpleNamespace"):
        build_shards(tmp_path / "blank.txt", slow, tmp_path / "x")


def test_sources_may_be_mended_before_the_first_shard(tmp_path):
    path, folder = tmp_path / "a.txt", tmp_path / "shards"
    path.write_bytes(b"w1 \xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        build_shards(path, build_tokenizer(), folder)
    path.write_text("w1 w2")
    assert build_shards(path, build_tokenizer(), folder).document(0).tolist() == naive_ids("w1 w2")
    (folder / "shard-00000.safetensors").unlink()
    path.write_text("w3")
    assert build_shards(path, build_tokenizer(), folder).document(0).tolist() == naive_ids("w3")


def test_progress_tells_the_time_left(corpus, capsys, monkeypatch):
    seconds = iter(range(0, 10_000, 6))
    monkeypatch.setattr(shards_module, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    corpus.build()
    said = capsys.readouterr().err.splitlines()
    words = sum(len(line.split()) + 2 for line in corpus.lines[:2])
    # two documents in 12 seconds; the time left goes by the bytes of the second, which have passed since the first
    start, place, size = len(corpus.lines[0]) + 1, len("  ".join(corpus.lines[:2])), sum(map(len, corpus.lines)) + 60
    minutes = (size - place) * 12 / (place - start) / 60
    assert len(said) == 30
    assert said[0] == f"2 documents  {words} tokens  {words / 12:,.0f} tokens/s  {minutes:.0f} min left"
    assert said[-1].endswith("  0 min left")


# Damage


def damage(path, name):
    """Flip one bit of the tensor `name` of a shard file."""
    tensors = load_file(path)
    place = path.read_bytes().index(tensors[name].tobytes())
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_damaged_block_is_named_when_it_is_read_and_the_rest_stays_readable(tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "lines.txt", 60)
    monkeypatch.setattr(shards_module, "BLOCK_BYTES", 64)
    folder = tmp_path / "shards"
    build_shards(tmp_path / "lines.txt", build_tokenizer(), folder, split_documents="line", shard_tokens=400)
    damage(folder / "shard-00001.safetensors", "tokens")
    opened = TokenShards(folder)
    in_first = opened.index["shards"][0]["num_documents"]
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \(block 0 .*; delete it and call"):
        opened.document(in_first)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \(block 0 "):
        opened.document(in_first)
    assert opened.document(in_first - 1).tolist() == naive_ids(lines[in_first - 1])
    assert opened.document(59).tolist() == naive_ids(lines[59])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged"):
        opened.verify()


@pytest.mark.parametrize("kind", ["lengths", "checks", "shorter", "longer", "empty", "foreign", "swapped"])
def test_a_damaged_shard_is_named_when_it_is_opened(corpus, kind):
    corpus.build()
    path = corpus.folder / "shard-00001.safetensors"
    if kind in ("lengths", "checks"):
        damage(path, kind)
    elif kind == "foreign":
        save_file({"tokens": np.zeros(3, np.uint16)}, path)
    else:
        raw = path.read_bytes()
        other = (corpus.folder / "shard-00002.safetensors").read_bytes()
        path.write_bytes({"shorter": raw[:-1], "longer": raw + b"\0", "empty": b"", "swapped": other}[kind])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \("):
        TokenShards(corpus.folder)
    with pytest.raises(ValueError, match=r"shard-00001.safetensors' is damaged \("):
        corpus.build()


def test_a_deleted_shard_is_written_anew(corpus):
    corpus.build()
    first = contents(corpus.folder)
    (corpus.folder / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors' is missing; call `build_shards` again"):
        TokenShards(corpus.folder)
    corpus.build()
    assert contents(corpus.folder) == first


def test_a_folder_without_its_index_is_refused(corpus):
    with pytest.raises(FileNotFoundError, match=r"holds no shards \(no index.json\)"):
        TokenShards(corpus.path)
    corpus.build()
    (corpus.folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json' is damaged"):
        corpus.build()
    (corpus.folder / "index.json").unlink()
    with pytest.raises(ValueError, match="holds shards without an index"):
        corpus.build()
