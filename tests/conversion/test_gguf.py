"""`python -m minicpm4_hf.conversion gguf`: what the file holds, read back by the gguf package."""

import json
import math

import pytest
import torch

pytest.importorskip("gguf")

from gguf_folders import (
    LINEAR,
    LONG,
    SHORT,
    WIDE,
    change_config,
    change_weights,
    fake_quantise,
    gptq,
    half_scales,
    llama,
    longrope,
    minicpm4,
    pack,
    read_file,
    save,
)
from safetensors.torch import load_file

from minicpm4_hf.conversion import gguf as command
from minicpm4_hf.conversion.gguf import EMBEDDING_TYPES, TYPES, convert_to_gguf
from minicpm4_hf.conversion.gguf_tensors import rotary_order
from minicpm4_hf.conversion.gguf_types import CodedRows, block_columns, decode, encode
from minicpm4_hf.official_layout import to_official
from minicpm4_hf.quantization import dequantize_int4, dequantize_ternary, quantize_int4, quantize_ternary

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def source_name(name):
    """Name in the checkpoint of a tensor of the file."""
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    base, part = name.rsplit(".", 1)
    if base in whole:
        return f"{whole[base]}.{part}"
    _, layer, own = base.split(".")
    return f"model.layers.{layer}.{NAMES[own]}.{part}"


def untwisted(name, tensor, config):
    """Rows of a query or key tensor back in the checkpoint's order: row 2i of a head is row i, 2i + 1 is D / 2 + i."""
    if "attn_q." not in name and "attn_k." not in name:
        return tensor
    pairs = tensor.unflatten(0, (-1, config.head_dim // 2, 2))
    return torch.cat((pairs[:, :, 0], pairs[:, :, 1]), dim=1).flatten(0, 1)


def convert(folder, path, **settings):
    """Without a tokenizer unless told otherwise."""
    return convert_to_gguf(folder, path, **{"tokenizer": False, **settings})


def test_the_order_of_rotary_rows():
    # Two heads of 4 rows: halves (0, 1) and (2, 3) become pairs (0, 2) and (1, 3).
    assert rotary_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_names_rows_and_sizes(tmp_path, tied):
    model = minicpm4(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, rope_parameters=longrope(4096))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    result = convert(folder, tmp_path / "a.gguf", type="f32")
    metadata, tensors = read_file(tmp_path / "a.gguf")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)}
    factors = {name: tensors.pop(name) for name in ("rope_factors_long.weight", "rope_factors_short.weight")}
    assert {source_name(name) for name in tensors} == set(weights)
    for name, (kind, tensor) in tensors.items():
        assert kind == "f32"
        assert torch.equal(untwisted(name, tensor, model.config), weights[source_name(name)]), name
    assert all(torch.equal(tensor, torch.tensor(SHORT)) for _, tensor in factors.values())
    assert result["errors"] == {"embeddings": 0.0, "layers": 0.0}
    assert result["num_bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert metadata["general.architecture"] == result["architecture"] == "minicpm"
    assert metadata["minicpm.block_count"] == 2
    assert metadata["minicpm.context_length"] == 4096
    assert metadata["minicpm.attention.head_count"] == 6
    assert metadata["minicpm.attention.head_count_kv"] == 2
    assert metadata["minicpm.attention.key_length"] == metadata["minicpm.rope.dimension_count"] == 16
    assert metadata["minicpm.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert metadata["minicpm.embedding_scale"] == 12
    assert metadata["minicpm.residual_scale"] == pytest.approx(1.4 / math.sqrt(2))
    assert metadata["minicpm.logit_scale"] == 40 / 16
    assert metadata["minicpm.rope.scaling.type"] == "longrope"
    assert metadata["minicpm.rope.scaling.original_context_length"] == 4096
    assert "minicpm.rope.scaling.attn_factor" not in metadata
    assert metadata["tokenizer.ggml.model"] == "none"
    assert metadata["general.file_type"] == 0


def test_the_longrope_list_that_the_model_uses(tmp_path):
    # The context is twice the original length: the model turns by the long list, whatever llama.cpp's context is.
    save(minicpm4(rope_parameters=longrope(2048)), tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "a.gguf", type="f16")
    metadata, tensors = read_file(tmp_path / "a.gguf")
    for which in ("long", "short"):
        assert torch.equal(tensors[f"rope_factors_{which}.weight"][1], torch.tensor(LONG))
    factor = math.sqrt(1 + math.log(2) / math.log(2048))
    assert metadata["minicpm.rope.scaling.attn_factor"] == pytest.approx(factor)


def test_a_llama_has_its_own_architecture(tmp_path):
    save(llama(rope_parameters=longrope(2048)), tmp_path / "model")
    result = convert(tmp_path / "model", tmp_path / "a.gguf", type="bf16")
    metadata, tensors = read_file(tmp_path / "a.gguf")
    assert result["architecture"] == metadata["general.architecture"] == "llama"
    assert not [key for key in metadata if key.endswith(("embedding_scale", "residual_scale", "logit_scale"))]
    assert torch.equal(tensors["rope_factors_long.weight"][1], torch.tensor(LONG))
    assert torch.equal(tensors["rope_factors_short.weight"][1], torch.tensor(SHORT))


def test_the_official_layout(tmp_path):
    folder = save(minicpm4(rope_parameters=longrope(4096)), tmp_path / "model")
    convert(folder, tmp_path / "a.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(to_official(config)))
    convert(folder, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("layer_type", "embedding_type"), [*((name, None) for name in TYPES), *(("f32", name) for name in EMBEDDING_TYPES)]
)
def test_types(tmp_path, layer_type, embedding_type):
    model = minicpm4(**WIDE)
    save(model, tmp_path / "model")
    result = convert(tmp_path / "model", tmp_path / "a.gguf", type=layer_type, embedding_type=embedding_type)
    embedding_type = embedding_type or TYPES[layer_type]
    assert (result["type"], result["embedding_type"]) == (layer_type, embedding_type)
    _, tensors = read_file(tmp_path / "a.gguf")
    weights = model.state_dict()
    # Largest error of a weight in units of the largest of its block (or of itself, for the float types).
    steps = {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}
    for name, (kind, tensor) in tensors.items():
        expected, found = weights[source_name(name)], untwisted(name, tensor, model.config)
        if tensor.ndim == 1:
            assert kind == "f32" and torch.equal(found, expected)
        elif "blk" not in name or layer_type not in ("tq1_0", "tq2_0"):
            assert kind == (layer_type if "blk" in name else embedding_type)
            size = expected.unflatten(1, (-1, block_columns(kind))).abs().amax(-1, keepdim=True)
            error = (found - expected).unflatten(1, (-1, block_columns(kind))).abs()
            assert (error <= steps[kind] * size + (2**-25 if kind == "f16" else 0)).all(), name
        else:
            assert kind == layer_type
            codes, scales = quantize_ternary(expected)
            assert torch.equal(found, dequantize_ternary(codes, scales.half().float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_type_follows_the_checkpoint(tmp_path, dtype):
    save(minicpm4().to(dtype), tmp_path / "model")
    result = convert(tmp_path / "model", tmp_path / "a.gguf")
    assert (
        result["type"] == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[str(dtype).removeprefix("torch.")]
    )
    assert result["errors"] == {"embeddings": 0.0, "layers": 0.0}


@pytest.mark.parametrize("layer_type", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize("form", ["weights", "packed"])
@pytest.mark.parametrize("group_size", [-1, 256], ids=["row", "256"])
def test_ternary_codes_are_carried_exactly(tmp_path, layer_type, form, group_size):
    model = minicpm4(**WIDE)
    folder = save(model, tmp_path / "model")
    (fake_quantise if form == "weights" else pack)(folder, group_size)
    result = convert(folder, tmp_path / "a.gguf", type=layer_type)
    assert result["layers"] == "exact codes"
    assert result["errors"]["layers"] == 0.0
    _, tensors = read_file(tmp_path / "a.gguf")
    for name, (kind, tensor) in tensors.items():
        if LINEAR.fullmatch(source_name(name)):
            assert kind == layer_type
            expected = dequantize_ternary(*half_scales(model.state_dict()[source_name(name)], group_size))
            assert torch.equal(untwisted(name, tensor, model.config), expected), name


def test_packed_ternary_weights_as_numbers(tmp_path):
    model = minicpm4(**WIDE)
    folder = pack(save(model, tmp_path / "model"), 64)
    assert convert(folder, tmp_path / "a.gguf", type="bf16")["errors"]["layers"] == 0.0
    assert convert(folder, tmp_path / "b.gguf", type="q8_0")["errors"]["layers"] < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_embeddings(tmp_path, bits):
    from minicpm4_hf.quantization.linear import pack_rows

    model = minicpm4(**WIDE)
    folder = pack(save(model, tmp_path / "model"), -1)
    settings = {"quant_method": "bitcpm", "group_size": -1, "embeddings": f"int{bits}", "embeddings_group_size": 64}
    change_config(folder, quantization_config=settings)
    original = {}

    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            original[name] = tensors[name]
            tensors[name], tensors[f"{name}_scale"] = (
                part.contiguous() for part in pack_rows(tensors[name], bits, 64)
            )
        return tensors

    change_weights(folder, change)
    result = convert(folder, tmp_path / "a.gguf", embedding_type="f32" if bits == 8 else "q4_0")
    assert result["errors"] == {"embeddings": 0.0, "layers": 0.0}
    _, tensors = read_file(tmp_path / "a.gguf")
    for name in ("token_embd.weight", "output.weight"):
        weight = original[source_name(name)]
        assert (tensors[name][1] - weight).abs().max() <= weight.abs().max() / (250 if bits == 8 else 14)


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_codes_are_carried_exactly(tmp_path, group_size):
    model = minicpm4(**WIDE)
    folder = gptq(save(model, tmp_path / "model"), group_size)
    result = convert(folder, tmp_path / "a.gguf")
    assert (result["type"], result["embedding_type"], result["layers"]) == ("q4_0", "q8_0", "exact codes")
    assert result["errors"]["layers"] == 0.0
    _, tensors = read_file(tmp_path / "a.gguf")
    for name, (_, tensor) in tensors.items():
        if LINEAR.fullmatch(source_name(name)):
            codes, scales = quantize_int4(model.state_dict()[source_name(name)], group_size)
            expected = dequantize_int4(codes, scales, dtype=torch.float32)
            assert torch.equal(untwisted(name, tensor, model.config), expected), name


def test_gptq_with_act_order(tmp_path):
    model = minicpm4(**WIDE)
    folder = gptq(save(model, tmp_path / "model"), 64, g_idx=lambda index: index.flip(0).contiguous())
    assert convert(folder, tmp_path / "a.gguf", type="f32")["errors"]["layers"] == 0.0
    _, tensors = read_file(tmp_path / "a.gguf")
    tensor = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    codes, _ = quantize_int4(model.state_dict()[f"{name}.weight"], 64)
    expected = codes * tensor[f"{name}.scales"].T.float().flip(1).repeat_interleave(64, dim=1)
    assert torch.equal(tensors["blk.0.ffn_up.weight"][1], expected)
    with pytest.raises(ValueError, match="act-order"):
        convert(folder, tmp_path / "b.gguf")


@pytest.mark.parametrize("name", ["tq1_0", "tq2_0"])
def test_ternary_blocks_of_zeros_and_of_every_code(name):
    codes = torch.zeros(3, 512, dtype=torch.int8)
    codes[1] = torch.arange(512) % 3 - 1
    scales = torch.tensor([[0.5, 0.0], [2.0, 6e-8], [1.0, 65504.0]])
    rows = CodedRows(codes, scales.half().float(), bits=2)
    assert torch.equal(decode(encode(rows, name, "x"), name), rows.values())


def test_blocks_are_what_the_gguf_package_makes():
    from gguf.quants import quantize

    from minicpm4_hf.conversion.gguf_types import ggml_type

    codes, scales = half_scales(torch.randn(5, 512), 256)
    rows = CodedRows(codes, scales, bits=2)
    for name in ("tq1_0", "tq2_0"):
        assert encode(rows, name, "x").tobytes() == quantize(rows.values().numpy(), ggml_type(name)).tobytes()
    # With code -8 in every block, the package chooses the same scale.
    codes = torch.randint(-8, 8, (4, 96), dtype=torch.int8)
    codes[:, ::32] = -8
    rows = CodedRows(codes, torch.rand(4, 3).half().float(), bits=4)
    assert encode(rows, "q4_0", "x").tobytes() == quantize(rows.values().numpy(), ggml_type("q4_0")).tobytes()


def test_long_matrices_come_in_pieces(tmp_path, monkeypatch):
    from minicpm4_hf.conversion import gguf_tensors

    folder = save(minicpm4(**WIDE), tmp_path / "model")
    for name, form in (("plain", lambda folder: folder), ("packed", lambda folder: pack(folder, 256))):
        form(folder)
        convert(folder, tmp_path / f"{name}.gguf", type="q8_0")
        monkeypatch.setattr(gguf_tensors, "_CHUNK_WEIGHTS", 3000)
        convert(folder, tmp_path / f"{name}-pieces.gguf", type="q8_0")
        monkeypatch.undo()
        assert (tmp_path / f"{name}.gguf").read_bytes() == (tmp_path / f"{name}-pieces.gguf").read_bytes()


def test_what_has_no_place_is_left_out_and_said(tmp_path):
    model = minicpm4(tie_word_embeddings=True).add_mtp_head_()
    folder = save(model, tmp_path / "model")
    change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    result = convert(folder, tmp_path / "a.gguf")
    assert "lm_head.weight" in result["left_out"]
    assert len([name for name in result["left_out"] if name.startswith("mtp.")]) > 5
    assert "output.weight" not in read_file(tmp_path / "a.gguf")[1]


def test_card(tmp_path):
    folder = save(minicpm4(), tmp_path / "Tiny")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny one.\n")
    convert(folder, tmp_path / "a.gguf", type="f16")
    card = (tmp_path / "a.gguf.md").read_text()
    assert card.startswith("---\nlicense: mit\nlibrary_name: gguf\n")
    for part in ("Tiny", "f16", "a.gguf", "A tiny one.", "layers, relative to the source"):
        assert part in card


def test_the_names_of_types_are_the_packages(tmp_path):
    for name in {*TYPES, *TYPES.values(), *EMBEDDING_TYPES}:
        assert block_columns(name) in (1, 32, 256)
    assert command.__doc__.count("python -m minicpm4_hf.conversion gguf") == 3
