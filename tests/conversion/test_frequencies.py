"""`conversion freq`: exact counts, files of exactly V ids that always hold the ends of text, reading, resuming."""

import io
import json
import os
import pickle
import random
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from minicpm4_hf.conversion import frequencies, output
from minicpm4_hf.conversion.frequencies import forced_ids, write_frequencies
from minicpm4_hf.conversion.frequency_files import (
    check_ids,
    choose_ids,
    list_frequency_files,
    read_frequencies,
    save_frequencies,
)
from minicpm4_hf.shipped import shipped_checkpoint

TOKENIZER = shipped_checkpoint()
WORDS = "the of and a to in he was that his it with is for as had you not be her at on by I which".split()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress lines, however slow the machine."""
    monkeypatch.setattr(output, "PROGRESS_SECONDS", 1e9)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def write_texts(folder, num_lines=300):
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))).capitalize() + ".\n" for _ in range(num_lines)]
    folder.mkdir()
    (folder / "a.txt").write_text("".join(lines))
    rows = [{"text": f"{line}\nÄ 漢字 {line}"} for line in lines[:20]]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["".join(lines), *(row["text"] for row in rows)]


def write(texts, folder, **settings):
    return write_frequencies(texts, folder, tokenizer=TOKENIZER, **{"sizes": [64, 400], **settings})


def test_counts_and_files(tmp_path, tokenizer):
    texts = write_texts(tmp_path / "texts")
    result = write(tmp_path / "texts", tmp_path / "out")
    names = [f"freq_{size}.{suffix}" for size in (400, 64) for suffix in ("pt", "safetensors")]
    assert result["files"] == ["README.md", *names]
    counts = Counter(id_ for text in texts for id_ in tokenizer(text, add_special_tokens=False).input_ids)
    assert result["num_tokens"] == sum(counts.values()) and result["num_different"] == len(counts)
    forced = set(forced_ids(tokenizer, TOKENIZER))
    for size in (64, 400):
        tensors = load_file(tmp_path / "out" / f"freq_{size}.safetensors")
        ids = tensors["token_ids"].tolist()
        assert torch.load(tmp_path / "out" / f"freq_{size}.pt", weights_only=True) == ids
        assert len(ids) == len(set(ids)) == size and forced <= set(ids)
        assert tensors["counts"].tolist() == [counts[id_] for id_ in ids] == sorted(tensors["counts"], reverse=True)
        others = [id_ for id_ in sorted(range(len(tokenizer)), key=lambda i: (-counts[i], i)) if id_ not in forced]
        assert [id_ for id_ in ids if id_ not in forced] == others[: size - len(forced)]
        covered = sum(counts[id_] for id_ in ids) / sum(counts.values())
        assert result["coverage"][str(size)] == pytest.approx(covered, abs=1e-12)
        assert f"{1 - covered:.3%}" in (tmp_path / "out" / "README.md").read_text()
    assert 0.9 < result["coverage"]["64"] <= result["coverage"]["400"] == 1.0


def test_the_ends_of_text_are_always_held(tokenizer):
    """`<s>`, `</s>` and `<|im_end|>`, none of which a text holds."""
    forced = forced_ids(tokenizer, TOKENIZER)
    assert tokenizer.convert_ids_to_tokens(forced) == ["<s>", "</s>", "<|im_end|>"]


def test_eos_of_the_configs_are_held(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 77, 99999], "bos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 78}))
    assert set(forced_ids(tokenizer, tmp_path)) == {1, 2, 77, 78, tokenizer.eos_token_id}


@pytest.mark.parametrize("size", [3, 4, 7, 10])
@pytest.mark.parametrize("forced", [(), (9,), (0, 8, 9), (2, 5)])
def test_choose_ids(size, forced):
    counts = torch.tensor([0, 5, 9, 5, 1, 7, 7, 0, 0, 2])
    ids = choose_ids(counts, size, forced)
    assert ids.dtype == torch.int32 and len(ids.unique()) == len(ids) == size
    assert set(forced) <= set(ids.tolist())
    assert ids.tolist() == sorted(ids.tolist(), key=lambda id_: (-counts[id_].item(), id_))
    left_out = [id_ for id_ in range(10) if id_ not in ids]
    chosen = [id_ for id_ in ids.tolist() if id_ not in forced]
    assert all((-counts[a], a) < (-counts[b], b) for a in chosen for b in left_out)


def test_choose_ids_refuses():
    with pytest.raises(ValueError, match="`size` must lie between 1 and 3, got 4"):
        choose_ids(torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="between 2 and 3, got 1"):
        choose_ids(torch.zeros(3, dtype=torch.int64), 1, (0, 1))


def test_long_texts_are_cut_without_loss(tmp_path, monkeypatch, tokenizer):
    """Pieces put together are the text, in whatever blocks it is read, and cuts lie behind white space."""
    text = "".join(write_texts(tmp_path / "texts", 60)) + "Ä" * 300
    (tmp_path / "t.txt").write_text("\ufeff" + text)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
    monkeypatch.setattr(frequencies, "_PIECE_CHARACTERS", 128)
    for block in (1, 7, 1000, 2**20):
        monkeypatch.setattr(frequencies, "_BLOCK_BYTES", block)
        for name in ("t.txt", "t.jsonl"):
            read = list(frequencies._read_pieces([(name, tmp_path / name)], "text"))
            pieces = [piece for piece, _ in read]
            assert "".join(pieces) == text and max(map(len, pieces)) <= 128
            assert all(piece[-1] in " \n" for piece in pieces[:-4])
            assert read[-1][1] <= (tmp_path / name).stat().st_size


def test_reading_both_forms(tmp_path):
    ids = torch.tensor([7, 3, 5])
    save_frequencies(tmp_path, ids, counts=torch.arange(10))
    for name in ("freq_3.pt", "freq_3.safetensors"):
        assert torch.equal(read_frequencies(tmp_path / name), ids.int())
    assert list_frequency_files(tmp_path) == {3: [tmp_path / "freq_3.pt", tmp_path / "freq_3.safetensors"]}
    torch.save(ids, tmp_path / "tensor.pt")
    assert torch.equal(read_frequencies(tmp_path / "tensor.pt"), ids.int())


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb_was_run",)


def write_pt(content):
    return lambda path: torch.save(content, path)


def plain_pickle(path):
    path.write_bytes(pickle.dumps([1, Bomb()]))


def zip_with_bomb(path):
    buffer = io.BytesIO()
    torch.save([Bomb()], buffer)
    path.write_bytes(buffer.getvalue())


def cut(path):
    torch.save(list(range(1000)), path)
    path.write_bytes(path.read_bytes()[:-300])


def header(path):
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


HOSTILE = {
    "bomb.pt": (plain_pickle, "holds more than a list of token ids, or is damaged, and was not loaded"),
    "zip bomb.pt": (zip_with_bomb, "holds more than a list of token ids, or is damaged, and was not loaded"),
    "cut.pt": (cut, "is no whole .pt file"),
    "empty.pt": (lambda path: path.write_bytes(b""), "is no whole .pt file"),
    "text.pt": (lambda path: path.write_text("hello"), "is no whole .pt file|was not loaded"),
    "large.pt": (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**27), "too large for a list"),
    "dict.pt": (write_pt({"a": 1}), "must hold token ids, whole numbers from 0"),
    "words.pt": (write_pt([1, "a"]), "must hold token ids"),
    "bools.pt": (write_pt([True, False]), "must hold token ids"),
    "negative.pt": (write_pt([1, -2]), "must hold token ids"),
    "huge.pt": (write_pt([1, 2**40]), "must hold token ids"),
    "floats.pt": (write_pt(torch.ones(3)), "must hold token ids"),
    "matrix.pt": (write_pt(torch.ones(3, 3).long()), "must hold one row of token ids"),
    "none.pt": (write_pt(torch.zeros(0, dtype=torch.int64)), "must hold one row of token ids"),
    "twice.pt": (write_pt([4, 5, 4]), "holds a token id twice"),
    "freq_4.pt": (write_pt([4, 5]), "holds 2 token ids, but its name says 4"),
    "h.safetensors": (header, "is damaged or cut off"),
    "x.safetensors": (lambda path: save_file({"x": torch.ones(2)}, path), "has no `token_ids`"),
    "absent.pt": (lambda path: None, "There is no frequency file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_reading_what_is_no_frequency_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make, sentence = HOSTILE[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=sentence):
        read_frequencies(tmp_path / name)
    assert not (tmp_path / "bomb_was_run").exists()


def test_check_ids():
    check_ids(torch.tensor([0, 4]), 5, "it")
    for ids in ([-1, 2], [5, 1], [2, 2]):
        with pytest.raises(ValueError, match="it must name different tokens of the vocabulary, 0 to 4"):
            check_ids(torch.tensor(ids), 5, "it")


def test_resumes_where_it_was_killed(tmp_path, monkeypatch):
    """Every step's counts are those of the pieces before it; the result is that of one run."""
    write_texts(tmp_path / "texts")
    monkeypatch.setattr(frequencies, "_PIECE_CHARACTERS", 256)
    monkeypatch.setattr(frequencies, "_BATCH_PIECES", 2)
    monkeypatch.setattr(frequencies, "STEP_CHARACTERS", 2000)
    write(tmp_path / "texts", tmp_path / "whole")
    save_step, saved, counted = output.Output.save_step, [], []

    def kill_after_each(self, name, *rest):
        save_step(self, name, *rest)
        saved.append(name)
        raise KeyboardInterrupt

    bincount = frequencies.np.bincount
    monkeypatch.setattr(frequencies.np, "bincount", lambda ids, **kw: counted.append(len(ids)) or bincount(ids, **kw))
    monkeypatch.setattr(output.Output, "save_step", kill_after_each)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "texts", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(output.Output, "save_step", save_step)
    result = write(tmp_path / "texts", tmp_path / "out")
    assert saved == [f"{i:06}" for i in range(1, 6)]
    assert sum(counted) == result["num_tokens"]  # none is counted twice
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts", "whole"]


def test_another_text_does_not_go_on(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    monkeypatch.setattr(frequencies, "_PIECE_CHARACTERS", 256)
    monkeypatch.setattr(frequencies, "_BATCH_PIECES", 2)
    monkeypatch.setattr(frequencies, "STEP_CHARACTERS", 1)

    def fail(self, *rest):
        raise KeyboardInterrupt

    save_step = output.Output.save_step
    monkeypatch.setattr(output.Output, "save_step", lambda *rest: [save_step(*rest), fail(*rest)])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "texts", tmp_path / "out")
    monkeypatch.undo()
    (tmp_path / "texts" / "a.txt").write_text("An other text.")
    (tmp_path / "texts" / "b.jsonl").unlink()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    expected = len(tokenizer("An other text.", add_special_tokens=False).input_ids)
    assert write(tmp_path / "texts", tmp_path / "out")["num_tokens"] == expected


def test_several_sources_and_dry_run(tmp_path):
    write_texts(tmp_path / "texts")
    sources = [tmp_path / "texts" / "a.txt", str(tmp_path / "texts" / "b.jsonl")]
    result = write(sources, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert "would hold freq_64.safetensors, freq_64.pt" in result["summary"]
    assert list(result["forced"].values()) == ["<s>", "</s>", "<|im_end|>"]
    both = write(sources, tmp_path / "both")
    folder = write(tmp_path / "texts", tmp_path / "folder")
    assert both["num_tokens"] == folder["num_tokens"]


def test_parquet(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["The first text.", "And the second one, longer than the first."]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "t.parquet")
    result = write(tmp_path / "t.parquet", tmp_path / "out", text_field="body")
    expected = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
    assert result["num_tokens"] == expected


def test_wrong_input(tmp_path):
    write_texts(tmp_path / "texts")
    limits = "`--sizes` must lie between 4, for one token beside those that are always held, and 4096"
    for sizes in ([3], [64, 5000], []):
        with pytest.raises(ValueError, match=limits):
            write(tmp_path / "texts", tmp_path / "out", sizes=sizes)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        write(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        write_frequencies(tmp_path / "texts", tmp_path / "out", tokenizer=tmp_path)
    with pytest.raises(ValueError, match="there is no field 'body'"):
        write(tmp_path / "texts", tmp_path / "out", text_field="body")
    for content in (b"good \xff bad", b"good \xc3"):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            write(tmp_path / "bad.txt", tmp_path / "out")
    (tmp_path / "bad.txt").write_text("")
    with pytest.raises(ValueError, match="There is no token in the text"):
        write(tmp_path / "bad.txt", tmp_path / "out")
    broken = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, broken, ignore=shutil.ignore_patterns("*.safetensors"))
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        write_frequencies(tmp_path / "texts", tmp_path / "out", tokenizer=broken)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
