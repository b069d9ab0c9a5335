"""`BitCPMConfig` through transformers: quantising as a model is loaded, saving, loading again, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from minicpm4_hf import BitCPMConfig, MiniCPM4ForCausalLM
from minicpm4_hf.quantization import PackedEmbedding, PackedHead, TernaryLinear, TiedHead
from minicpm4_hf.quantization.bitcpm import BitCPMQuantizer, replace_modules_
from minicpm4_hf.quantization.linear import Int4Linear

EMBEDDINGS = [None, "int8", "int4"]


def settings(**more):
    return BitCPMConfig(**{"group_size": 32, "embeddings_group_size": 32, **more})


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path_factory):
    """A folder of latent float32 weights."""
    folder = tmp_path_factory.mktemp("bitcpm") / "source"
    build_model(group=2, tie_word_embeddings=request.param).save_pretrained(folder)
    return folder


def ternary(weight, group_size):
    """The definition, in plain loops over groups."""
    groups = weight.view(len(weight), -1, group_size)
    scale = groups.abs().mean(-1, keepdim=True)
    return ((groups / scale).round().clamp(-1, 1) * scale).view_as(weight)


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (weight / scale).round() * scale


def int4(weight):
    groups = weight.view(len(weight), -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) * 2 / 15).clamp(min=2**-24).half().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def reference(folder, embeddings):
    """The full-precision model with weights rounded by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = {None: lambda weight: weight, "int8": int8, "int4": int4}[embeddings]
    for name, parameter in model.named_parameters():
        if "_proj." in name:
            parameter.data = ternary(parameter.data, 32)
        elif parameter.ndim == 2:
            parameter.data = rounded(parameter.data)
    return model.eval()


@torch.no_grad()
def logits(model):
    ids = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    return model(ids).logits


@pytest.mark.parametrize("embeddings", EMBEDDINGS)
def test_quantised_at_load_saved_and_loaded(source, tmp_path, embeddings):
    config = settings(embeddings=embeddings)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config).eval()
    layers = [module for module in model.modules() if isinstance(module, TernaryLinear)]
    assert len(layers) == 14 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    tied = model.config.tie_word_embeddings
    if embeddings is not None:
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        assert isinstance(model.get_output_embeddings(), TiedHead if tied else PackedHead)
    first = logits(model)
    torch.testing.assert_close(first, logits(reference(source, embeddings)), rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (64, 2)
    assert ("lm_head.weight" in tensors) == (not tied)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert again.config.quantization_config.group_size == 32
    assert torch.equal(logits(again), first)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name

    again.save_pretrained(tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "model.safetensors")
    assert twice.keys() == tensors.keys() and all(torch.equal(twice[name], tensors[name]) for name in tensors)


def test_dequantised_it_is_the_rounded_model(source):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings(embeddings="int8")).eval()
    packed = logits(model)
    full = model.dequantize()
    assert not any(isinstance(module, (TernaryLinear, PackedEmbedding)) for module in full.modules())
    torch.testing.assert_close(logits(full), packed, rtol=1e-4, atol=1e-4)


def test_latent_weights_are_rounded_in_float32_whatever_the_dtype(source):
    config = settings(embeddings="int8")
    models = [
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    states = [model.state_dict() for model in models]
    assert states[1]["model.norm.weight"].dtype == torch.bfloat16
    packed = [name for name in states[0] if name.endswith("_scale") or states[0][name].dtype != torch.float32]
    assert len(packed) >= 29
    for name in packed:
        assert states[0][name].dtype == states[1][name].dtype
        assert torch.equal(states[0][name], states[1][name]), name


def test_generation_and_casts(source):
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings(), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > 3
    layer = model.model.layers[0].mlp.up_proj.to(torch.bfloat16)
    assert layer.weight.dtype == torch.uint8 and layer.weight_scale.dtype == torch.float32


def test_layers_named_are_left_alone(source):
    config = settings(modules_to_not_convert=["o_proj"])
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    kinds = {name.split(".")[-1]: type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds.pop("o_proj") is torch.nn.Linear and set(kinds.values()) == {TernaryLinear}


def test_llama_is_packed_too(tmp_path):
    """BitCPM-CANN 1B and 3B are Llamas."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", quantization_config=settings()).eval()
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert type(again.model.layers[0].mlp.down_proj) is TernaryLinear
    assert torch.equal(logits(again), logits(model))


def test_registration_and_config(tmp_path):
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitcpm"] is BitCPMConfig
    assert AUTO_QUANTIZER_MAPPING["bitcpm"] is BitCPMQuantizer
    config = settings(embeddings="int4", scale_dtype="bfloat16")
    again = BitCPMConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again.embedding_bits == 4 and again.bits == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group_size": 48}, r"`group_size` must be one of -1, 256, 128, 64, 32 .*, got 48"),
        ({"embeddings": "int2"}, "`embeddings` must be None, 'int8' or 'int4', got 'int2'"),
        ({"embeddings_group_size": 0}, "`embeddings_group_size` must be -1 or above 0, got 0"),
        ({"scale_dtype": "int8"}, "`scale_dtype` must be one of float32, bfloat16, float16, got 'int8'"),
        ({"bits": 4}, "is of method 'bitcpm' and 2 bits"),
        ({"quant_method": "gptq"}, "is of method 'bitcpm' and 2 bits"),
        ({"zero_point": True}, "has no setting zero_point"),
    ],
)
def test_settings_that_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BitCPMConfig(**wrong)


def test_sizes_that_do_not_fit(tmp_path):
    build_model(group=2, intermediate_size=48).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj cannot be packed: .* divide the 48 inputs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "odd", quantization_config=settings())


def drop(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]


def narrow(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:, 1:].contiguous()


def as_numbers(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"has no model\.layers\.1\.mlp\.up_proj\.weight_scale, which its quantization_config asks for"),
        (narrow, r"is U8 \[64, 15\] in the checkpoint, but its config.json asks for torch.uint8 \[64, 16\]"),
        (as_numbers, "is F32 .* but its config.json asks for torch.uint8"),
    ],
)
def test_packed_files_that_do_not_fit(source, tmp_path, change, message):
    folder = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(source, quantization_config=settings()).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_modules():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="inputs must be a multiple of 4, got 6"):
        TernaryLinear(6, 8)
    with pytest.raises(ValueError, match=r"must be -1 .* or divide the 64 inputs, got 48"):
        TernaryLinear(64, 8, group_size=48)
    with pytest.raises(ValueError, match="outputs that are a multiple of 8, got 9"):
        Int4Linear(64, 9, group_size=32)
    with pytest.raises(ValueError, match="must be 4 or 8, got 2"):
        PackedEmbedding(8, 64, bits=2)
    with torch.device("meta"):
        model = MiniCPM4ForCausalLM(AutoConfig.for_model("minicpm4", num_hidden_layers=0, hidden_size=64))
    with pytest.raises(ValueError, match="has no linear layers in `layers` to pack as ternary"):
        replace_modules_(model, BitCPMConfig())
