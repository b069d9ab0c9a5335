"""The tokenizer of a GGUF file: what is written, what is refused, and what llama.cpp makes of it."""

import copy
import json
import random

import pytest

pytest.importorskip("gguf")

import gguf
from gguf_folders import ODD, change_config, minicpm4, read_file, save
from gguf_tokenizers import CHAT_TEMPLATE, PREFIX, SPACES, official_kind, sentencepiece_merges, write_tokenizer
from transformers import AutoTokenizer

from minicpm4_hf.conversion.gguf import convert_to_gguf
from minicpm4_hf.conversion.gguf_tokenizer import read_vocabulary
from minicpm4_hf.eval.gguf import TEXTS
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt

OFFICIAL = official_kind()
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
SIZES = {**ODD, "vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 1, "eos_token_id": [2, 4088]}
TYPES = gguf.TokenType


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder without a tokenizer."""
    return save(minicpm4(**SIZES), tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture
def folder(weights, tmp_path):
    """A folder with the weights above, that a test may change."""
    new = tmp_path / "model"
    new.mkdir()
    for path in weights.iterdir():
        (new / path.name).symlink_to(path)
    config = json.loads((weights / "config.json").read_text())
    (new / "config.json").unlink()
    (new / "config.json").write_text(json.dumps(config))
    (new / "generation_config.json").unlink()
    return new


def vocabulary(folder, **settings):
    config = minicpm4(**{**SIZES, **settings}).config
    return read_vocabulary(folder, config)


def changed(**changes):
    return {**copy.deepcopy(OFFICIAL), **changes}


def with_model(**changes):
    return changed(model={**OFFICIAL["model"], **changes})


def test_what_is_written(folder, tmp_path):
    write_tokenizer(folder, OFFICIAL, pad_token="</s>")
    result = convert_to_gguf(folder, tmp_path / "a.gguf")
    assert result["tokenizer_differences"] == []
    metadata, _ = read_file(tmp_path / "a.gguf")
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items() if "tokenizer" in key}
    assert keys["model"] == "llama"
    vocab = OFFICIAL["model"]["vocab"]
    assert [keys["tokens"][number] for number in vocab.values()] == list(vocab)
    assert keys["tokens"][4088:] == [entry["content"] for entry in OFFICIAL["added_tokens"][3:]]
    assert keys["token_type"][:4] == [TYPES.UNKNOWN, TYPES.CONTROL, TYPES.CONTROL, TYPES.BYTE]
    assert set(keys["token_type"][3:259]) == {TYPES.BYTE}
    assert set(keys["token_type"][259:4088]) == {TYPES.NORMAL}
    assert set(keys["token_type"][4088:]) == {TYPES.CONTROL}
    ids = {name.removesuffix("_token_id"): value for name, value in keys.items() if name.endswith("_token_id")}
    assert ids == {
        "bos": 1,
        "eos": 4088,
        "eot": 4088,
        "unknown": 0,
        "padding": 2,
        "fim_pre": 4093,
        "fim_mid": 4094,
        "fim_suf": 4095,
    }
    assert (keys["add_bos_token"], keys["add_eos_token"], keys["add_space_prefix"]) == (True, False, True)
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    # A better piece, which is one with a smaller id here, has the higher score.
    made = [number for piece, number in vocab.items() if any(a + b == piece for a, b in OFFICIAL["model"]["merges"])]
    scores = [keys["scores"][number] for number in made]
    assert scores == sorted(scores, reverse=True) and scores[0] < 0 and len(set(scores)) == len(scores)


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [PREFIX, SPACES]}}, True),
        ({"normalizer": SPACES}, False),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, False),
    ],
    ids=["prepend", "replace", "metaspace"],
)
def test_llama_cpp_cuts_texts_as_the_official_kind_does(folder, tmp_path, changes, prefix):
    llama_cpp_model = pytest.importorskip("minicpm4_hf.eval.llama_cpp_model")
    write_tokenizer(folder, changed(**changes))
    result = convert_to_gguf(folder, tmp_path / "a.gguf")
    assert result["tokenizer_differences"] == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").split("\n")[:-1]]
    texts += shipped_excerpt().read_text(encoding="utf-8")[:30000].split("\n\n")
    texts += random_texts(300)
    with llama_cpp_model.LlamaCppModel(tmp_path / "a.gguf", vocabulary_only=True) as engine:
        assert engine.tokenize("a")[1:] == tokenizer("a").input_ids[1:]
        assert (len(engine.tokenize("\n")) == 3) is prefix  # begin of text, space, newline
        for text in texts:
            assert engine.tokenize(text) == tokenizer(text).input_ids, text
        assert [token for token in range(4096) if engine.is_end(token)] == [2, 4088]
        assert engine.chat_template() == CHAT_TEMPLATE


def random_texts(count):
    """Pieces and characters in random order, special tokens and runs of spaces among them."""
    chance = random.Random(0)
    pieces = [piece.replace("▁", " ") for piece in OFFICIAL["model"]["vocab"] if len(piece) > 1 and "<" not in piece]
    parts = [*pieces[:1500], *" \n'\u2019.,-aeé…\t" * 40, "  ", "    ", "<|im_end|>", "<s>", "</s>", "世界", "😀"]
    return ["".join(chance.choices(parts, k=25)) for _ in range(count)]


def test_the_shipped_tokenizer_and_how_it_differs(tmp_path):
    llama_cpp_model = pytest.importorskip("minicpm4_hf.eval.llama_cpp_model")
    result = convert_to_gguf(shipped_checkpoint(), tmp_path / "a.gguf", type="q8_0")
    assert len(result["tokenizer_differences"]) == 4
    assert any("pattern" in difference for difference in result["tokenizer_differences"])
    tokenizer = AutoTokenizer.from_pretrained(shipped_checkpoint())
    prose = shipped_excerpt().read_text(encoding="utf-8")[:40000].split("\n\n")
    with llama_cpp_model.LlamaCppModel(tmp_path / "a.gguf", vocabulary_only=True) as engine:
        different = [text for text in prose if engine.tokenize(text) != tokenizer(text).input_ids]
        assert not different
        # What the sentence is about: of a run of spaces before a sign, ours keeps the last one apart.
        assert engine.tokenize("a  #") != tokenizer("a  #").input_ids
        assert all(engine.is_end(token) for token in (2, 4088))


def test_tokens_that_the_embedding_has_more(folder):
    write_tokenizer(folder, OFFICIAL)
    found = vocabulary(folder, vocab_size=4099)
    assert found.tokens[4096:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]"]
    assert found.types[4096:] == [TYPES.UNUSED] * 3


def test_tokens_that_are_not_special(folder):
    tokens = copy.deepcopy(OFFICIAL["added_tokens"])
    tokens[-1]["special"] = False
    write_tokenizer(folder, changed(added_tokens=tokens))
    assert vocabulary(folder).types[4095] == TYPES.USER_DEFINED


def test_tokens_named_in_the_settings_only(folder):
    tokens = OFFICIAL["added_tokens"]
    decoder = {str(entry["id"]): entry for entry in tokens[-2:]}
    write_tokenizer(folder, changed(added_tokens=tokens[:-2]), added_tokens_decoder=decoder)
    assert vocabulary(folder).tokens[4094:] == ["<|fim_middle|>", "<|fim_suffix|>"]


@pytest.mark.parametrize(
    ("stops", "ids", "known"),
    [
        ([2, 4088], {"eos": 4088, "eot": 4088}, True),
        ([4090], {"eos": 4088, "eot": 4088, "eom": 4090}, True),
        ([4088, 4090, 4091], {"eos": 4088, "eot": 4088, "eom": 4090}, False),
        (4088, {"eos": 4088, "eot": 4088}, True),
        (None, {"eos": 4088, "eot": 4088}, True),
    ],
    ids=str,
)
def test_every_end_of_a_text_is_known(folder, stops, ids, known):
    write_tokenizer(folder, OFFICIAL)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    found = vocabulary(folder)
    assert {name: found.ids[name] for name in ("eos", "eot", "eom") if name in found.ids} == ids
    assert (found.differences == []) is known


def test_settings_decide_on_the_first_and_last_token(folder):
    write_tokenizer(folder, OFFICIAL, add_bos_token=False, add_eos_token=True)
    assert (vocabulary(folder).add_bos, vocabulary(folder).add_eos) == (False, True)
    write_tokenizer(folder, changed(post_processor=None))
    assert (vocabulary(folder).add_bos, vocabulary(folder).add_eos) == (False, False)


def test_chat_templates(folder):
    write_tokenizer(folder, OFFICIAL, chat_template=None)
    assert vocabulary(folder).chat_template is None
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    for template, expected in (("C", "C"), (named, "B")):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        assert vocabulary(folder).chat_template == expected


VOCAB, MERGES = OFFICIAL["model"]["vocab"], OFFICIAL["model"]["merges"]
NORMALIZED = [{**OFFICIAL["added_tokens"][0], "normalized": True}, *OFFICIAL["added_tokens"][1:]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (with_model(merges=MERGES[:-1]), "do not allow every way"),
        (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, SPACES]}), "normalises texts (NFC)"),
        (changed(pre_tokenizer={**METASPACE, "split": True}), "by a pattern"),
        (changed(pre_tokenizer={**METASPACE, "prepend_scheme": "first"}), "before a text only"),
        (changed(normalizer=None, pre_tokenizer=METASPACE), "before a text that begins with one"),
        (changed(added_tokens=NORMALIZED), "'<unk>' takes in spaces"),
    ],
    ids=["merges", "nfc", "split", "first", "always", "normalized"],
)
def test_differences_are_said(folder, content, sentence):
    write_tokenizer(folder, content)
    assert any(sentence in difference for difference in vocabulary(folder).differences)


def without(key):
    return {name: value for name, value in OFFICIAL.items() if name != key}


def renamed(old, new):
    return with_model(vocab={new if piece == old else piece: number for piece, number in VOCAB.items()}, merges=[])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (with_model(type="Unigram"), "is of type Unigram and not BPE with byte fallback"),
        (with_model(byte_fallback=False), "is of type BPE without byte fallback"),
        (renamed("<0x41>", "xyz"), "lacks the byte token <0x41>"),
        (with_model(vocab={**VOCAB, "zzz": 300}, merges=[]), "gives the same id to two pieces"),
        (with_model(vocab={**VOCAB, "zzz": 4096}, merges=[]), "token ids from 0 to 4096, but the model's vocabulary"),
        (renamed("▁narrow", "<|im_end|>"), "'<|im_end|>' as token 4088"),
        (renamed("▁narrow", ""), "has '' as token 4087"),
        (renamed("▁narrow", "a\0b"), "as token 4087, which is empty, no text, or there twice"),
        (renamed("▁narrow", "\ud800"), "as token 4087"),
        (with_model(merges=[["a", "qqq"]]), "merge of 'a' and 'qqq'"),
        (changed(pre_tokenizer={"type": "ByteLevel"}), "works on bytes (ByteLevel)"),
        (changed(normalizer=None), "does not write spaces as '▁'"),
        (without("model"), "not a tokenizer that can be read (KeyError('model'))"),
        (changed(model=[]), "not a tokenizer that can be read"),
        (with_model(merges=[3]), "not a tokenizer that can be read"),
        (changed(added_tokens=[{"id": 5}]), "not a tokenizer that can be read"),
        ([], "must hold a JSON object, got a list"),
    ],
)
def test_what_is_no_such_tokenizer(folder, content, sentence):
    write_tokenizer(folder, {})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        vocabulary(folder)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def test_missing_and_damaged_files(folder):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json.*--no-tokenizer"):
        vocabulary(folder)
    write_tokenizer(folder, OFFICIAL)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not text in UTF-8"):
        vocabulary(folder)
    (folder / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        vocabulary(folder)
    (folder / "tokenizer.json").write_text("[" * 100000)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        vocabulary(folder)


def test_a_stop_token_beyond_the_vocabulary(folder):
    write_tokenizer(folder, OFFICIAL)
    change_config(folder, eos_token_id=5000)
    with pytest.raises(ValueError, match="stops at token 5000, beyond its vocabulary of 4096"):
        vocabulary(folder, eos_token_id=5000)


def test_the_merges_of_the_tests_are_those_of_scores():
    # "ab" is better than "bc": of "abc", whose two ways are both there, the best piece is joined first.
    pieces = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    assert sentencepiece_merges(pieces) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
