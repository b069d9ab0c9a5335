"""`python -m minicpm4_hf.conversion ternary`: exact packing, rounding, embeddings, loading, and what is refused."""

import json
import shutil

import pytest
import torch
import yaml
from conversion_runs import listing
from safetensors.torch import load_file, save_file
from small_models import build_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minicpm4_hf.conversion import output
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.conversion.ternary import convert_to_ternary
from minicpm4_hf.official_layout import to_official
from minicpm4_hf.quantization import TernaryLinear, dequantize_ternary, quantize_ternary

SIZES = {"group": 4, "hidden_size": 256, "intermediate_size": 512, "head_dim": 32}
GROUP_SIZES = [-1, 256, 128, 64, 32]
UP = "model.layers.1.mlp.up_proj.weight"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def is_linear(name):
    return "_proj." in name


def save(model, folder, **settings):
    model.save_pretrained(folder, **settings)
    for path in folder.glob("*.py"):
        path.unlink()
    (folder / "tokenizer.json").write_text("{}")
    return folder


def fake_quantised(folder, group_size, dtype=torch.bfloat16, *, max_shard_size="5GB", **settings):
    """As BitCPM4 is released: scales times codes in an ordinary checkpoint."""
    model = build_model(**{**SIZES, **settings})
    for name, parameter in model.named_parameters():
        if is_linear(name):
            parameter.data = dequantize_ternary(*quantize_ternary(parameter.data, group_size))
    return save(model.to(dtype), folder, max_shard_size=max_shard_size)


def latent(folder, dtype=torch.float32, **settings):
    return save(build_model(**{**SIZES, **settings}).to(dtype), folder)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder, **settings):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **settings}))
    return folder


def all_tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def unpack_by_hand(packed, scales):
    codes = torch.stack([(packed >> 2 * i) & 3 for i in range(4)], -1).flatten(1).to(scales.dtype) - 1
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


@torch.no_grad()
def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(3, 60)[None]).logits


def assert_same_logits(folder, other):
    """The weights are the same; kernels add in another order."""
    torch.testing.assert_close(logits(folder), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_groups_are_found_and_every_weight_is_exact(tmp_path, group_size, dtype):
    source = fake_quantised(tmp_path / "in", group_size, dtype)
    result = convert_to_ternary(source, tmp_path / "out")
    # In rows of 256 the two are the same, but down_proj has rows of 512.
    assert result["group_size"] == group_size and result["errors"] == {} and result["tensors"] == 14
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert set(after) == set(before) | {f"{name}_scale" for name in before if is_linear(name)}
    for name, tensor in before.items():
        if is_linear(name):
            scales = after[f"{name}_scale"]
            assert after[name].dtype == torch.uint8 and after[name].shape[1] == tensor.shape[1] // 4
            assert scales.dtype == dtype
            assert scales.shape[1] == (1 if group_size == -1 else tensor.shape[1] // group_size)
            assert torch.equal(unpack_by_hand(after[name], scales), tensor)
        else:
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
    assert_same_logits(tmp_path / "out", source)


def test_sizes_that_are_said(tmp_path, capsys):
    source = fake_quantised(tmp_path / "in", 64)
    before = listing(tmp_path)
    assert main(["ternary", str(source), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert listing(tmp_path) == before
    assert main(["ternary", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'out'} would have ") and "ternary weights, groups of 64" in shown
    assert main(["ternary", str(source), str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    tensors = all_tensors(tmp_path / "out")
    assert planned["num_bytes"] == sum(tensor.nbytes for tensor in tensors.values()) == sum(result["bytes"].values())
    ternary = {name: tensor for name, tensor in tensors.items() if is_linear(name)}
    assert result["bytes"]["ternary"] == sum(tensor.nbytes for tensor in ternary.values())
    assert result["bits_per_ternary_weight"] == 2 + 16 / 64
    assert result["files"] == listing(tmp_path / "out")
    assert result["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert result["source_bytes"] == sum(tensor.nbytes for tensor in all_tensors(source).values())


def test_shards_and_small_pieces(tmp_path, monkeypatch):
    source = fake_quantised(tmp_path / "in", 32, max_shard_size="300KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    monkeypatch.setattr(output.Output.shards, "__defaults__", (100_000,))
    convert_to_ternary(source, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 110_000 for path in shards)
    assert_same_logits(tmp_path / "out", source)


def test_the_official_layout_and_its_remote_code(tmp_path):
    source = fake_quantised(tmp_path / "in", -1, mup_denominator=3)
    model_config = AutoModelForCausalLM.from_pretrained(source).config
    file = to_official(model_config.to_diff_dict()) | {
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
    }
    (source / "config.json").write_text(json.dumps({**file, "architectures": ["MiniCPMForCausalLM"]}))
    (source / "configuration_minicpm.py").write_text("raise SystemExit('remote code was run')\n")
    result = convert_to_ternary(source, tmp_path / "out")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert set(result["files"]) == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "minicpm" and "auto_map" not in config
    assert_same_logits(tmp_path / "out", source)


def test_llama(tmp_path):
    """BitCPM-CANN 1B and 3B are Llamas."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    for name, parameter in model.named_parameters():
        if is_linear(name):
            parameter.data = dequantize_ternary(*quantize_ternary(parameter.data))
    source = save(model.to(torch.bfloat16), tmp_path / "in")
    assert convert_to_ternary(source, tmp_path / "out")["group_size"] == -1
    assert_same_logits(tmp_path / "out", source)


def test_groups_that_only_some_rows_allow(tmp_path):
    """Rows of 96 columns can only be cut in 32; one matrix is ternary by rows, another by 32 only."""
    source = fake_quantised(tmp_path / "in", -1, intermediate_size=96)

    def change(tensors):
        down = tensors["model.layers.0.mlp.down_proj.weight"]
        tensors["model.layers.0.mlp.down_proj.weight"] = dequantize_ternary(*quantize_ternary(down, 32))
        up = tensors[UP].float() + 0.01 * torch.randn(tensors[UP].shape)
        tensors[UP] = dequantize_ternary(*quantize_ternary(up, 128)).to(torch.bfloat16)

    assert convert_to_ternary(change_weights(source, change), tmp_path / "out")["group_size"] == 32


def test_negative_zeros_and_rows_of_zeros(tmp_path):
    source = fake_quantised(tmp_path / "in", -1)

    def change(tensors):
        tensors[UP][tensors[UP] == 0] = -0.0
        tensors[UP][3] = 0

    change_weights(source, change)
    convert_to_ternary(source, tmp_path / "out")
    after = all_tensors(tmp_path / "out")
    assert torch.equal(unpack_by_hand(after[UP], after[f"{UP}_scale"]), all_tensors(source)[UP])
    assert_same_logits(tmp_path / "out", source)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("embeddings", "bound"), [("int8", 0.01), ("int4", 0.15)])
def test_embeddings(tmp_path, embeddings, bound, tied):
    source = fake_quantised(tmp_path / "in", 64, tie_word_embeddings=tied)
    arguments = ["ternary", str(source), str(tmp_path / "out"), "--embeddings", embeddings]
    assert main([*arguments, "--embeddings-group-size", "64"]) == 0
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    assert ("lm_head.weight" in after) == (not tied)
    for name in {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"}):
        weight, scales = after[name], after[f"{name}_scale"].float()
        if embeddings == "int8":
            restored = weight.float() * scales
        else:
            codes = torch.stack([(weight >> 4 * i) & 15 for i in range(8)], 1).flatten(0, 1) - 8  # [D, V]
            restored = (codes * scales.repeat_interleave(64, 0)).T
        error = (restored - before[name].float()).norm() / before[name].float().norm()
        assert 0 < error < bound
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj) is TernaryLinear
    first, full = logits(tmp_path / "out"), logits(source)
    assert 0 < (first - full).norm() / full.norm() < 5 * bound


def test_a_head_in_the_file_of_a_tied_model(tmp_path, capsys):
    source = fake_quantised(tmp_path / "in", 64, tie_word_embeddings=True)
    change_weights(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert_to_ternary(source, tmp_path / "out", embeddings="int8")
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")
    convert_to_ternary(source, tmp_path / "kept")
    assert "lm_head.weight" in all_tensors(tmp_path / "kept")
    change_weights(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 2}))
    refuse(source, tmp_path, capsys, "but lm_head.weight is not the embedding; correct", "--embeddings=int8")


@pytest.mark.parametrize("group_size", [-1, 32])
def test_latent_weights_are_rounded_in_float32(tmp_path, group_size):
    source = latent(tmp_path / "in")
    result = convert_to_ternary(source, tmp_path / "out", quantize=True, group_size=group_size)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    flipped_by_a_cast = 0
    for name, weight in before.items():
        if not is_linear(name):
            continue
        columns = weight.shape[1] if group_size == -1 else group_size
        groups = weight.view(len(weight), -1, columns)
        scales = groups.abs().mean(-1)
        codes = (groups / scales[..., None]).round().clamp(-1, 1).view_as(weight)
        assert torch.equal(after[f"{name}_scale"], scales)
        fields = torch.stack([(after[name] >> 2 * i) & 3 for i in range(4)], -1).flatten(1).float() - 1
        assert torch.equal(fields, codes), name
        cast = weight.to(torch.bfloat16).float().view_as(groups)
        cast_codes = (cast / cast.abs().mean(-1, keepdim=True)).round().clamp(-1, 1).view_as(weight)
        flipped_by_a_cast += (cast_codes != codes).sum().item()
    assert flipped_by_a_cast > 100
    assert all(0.3 < error < 0.7 for error in result["errors"].values()) and len(result["errors"]) == 7
    # What loads with `quantization_config` is the same.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=model.config.quantization_config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_rounded_latents_are_warned_of(tmp_path, capsys):
    arguments = ["--quantize", "--group-size", "64"]
    exact, rounded = latent(tmp_path / "a"), latent(tmp_path / "b", torch.bfloat16)
    capsys.readouterr()
    assert main(["ternary", str(exact), str(tmp_path / "out-a"), *arguments]) == 0
    assert capsys.readouterr().err == ""
    assert main(["ternary", str(rounded), str(tmp_path / "out-b"), *arguments]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: the weights are bfloat16; if they are latent weights") and "1.8 %" in warning


def test_an_mtp_head_stays_as_it_is(tmp_path):
    source = fake_quantised(tmp_path / "in", 64)
    extra = torch.randn(256, 256).to(torch.bfloat16)
    change_weights(source, lambda t: t.update({"mtp.layers.0.mlp.up_proj.weight": extra}))
    convert_to_ternary(source, tmp_path / "out")
    assert torch.equal(all_tensors(tmp_path / "out")["mtp.layers.0.mlp.up_proj.weight"], extra)


def test_card(tmp_path):
    source = fake_quantised(tmp_path / "in", 64)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nThe card of the source.\n")
    convert_to_ternary(source, tmp_path / "out", embeddings="int8")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["base_model_relation"] == "quantized"
    assert {"ternary", "bitcpm", "minicpm4"} == set(front["tags"])
    for words in (
        "are packed at two bits each, with their scales in bfloat16",
        "| group size | 64 |",
        "| weights | packed as they were |",
        "| embedding and head | int8 |",
        "| matrices of the layers | None: all 14 ternary matrices are equal to the source's",
        "| `embed_tokens`, root mean square of the rounding, relative to the weights | 0.00",
        "| of these, ternary | ",
        "The card of the source.",
    ):
        assert words in card
    convert_to_ternary(source, tmp_path / "exact")
    assert "\n\nNone: all 14 ternary matrices are equal" in (tmp_path / "exact" / "README.md").read_text()
    convert_to_ternary(latent(tmp_path / "latent"), tmp_path / "rounded", quantize=True)
    card = (tmp_path / "rounded" / "README.md").read_text()
    assert "| weights | rounded |" in card and "| group size | a row |" in card and "None" not in card


def refuse(source, tmp_path, capsys, sentence, *settings):
    """The command ends with 2, the sentence is on stderr, and nothing new is there."""
    before = listing(tmp_path)
    capsys.readouterr()
    assert main(["ternary", str(source), str(tmp_path / "refused"), *settings]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and captured.err.endswith(".\n") and sentence in captured.err, (
        captured.err
    )
    assert listing(tmp_path) == before


def test_one_weight_that_is_not_ternary(tmp_path, capsys):
    source = fake_quantised(tmp_path / "in", 64)
    change_weights(source, lambda tensors: tensors[UP][5, 7].add_(3.0))
    refuse(source, tmp_path, capsys, f"{UP} in {source / 'model.safetensors'} is not ternary by whole rows or groups")
    refuse(source, tmp_path, capsys, "down to 32, first in row 5; for latent or full-precision weights `--quantize`")
    refuse(source, tmp_path, capsys, f"{UP} in {source / 'model.safetensors'} is not ternary", "--dry-run")
    refuse(source, tmp_path, capsys, f"{UP} in ", "--group-size=64")


def test_groups_that_were_given_wrong(tmp_path, capsys):
    source = fake_quantised(tmp_path / "in", 64)
    refuse(
        source,
        tmp_path,
        capsys,
        "first in row 0; leave out `--group-size`, and the groups are found.",
        "--group-size=256",
    )
    assert convert_to_ternary(source, tmp_path / "finer", group_size=32)["group_size"] == 32
    assert_same_logits(tmp_path / "finer", source)


def test_other_refusals(tmp_path, capsys):
    ternary = fake_quantised(tmp_path / "ternary", 64)
    refuse(
        ternary, tmp_path, capsys, "is ternary already, and rounding it would change its scales; leave", "--quantize"
    )
    convert_to_ternary(ternary, tmp_path / "packed")
    refuse(tmp_path / "packed", tmp_path, capsys, "is quantised already (method 'bitcpm'); convert")
    odd = latent(tmp_path / "odd", intermediate_size=48)
    refuse(odd, tmp_path, capsys, "model.layers.0.mlp.down_proj cannot be packed: ", "--quantize", "--group-size=32")
    uneven = latent(tmp_path / "uneven", intermediate_size=50)
    refuse(uneven, tmp_path, capsys, "down_proj cannot be packed: A packed layer's inputs must be a multiple of 4")
    other = shutil.copytree(ternary, tmp_path / "other")
    change_config(other, architectures=["MiniCPM4ForSequenceClassification"])
    refuse(other, tmp_path, capsys, "is a MiniCPM4ForSequenceClassification, and only a causal language model")
    refuse(ternary, tmp_path, capsys, "divide the 256", "--embeddings=int4", "--embeddings-group-size=96")


def test_a_source_that_changes_meanwhile(tmp_path, capsys, monkeypatch):
    source = fake_quantised(tmp_path / "in", 64)
    monkeypatch.setattr(
        "minicpm4_hf.conversion.ternary.unpack_ternary", lambda packed: torch.zeros(len(packed), 4 * packed.shape[1])
    )
    refuse(source, tmp_path, capsys, "did not come back from its packed form as it was")


@pytest.mark.parametrize("wrong", ["48", "0", "x"])
def test_group_sizes_that_are_none(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        main(["ternary", str(tmp_path), str(tmp_path / "out"), "--group-size", wrong])
    assert stop.value.code == 2 and "--group-size" in capsys.readouterr().err
