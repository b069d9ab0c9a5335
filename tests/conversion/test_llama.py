"""`conversion llama`: the folded model gives the source's logits, and what a Llama cannot say is refused or named."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaConfig

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, extend_context
from minicpm4_hf.conversion import output
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.conversion.llama import convert_to_llama
from minicpm4_hf.official_layout import MiniCPMConfig, MiniCPMForCausalLM

SIZES = {
    "vocab_size": 73,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "dim_model_base": 16,
    "eos_token_id": [2, 70],
    "tie_word_embeddings": False,
}
FACTORS = [1.0, 1.25, 2.5, 20.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": FACTORS, "long_factor": FACTORS}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress lines, however slow the machine."""
    monkeypatch.setattr(output, "PROGRESS_SECONDS", 1e9)


def save(folder, *, dtype=torch.float32, config_class=MiniCPM4Config, model_class=MiniCPM4ForCausalLM, **settings):
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases other than their initial ones and zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return model.float().eval()


@torch.no_grad()
def logits(model, length=50):
    return model(torch.arange(length)[None] * 7 % 73).logits.double()


CASES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "longrope": {"rope_parameters": LONGROPE},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "attention factor": {"rope_parameters": {**LONGROPE, "attention_factor": 1.2}},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_source_s(tmp_path, case):
    model = save(tmp_path / "in", **CASES[case])
    result = convert_to_llama(tmp_path / "in", tmp_path / "out")
    folded, report = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is LlamaForCausalLM
    reference = logits(model)
    assert reference.std() > 0.1
    assert (logits(folded.eval()) - reference).abs().max() < 1e-4
    assert folded.lm_head.weight.data_ptr() != folded.model.embed_tokens.weight.data_ptr()
    assert folded.config.eos_token_id == [2, 70]
    assert result["notes"] == []
    assert max(result["rounding"].values()) < 1e-7


def test_longrope_keeps_the_list_that_minicpm4_uses_at_every_length(tmp_path):
    """Llama's own code takes the short list up to the original length, MiniCPM4 the long one throughout."""
    rope = {**LONGROPE, "long_factor": [1.0, 2.0, 5.0, 60.0], "original_max_position_embeddings": 32}
    model = save(tmp_path / "in", rope_parameters=rope, max_position_embeddings=64)
    convert_to_llama(tmp_path / "in", tmp_path / "out")
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    for length in (20, 60):
        assert (logits(folded, length) - logits(model, length)).abs().max() < 1e-4
    rope = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert rope["short_factor"] == rope["long_factor"] == [1.0, 2.0, 5.0, 60.0]


def test_extended_context(tmp_path):
    config = extend_context(MiniCPM4Config(**{**SIZES, "rope_parameters": LONGROPE}), 16384)
    model = MiniCPM4ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "in")
    convert_to_llama(tmp_path / "in", tmp_path / "out")
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(folded) - logits(model)).abs().max() < 1e-4


def test_a_2024_minicpm(tmp_path):
    model = save(
        tmp_path / "in",
        config_class=MiniCPMConfig,
        model_class=MiniCPMForCausalLM,
        scale_emb=12,
        scale_depth=1.4,
        tie_word_embeddings=True,
    )
    convert_to_llama(tmp_path / "in", tmp_path / "out")
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(folded) - logits(model)).abs().max() < 1e-4


def test_old_runtimes_find_rope_under_the_old_keys(tmp_path):
    save(tmp_path / "in", rope_parameters=LONGROPE, dtype=torch.bfloat16)
    convert_to_llama(tmp_path / "in", tmp_path / "out")
    file = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (file["model_type"], file["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert file["rope_theta"] == 10000.0 and file["torch_dtype"] == "bfloat16"
    assert file["rope_scaling"]["original_max_position_embeddings"] == 4096
    assert not set(file) & {"scale_emb", "scale_depth", "dim_model_base", "rope_parameters", "auto_map"}
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["long_factor"] == FACTORS and config.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_is_measured(tmp_path, dtype):
    """The error that is reported is that of the file's weights against the exact products."""
    save(tmp_path / "in", dtype=torch.bfloat16)
    result = convert_to_llama(tmp_path / "in", tmp_path / "out", dtype=dtype)
    before = {}
    for path in (tmp_path / "in").glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    factors = {"model.embed_tokens.weight": 12, "lm_head.weight": 16 / 48}
    factors |= {name: 1.4 / 3**0.5 for name in after if "o_proj" in name or "down_proj" in name}
    kinds = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    errors, sums = {}, {}
    for name, tensor in after.items():
        exact = before[name].double() * factors.get(name, 1)
        if name not in factors:
            assert torch.equal(tensor, before[name].to(tensor.dtype))
            continue
        kind = kinds.get(name, "branch ends")
        errors[kind] = errors.get(kind, 0) + (tensor.double() - exact).square().sum()
        sums[kind] = sums.get(kind, 0) + exact.square().sum()
        worst = ((tensor.double() - exact) / exact.where(exact != 0, 1.0)).abs().max()
        assert dtype == "float16" or worst <= {"bfloat16": 1 / 256, "float32": 2**-24}[dtype]
    assert set(result["rounding"]) == set(errors)
    for kind, value in result["rounding"].items():
        assert value == pytest.approx((errors[kind] / sums[kind]).sqrt().item(), rel=1e-6)
    assert {"bfloat16": 1e-3, "float16": 1e-4, "float32": 0}[dtype] <= max(result["rounding"].values()) < 3e-3
    assert f"{result['rounding']['head']:.2e}" in (tmp_path / "out" / "README.md").read_text()


def test_a_power_of_two_is_exact(tmp_path):
    save(tmp_path / "in", dtype=torch.bfloat16, dim_model_base=12, scale_emb=8)
    result = convert_to_llama(tmp_path / "in", tmp_path / "out")
    assert result["rounding"]["head"] == result["rounding"]["embedding"] == 0 < result["rounding"]["branch ends"]
    assert "none, every product is exact" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_left_out_is_said(tmp_path, capsys):
    model = MiniCPM4ForCausalLM(MiniCPM4Config(**{**SIZES, "sparse_config": {"dense_len": 4096}})).add_mtp_head_()
    model.save_pretrained(tmp_path / "in")
    assert main(["llama", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    notes = (
        "The MTP head is left out: Llama has none.",
        "`sparse_config` is left out: Llama attends densely at every",
    )
    for note in notes:
        assert note in shown and note in (tmp_path / "out" / "README.md").read_text()
    folded = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(folded) - logits(model.eval())).abs().max() < 1e-4


def test_dry_run_writes_nothing(tmp_path, capsys):
    save(tmp_path / "in", tie_word_embeddings=True)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    assert main(["llama", str(tmp_path / "in"), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    convert_to_llama(tmp_path / "in", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert result["num_bytes"] == sum(tensor.nbytes for tensor in written.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*result["files"], "model.safetensors"} and "tokenizer.json" in names


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(folder, capsys, *arguments):
    capsys.readouterr()
    code = main(["llama", str(folder), str(folder.parent / "out"), *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and captured.err.count("\n") == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return captured.err


def test_what_is_no_minicpm_in_full_precision_is_refused(tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder)
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "is quantised, and scales cannot be folded into packed weights" in run(folder, capsys)
    edit(folder, quantization_config=None, model_type="llama", architectures=["LlamaForCausalLM"])
    assert "is a Llama already, with no scale to fold" in run(folder, capsys)


def test_a_classifier_is_refused(tmp_path, capsys):
    save(tmp_path / "in", model_class=MiniCPM4ForSequenceClassification)
    sentence = "is a MiniCPM4ForSequenceClassification, and only a causal language model has a Llama form"
    assert sentence in run(tmp_path / "in", capsys)


def test_a_weight_that_no_llama_has_is_refused(tmp_path, capsys):
    save(tmp_path / "in", attention_bias=True)
    edit(tmp_path / "in", attention_bias=False)
    sentence = "k_proj.bias, which is no weight of this model and has no place in a Llama."
    assert sentence in run(tmp_path / "in", capsys)


def test_float16_that_overflows_is_refused(tmp_path, capsys):
    model = save(tmp_path / "in")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 4] = 6000.0
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    sentence = "model.embed_tokens.weight is too large for float16 once folded; use `--dtype bfloat16` or float32."
    assert sentence in run(tmp_path / "in", capsys, "--dtype", "float16")
