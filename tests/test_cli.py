"""The `minicpm4` command, and what it measures with: perplexity in chunks, and the count of attended tokens."""

import argparse
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import SMALL_SPARSE
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from minicpm4_cli import COMMANDS, build_parser, chat, demo, generate, loading, main, serve
from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, shipped
from minicpm4_hf.attended import attended_tokens, mean_attended_tokens
from minicpm4_hf.perplexity import score_text, score_tokens
from minicpm4_hf.sparse_attention import sparse_attention
from minicpm4_hf.training.tokenizer import train_tokenizer

SPARSE = {**SMALL_SPARSE, "use_nope": False, "dense_len": 64}
CONTEXT = 2048
FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0]
STOP = [2, 504]


@pytest.fixture(scope="module")
def text():
    return shipped.shipped_excerpt().read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer([text[:40_000]], vocab_size=512)


def tiny_config(**changes):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS,
        "original_max_position_embeddings": CONTEXT,
    }
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "dim_model_base": 64,
        "bos_token_id": 1,
        "eos_token_id": STOP,
        "sparse_config": SPARSE,
    }
    return MiniCPM4Config(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    MiniCPM4ForCausalLM(tiny_config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(folder, tmp_path / "broken")


def set_config(path, **changes):
    content = json.loads((path / "config.json").read_text())
    content.update(changes)
    (path / "config.json").write_text(json.dumps(content))


def generate_json(capsys, *arguments):
    assert main(["generate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    """Run a command that must refuse, and return its sentence."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("minicpm4: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("minicpm4: ").rstrip("\n")


# The command itself


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys, minicpm4_cli\n"
        "for arguments in ['--help'], *([name, '--help'] for name in minicpm4_cli.COMMANDS):\n"
        "    try:\n"
        "        minicpm4_cli.main(arguments)\n"
        "    except SystemExit as stop:\n"
        "        assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'tqdm', 'numpy', 'minicpm4_hf'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(name in run.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_ends_with_three_commands_that_parse(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert len(examples) == 3
    for example in examples:
        line = example.rpartition("|")[2].partition(">")[0]
        if line.strip().startswith("curl"):
            continue
        program, *arguments = shlex.split(line)
        assert program == "minicpm4"
        assert callable(build_parser().parse_args(arguments).run)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"minicpm4-hf \d+\.\d+.*\n", capsys.readouterr().out)


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["info"], "run", interrupted)
    assert main(["info"]) == 130


def test_module_is_the_same_program_and_keeps_text_and_figures_apart(folder, tokenizer):
    command = [sys.executable, "-m", "minicpm4_hf", "generate", "--model", folder, "--max-new-tokens", "5"]
    command += ["--temperature", "0"]
    run = subprocess.run(command, input=b"It was a dark night", capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    expected = greedy(AutoModelForCausalLM.from_pretrained(folder), tokenizer, "It was a dark night", 5)
    assert run.stdout.decode().rstrip("\n") == expected
    assert re.fullmatch(
        r"\nprompt \d+ tokens, first token after [\d.]+ s, prefill \d+ tokens/s, decode [\d.]+ tokens/s\n"
        r"attention InfLLM v2, \w+, \d+ tokens attended per query, peak memory [\d.]+ GiB\n",
        run.stderr.decode(),
    )


# generate


def greedy(model, tokenizer, prompt, new_tokens):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [7, 64, 2048])
def test_greedy_equals_generate(folder, tokenizer, text, chunk, attention, capsys):
    prompt = text[:1500]
    options = {} if attention == "sparse" else {"sparse_config": None}
    reference = AutoModelForCausalLM.from_pretrained(folder, **options)
    flags = ["--dense"] if attention == "dense" else []
    figures = generate_json(
        capsys, "--model", folder, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 12, "--prefill-chunk",
        chunk, *flags,
    )  # fmt: skip
    assert figures["prompt_tokens"] > 3 * SPARSE["dense_len"]
    assert figures["text"] == greedy(reference, tokenizer, prompt, 12)


def test_json_fields(folder, tokenizer, capsys):
    prompt = "It was a dark night"
    figures = generate_json(capsys, "--model", folder, "--prompt", prompt, "--max-new-tokens", 4)
    length = len(tokenizer(prompt).input_ids)
    assert figures["model"] == str(folder)
    assert figures["prompt_tokens"] == length
    assert 1 <= figures["new_tokens"] <= 4
    assert figures["finish_reason"] in ("stop", "length")
    assert figures["time_to_first_token_s"] > 0
    assert figures["prefill_tokens_per_s"] == pytest.approx(length / figures["time_to_first_token_s"])
    assert figures["peak_memory_bytes"] > 1_000_000
    assert figures["attended_tokens_per_query"] == pytest.approx((length + figures["new_tokens"]) / 2)
    assert (figures["device"], figures["dtype"]) == ("cuda:0" if torch.cuda.is_available() else "cpu", "float32")


def test_one_new_token_has_no_decode_speed(folder, capsys):
    arguments = ["--model", str(folder), "--prompt", "It was", "--max-new-tokens", "1"]
    assert generate_json(capsys, *arguments)["decode_tokens_per_s"] is None
    assert main(["generate", *arguments]) == 0
    assert "decode 1 token\n" in capsys.readouterr().err


def test_stops_at_the_end_token(broken, model, tokenizer, capsys):
    prompt = "It was a dark night"
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    content = json.loads((broken / "generation_config.json").read_text())
    (broken / "generation_config.json").write_text(json.dumps({**content, "eos_token_id": ids[3]}))
    figures = generate_json(capsys, "--model", broken, "--prompt", prompt, "--temperature", 0, "--max-new-tokens", 8)
    assert figures["finish_reason"] == "stop"
    assert figures["new_tokens"] == ids.index(ids[3]) + 1


def test_sampling_follows_the_seed(folder, capsys):
    arguments = ["--model", folder, "--prompt", "It was", "--max-new-tokens", 24, "--temperature", 1.5]
    texts = [generate_json(capsys, *arguments, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    # A share of probability that holds the best token only.
    nucleus = generate_json(capsys, *arguments, "--top-p", 1e-6, "--seed", 2)["text"]
    assert nucleus == generate_json(capsys, *arguments[:-1], 0)["text"]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (None, None, (True, 0.8, 0.7)),
        (0.0, None, (False, None, None)),
        (0.0, 0.5, (False, None, None)),
        (1.2, None, (True, 1.2, 0.7)),
        (None, 0.5, (True, 0.8, 0.5)),
    ],
)
def test_sampling_settings_start_from_the_checkpoint(model, temperature, top_p, expected, monkeypatch):
    original = model.generation_config.__class__(do_sample=True, temperature=0.8, top_p=0.7, eos_token_id=STOP)
    monkeypatch.setattr(model, "generation_config", original)
    settings = generate.sampling_settings(model, 9, temperature, top_p)
    assert (settings.do_sample, settings.temperature, settings.top_p) == expected
    assert (settings.max_new_tokens, settings.eos_token_id) == (9, STOP)
    assert original.max_new_tokens is None


def test_chat_flag_uses_the_template(folder, tokenizer, capsys):
    templated = "<|im_start|>user\nIt was<|im_end|>\n<|im_start|>assistant\n"
    figures = generate_json(capsys, "--model", folder, "--chat", "--prompt", "It was", "--temperature", 0)
    ids = tokenizer(templated, add_special_tokens=False).input_ids
    assert figures["prompt_tokens"] == len(ids)


def test_prompt_comes_from_a_file_or_stdin(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--model", folder, "--temperature", 0, "--max-new-tokens", 6]
    expected = generate_json(capsys, *arguments, "--prompt", "Été à Paris\n")["text"]
    path = tmp_path / "prompt.txt"
    path.write_bytes("Été à Paris\n".encode())
    assert generate_json(capsys, *arguments, "--prompt-file", path)["text"] == expected
    for flags in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        assert generate_json(capsys, *arguments, *flags)["text"] == expected


def test_sparse_flag_changes_the_settings(folder, capsys):
    args = build_parser().parse_args(["generate", "--model", str(folder), "--sparse", "topk=5", "use_nope=true"])
    config = loading.load(args).model.config
    assert config.sparse_config == {**SPARSE, "topk": 5, "use_nope": True}
    args = build_parser().parse_args(["generate", "--model", str(folder), "--dense"])
    assert loading.load(args).model.config.sparse_config is None


def test_sparse_flag_alone_gives_the_official_settings(broken):
    set_config(broken, sparse_config=None)
    args = build_parser().parse_args(["generate", "--model", str(broken), "--sparse"])
    sparse = loading.load(args).model.config.sparse_config
    assert (sparse["topk"], sparse["window_size"], sparse["dense_len"]) == (64, 2048, 8192)


def test_context_flag_makes_room(folder, text, capsys):
    arguments = ["generate", "--model", folder, "--prompt", text[:8000], "--max-new-tokens", "4", "--temperature", "0"]
    sentence = fails(capsys, *arguments)
    needed = int(re.search(r"--context (\d+)", sentence)[1])
    assert needed > CONTEXT
    assert main([*map(str, arguments), "--context", str(needed)]) == 0
    capsys.readouterr()
    assert "--context" in fails(capsys, *arguments, "--context", needed - 1)


def test_llama_type_runs_dense(tmp_path, tokenizer, capsys):
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--model", tmp_path, "--prompt", "It was", "--temperature", 0, "--max-new-tokens", 5]
    figures = generate_json(capsys, *arguments)
    assert figures["attention"] == "dense"
    assert figures["text"] == greedy(model, tokenizer, "It was", 5)
    assert "needs a MiniCPM4 model" in fails(capsys, "generate", *arguments, "--sparse")


def test_official_layout_runs(broken, tokenizer, model, capsys):
    content = json.loads((broken / "config.json").read_text())
    del content["model_type"]
    content["architectures"] = ["MiniCPMForCausalLM"]
    content["auto_map"] = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
    (broken / "config.json").write_text(json.dumps(content))
    figures = generate_json(capsys, "--model", broken, "--prompt", "It was", "--temperature", 0, "--max-new-tokens", 5)
    assert figures["text"] == greedy(model, tokenizer, "It was", 5)


def test_local_checkpoint_needs_no_network(folder, monkeypatch, capsys):
    def refuse(*arguments):
        raise AssertionError(f"connected to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    figures = generate_json(capsys, "--model", folder, "--prompt", "It was", "--max-new-tokens", 2)
    assert 1 <= figures["new_tokens"] <= 2


def test_transformers_settings_are_put_back(folder, capsys):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    generate_json(capsys, "--model", folder, "--prompt", "It was", "--max-new-tokens", 2)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# Input that is refused


def break_nothing(path):
    return path


def break_path(path):
    return path / "nowhere"


def break_into_file(path):
    return path / "config.json"


def break_config_absent(path):
    (path / "config.json").unlink()
    return path


def break_config_json(path):
    (path / "config.json").write_text("{not json")
    return path


def break_config_list(path):
    (path / "config.json").write_text("[]")
    return path


def break_model_type(path):
    set_config(path, model_type="qwen3")
    return path


def break_config_value(path):
    set_config(path, num_key_value_heads=3)
    return path


def break_scales(path):
    set_config(path, dim_model_base=None)
    return path


def break_sparse_key(path):
    set_config(path, sparse_config={"blocksize": 64})
    return path


def break_shard(path):
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(tensors)}
    save_file({key: tensor for key, tensor in tensors.items() if weight_map[key] == names[0]}, path / names[0])
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def break_index(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("{}")
    return path


def break_length(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return path


def break_header(path):
    (path / "model.safetensors").write_bytes(b"")
    return path


def change_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def break_shape(path):
    name = "model.layers.1.mlp.up_proj.weight"
    return change_tensors(path, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))


def break_missing_weight(path):
    return change_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def break_into_pickle(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def break_weights_absent(path):
    (path / "model.safetensors").unlink()
    return path


def break_tokenizer_absent(path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    return path


def break_tokenizer_json(path):
    file = path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    return path


def break_tokenizer_content(path):
    (path / "tokenizer.json").write_text("{}")
    return path


def break_tokenizer_config(path):
    (path / "tokenizer_config.json").write_text("{")
    return path


def break_tokenizer_size(path):
    set_config(path, vocab_size=500)
    return change_tensors(
        path,
        lambda tensors: tensors.update(
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:500].clone()}
        ),
    )


def break_chat_template(path):
    (path / "chat_template.jinja").unlink()
    return path


UNFIT = [
    (break_path, [], r"There is no model folder '.*nowhere'"),
    (break_into_file, [], r"must be a checkpoint's folder, but '.*config.json' is a file"),
    (break_config_absent, [], r"has no config.json"),
    (break_config_json, [], r"config.json' is not valid JSON"),
    (break_config_list, [], r"must hold a JSON object, got list"),
    (break_model_type, [], r"is of type 'qwen3'; this program runs minicpm4, minicpm, llama"),
    (break_config_value, [], r"`num_attention_heads` \(4\) must be a multiple"),
    (break_scales, [], r"The config has no `dim_model_base`"),
    (break_sparse_key, [], r"`sparse_config` has no key 'blocksize'; the allowed keys are kernel_size"),
    (break_shard, [], r"lacks 1 of its 2 weight files, 'model-00002-of-00002.safetensors'"),
    (break_index, [], r"names no weights: it must hold a `weight_map`"),
    (break_length, [], r"model.safetensors' is truncated or no safetensors file"),
    (break_header, [], r"model.safetensors' is truncated or no safetensors file"),
    (break_shape, [], r"'model.layers.1.mlp.up_proj.weight' in .* has shape \[95, 64\], .* asks for \[96, 64\]"),
    (break_missing_weight, [], r"lacks 1 weights of the model, 'model.layers.1.mlp.up_proj.weight' first"),
    (break_into_pickle, [], r"holds pickled weights only \(pytorch_model.bin\).* convert them"),
    (break_weights_absent, [], r"has no weights: neither model.safetensors nor model.safetensors.index.json"),
    (break_tokenizer_absent, [], r"has no tokenizer"),
    (break_tokenizer_json, [], r"tokenizer.json' is not valid JSON"),
    (break_tokenizer_content, [], r"tokenizer.json' is no tokenizer"),
    (break_tokenizer_config, [], r"The tokenizer in .* could not be loaded"),
    (break_tokenizer_size, [], r"has 512 tokens, but the model only 500"),
    (break_chat_template, ["--chat"], r"has no chat template"),
    (break_nothing, ["--sparse", "topk"], r"`--sparse` takes KEY=VALUE pairs .* got 'topk'"),
    (break_nothing, ["--sparse", "topk=many"], r"got 'topk=many'"),
    (break_nothing, ["--sparse", "=3"], r"got '=3'"),
    (break_nothing, ["--sparse", "top=3"], r"`sparse_config` has no key 'top'"),
    (
        break_nothing,
        ["--sparse", "block_size=18"],
        r"`sparse_config\['block_size'\]` must be a multiple of `kernel_stride`",
    ),
    (break_nothing, ["--sparse", "topk=1"], r"must be at least `init_blocks` \+ 1"),
    (break_nothing, ["--sparse", "use_nope=1"], r"must be true or false, got 1"),
    (break_nothing, ["--temperature", "-1"], r"`--temperature` must be 0 \(greedy\) or more, got -1"),
    (break_nothing, ["--temperature", "nan"], r"`--temperature` must be 0"),
    (break_nothing, ["--top-p", "0"], r"`--top-p` must be above 0 and at most 1"),
    (break_nothing, ["--max-new-tokens", "2048"], r"more than the context of 2048; extend it with `--context \d+`"),
    (
        break_nothing,
        ["--device", "toaster"],
        r"`--device` must be a torch device such as cpu, cuda or cuda:1, got 'toaster'",
    ),
]


@pytest.mark.parametrize(
    ("change", "flags", "sentence"), UNFIT, ids=[" ".join([c.__name__[6:], *f]) for c, f, _ in UNFIT]
)
def test_unfit_input_is_one_sentence(broken, change, flags, sentence, capsys):
    path = change(broken)
    before = sorted(broken.parent.rglob("*"))
    message = fails(capsys, "generate", "--model", path, "--prompt", "It was", *flags)
    assert re.search(sentence, message), message
    assert sorted(broken.parent.rglob("*")) == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_absent_device(folder, device, capsys):
    sentence = fails(capsys, "generate", "--model", folder, "--prompt", "It was", "--device", device)
    assert sentence == f"`--device {device}` is not available: torch finds none here; use `--device cpu`."


@pytest.mark.parametrize(
    ("flags", "stdin", "sentence"),
    [
        (["--prompt", ""], None, r"The prompt is empty"),
        (["--prompt", " \n\t"], None, r"The prompt is empty"),
        (["--prompt-file", "-"], b"", r"The prompt is empty"),
        ([], b"caf\xe9", r"The prompt in stdin is not UTF-8 text \(byte 3\)"),
        (["--prompt-file", "latin.txt"], None, r"The prompt in 'latin.txt' is not UTF-8 text \(byte 3\)"),
        (["--prompt-file", "nowhere.txt"], None, r"There is no prompt file 'nowhere.txt'"),
        (["--prompt", "caf\udce9"], None, r"`--prompt` is not UTF-8 text"),
    ],
)
def test_unfit_prompt(folder, flags, stdin, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert re.search(sentence, fails(capsys, "generate", "--model", folder, *flags))


def test_terminal_without_prompt(folder, monkeypatch, capsys):
    terminal = io.TextIOWrapper(io.BytesIO())
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert fails(capsys, "generate", "--model", folder).startswith("There is no prompt")


def test_unreachable_hub(monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(repository, **kwargs):
        raise LocalEntryNotFoundError("No connection.\nDetails.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    sentence = fails(capsys, "generate", "--model", "nobody/nothing", "--prompt", "It was")
    assert sentence.startswith("There is no model folder 'nobody/nothing'")
    assert "could not be fetched from the Hub (No connection)" in sentence


def test_hub_id_is_fetched_without_pickles(folder, monkeypatch, capsys):
    import huggingface_hub

    asked = {}

    def fetch(repository, allow_patterns):
        asked[repository] = allow_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    figures = generate_json(capsys, "--model", "somebody/tiny", "--prompt", "It was", "--max-new-tokens", 2)
    assert figures["model"] == "somebody/tiny"
    assert "*.safetensors" in asked["somebody/tiny"] and not any("bin" in p for p in asked["somebody/tiny"])


def test_wrong_flags_are_argparse_errors(capsys):
    for arguments in (
        [],
        ["dance"],
        ["generate", "--dense", "--sparse", "topk=3"],
        ["generate", "--prompt", "a", "--prompt-file", "b"],
        ["generate", "--max-new-tokens", "0"],
        ["generate", "--context", "x"],
        ["info", "--model", "a", "--preset", "b"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


# What the figures are computed with


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dense_len": -1},
        {"topk": 1, "init_blocks": 0, "window_size": 0},
        {"window_size": 16, "topk": 6},
        {"init_blocks": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_attended_tokens_are_what_attention_selects(changes, length):
    settings = {**SPARSE, **changes}
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    names = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
    _, blocks = sparse_attention(q, k, v, **{name: settings[name] for name in names})
    tokens = blocks.unsqueeze(-1) * settings["block_size"] + torch.arange(settings["block_size"])
    positions = torch.arange(length)
    seen = (blocks.unsqueeze(-1) >= 0) & (tokens <= positions[:, None, None])
    counts = seen.flatten(3).sum(-1)  # [1, H, T]
    counts = torch.where(positions + 1 < settings["dense_len"], positions + 1, counts)
    expected = attended_tokens(positions, settings)
    assert (counts == expected).all()
    assert mean_attended_tokens(length, settings) == pytest.approx(expected.double().mean().item())
    assert mean_attended_tokens(length, None) == (length + 1) / 2


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("chunk", [1, 50, 1024])
def test_scores_in_chunks_equal_one_pass(folder, text, tokenizer, attention, chunk):
    options = {} if attention == "sparse" else {"sparse_config": None}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :300]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
    done, cache = [], DynamicCache(config=model.config)
    nats = score_tokens(model, ids, chunk_tokens=chunk, past_key_values=cache, progress=done.append)
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nats, score_tokens(model, ids[0], chunk_tokens=chunk))
    assert done[-1] == cache.get_seq_length() == 299
    assert done == sorted(set(done))


def test_text_score(model, tokenizer):
    prompt = "Été à Paris: it was a dark night."
    score = score_text(model, tokenizer, prompt)
    assert score.tokens == len(tokenizer(prompt).input_ids) - 1
    assert score.bytes == len(prompt.encode())
    assert score.perplexity == pytest.approx(math.exp(score.nats / score.tokens))
    assert score.bits_per_byte == pytest.approx(score.nats / score.bytes / math.log(2))

    class WithoutBos:
        """The same tokenizer, but the first token is one of the text."""

        all_special_ids = tokenizer.all_special_ids
        decode = tokenizer.decode

        def __call__(self, text, **kwargs):
            return tokenizer(text, add_special_tokens=False, **kwargs)

    prompt = prompt[prompt.index("it") :]
    score, bare = score_text(model, tokenizer, prompt), score_text(model, WithoutBos(), prompt)
    first = tokenizer.decode(tokenizer(prompt, add_special_tokens=False).input_ids[:1])
    assert bare.tokens == score.tokens - 1
    assert bare.bytes == score.bytes - len(first.encode())


def test_score_refuses(model):
    with pytest.raises(ValueError, match="at least 2 tokens"):
        score_tokens(model, torch.tensor([[1]]))
    with pytest.raises(ValueError, match="one row"):
        score_tokens(model, torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="`chunk_tokens` must be at least 1"):
        score_tokens(model, torch.ones(5, dtype=torch.long), chunk_tokens=0)


# info


def test_info_of_a_checkpoint(folder, model, capsys):
    assert main(["info", "--model", str(folder), "--context", "1000", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    key = 2 * 2 * 16 * 4  # layers, heads, head size, bytes
    weights, cache = parameters * 4, 2 * key * 1000
    k1, k2 = key * ((1000 - 8) // 4 + 1), key * ((1000 - 32) // 16 + 1)
    assert facts["parameters"] == parameters
    assert facts["memory_bytes"] == {
        "weights": weights,
        "key_value_cache": cache,
        "compressed_keys_k1": k1,
        "compressed_keys_k2": k2,
        "total": weights + cache + k1 + k2,
    }
    assert facts["sparse_config"] == SPARSE
    assert facts["max_context_tokens"] == CONTEXT
    assert facts["attended_tokens_last_query"] == (3 + 2 - 1) * 16 + 999 % 16 + 1
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backend"] and facts["backend_reason"]
    # The caches of a real run are that large.
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(1, 1000, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    assert sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) == 2 * key * 1000


def test_info_of_a_preset(capsys):
    assert main(["info", "--preset", "MiniCPM4-8B", "--sparse", "--context", "131072", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    layer = 4096 * 4096 * 2 + 2 * 4096 * 256 + 3 * 4096 * 16384 + 2 * 4096
    assert facts["parameters"] == 32 * layer + 2 * 73448 * 4096 + 4096
    assert facts["memory_bytes"]["key_value_cache"] == 2 * 32 * 2 * 128 * 2 * 131072
    # One pooled key for 16 tokens and one for 64, but for the windows that do not fill up.
    keys = facts["memory_bytes"]["key_value_cache"] // 2
    assert facts["memory_bytes"]["compressed_keys_k1"] == pytest.approx(keys / 16, rel=1e-3)
    assert facts["memory_bytes"]["compressed_keys_k2"] == pytest.approx(keys / 64, rel=1e-3)
    assert facts["max_context_tokens"] == 131072
    assert facts["attended_tokens_last_query"] == 6144


def test_info_table(folder, capsys):
    assert main(["info", "--model", str(folder), "--dense"]) == 0
    page = capsys.readouterr().out
    for label in ("parameters", "memory: weights", "memory: key value cache", "sparse settings", "attention backend"):
        assert f"\n{label}" in page
    assert "none (dense)" in page
    assert "compressed" not in page
    assert main(["info", "--model", str(folder), "--sparse", "use_nope=true"]) == 0
    assert "unrotated keys" in capsys.readouterr().out


def test_info_refuses(folder, capsys):
    assert "'MiniCPM9'" in fails(capsys, "info", "--preset", "MiniCPM9")
    assert "no model folder" in fails(capsys, "info", "--model", folder / "nowhere")
    assert "topk" in fails(capsys, "info", "--model", folder, "--sparse", "topk=0")


# demo


@pytest.fixture
def tiny_demo(folder, tmp_path, text, monkeypatch):
    excerpt = tmp_path / "excerpt.txt"
    excerpt.write_text(text[:3000], encoding="utf-8")
    monkeypatch.setattr(shipped, "shipped_checkpoint", lambda: folder)
    monkeypatch.setattr(shipped, "shipped_excerpt", lambda: excerpt)
    return excerpt


def test_demo_compares_dense_and_sparse(tiny_demo, folder, tokenizer, capsys):
    assert main(["demo", "--json", "--tokens", "500", "--new-tokens", "6", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert "dense" in captured.err and "sparse" in captured.err and "tok" in captured.err  # the progress bars
    ids = tokenizer(tiny_demo.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :500]
    for mode in ("dense", "sparse"):
        options = {"sparse_config": None} if mode == "dense" else {}
        nats = score_tokens(AutoModelForCausalLM.from_pretrained(folder, **options), ids).double().mean().item()
        assert results[mode]["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
        assert results[mode]["prefill_tokens_per_s"] > 0
        assert results[mode]["decode_tokens_per_s"] > 0
        size = len(tokenizer.decode(ids[0, 1:]).encode())
        assert results[mode]["bits_per_byte"] == pytest.approx(nats * 499 / math.log(2) / size, rel=1e-4)
    assert results["tokens"] == 500
    assert results["sparse"]["perplexity"] != results["dense"]["perplexity"]
    assert results["perplexity_ratio"] == results["sparse"]["perplexity"] / results["dense"]["perplexity"]
    assert results["dense"]["attended_tokens_per_query"] == 250
    expected = mean_attended_tokens(499, SPARSE)
    assert results["sparse"]["attended_tokens_per_query"] == expected
    assert results["attended_share"] == expected / 250
    assert results["sparse"]["continuation"]


def test_demo_ends_with_the_table(tiny_demo, capsys):
    assert main(["demo", "--tokens", "100", "--new-tokens", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6].split() == ["dense", "sparse", "sparse/dense"]
    labels = ["perplexity", "bits per byte", "prefill, tokens/s", "decode, tokens/s", "tokens attended per query"]
    assert [line[:27].strip() for line in lines[-5:]] == labels
    assert lines[-2].split()[-2:] == ["-", "-"]  # one token has no decode speed


@pytest.mark.parametrize("tokens", [15, 5000])
def test_demo_refuses(tiny_demo, tokens, capsys):
    assert fails(capsys, "demo", "--tokens", tokens).startswith("`--tokens` must be between 16 and ")


def test_demo_restores_the_settings(model):
    with demo.attention(model, None):
        assert model.config.sparse_config is None
    assert model.config.sparse_config == SPARSE


def test_shipped_excerpt_is_only_text(text):
    assert text.startswith("CHAPTER I\n\nJONATHAN HARKER'S JOURNAL\n")
    assert text.endswith(":--\n") and not text.endswith("\n\n")
    assert not re.search(r"gutenberg|\[Illustration", text, re.IGNORECASE)
    note = (shipped.shipped_excerpt().parent / "README.md").read_text(encoding="utf-8")
    assert "no. 345" in note and "public domain" in note
    assert f"{len(text.encode()):,} bytes" in note


def test_missing_shipped_files_are_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    sentence = "The shipped 'minicpm4-books' is missing from this installation of minicpm4-hf; "
    for command in (["info"], ["demo"], ["generate", "--prompt", "It was"]):
        assert fails(capsys, *command).startswith(sentence)


HAS_CHECKPOINT = (shipped._PACKAGE / "checkpoints" / "minicpm4-books" / "config.json").is_file()


@pytest.mark.skipif(not HAS_CHECKPOINT, reason="no checkpoint is shipped")
def test_shipped_checkpoint_is_the_default(text, capsys):
    length = len(AutoTokenizer.from_pretrained(shipped.shipped_checkpoint())(text).input_ids)
    note = (shipped.shipped_excerpt().parent / "README.md").read_text(encoding="utf-8")
    assert f"{length:,} tokens" in note
    figures = generate_json(capsys, "--prompt", text[:2000], "--max-new-tokens", 4, "--temperature", 0)
    assert figures["model"] == "minicpm4-books"


@pytest.mark.slow
@pytest.mark.skipif(not HAS_CHECKPOINT, reason="no checkpoint is shipped")
def test_shipped_checkpoint_reads_sparse_as_well_as_dense(capsys):
    assert main(["demo", "--json", "--tokens", "6000", "--new-tokens", "8"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["dense"]["bits_per_byte"] < 3
    assert results["perplexity_ratio"] < 1.05
    assert results["attended_share"] < 0.5


# serve and chat

needs_serving = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in serve.REQUIREMENTS), reason="needs minicpm4-hf[serve]"
)


@pytest.fixture
def without_fastapi(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else find_spec(name, *rest)
    )


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_missing_requirement_names_the_pip_line(folder, command, without_fastapi, capsys):
    sentence = fails(capsys, command, "--model", folder)
    assert sentence == (
        f"`minicpm4 {command}` needs fastapi, not installed here; run `pip install 'minicpm4-hf[serve]'`."
    )


@needs_serving
def test_serve_refuses(folder, capsys):
    assert "between 1 and 65535" in fails(capsys, "serve", "--model", folder, "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        sentence = fails(capsys, "serve", "--model", folder, "--port", port)
    assert re.match(rf"Cannot listen on 127.0.0.1 port {port} \(.*\); choose another", sentence)
    assert "no model folder" in fails(capsys, "serve", "--model", folder / "nowhere", "--port", chat.free_port())


def wait_for(url, process, seconds=240):
    for _ in range(seconds * 2):
        if process.poll() is not None:
            pytest.fail(f"the server ended:\n{process.stdout.read()}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.loads(answer.read())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail("the server did not start")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Address of a running `minicpm4 serve`, in a home without a Hub cache."""
    home = tmp_path_factory.mktemp("home")
    port = chat.free_port()
    command = [
        sys.executable,
        "-m",
        "minicpm4_cli",
        "serve",
        "--model",
        folder,
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "HOME": str(home), "HF_HOME": str(home / "huggingface")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert wait_for(f"http://127.0.0.1:{port}/health", process) == {"status": "ok"}
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output
    finally:
        process.kill()
        process.wait()


@needs_serving
def test_serve_answers_the_openai_client(server, folder, model, tokenizer):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)
    assert [entry.id for entry in client.models.list()] == [str(folder)]

    prompt = "It was a dark night"
    expected = greedy(model, tokenizer, prompt, 6)
    for name in ("any-name", str(folder)):
        options = {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0}
        answer = client.completions.create(**options)
        assert (answer.model, answer.choices[0].text) == (str(folder), expected)
        chunks = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected

    turns = [{"role": "user", "content": "Hello"}]
    template = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**template, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, template["input_ids"].shape[1] :], skip_special_tokens=True)
    options = {"model": "any-name", "messages": turns, "max_tokens": 6, "temperature": 0}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content.strip() == expected.strip()
    assert answer.usage.completion_tokens == 6
    chunks = client.chat.completions.create(**options, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed.strip() == expected.strip()


@needs_serving
def test_serve_takes_a_long_prompt_in_chunks(server, model, tokenizer, text):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=240)
    prompt = text[:2500]
    answer = client.completions.create(model="any-name", prompt=prompt, max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens > 3 * SPARSE["dense_len"]
    assert answer.choices[0].text == greedy(model, tokenizer, prompt, 4)


@needs_serving
def test_server_prefills_in_chunks_of_any_size(folder, tokenizer, text, monkeypatch):
    from transformers.cli.serving import model_manager

    original = model_manager.ModelManager
    prompt = text[:1500]
    loaded = loading.Loaded(AutoModelForCausalLM.from_pretrained(folder), tokenizer, "tiny")
    expected = greedy(loaded.model, tokenizer, prompt, 6)
    monkeypatch.setattr(serve, "_PREFILL_CHUNK", 100)
    with serve.one_model_server(loaded):
        assert model_manager.ModelManager is not original
        assert loaded.model.generation_config.prefill_chunk_size == 100
        assert greedy(loaded.model, tokenizer, prompt, 6) == expected
    assert model_manager.ModelManager is original


@needs_serving
def test_serve_keeps_its_model(server):
    """A request without a model, and transformers' endpoints that load and unload models."""

    def post(path, content):
        request = urllib.request.Request(
            server + path, json.dumps(content).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.read().decode()

    assert '"status": "ready"' in post("/load_model", {"model": "another"})
    assert json.loads(post("/reset", {})) == {"status": "ok"}
    answer = json.loads(post("/v1/completions", {"prompt": "It was", "max_tokens": 2}))
    assert answer["choices"][0]["finish_reason"] == "length"


@needs_serving
def test_chat_answers_piped_turns(folder):
    command = [sys.executable, "-m", "minicpm4_cli", "chat", "--model", folder, "--max-new-tokens", "4"]
    run = subprocess.run(
        [*command, "--temperature", "0", "--system", "Be brief.", "--device", "cpu"],
        input="Hello\n!clear\nAgain\n",
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "200"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f"<{folder}>:") == 2
    assert "Traceback" not in run.stderr and "INFO" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (None, None, ["max_new_tokens=7", "do_sample=True", "temperature=0.8", "top_p=0.7"]),
        (0.0, None, ["max_new_tokens=7", "do_sample=False"]),
        (0.5, None, ["max_new_tokens=7", "do_sample=True", "temperature=0.5", "top_p=0.7"]),
        (None, 0.9, ["max_new_tokens=7", "do_sample=True", "temperature=0.8", "top_p=0.9"]),
    ],
)
def test_chat_settings_start_from_the_checkpoint(temperature, top_p, expected):
    defaults = argparse.Namespace(do_sample=True, temperature=0.8, top_p=0.7)
    args = argparse.Namespace(max_new_tokens=7, temperature=temperature, top_p=top_p)
    assert chat.generate_flags(defaults, args) == expected
