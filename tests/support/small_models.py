"""Small random models with a block-sparse attention that chooses already at a hundred tokens."""

import torch

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM

# Short lengths everywhere, so that a few hundred tokens already choose among blocks: a budget of 3 + 2 blocks of 16.
SMALL_SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 3,
    "dense_len": -1,
}


def build_model(group=4, *, heads=2, sparse=SMALL_SPARSE, seed=0, **settings):
    """A random two-layer model with `heads` key heads and `group` query heads for each; None turns sparse off."""
    torch.manual_seed(seed)
    config = MiniCPM4Config(
        **{
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": heads * group,
            "num_key_value_heads": heads,
            "head_dim": 16,
            "initializer_range": 0.2,
            "dim_model_base": 32,
            "max_position_embeddings": 4096,
            "eos_token_id": 96,
            "pad_token_id": 96,
            "sparse_config": sparse,
            **settings,
        }
    )
    return MiniCPM4ForCausalLM(config).eval()
