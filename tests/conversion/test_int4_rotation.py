"""Hadamard matrices, and that a rotated model computes what the model did."""

import pytest
import torch
from safetensors.torch import load_file
from small_models import build_model

from minicpm4_hf.conversion.gptq_model import Weights
from minicpm4_hf.conversion.gptq_rotation import hadamard_matrix, random_hadamard
from minicpm4_hf.conversion.source import open_checkpoint


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 44, 64, 76, 96, 256, 768, 1536])
def test_hadamard_matrices_are(size):
    matrix = hadamard_matrix(size)
    assert matrix.shape == (size, size) and (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92, 100, 184])
def test_sizes_without_a_hadamard_matrix_are_refused(size):
    with pytest.raises(ValueError, match=f"A size of {size} has no Hadamard matrix that can be built here"):
        hadamard_matrix(size)


def test_a_random_hadamard_spreads_and_repeats():
    matrix = random_hadamard(64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(64, dtype=torch.float64))
    assert torch.equal(matrix, random_hadamard(64)) and not torch.equal(matrix, random_hadamard(64, 1))
    for vector in (torch.ones(64, dtype=torch.float64), torch.eye(64, dtype=torch.float64)[5]):
        assert (vector @ matrix).abs().max() < 0.5 * vector.norm()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_rotated_model_computes_the_same(tmp_path, tokens, tied, sparse):
    settings = {} if sparse else {"sparse": None}
    model = build_model(tie_word_embeddings=tied, hidden_size=96, dim_model_base=48, head_dim=12, **settings)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = torch.linspace(0.5, 2.0, len(parameter))
    model.save_pretrained(tmp_path / "source")
    weights = Weights(open_checkpoint(tmp_path / "source"), rotate=True)
    names = [*load_file(tmp_path / "source" / "model.safetensors"), *(["lm_head.weight"] if tied else [])]
    assert weights.is_head_added == tied
    rotated = build_model(tie_word_embeddings=False, hidden_size=96, dim_model_base=48, head_dim=12, **settings)
    rotated.load_state_dict({name: weights.get(name) for name in names})
    assert torch.equal(rotated.model.norm.weight, torch.ones(96))
    assert not torch.allclose(rotated.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    ids = tokens(2, 130)
    with torch.no_grad():
        expected, actual = model(ids).logits, rotated(ids).logits
    assert (actual - expected).abs().max() < 2e-5 * expected.abs().max()
    (embedded,) = weights.embed(ids[:1])
    torch.testing.assert_close(embedded, rotated.model.embed_tokens.weight[ids[0]].detach())
