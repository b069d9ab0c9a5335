"""`conversion marlin`: the layout against its definition by thread and nibble, exact round trips, the requirements."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.conversion import output
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.conversion.marlin import convert_marlin
from minicpm4_hf.conversion.marlin_layout import (
    pack_marlin,
    permute_scales,
    unpack_marlin,
    unpermute_scales,
)
from minicpm4_hf.official_layout import to_official
from minicpm4_hf.quantization.int4 import pack_gptq, quantize_int4

QUANTISED = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "static_groups": True,
    "lm_head": False,
    "checkpoint_format": "gptq",
}
H, INNER, HEADS, KEYS, D, VOCAB = 256, 384, 4, 1, 64, 73
LINEARS = {
    "self_attn.q_proj": (HEADS * D, H),
    "self_attn.k_proj": (KEYS * D, H),
    "self_attn.v_proj": (KEYS * D, H),
    "self_attn.o_proj": (H, HEADS * D),
    "mlp.gate_proj": (INNER, H),
    "mlp.up_proj": (INNER, H),
    "mlp.down_proj": (H, INNER),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress lines, however slow the machine."""
    monkeypatch.setattr(output, "PROGRESS_SECONDS", 1e9)


def codes_of(packed_row):
    """The fields of a row of int32, as a list of lists."""
    return [[(value >> (4 * p)) & 15 for p in range(8)] for value in packed_row.tolist()]


def fragment_order():
    """Where each field of 128 int32 comes from in a block of 16 inputs by 64 outputs.

    From the operand B of the tensor core's `mma.m16n8k16`: thread t holds inputs 2 (t % 4) + {0, 1, 8, 9} of output
    t // 4. A tile of 16 outputs is two of them. In an int32 the eight codes of a thread stand such that field p and
    field p + 4 are neighbouring inputs: first the even ones of all, then the odd ones.
    """
    order = []
    for thread in range(32):
        for tile in range(4):
            held = []
            for half in (0, 8):
                for row in (0, 1, 8, 9):
                    held.append((2 * (thread % 4) + row, 16 * tile + thread // 4 + half))
            order.append([held[i] for i in (0, 2, 4, 6)] + [held[i] for i in (1, 3, 5, 7)])
    return order


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 64), (128, 64), (48, 192)])
def test_pack_is_the_fragments_order(inputs, outputs):
    qweight = torch.randint(-(2**31), 2**31, (inputs // 8, outputs)).to(torch.int32)
    packed = pack_marlin(qweight)
    assert packed.dtype == torch.int32 and packed.shape == (inputs // 16, 2 * outputs)
    for a in range(inputs // 16):
        fields = codes_of(packed[a])
        for b in range(outputs // 64):
            for number, places in enumerate(fragment_order()):
                for p, (k, n) in enumerate(places):
                    k, n = 16 * a + k, 64 * b + n
                    assert fields[128 * b + number][p] == (qweight[k // 8, n].item() >> (4 * (k % 8))) & 15
    assert torch.equal(unpack_marlin(packed), qweight)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("outputs", [64, 192])
def test_scales_stand_where_the_threads_look(groups, outputs):
    """Thread t needs the scales of its outputs t // 4 + 8 j, or 2 (t % 4) + {0, 1} + 8 j with one group, in a row."""
    scales = torch.arange(groups * outputs).view(groups, outputs)
    if groups > 1:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + c for i in range(4) for c in (0, 1, 8, 9, 16, 17, 24, 25)]
    expected = [[row[base + i].item() for base in range(0, outputs, len(order)) for i in order] for row in scales]
    assert permute_scales(scales).tolist() == expected
    assert torch.equal(unpermute_scales(permute_scales(scales)), scales)


def test_sizes_that_no_tile_covers():
    for shape in ((3, 64), (2, 32), (2, 96), (0, 64)):
        with pytest.raises(ValueError, match="Marlin's tiles need inputs in multiples of 16 and outputs in multiples"):
            pack_marlin(torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(ValueError, match="got 16 and 32"):
        unpack_marlin(torch.zeros(1, 64, dtype=torch.int32))


def gptq(shape, generator):
    codes, scales = quantize_int4(torch.randn(shape, generator=generator), 128)
    return pack_gptq(codes, scales)


def write(folder, tensors, config, *, shards=1):
    folder.mkdir()
    names = list(tensors)
    random.Random(0).shuffle(names)
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        name = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_model(folder, *, layout="official", shards=1, **quantised):
    """A GPTQ model of two layers."""
    generator = torch.Generator().manual_seed(1)
    config = MiniCPM4Config(
        vocab_size=VOCAB,
        hidden_size=H,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        eos_token_id=2,
    )
    tensors = {}
    for name, tensor in MiniCPM4ForCausalLM(config).to(torch.float16).state_dict().items():
        module = name.removesuffix(".weight")
        if module.partition("layers.")[2][2:] in LINEARS:
            tensors |= {f"{module}.{part}": value for part, value in gptq(tensor.shape, generator).items()}
        else:
            tensors[name] = tensor
    file = config.to_diff_dict() | {"architectures": ["MiniCPM4ForCausalLM"]}
    file = to_official(file) if layout == "official" else file
    write(folder, tensors, file | {"quantization_config": {**QUANTISED, **quantised}}, shards=shards)
    if layout == "official":
        for name in ("configuration_minicpm.py", "modeling_minicpm.py"):
            (folder / name).write_text("# official\n")
    return folder


def write_draft(folder, kind, dtype=torch.float16):
    """A GPTQ draft under the names that CPM.cu's converter reads."""
    generator = torch.Generator().manual_seed(2)
    prefix, width = ("model.layers.0", H) if kind == "eagle" else ("midlayer", 2 * H)
    linears = {f"{prefix}.{name}": shape for name, shape in LINEARS.items()}
    for name in "qkv":
        linears[f"{prefix}.self_attn.{name}_proj"] = (linears[f"{prefix}.self_attn.{name}_proj"][0], width)
    linears["fc"] = (H, 2 * H if kind == "eagle" else 3 * H)
    tensors = {f"{n}.{part}": value for n, s in linears.items() for part, value in gptq(s, generator).items()}

    def random_tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "eagle":
        tensors |= {"input_norm1.weight": random_tensor(H), "input_norm2.weight": random_tensor(H)}
        tensors["model.embed_tokens.weight"] = random_tensor(VOCAB, H)
    else:
        norms.append("hidden_norm")
        tensors |= {"norm.weight": random_tensor(H), "lm_head.weight": random_tensor(32, H)}
        tensors["d2t"] = torch.arange(32)
    tensors |= {f"{prefix}.{name}.weight": random_tensor(H) for name in norms}
    config = {
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "vocab_size": VOCAB,
        "draft_vocab_size": 32,
        "quantization_config": QUANTISED,
    }
    return write(folder, tensors, config)


def load(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_there_and_back(tmp_path, shards):
    folder = write_model(tmp_path / "gptq", shards=shards)
    before = load(folder)
    result = convert_marlin(folder, tmp_path / "marlin")
    packed = load(tmp_path / "marlin")
    assert (result["kind"], result["to"], result["notes"]) == ("model", "marlin", [])
    assert result["files"] == sorted(path.name for path in (tmp_path / "marlin").iterdir())
    names = {name.partition("layers.1.")[2] for name in packed if "layers.1." in name}
    quantised = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert names == norms | {f"{name}.{part}" for name in quantised for part in ("qweight", "scales")}

    layer = "model.layers.1.self_attn"
    joined = {
        part: torch.cat([before[f"{layer}.{name}_proj.{part}"] for name in "qkv"], dim=1)
        for part in ("qweight", "scales")
    }
    assert torch.equal(packed[f"{layer}.qkv_proj.qweight"], pack_marlin(joined["qweight"]))
    assert torch.equal(packed[f"{layer}.qkv_proj.scales"], permute_scales(joined["scales"]))
    assert torch.equal(packed["model.norm.weight"], before["model.norm.weight"])

    config = json.loads((tmp_path / "marlin" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "marlin"
    assert {"configuration_minicpm.py", "modeling_minicpm.py", "tokenizer.json"} <= set(result["files"])
    convert_marlin(tmp_path / "marlin", tmp_path / "back", to="gptq")
    assert_same(load(tmp_path / "back"), before)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_draft_there_and_back(tmp_path, kind):
    folder = write_draft(tmp_path / "gptq", kind)
    before = load(folder)
    assert convert_marlin(folder, tmp_path / "marlin")["kind"] == kind
    packed = load(tmp_path / "marlin")
    prefix = "layers.0" if kind == "eagle" else "midlayer"
    assert packed[f"{prefix}.self_attn.qkv_proj.qweight"].shape[0] == (H if kind == "eagle" else 2 * H) // 16
    assert not any(name.startswith("model.") for name in packed)
    qweight, scales = before["fc.qweight"], before["fc.scales"]
    if kind == "eagle":  # the two halves of the inputs side by side, as the loader cuts them
        first, second = (pack_marlin(half) for half in (qweight[: H // 8], qweight[H // 8 :]))
        assert torch.equal(packed["fc.qweight"], torch.cat((first, second), dim=1))
        first, second = (permute_scales(half) for half in (scales[: H // 128], scales[H // 128 :]))
        assert torch.equal(packed["fc.scales"], torch.cat((first, second), dim=1))
    else:
        assert torch.equal(packed["fc.qweight"], pack_marlin(qweight))
    convert_marlin(tmp_path / "marlin", tmp_path / "back", to="gptq")
    assert_same(load(tmp_path / "back"), before)


def test_a_draft_s_floats_become_float16(tmp_path, capsys):
    """CPM.cu copies a quantised draft's bytes as they are into float16 buffers."""
    folder = write_draft(tmp_path / "gptq", "eagle", torch.bfloat16)
    convert_marlin(folder, tmp_path / "marlin")
    assert {t.dtype for t in load(tmp_path / "marlin").values()} == {torch.int32, torch.float16}
    tensors = load(folder)
    tensors["input_norm2.weight"] = tensors["input_norm2.weight"] * 1e5
    save_file(tensors, folder / "model.safetensors")
    sentence = "input_norm2.weight is too large for float16, in which CPM.cu reads the tensors of a draft."
    assert sentence in run(folder, tmp_path / "other", capsys)


def test_one_group_for_all_inputs(tmp_path, monkeypatch):
    """128 inputs make one group, whose scales have an order of their own."""
    monkeypatch.setitem(globals(), "H", 128)
    monkeypatch.setitem(globals(), "HEADS", 2)
    for name, shape in (("q", (128, 128)), ("k", (64, 128)), ("v", (64, 128)), ("o", (128, 128))):
        monkeypatch.setitem(LINEARS, f"self_attn.{name}_proj", shape)
    folder = write_model(tmp_path / "gptq")
    convert_marlin(folder, tmp_path / "marlin")
    scales = load(folder)["model.layers.0.self_attn.o_proj.scales"]
    assert scales.shape == (1, 128)
    order = [32 * b + 2 * i + c for b in range(4) for i in range(4) for c in (0, 1, 8, 9, 16, 17, 24, 25)]
    packed = load(tmp_path / "marlin")["model.layers.0.self_attn.o_proj.scales"]
    assert torch.equal(packed, scales[:, order])
    convert_marlin(tmp_path / "marlin", tmp_path / "back", to="gptq")
    assert_same(load(tmp_path / "back"), load(folder))


def test_our_own_layout_becomes_the_official_one(tmp_path):
    write_model(tmp_path / "gptq", layout="ours")
    convert_marlin(tmp_path / "gptq", tmp_path / "marlin")
    config = json.loads((tmp_path / "marlin" / "config.json").read_text())
    assert config["model_type"] == "minicpm" and "rope_parameters" not in config
    assert config["quantization_config"]["group_size"] == 128


def test_cpmcu_s_folder_names(tmp_path, capsys):
    write_model(tmp_path / "m")
    out = tmp_path / "packed"
    words = any(word in str(out).lower() for word in ("marlin", "gptq", "quant", "awq", "int4", "int8", "qat"))
    assert main(["marlin", str(tmp_path / "m"), str(out), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert ("CPM.cu tells quantised folders by their names: put 'marlin' into 'packed'." in shown) != words
    assert "would be 8 packed layers" in shown and not out.exists()


def run(folder, out, capsys, *arguments):
    before = sorted(folder.parent.iterdir())
    code = main(["marlin", str(folder), str(out), *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and captured.err.count("\n") == 1
    assert sorted(folder.parent.iterdir()) == before
    return captured.err


REQUIREMENTS = {
    "method": ({"quant_method": "awq"}, "says quant_method 'awq', but the method must be 'gptq'"),
    "bits": ({"bits": 8}, "says bits 8, but the kernel reads 4-bit codes only: it must be 4."),
    "group": ({"group_size": 64}, "says group_size 64, but the kernel's groups are of 128 inputs: it must be 128."),
    "asymmetric": ({"sym": False}, "says sym False, but the kernel has no zero points"),
    "no sym": ({"sym": None}, "says sym None, but the kernel has no zero points"),
    "act-order": ({"desc_act": True}, "says desc_act True, but the kernel reads groups in order"),
    "head": ({"lm_head": True}, "says lm_head True, but the head must be in full precision"),
    "version 2": ({"checkpoint_format": "gptq_v2"}, "says checkpoint_format 'gptq_v2'; what is read is version 1"),
    "text": ({"bits": "4"}, "says bits '4', but"),
}


@pytest.mark.parametrize("case", REQUIREMENTS)
def test_requirements_of_the_config(tmp_path, capsys, case):
    changes, sentence = REQUIREMENTS[case]
    write_model(tmp_path / "gptq", **changes)
    assert sentence in run(tmp_path / "gptq", tmp_path / "marlin", capsys)


Q = "model.layers.1.self_attn.q_proj"


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


TENSORS = {
    "zero points": (
        change(f"{Q}.qzeros", lambda t: t + 1),
        f"{Q} in {{folder}} cannot be packed. The zero points in `qzeros` are not those of symmetric 4-bit weights",
    ),
    "g_idx": (
        change(f"{Q}.g_idx", lambda t: t.flip(0)),
        f"{Q}.g_idx in {{folder}} is out of order; the kernel knows no act-order.",
    ),
    "missing": (lambda tensors: tensors.pop(f"{Q}.scales"), f"lack {Q}.scales; the kernel needs every linear layer."),
    "shape": (change(f"{Q}.scales", lambda t: t[:1].clone()), f"{Q}.scales in "),
    "dtype": (change(f"{Q}.qweight", lambda t: t.long()), "is torch.int64 [32, 256], but must be torch.int32"),
    "bias": (lambda t: t.update({f"{Q}.bias": torch.zeros(H)}), "but CPM.cu's quantised layers have no bias."),
    "full precision": (
        lambda t: t.update({f"{Q}.weight": torch.zeros(H, H)}),
        f"holds {Q}.weight, but every linear layer must be quantised.",
    ),
    "head": (
        lambda t: t.update({"lm_head.qweight": torch.zeros(8, 8, dtype=torch.int32)}),
        "holds lm_head.qweight, but lm_head is no layer that the kernel serves.",
    ),
    "nan": (change(f"{Q}.scales", lambda t: t * float("nan")), "holds NaN or infinity, first at [0, 0]"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_requirements_of_the_tensors(tmp_path, capsys, case):
    damage, sentence = TENSORS[case]
    folder = write_model(tmp_path / "gptq")
    tensors = load(folder)
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert sentence.format(folder=folder) in run(folder, tmp_path / "marlin", capsys)


def test_sizes_that_the_kernel_does_not_cover(tmp_path, capsys):
    folder = write_model(tmp_path / "gptq")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 200}))
    sentence = "model.layers.0.mlp.gate_proj has 200 outputs, but the kernel needs a multiple of 64."
    assert sentence in run(folder, tmp_path / "marlin", capsys)
    path.write_text(json.dumps({**config, "intermediate_size": 192}))
    sentence = "model.layers.0.mlp.down_proj has 192 inputs, but the kernel needs a multiple of 128."
    assert sentence in run(folder, tmp_path / "marlin", capsys)


def test_the_wrong_direction(tmp_path, capsys):
    folder = write_model(tmp_path / "gptq")
    assert "holds no qkv_proj.qweight, so it is not in CPM.cu's" in run(folder, tmp_path / "x", capsys, "--to", "gptq")
    convert_marlin(folder, tmp_path / "marlin")
    error = run(tmp_path / "marlin", tmp_path / "x", capsys)
    assert "so it is in the Marlin layout already; `--to gptq` unpacks it." in error
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": None}))
    assert "has no `quantization_config`, so the weights are not GPTQ's" in run(folder, tmp_path / "x", capsys)
