"""`conversion draft`: names of each runtime, exact round trips, and what is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.conversion import output
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.conversion.draft import convert_draft
from minicpm4_hf.conversion.draft_names import Sizes, detect
from minicpm4_hf.conversion.draft_reader import open_draft
from minicpm4_hf.conversion.frequency_files import read_frequencies
from minicpm4_hf.conversion.marlin import convert_marlin
from minicpm4_hf.quantization.int4 import pack_gptq, quantize_int4

H, INNER, HEADS, KEYS, D, VOCAB, DRAFT_VOCAB = 64, 96, 4, 2, 16, 50, 12
CONFIG = {
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "vocab_size": VOCAB,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "mup_denominator": 3,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# A layer's tensors under transformers' names, and their shapes for EAGLE; in EAGLE-3 q, k, v take twice the inputs.
LAYER = {
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
    "self_attn.q_proj.weight": (HEADS * D, H),
    "self_attn.k_proj.weight": (KEYS * D, H),
    "self_attn.v_proj.weight": (KEYS * D, H),
    "self_attn.o_proj.weight": (H, HEADS * D),
    "mlp.gate_proj.weight": (INNER, H),
    "mlp.up_proj.weight": (INNER, H),
    "mlp.down_proj.weight": (H, INNER),
}
JOINED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
# What each runtime's loader names, written out: CPM.cu `minicpm4_eagle.cuh`, vLLM `minicpm_eagle.py`.
EAGLE_CPMCU = {
    "fc.weight": (H, 2 * H),
    "input_norm1.weight": (H,),
    "input_norm2.weight": (H,),
    "embed_tokens.weight": (VOCAB, H),
    **{f"layers.0.{name}": shape for name, shape in LAYER.items()},
}
EAGLE_VLLM = {
    "model.fc.weight": (H, 2 * H),
    "model.input_norm1.weight": (H,),
    "model.input_norm2.weight": (H,),
    "model.embed_tokens.weight": (VOCAB, H),
    "model.norm.weight": (H,),
    "lm_head.weight": (VOCAB, H),
    **{f"model.eagle_layers.0.{name}": shape for name, shape in LAYER.items()},
}
EAGLE_OURS = {
    "fc.weight": (H, 2 * H),
    "embed_norm.weight": (H,),
    "hidden_norm.weight": (H,),
    "embed_tokens.weight": (VOCAB, H),
    **{f"layers.0.{name}": shape for name, shape in LAYER.items()},
}
EAGLE3_THEIRS = {
    "fc.weight": (H, 3 * H),
    "midlayer.hidden_norm.weight": (H,),
    "norm.weight": (H,),
    "lm_head.weight": (DRAFT_VOCAB, H),
    **{f"midlayer.{name}": (shape[0], 2 * H) if name in JOINED else shape for name, shape in LAYER.items()},
}
EAGLE3_OURS = {name.replace("midlayer.", "layers.0."): shape for name, shape in EAGLE3_THEIRS.items()}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No progress lines, however slow the machine."""
    monkeypatch.setattr(output, "PROGRESS_SECONDS", 1e9)


def random_tensors(shapes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def draft_ids(seed=0):
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:DRAFT_VOCAB].sort().values


def write(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def write_eagle3(folder, *, dtype=torch.int64, t2d=True, **config):
    ids = draft_ids()
    tensors = random_tensors(EAGLE3_THEIRS) | {"d2t": (ids - torch.arange(DRAFT_VOCAB)).to(dtype)}
    if t2d:
        tensors["t2d"] = torch.isin(torch.arange(VOCAB), ids)
    architecture = {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"}
    return write(folder, tensors, **architecture, draft_vocab_size=DRAFT_VOCAB, **config)


def write_base(folder, **settings):
    torch.manual_seed(3)
    config = MiniCPM4Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": H,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "dim_model_base": 16,
            "eos_token_id": 2,
            **settings,
        }
    )
    model = MiniCPM4ForCausalLM(config)
    model.save_pretrained(folder)
    return model.state_dict()


def load(folder):
    return load_file(folder / "model.safetensors")


def assert_same(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_eagle_names(tmp_path):
    source = write(tmp_path / "cpmcu", random_tensors(EAGLE_CPMCU))
    result = convert_draft(source, tmp_path / "ours", to="ours")
    assert (result["kind"], result["source_format"], result["notes"]) == ("eagle", "cpmcu", [])
    assert {name: tuple(t.shape) for name, t in load(tmp_path / "ours").items()} == EAGLE_OURS
    assert torch.equal(load(tmp_path / "ours")["embed_norm.weight"], load(source)["input_norm1.weight"])
    assert config_of(tmp_path / "ours") == {**CONFIG, "draft_type": "eagle"}
    assert result["files"] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize("way", ["ours", "vllm"])
def test_eagle_from_cpmcu_and_back(tmp_path, way):
    source = write(tmp_path / "cpmcu", random_tensors(EAGLE_CPMCU))
    write_base(tmp_path / "base")
    convert_draft(source, tmp_path / "there", to=way, base=tmp_path / "base")
    convert_draft(tmp_path / "there", tmp_path / "back", to="cpmcu")
    assert_same(load(tmp_path / "back"), load(source))
    assert config_of(tmp_path / "back") == CONFIG


def test_eagle_from_vllm_and_back(tmp_path):
    config = {"architectures": ["EagleMiniCPMForCausalLM"]}
    source = write(tmp_path / "vllm", random_tensors(EAGLE_VLLM), **config)
    convert_draft(source, tmp_path / "ours", to="ours")
    assert set(load(tmp_path / "ours")) == {*EAGLE_OURS, "norm.weight", "lm_head.weight"}
    assert convert_draft(tmp_path / "ours", tmp_path / "back", to="vllm")["source_format"] == "ours"
    assert_same(load(tmp_path / "back"), load(source))
    assert config_of(tmp_path / "back") == config_of(source)


def test_what_vllm_must_find_comes_from_the_target(tmp_path):
    shapes = {name: shape for name, shape in EAGLE_CPMCU.items() if name != "embed_tokens.weight"}
    source = write(tmp_path / "cpmcu", random_tensors(shapes), mup_denominator=None)
    base = write_base(tmp_path / "base")
    result = convert_draft(source, tmp_path / "vllm", to="vllm", base=tmp_path / "base")
    tensors = load(tmp_path / "vllm")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == EAGLE_VLLM
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(tensors[name], base[name])
    assert result["notes"] == ["Copied from the target: embed_tokens.weight, norm.weight, lm_head.weight."]
    config = config_of(tmp_path / "vllm")
    assert config["architectures"] == ["EagleMiniCPMForCausalLM"]
    assert config["mup_denominator"] == 3  # the target's layers: vLLM would take the draft's own number, 1


def test_a_tied_target(tmp_path):
    source = write(tmp_path / "cpmcu", random_tensors(EAGLE_CPMCU))
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    convert_draft(source, tmp_path / "vllm", to="vllm", base=tmp_path / "base")
    assert torch.equal(load(tmp_path / "vllm")["lm_head.weight"], base["model.embed_tokens.weight"])


def test_cpmcu_takes_head_and_norm_from_the_target(tmp_path):
    source = write(tmp_path / "vllm", random_tensors(EAGLE_VLLM))
    result = convert_draft(source, tmp_path / "cpmcu", to="cpmcu")
    assert set(load(tmp_path / "cpmcu")) == set(EAGLE_CPMCU)
    assert sorted(result["notes"]) == [
        "lm_head.weight is left out: CPM.cu uses the target's.",
        "norm.weight is left out: CPM.cu uses the target's.",
    ]
    assert "lm_head.weight is left out" in (tmp_path / "cpmcu" / "README.md").read_text()


def test_a_head_under_cpmcu_s_names_is_kept(tmp_path):
    """As a trainer may save it, though CPM.cu's own loader knows no head in a draft."""
    tensors = random_tensors({**EAGLE_CPMCU, "lm_head.weight": (VOCAB, H), "norm.weight": (H,)})
    convert_draft(write(tmp_path / "in", tensors), tmp_path / "vllm", to="vllm")
    assert {name: tuple(t.shape) for name, t in load(tmp_path / "vllm").items()} == EAGLE_VLLM


def test_a_plain_eagle_without_norms(tmp_path):
    """EAGLE's own drafts have a bias in `fc`, and neither input norms nor the layer's first norm."""
    shapes = {name: s for name, s in EAGLE_CPMCU.items() if "input_" not in name} | {"fc.bias": (H,)}
    source = write(tmp_path / "in", random_tensors(shapes))
    convert_draft(source, tmp_path / "ours", to="ours")
    assert set(load(tmp_path / "ours")) == set(shapes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_eagle3_there_and_back(tmp_path, dtype):
    source = write_eagle3(tmp_path / "in", dtype=dtype)
    assert convert_draft(source, tmp_path / "ours", to="ours")["kind"] == "eagle3"
    tensors = load(tmp_path / "ours")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == EAGLE3_OURS | {
        "draft_token_ids": (DRAFT_VOCAB,),
        "t2d": (VOCAB,),
    }
    assert torch.equal(tensors["draft_token_ids"], draft_ids().to(dtype))
    for to in ("cpmcu", "vllm"):
        assert convert_draft(tmp_path / "ours", tmp_path / to, to=to)["source_format"] == "ours"
        assert_same(load(tmp_path / to), load(source))
        assert config_of(tmp_path / to) == config_of(source)


def test_eagle3_as_vllm_s_trainer_names_it(tmp_path):
    source = write_eagle3(tmp_path / "in", t2d=False)
    tensors = {f"model.{name.replace('midlayer.', 'layers.0.')}": t for name, t in load(source).items()}
    other = write(tmp_path / "other", tensors, draft_vocab_size=DRAFT_VOCAB)
    convert_draft(other, tmp_path / "out", to="cpmcu")
    assert_same(load(tmp_path / "out"), load(source))


def test_eagle3_with_the_whole_vocabulary(tmp_path):
    tensors = random_tensors(EAGLE3_THEIRS)
    del tensors["lm_head.weight"]
    write(tmp_path / "in", tensors)
    convert_draft(tmp_path / "in", tmp_path / "ours", to="ours")
    convert_draft(tmp_path / "ours", tmp_path / "back", to="vllm")
    assert_same(load(tmp_path / "back"), tensors)


def test_frequency_files_go_along(tmp_path):
    ids = draft_ids(1).flip(0)
    source = write(tmp_path / "cpmcu", random_tensors(EAGLE_CPMCU))
    torch.save(ids.tolist(), source / f"freq_{DRAFT_VOCAB}.pt")
    torch.save(ids.tolist()[:5], source / "freq_5.pt")
    result = convert_draft(source, tmp_path / "ours", to="ours")
    assert {"freq_12.safetensors", "freq_5.safetensors"} <= set(result["files"])
    assert torch.equal(read_frequencies(tmp_path / "ours" / "freq_12.safetensors"), ids.int())
    result = convert_draft(tmp_path / "ours", tmp_path / "back", to="cpmcu")
    # CPM.cu refuses a folder with two .safetensors files.
    assert [name for name in result["files"] if "safetensors" in name] == ["model.safetensors"]
    assert torch.load(tmp_path / "back" / "freq_5.pt", weights_only=True) == ids.tolist()[:5]
    write_base(tmp_path / "base")
    result = convert_draft(source, tmp_path / "vllm", to="vllm", base=tmp_path / "base")
    assert "FR-Spec's frequency files are left out: vLLM drafts over the whole vocabulary." in result["notes"]
    assert not list((tmp_path / "vllm").glob("freq_*"))


def test_token_id_remap(tmp_path):
    tensors = random_tensors(EAGLE_CPMCU) | {"token_id_remap": draft_ids().int()}
    source = write(tmp_path / "cpmcu", tensors)
    convert_draft(source, tmp_path / "ours", to="ours")
    assert torch.equal(load(tmp_path / "ours")["draft_token_ids"], draft_ids().int())
    convert_draft(tmp_path / "ours", tmp_path / "back", to="cpmcu")
    assert_same(load(tmp_path / "back"), tensors)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_quantised_drafts(tmp_path, capsys, monkeypatch, kind):
    """Renamed for ours and for CPM.cu's converter; packed ones are sent to `marlin`, and vLLM takes none."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 1}
    config = {**CONFIG, **sizes, "draft_vocab_size": DRAFT_VOCAB}
    prefix, width = ("model.layers.0", 256) if kind == "eagle" else ("midlayer", 512)
    linears = {f"{prefix}.self_attn.{n}_proj": (o, i) for n, o, i in (("q", 256, width), ("k", 64, width))}
    linears |= {f"{prefix}.self_attn.v_proj": (64, width), f"{prefix}.self_attn.o_proj": (256, 256)}
    linears |= {f"{prefix}.mlp.{name}_proj": (256, 256) for name in ("gate", "up", "down")}
    linears["fc"] = (256, 512 if kind == "eagle" else 768)
    tensors = {}
    for name, shape in linears.items():
        parts = pack_gptq(*quantize_int4(torch.randn(shape, generator=torch.Generator().manual_seed(5)), 128))
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    norms = {f"{prefix}.{name}_layernorm.weight": (256,) for name in ("input", "post_attention")}
    if kind == "eagle":
        norms |= {"input_norm1.weight": (256,), "input_norm2.weight": (256,)}
        norms["model.embed_tokens.weight"] = (VOCAB, 256)
    else:
        norms |= {f"{prefix}.hidden_norm.weight": (256,), "norm.weight": (256,), "lm_head.weight": (DRAFT_VOCAB, 256)}
        tensors["d2t"] = torch.arange(DRAFT_VOCAB)
    tensors |= random_tensors(norms, torch.float16)
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    source = write(tmp_path / "gptq", tensors, **config, quantization_config=quantised)
    convert_draft(source, tmp_path / "ours", to="ours")
    assert "layers.0.self_attn.q_proj.g_idx" in load(tmp_path / "ours")
    convert_draft(tmp_path / "ours", tmp_path / "back", to="cpmcu")
    assert_same(load(tmp_path / "back"), tensors)
    convert_marlin(tmp_path / "back", tmp_path / "marlin")
    for folder, to, sentence in (
        (source, "vllm", "is quantised, and vLLM loads such a draft in full precision only."),
        (tmp_path / "marlin", "ours", "is packed for CPM.cu's Marlin kernel; unpack the draft first, with `marlin"),
    ):
        assert main(["draft", str(folder), str(tmp_path / "no"), "--to", to]) == 2
        assert sentence in capsys.readouterr().err


def run(folder, capsys, *arguments):
    before = sorted(folder.parent.iterdir())
    code = main(["draft", str(folder), str(folder.parent / "out"), *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "") and captured.err.count("\n") == 1
    assert sorted(folder.parent.iterdir()) == before
    return captured.err


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


BROKEN = {
    "unknown": (
        lambda t: t.update({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
        "holds layers.0.self_attn.rotary_emb.inv_freq, which is no tensor of an EAGLE draft with 1 layer; it would be",
    ),
    "second layer": (lambda t: t.update({"layers.1.mlp.up_proj.weight": torch.ones(1)}), "holds layers.1.mlp.up_proj"),
    "missing": (
        without("input_norm2.weight", "layers.0.mlp.up_proj.weight"),
        "lack hidden_norm.weight (input_norm2.weight for CPM.cu; 2 tensors missing in all)",
    ),
    "shape": (
        lambda t: t.update({"fc.weight": torch.ones(H, H)}),
        "fc.weight in {folder}/model.safetensors has shape [64, 64], but config.json asks for [64, 128]",
    ),
    "type": (lambda t: t.update({"fc.weight": t["fc.weight"].char()}), "is of type torch.int8, which is not"),
    "no fc": (without("fc.weight"), "cannot be read as a draft. There is no `fc` among the tensors"),
    "twice": (
        lambda t: t.update({"model.fc.weight": t["fc.weight"].clone()}),
        "holds model.fc.weight and fc.weight, which are the same tensor of a draft.",
    ),
    "token ids": (
        lambda t: t.update({"token_id_remap": torch.tensor([3, 3])}),
        "token_id_remap in {folder} must name different tokens of the vocabulary, 0 to 49.",
    ),
    "nan": (lambda t: t["fc.weight"].fill_(float("nan")), "holds NaN or infinity, first at [0, 0]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_eagle_draft(tmp_path, capsys, case):
    damage, sentence = BROKEN[case]
    tensors = random_tensors(EAGLE_CPMCU)
    damage(tensors)
    folder = write(tmp_path / "in", tensors)
    assert sentence.format(folder=folder) in run(folder, capsys, "--to", "ours")


def test_what_is_no_eagle3_draft(tmp_path, capsys):
    folder = write_eagle3(tmp_path / "in")
    tensors = load(folder)
    save_file(tensors | {"d2t": tensors["d2t"] + VOCAB}, folder / "model.safetensors")
    assert "d2t in" in (error := run(folder, capsys, "--to", "ours")) and "must name different tokens" in error
    save_file(tensors | {"t2d": ~tensors["t2d"]}, folder / "model.safetensors")
    assert "do not name the same tokens." in run(folder, capsys, "--to", "ours")
    del tensors["d2t"]
    save_file(tensors, folder / "model.safetensors")
    assert "lack draft_token_ids (d2t for CPM.cu; 1 tensors missing" in run(folder, capsys, "--to", "ours")


def test_what_vllm_cannot_load(tmp_path, capsys):
    tensors = random_tensors(EAGLE_CPMCU)
    folder = write(tmp_path / "in", tensors)
    sentence = "lacks norm.weight, which vLLM's EAGLE for MiniCPM must find in the draft; name the target model"
    assert sentence in run(folder, capsys, "--to", "vllm")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "mup_denominator": None}))
    assert "gives no `mup_denominator`, by which vLLM scales" in run(folder, capsys, "--to", "vllm")
    save_file(tensors | {"fc.bias": torch.ones(H)}, folder / "model.safetensors")
    assert "has fc.bias, and vLLM's EAGLE for MiniCPM has no bias there." in run(folder, capsys, "--to", "vllm")
    for name, ours in (("layers.0.input_layernorm.weight",) * 2, ("input_norm1.weight", "embed_norm.weight")):
        fewer = {key: tensor for key, tensor in tensors.items() if key not in (name, "input_norm2.weight")}
        if name.startswith("layers"):
            fewer["input_norm2.weight"] = tensors["input_norm2.weight"]
        save_file(fewer, folder / "model.safetensors")
        assert f"lacks {ours}, which vLLM's EAGLE for MiniCPM always" in run(folder, capsys, "--to", "vllm")


def test_another_model_s_draft(tmp_path, capsys):
    write_base(tmp_path / "base", scale_depth=2.0)
    capsys.readouterr()  # the progress of saving
    folder = write(tmp_path / "in", random_tensors(EAGLE_CPMCU))
    error = run(folder, capsys, "--to", "vllm", "--base", tmp_path / "base")
    assert "has `scale_depth` 1.4, but the target" in error and "this draft belongs to another model." in error


def test_wrong_configs_and_frequency_files(tmp_path, capsys):
    folder = write(tmp_path / "in", random_tensors(EAGLE_CPMCU))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": "64"}))
    assert "must give `hidden_size` as a whole number above 0, got '64'." in run(folder, capsys, "--to", "ours")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save([1, 2, VOCAB], folder / "freq_3.pt")
    assert "freq_3 in" in (error := run(folder, capsys, "--to", "ours")) and "0 to 49" in error
    torch.save([1, 2, 3], folder / "freq_3.pt")
    save_file({"token_ids": torch.tensor([1, 2, 4])}, folder / "freq_3.safetensors")
    assert "freq_3.pt and freq_3.safetensors hold different ids" in run(folder, capsys, "--to", "ours")
    with pytest.raises(ValueError, match="`to` must be one of cpmcu, vllm, ours, got 'sglang'"):
        convert_draft(folder, tmp_path / "out", to="sglang")


def test_dry_run(tmp_path, capsys):
    folder = write(tmp_path / "in", random_tensors(EAGLE_CPMCU))
    torch.save([1, 2, 3], folder / "freq_3.pt")
    assert main(["draft", str(folder), str(tmp_path / "out"), "--to", "ours", "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert result["files"] == ["README.md", "config.json", "freq_3.safetensors"]
    assert result["num_bytes"] == sum(tensor.nbytes for tensor in load(folder).values())


def test_detect_by_names():
    assert detect(EAGLE_CPMCU) == ("eagle", "cpmcu")
    assert detect(EAGLE_VLLM) == ("eagle", "vllm")
    assert detect(EAGLE_OURS) == ("eagle", "ours")
    assert detect([*EAGLE3_THEIRS, "d2t"]) == ("eagle3", "cpmcu")
    assert detect([*EAGLE3_OURS, "draft_token_ids"]) == ("eagle3", "ours")
    assert detect([*EAGLE3_OURS, "d2t"]) == ("eagle3", "cpmcu")


def test_sizes_that_follow_from_others(tmp_path):
    sizes = Sizes.read({**CONFIG, "num_key_value_heads": None}, "config.json")
    assert (sizes.num_key_value_heads, sizes.head_dim, sizes.draft_vocab_size) == (HEADS, D, VOCAB)
    assert open_draft(write_eagle3(tmp_path / "in")).sizes.draft_vocab_size == DRAFT_VOCAB
