"""One layer at a time: the runner against the whole model, moments, smoothing, calibration text, hidden states."""

import json

import pytest
import torch
from small_models import build_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from minicpm4_hf.conversion.gptq_calibration import HiddenStates, digest_sequences, read_calibration
from minicpm4_hf.conversion.gptq_layer import INPUT_GROUPS, LINEARS, LayerRunner
from minicpm4_hf.conversion.gptq_smoothing import smooth_layer_
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt


def build_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


MODELS = {"sparse": build_model, "dense": lambda: build_model(sparse=None), "llama": build_llama}


def embed(model, ids):
    return model.model.embed_tokens(ids).detach() * getattr(model.config, "scale_emb", 1)


@pytest.mark.parametrize("name", MODELS)
def test_layers_run_alone_as_in_the_model(name, tokens):
    model, ids = MODELS[name](), tokens(1, 150)
    with torch.no_grad():
        expected = model.model(ids, output_hidden_states=True).hidden_states
    runner, states = LayerRunner(model.config), embed(model, ids)[0]
    for index, layer in enumerate(model.model.layers):
        torch.testing.assert_close(states, expected[index][0], rtol=1e-6, atol=1e-6)
        runner.load(index, layer.state_dict().items())
        states = runner.run(states)
    torch.testing.assert_close(model.model.norm(states), expected[-1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_stands_before_a_sequence(name, tokens):
    model, ids = MODELS[name](), tokens(1, 120)[0]
    runner = LayerRunner(model.config)
    states, prefix_states = embed(model, ids), embed(model, ids)[:3]
    runner.load(0, model.model.layers[0].state_dict().items())
    whole = runner.run(states)
    after, prefix = runner.run_prefix(prefix_states)
    assert prefix[0].shape == (1, model.config.num_key_value_heads, 3, model.config.head_dim)
    torch.testing.assert_close(after, whole[:3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runner.run(states[3:], prefix), whole[3:], rtol=1e-4, atol=1e-5)
    plain = runner.collect(["down"], [states], skip=5)["down"]
    behind = runner.collect(["down"], [states[3:]], skip=5, prefix=prefix)["down"]
    assert plain.count == behind.count == 115
    torch.testing.assert_close(plain.hessian, behind.hessian, rtol=1e-3, atol=1e-3)


def test_collected_moments_are_those_of_the_inputs(tokens):
    model = build_model(sparse=None)
    layer, recorded = model.model.layers[0], {}
    for linears in INPUT_GROUPS.values():
        for linear in linears:
            layer.get_submodule(linear).register_forward_hook(
                lambda module, inputs, output, linear=linear: recorded.setdefault(linear, []).append(inputs[0][0])
            )
    ids = tokens(3, 40)
    sequences = [embed(model, row) for row in ids]
    with torch.no_grad():
        for row in ids:
            model(row[None])
    runner = LayerRunner(model.config)
    runner.load(0, layer.state_dict().items())
    for skip in (0, 4):
        statistics = runner.collect(INPUT_GROUPS, sequences, skip=skip)
        assert list(statistics) == list(INPUT_GROUPS)
        for group, linears in INPUT_GROUPS.items():
            for linear in linears:
                inputs = torch.cat([part[skip:] for part in recorded[linear]])
                assert statistics[group].count == len(inputs) == 3 * (40 - skip)
                hessian = inputs.double().t() @ inputs.double()
                torch.testing.assert_close(statistics[group].hessian.double(), hessian, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(statistics[group].magnitudes, inputs.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_inputs_that_are_not_finite_are_named(tokens):
    model = build_model(sparse=None)
    runner = LayerRunner(model.config)
    runner.load(0, model.model.layers[0].state_dict().items())
    runner.set_weight("mlp.up_proj.weight", torch.full((64, 64), 3e38))
    with pytest.raises(ValueError, match=r"An input of mlp\.down_proj is infinite or NaN\."):
        runner.collect(["down"], [embed(model, tokens(1, 8)[0])], skip=0)


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_smoothing_leaves_the_layer_what_it_was(name, norm_dtype, tokens):
    model = MODELS[name]()
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.data = torch.linspace(0.1, 3.0, 64).to(norm_dtype).float()
    layer.mlp.up_proj.weight.data[7] *= 30.0  # a channel that wants smoothing
    runner = LayerRunner(model.config)
    runner.load(0, layer.state_dict().items())
    sequences = [embed(model, ids) for ids in tokens(2, 120)]
    before = [runner.run(states) for states in sequences]
    weights = {linear: runner.get_weight(f"{linear}.weight").clone() for linear in LINEARS}
    powers = smooth_layer_(runner, sequences, 32, 4, norm_dtype)
    assert set(powers) == set(INPUT_GROUPS) and powers["down"] > 0
    assert any(not torch.equal(weights[linear], runner.get_weight(f"{linear}.weight")) for linear in LINEARS)
    for states, expected in zip(sequences, before):
        error = (runner.run(states) - expected).abs().max()
        assert error < 2e-6 * expected.abs().max()
    norm = runner.get_weight("input_layernorm.weight")
    assert torch.equal(norm, norm.to(norm_dtype).float())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_checkpoint())


def test_calibration_sequences_lie_evenly_in_the_text(tokenizer):
    text = shipped_excerpt().read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    sequences = read_calibration([shipped_excerpt()], tokenizer, num_sequences=5, length=64)
    assert sequences.shape == (5, 64) and sequences.dtype == torch.int64
    assert (sequences[:, 0] == tokenizer.bos_token_id).all()
    num_windows = len(ids) // 63
    for i, sequence in enumerate(sequences.tolist()):
        begin = i * num_windows // 5 * 63
        assert sequence[1:] == ids[begin : begin + 63]
    bare = read_calibration([shipped_excerpt()], tokenizer, num_sequences=2, length=64, with_bos=False)
    assert bare[0].tolist() == ids[:64]
    assert digest_sequences(bare) != digest_sequences(sequences[:2]) and len(digest_sequences(bare)) == 64


def test_no_sequence_spans_two_documents(tokenizer, tmp_path):
    paragraph = "It was a dark night, and nobody was on the road. " * 20
    lines = [json.dumps({"text": f"{i} {paragraph}"}) for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sequences = read_calibration([tmp_path], tokenizer, num_sequences=4, length=150)
    starts = [tokenizer(f"{i} {paragraph}", add_special_tokens=False).input_ids for i in range(4)]
    assert [sequence[1:] for sequence in sequences.tolist()] == [ids[:149] for ids in starts]


def test_calibration_errors(tokenizer, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("It was a dark night.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has \d tokens, which make 0 sequences of 64, but 2 are asked for; give"):
        read_calibration([short], tokenizer, num_sequences=2, length=64)
    with pytest.raises(ValueError, match="`--length` must be greater than 1, got 1"):
        read_calibration([short], tokenizer, num_sequences=2, length=1)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        read_calibration([tmp_path / "none.txt"], tokenizer, num_sequences=2, length=64)


def test_hidden_states_come_back_bit_for_bit(tmp_path):
    states = HiddenStates(tmp_path / "states", (3, 5, 7))
    assert not states.is_complete() and HiddenStates.count_bytes((3, 5, 7)) == 420
    sequences = list(torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)))
    states.write_all(iter(sequences))
    assert states.is_complete() and states.path.stat().st_size == 420
    for i in (2, 0, 1):
        assert torch.equal(states.read(i), sequences[i])
    assert [path.name for path in tmp_path.iterdir()] == ["states"]

    def failing():
        yield sequences[0]
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        states.write_all(failing())
    assert states.is_complete()  # what was there is still there
