"""A random model in which the first positions of a text carry massive activations, as they do in trained models.

Trained models show inputs of `down_proj` at the first few tokens that are tens to thousands of times larger than all
others (MiniCPM4 technical report, arXiv:2506.07900; Sun et al., arXiv:2402.17762). Random weights do not; here they
are planted: the first tokens point in one direction of the residual stream, to which a few channels of each MLP
answer.

Nor are random embeddings correlated, and where inputs are not, there is nothing that GPTQ could do better than
rounding to nearest. Those here have a covariance whose eigenvalues fall as 1 / i, as spectra of activations do.
"""

from pathlib import Path

import torch

from minicpm4_hf import MiniCPM4ForCausalLM, build_config

NUM_FIRST = 4  # tokens, those that P-GPTQ leaves out
NUM_CHANNELS = 8  # of an MLP that answer to them


def build_planted(
    folder: Path, *, preset: str = "MiniCPM4-0.5B", num_layers: int, massive: float, seed: int = 0, **settings
) -> None:
    """Save a checkpoint, bfloat16, random but for what is planted.

    Args:
        folder: to be made.
        preset: whose shape it has, with `num_layers` layers.
        massive: size of the planted inputs of `down_proj` at the first positions; the others' are about 0.5.
        settings: of the config in place of the preset's.
    """
    config = build_config(preset)
    for name, value in {"num_hidden_layers": num_layers, **settings}.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    model = MiniCPM4ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)
    embeddings = model.model.embed_tokens.weight.data.normal_(generator=generator)
    scales = torch.arange(1, config.hidden_size + 1).float().rsqrt()
    basis = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size, generator=generator)).Q
    embeddings.copy_(embeddings * scales @ basis * (config.hidden_size**0.5 / scales.norm() / config.scale_emb))
    direction = torch.nn.functional.normalize(torch.randn(config.hidden_size, generator=generator), dim=0)
    # After the norm a first token has sqrt(hidden) along the direction, so SiLU(x) x is about `massive` with this row.
    row = direction * (massive / config.hidden_size) ** 0.5
    for layer in model.model.layers:
        channels = torch.randperm(config.intermediate_size, generator=generator)[:NUM_CHANNELS]
        layer.mlp.gate_proj.weight.data[channels] = row
        layer.mlp.up_proj.weight.data[channels] = row
    embeddings[:NUM_FIRST] += 100.0 * direction * config.hidden_size**0.5
    model.to(torch.bfloat16).save_pretrained(folder)


def random_sequences(vocab_size: int, num: int, length: int, seed: int) -> torch.Tensor:
    """Tokens `[num, length]`: the planted first ones in some order, then random others."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([torch.randperm(NUM_FIRST, generator=generator) for _ in range(num)])
    return torch.cat((first, torch.randint(NUM_FIRST, vocab_size, (num, length - NUM_FIRST), generator=generator)), 1)


__all__ = ["NUM_FIRST", "build_planted", "random_sequences"]
