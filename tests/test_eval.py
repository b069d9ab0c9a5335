"""`python -m minicpm4_hf.eval`: its figures against a plain computation, its record, and wrong input."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.training.tokenizer import train_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog; naïve café, 12.5 km.\n" * 20
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 16, "topk": 2, "dense_len": -1}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small random checkpoint that is sparse, and a text."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_tokenizer([TEXT * 20], vocab_size=400)
    torch.manual_seed(0)
    config = MiniCPM4Config(vocab_size=len(tokenizer), dim_model_base=16, sparse_config=SPARSE, **SHAPE)
    MiniCPM4ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def expected_nats(folder, context, **settings):
    """Windows that begin with `<s>`, one at a time, the log-probabilities taken in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **settings).eval()
    ids = AutoTokenizer.from_pretrained(folder / "model")(TEXT, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), context - 1):
        window = torch.tensor([[1, *ids[start : start + context - 1]]])
        with torch.no_grad():
            logits = model(window, use_cache=False).logits[0, :-1].double()
        total -= logits.log_softmax(-1).gather(1, window[0, 1:, None]).sum().item()
    return total, len(ids)


def run(folder, *arguments):
    return main(["perplexity", "--model", str(folder / "model"), "--text", str(folder / "text.txt"), *arguments])


@pytest.mark.parametrize("context", [100, 512])
def test_record(folder, context, tmp_path, capsys):
    assert run(folder, "--context", str(context), "--json", "--output", str(tmp_path / "record.json")) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]

    nats, num_tokens = expected_nats(folder, context)
    content = TEXT.encode("utf-8")
    assert record["num_tokens"] == num_tokens and record["num_bytes"] == len(content) > len(TEXT)
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["nats"] == pytest.approx(nats, rel=1e-6)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(content), rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-6)
    assert record["sparse_config"]["topk"] == 2 and record["context"] == context
    assert set(record["versions"]) == {"minicpm4-hf", "torch", "transformers", "tokenizers"}


def test_attention_settings_change_the_figure(folder, capsys):
    nats = {}
    for name, arguments in {"own": [], "dense": ["--dense"], "wider": ["--sparse", "topk=3"]}.items():
        assert run(folder, "--context", "512", "--json", *arguments) == 0
        record = json.loads(capsys.readouterr().out)
        nats[name] = record["nats"]
        if name == "wider":
            assert record["sparse_config"]["topk"] == 3 and record["sparse_config"]["block_size"] == 16
    assert nats["dense"] == pytest.approx(expected_nats(folder, 512, sparse_config=None)[0], rel=1e-6)
    assert len({round(value, 4) for value in nats.values()}) == 3


def test_readable_output(folder, capsys):
    assert run(folder) == 2  # the default context is more than this model has
    assert "`context` must be from 2 to the model's 512, got 4096" in capsys.readouterr().err
    assert run(folder, "--context", "200") == 0
    assert "bits per byte, perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--text", "missing.txt"], "No such file or directory: 'missing.txt'"),
        (["--text", "empty.txt"], "The text 'empty.txt' is empty."),
        (["--text", "latin1.txt"], "The text 'latin1.txt' is not UTF-8: byte 3 cannot be decoded."),
        (["--model", "missing"], "There is no model folder 'missing'"),
        (["--model", "."], "'.' is not a checkpoint"),
        (["--sparse", "topk"], "got 'topk'"),
        (["--sparse", "top=3"], "`sparse_config` has no key 'top'"),
        (["--sparse", "topk=0"], "`sparse_config['topk']` must be an integer of at least 1, got 0"),
        (["--context", "1"], "`context` must be from 2 to the model's 512, got 1."),
        (["--output", "missing/record.json"], "The folder of 'missing/record.json' does not exist."),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(folder, arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    assert run(folder, "--context", "200", *arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line(folder):
    command = [sys.executable, "-m", "minicpm4_hf.eval", "perplexity", "--model", "model", "--text", "text.txt"]
    done = subprocess.run([*command, "--context", "300", "--json"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "text.txt"
