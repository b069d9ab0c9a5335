"""`python -m minicpm4_hf.conversion`: round trips, atomicity and what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, extend_context
from minicpm4_hf.conversion import convert_to_hf, convert_to_official, output
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.official_layout import MiniCPM4Model, MiniCPMConfig, MiniCPMForCausalLM, to_official

FACTORS = [1.0, 1.25, 2.5, 20.0]
SIZES = {
    "vocab_size": 73,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "dim_model_base": 8,
    "eos_token_id": 2,
    "mup_denominator": 3,
}


def build_config(**settings):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS, "long_factor": list(FACTORS)}
    return MiniCPM4Config(**{**SIZES, "rope_parameters": rope, **settings})


def write_official(folder, config, *, max_shard_size="20KB"):
    """A folder as OpenBMB publishes them: sharded weights, official config, remote code, tokenizer files."""
    torch.manual_seed(0)
    MiniCPM4ForCausalLM(config).save_pretrained(folder, max_shard_size=max_shard_size)
    for path in folder.glob("*.py"):
        path.unlink()
    file = to_official(config.to_diff_dict()) | {"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}}
    (folder / "config.json").write_text(json.dumps({**file, "architectures": ["MiniCPMForCausalLM"]}))
    for name in ("configuration_minicpm.py", "modeling_minicpm.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("A card.\n")
    (folder / ".gitattributes").write_text("hidden\n")
    (folder / "pytorch_model.bin").write_bytes(b"not needed")
    return folder


@pytest.fixture
def official(tmp_path):
    return write_official(tmp_path / "official", build_config())


@torch.no_grad()
def logits(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(3, 30)[None]).logits


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def test_round_trip(official, tmp_path):
    hf_folder, back = tmp_path / "hf", tmp_path / "back"
    result = convert_to_hf(official, hf_folder)
    assert len(shards(official)) > 3
    assert shards(hf_folder) == shards(official)
    assert result["files"] == names(hf_folder)
    assert set(names(hf_folder)) - set(shards(hf_folder)) == {
        "README.md",
        "config.json",
        "configuration_minicpm4.py",
        "generation_config.json",
        "modeling_minicpm4.py",
        "sparse_attention.py",
        "sparse_cache.py",
        "tokenizer.json",
    }
    config = json.loads((hf_folder / "config.json").read_text())
    assert config["model_type"] == "minicpm4"
    assert config["architectures"] == ["MiniCPM4ForCausalLM"]
    assert sorted(config["auto_map"]) == [
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
    ]

    result = convert_to_official(hf_folder, back)
    assert result["model_type"] == "minicpm"
    assert not list(back.glob("*.py"))
    assert shards(back) == shards(official)
    config = json.loads((back / "config.json").read_text())
    before = json.loads((official / "config.json").read_text())
    del before["auto_map"]
    assert config == before
    assert config["rope_scaling"]["rope_type"] == "longrope"
    reference = logits(official)
    for folder in (hf_folder, back):
        assert torch.equal(logits(folder), reference)


def test_the_config_is_what_save_pretrained_writes(official, tmp_path):
    convert_to_hf(official, tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(official).save_pretrained(tmp_path / "saved")
    ours, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "saved"))
    for config in (ours, saved):
        del config["auto_map"]
    assert ours == saved


@pytest.mark.slow
def test_converted_folder_loads_without_the_package(official, tmp_path):
    convert_to_hf(official, tmp_path / "hf")
    code = (
        "import sys; sys.modules['minicpm4_hf'] = None\n"
        "from transformers import AutoModel, AutoModelForSequenceClassification\n"
        "for auto_class in (AutoModel, AutoModelForSequenceClassification):\n"
        f"    model = auto_class.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True)\n"
        "    assert type(model).__module__.startswith('transformers_modules.'), type(model)\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-I", "-c", code], check=True, env=environment, cwd=tmp_path)


def test_tied_weights_and_one_file(tmp_path):
    folder = write_official(tmp_path / "official", build_config(tie_word_embeddings=True), max_shard_size="1GB")
    assert convert_to_hf(folder, tmp_path / "hf")["num_bytes"] > 0
    assert list(shards(tmp_path / "hf")) == ["model.safetensors"]
    assert torch.equal(logits(tmp_path / "hf"), logits(folder))


def test_links_are_followed(official, tmp_path):
    """A folder of the Hub cache holds links."""
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in official.iterdir():
        (linked / path.name).symlink_to(path)
    convert_to_hf(linked, tmp_path / "hf")
    assert not any(path.is_symlink() for path in (tmp_path / "hf").iterdir())
    assert shards(tmp_path / "hf") == shards(official)


def test_extended_context_keeps_its_attention_factor(tmp_path):
    config = extend_context(build_config(), 16384)
    MiniCPM4ForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert_to_official(tmp_path / "hf", tmp_path / "official")
    file = json.loads((tmp_path / "official" / "config.json").read_text())
    # The official code's factor is sqrt(1 + ln(max / original) / ln(original)).
    assert file["max_position_embeddings"] == file["rope_scaling"]["original_max_position_embeddings"] == 16384
    assert file["rope_scaling"]["short_factor"] == config.rope_parameters["long_factor"]
    assert torch.equal(logits(tmp_path / "official"), logits(tmp_path / "hf"))


def run(arguments, capsys):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_cli(official, tmp_path, capsys):
    code, out, err = run(["to-hf", official, tmp_path / "hf", "--json"], capsys)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["output"] == str(tmp_path / "hf")
    assert result["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    code, out, err = run(["to-official", tmp_path / "hf", tmp_path / "back"], capsys)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'back'}: ") and out.count("\n") == 1


def test_progress_of_long_copies_goes_to_stderr(official, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(output, "PROGRESS_SECONDS", -1.0)
    code, _, err = run(["to-hf", official, tmp_path / "hf"], capsys)
    assert code == 0
    assert "GB copied" in err and err.endswith(" left\n")


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "to-hf" in shown and "to-official" in shown


@pytest.mark.slow
def test_module_runs():
    command = [sys.executable, "-m", "minicpm4_hf.conversion", "to-hf", "nowhere", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: nowhere is not a folder" in done.stderr


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 10)


def remove_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def edit(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def only_pickle(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_weights(folder):
    only_pickle(folder)
    (folder / "pytorch_model.bin").unlink()


INDEX = "model.safetensors.index.json"
BROKEN = {
    "truncated shard": (truncate, "is damaged or cut off"),
    "missing shard": (remove_shard, "lacks the shard model-0000"),
    "pickle": (only_pickle, "has its weights in pytorch_model.bin, a pickle"),
    "no weights": (no_weights, "has no weights: neither model.safetensors nor model.safetensors.index.json."),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "must hold a JSON object"),
    "broken index": (lambda folder: (folder / INDEX).write_text("{}"), "is not a shard index"),
    "index that leaves the folder": (
        edit(INDEX, lambda index: index["weight_map"].update(x="../model.safetensors")),
        "which is no file of this folder",
    ),
    "too few tensors": (
        edit("config.json", lambda config: config.update(num_hidden_layers=4)),
        "lack model.layers.3.input_layernorm.weight (9 tensors missing in all)",
    ),
    "dim_model_base": (edit("config.json", lambda config: config.pop("dim_model_base")), "has no `dim_model_base`"),
    "wrong type": (edit("config.json", lambda config: config.update(hidden_size="32")), "hidden_size"),
    "MiniCPM-MoE": (edit("config.json", lambda config: config.update(num_experts=8)), "is a mixture of experts"),
    "llama": (
        edit("config.json", lambda config: config.update(model_type="llama")),
        "is not in the official layout: its config.json says model type 'llama'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_sentence_and_leaves_nothing(official, tmp_path, capsys, case):
    damage, sentence = BROKEN[case]
    damage(official)
    before = names(tmp_path)
    code, out, err = run(["to-hf", official, tmp_path / "hf"], capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err
    assert names(tmp_path) == before


def test_existing_output_and_missing_folders(official, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    code, _, err = run(["to-hf", official, tmp_path / "there"], capsys)
    assert code == 2 and "already exists; name a folder that does not." in err
    assert not names(tmp_path / "there")
    code, _, err = run(["to-hf", official, tmp_path / "no" / "hf"], capsys)
    assert code == 2 and "is not a folder" in err
    code, _, err = run(["to-hf", tmp_path / "nowhere", tmp_path / "hf"], capsys)
    assert code == 2 and "nowhere is not a folder" in err


@pytest.mark.skipif(os.name != "posix", reason="needs a folder that cannot be written")
@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_a_stopped_copy_leaves_nothing(official, tmp_path, capsys, monkeypatch, stop):
    def fail(*args):
        raise stop

    monkeypatch.setattr(output.Output, "copy_files", fail)
    before = names(tmp_path)
    if isinstance(stop, OSError):
        code, _, err = run(["to-hf", official, tmp_path / "hf"], capsys)
        assert code == 2 and "No space left on device" in err
    else:
        with pytest.raises(KeyboardInterrupt):
            main(["to-hf", str(official), str(tmp_path / "hf")])
    assert names(tmp_path) == before


def test_2024_files_have_no_other_layout(tmp_path, capsys):
    config = MiniCPMConfig(**{**SIZES, "mup_denominator": None, "num_key_value_heads": 4})
    MiniCPMForCausalLM(config).save_pretrained(tmp_path / "2b")
    code, _, err = run(["to-hf", tmp_path / "2b", tmp_path / "hf"], capsys)
    assert code == 2 and "is a 2024 MiniCPM, which has no minicpm4 layout" in err
    code, _, err = run(["to-official", tmp_path / "2b", tmp_path / "back"], capsys)
    assert code == 2 and "is not in the minicpm4 layout" in err


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"head_dim": 16, "rope_parameters": None}, "`head_dim` 16"),
        ({"mlp_bias": True}, "`mlp_bias`"),
        (
            {"rope_parameters": {**build_config().rope_parameters, "attention_factor": 1.2}},
            "a LongRoPE attention factor",
        ),
        ({"rope_parameters": {**build_config().rope_parameters, "factor": 4.0}}, "a LongRoPE attention factor"),
    ],
    ids=["head_dim", "mlp_bias", "attention_factor", "factor"],
)
def test_what_the_official_layout_cannot_express(tmp_path, capsys, settings, what):
    MiniCPM4ForCausalLM(build_config(**settings)).save_pretrained(tmp_path / "hf")
    code, _, err = run(["to-official", tmp_path / "hf", tmp_path / "official"], capsys)
    assert code == 2
    assert f"The official layout cannot express {what}" in err
    assert not (tmp_path / "official").exists()


def test_a_model_without_head_is_copied_too(tmp_path):
    MiniCPM4Model(build_config()).save_pretrained(tmp_path / "hf")
    convert_to_official(tmp_path / "hf", tmp_path / "official")
    assert json.loads((tmp_path / "official" / "config.json").read_text())["architectures"] == ["MiniCPMModel"]
