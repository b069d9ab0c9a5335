"""muP: standard deviations and groups against numbers from the rules, and the models and parameters they must take."""

import math

import pytest
import torch
from torch import nn

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, MiniCPM4Model
from minicpm4_hf.training.mup import (
    initialize_mup_,
    mup_parameter_groups,
    parameter_kinds,
    standard_parametrization,
)

SHAPE = {
    "vocab_size": 512,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def build(width=512, cls=MiniCPM4ForCausalLM, **settings):
    """A model whose width factor is `width / 256`."""
    config = MiniCPM4Config(**{**SHAPE, "hidden_size": width, "num_attention_heads": width // 64, **settings})
    return cls(config)


def names_by_group(model, **settings):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = mup_parameter_groups(model, **{"learning_rate": 0.01, "weight_decay": 0.1, **settings})
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


@pytest.mark.parametrize(("width", "std", "rate"), [(128, 0.1414214, 0.02), (256, 0.1, 0.01), (512, 0.0707107, 0.005)])
def test_numbers_of_the_rules(width, std, rate):
    model = initialize_mup_(build(width), generator=torch.Generator().manual_seed(0))
    groups = {g["name"]: g for g in mup_parameter_groups(model, learning_rate=0.01, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "embedding": (0.01, 0.0),
        "vector": (0.01, 0.0),
        "matrix": (pytest.approx(rate, rel=1e-12), 0.1),
    }
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones(width))
            continue
        expected = 0.1 if "embed" in name or "lm_head" in name else std
        # six standard errors of a standard deviation and of a mean
        assert abs(parameter.std().item() / expected - 1) < 6 / math.sqrt(2 * parameter.numel()) + 1e-3, name
        assert abs(parameter.mean().item()) < 6 * expected / math.sqrt(parameter.numel()), name
        # a normal distribution has this share within one standard deviation, a uniform one 0.577
        share = (parameter.abs() < expected).double().mean().item()
        assert abs(share - 0.6827) < 3 / math.sqrt(parameter.numel()) + 5e-3, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_is_in_one_group(tied):
    model = build(128, tie_word_embeddings=tied)
    groups = names_by_group(model)
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    assert groups["embedding"] == ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    assert len(groups["vector"]) == 2 * 2 + 1 and all("norm" in name for name in groups["vector"])
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(groups["matrix"]) == 2 * len(projections)
    assert {name.split(".")[-2] for name in groups["matrix"]} == set(projections)
    assert list(groups) == ["embedding", "vector", "matrix"]


def test_parameters_that_a_model_may_carry_besides():
    model = build(128, attention_bias=True, mlp_bias=True)
    model.second_token = nn.ModuleDict(  # as multi-token prediction has it: two norms, a projection, a layer
        {
            "norms": nn.ModuleList([nn.RMSNorm(128), nn.RMSNorm(128)]),
            "fc": nn.Linear(256, 128),
            "layer": type(model.model.layers[0])(model.config, 2),
        }
    )
    model.gate = nn.Parameter(torch.zeros(()))
    model.experts = nn.Parameter(torch.empty(3, 128, 16))
    model.positions = nn.Embedding(7, 128)
    kinds = parameter_kinds(model)
    for name, kind in kinds.items():
        ends = name.rpartition(".")[2]
        if name in ("model.embed_tokens.weight", "positions.weight", "lm_head.weight"):
            assert kind == "embedding"
        elif ends in ("bias", "gate") or "norm" in name:
            assert kind == "vector", name
        else:
            assert kind == "matrix", name
    assert kinds["second_token.layer.mlp.up_proj.weight"] == kinds["experts"] == "matrix"
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    initialize_mup_(model)
    assert len(biases) == 2 * 7 + 7 + 1  # the layers', the added layer's, fc's
    assert all(torch.equal(bias, before[name]) for name, bias in biases.items())
    assert model.experts.std().item() == pytest.approx(0.1 * math.sqrt(2), rel=0.05)
    assert sum(map(len, names_by_group(model).values())) == len(kinds)


def test_models_without_a_divided_head():
    assert "lm_head.weight" not in parameter_kinds(build(128, MiniCPM4Model))
    kinds = parameter_kinds(build(128, MiniCPM4ForSequenceClassification, num_labels=3))
    assert kinds["score.weight"] == "matrix" and kinds["model.embed_tokens.weight"] == "embedding"


def test_frozen_parameters_are_left_out():
    model = build(128, tie_word_embeddings=True)
    model.model.embed_tokens.requires_grad_(False)
    groups = names_by_group(model)
    assert list(groups) == ["vector", "matrix"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that learns: all have `requires_grad` False"):
        names_by_group(model)


def test_the_draw_depends_on_the_generator_alone():
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(draws))
        model = initialize_mup_(build(128), generator=torch.Generator().manual_seed(seed))
        draws.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    matrices = [name for name in draws[0] if "norm" not in name]
    assert not any(torch.equal(draws[0][name], draws[2][name]) for name in matrices)


def test_the_padding_row_stays_zero():
    model = initialize_mup_(build(128, pad_token_id=5))
    row_is_zero = (model.model.embed_tokens.weight == 0).all(dim=1)
    assert row_is_zero.nonzero().flatten().tolist() == [5]


def test_init_std_scales_all_draws():
    weights = []
    for init_std in (0.1, 0.02):
        model = initialize_mup_(build(128), init_std=init_std, generator=torch.Generator().manual_seed(0))
        weights.append(dict(model.named_parameters()))
    for name, weight in weights[0].items():
        factor = 1.0 if "norm" in name else 0.2
        torch.testing.assert_close(weights[1][name], weight * factor)


def test_standard_parametrization():
    config = build(512).config
    standard = standard_parametrization(config)
    assert config.dim_model_base == 256 and config.logits_scaling == 2  # the argument is as it was
    assert standard.logits_scaling == 1
    differing = {key for key, value in config.to_dict().items() if standard.to_dict()[key] != value}
    assert differing == {"dim_model_base"}
    model = initialize_mup_(MiniCPM4ForCausalLM(standard))
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.01)
    groups = mup_parameter_groups(model, learning_rate=0.01, weight_decay=0.1)
    assert {group["name"]: group["lr"] for group in groups} == dict.fromkeys(("embedding", "vector", "matrix"), 0.01)


def test_parametrisations_agree_at_the_base_width():
    config = build(256).config
    assert standard_parametrization(config).to_dict() == config.to_dict()


def test_the_logits_of_a_new_model_fall_with_the_width():
    """A sum of `width` terms of deviation 0.1 over `m`, of a normalised hidden state: 0.1 * 256 / sqrt(width)."""
    ids = torch.randint(3, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    for width in (128, 512):
        model = initialize_mup_(build(width, tie_word_embeddings=False), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            size = model(ids).logits.square().mean().sqrt().item()
        assert size == pytest.approx(25.6 / math.sqrt(width), rel=0.1)


def test_an_untied_head_learns_alike_at_any_width():
    """A step of the head alone changes the logits alike; with a matrix's rate it would be a quarter at four times."""
    ids = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    changes = []
    for width in (256, 1024):
        model = build(width, num_hidden_layers=1, tie_word_embeddings=False)
        initialize_mup_(model, generator=torch.Generator().manual_seed(0))
        model.model.requires_grad_(False)
        optimizer = torch.optim.AdamW(mup_parameter_groups(model, learning_rate=1e-3, weight_decay=0.0))
        before = model(ids, labels=ids)
        before.loss.backward()
        optimizer.step()
        with torch.no_grad():
            changes.append((model(ids).logits - before.logits).square().mean().sqrt().item())
    assert changes[1] / changes[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be a number greater than 0, got 0.0."),
        ({"learning_rate": math.inf}, "`learning_rate` must be a number greater than 0, got inf."),
        ({"weight_decay": -0.1}, "`weight_decay` must be a number of at least 0, got -0.1."),
        ({"weight_decay": math.nan}, "`weight_decay` must be a number of at least 0, got nan."),
    ],
)
def test_wrong_numbers(settings, sentence):
    with pytest.raises(ValueError) as error:
        names_by_group(build(128), **settings)
    assert str(error.value) == sentence


def test_wrong_initialisation():
    for init_std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`init_std` must be a number greater than 0"):
            initialize_mup_(build(128), init_std=init_std)
    with torch.device("meta"):
        model = build(128)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is on the meta device"):
        initialize_mup_(model)


def test_a_wrapped_model_is_refused():
    for function in (initialize_mup_, lambda model: mup_parameter_groups(model, learning_rate=1.0, weight_decay=0.0)):
        with pytest.raises(ValueError, match="`dim_model_base`, got Sequential; give the MiniCPM4 model itself"):
            function(nn.Sequential(build(128)))
