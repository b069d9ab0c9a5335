"""What the files of a checkpoint are called in the two layouts; tables only.

The weights have the same names in both, so the shards are copied as they are.
Source: the file lists of the openbmb repositories and the `auto_map` of their config.json.
"""

# Weights of a dense model; `{layer}` counts from 0. The head is left out where the embeddings are tied.
WEIGHTS = ("model.embed_tokens.weight", "model.norm.weight")
HEAD_WEIGHT = "lm_head.weight"
LAYER_WEIGHTS = (
    "model.layers.{layer}.input_layernorm.weight",
    "model.layers.{layer}.self_attn.q_proj.weight",
    "model.layers.{layer}.self_attn.k_proj.weight",
    "model.layers.{layer}.self_attn.v_proj.weight",
    "model.layers.{layer}.self_attn.o_proj.weight",
    "model.layers.{layer}.post_attention_layernorm.weight",
    "model.layers.{layer}.mlp.gate_proj.weight",
    "model.layers.{layer}.mlp.up_proj.weight",
    "model.layers.{layer}.mlp.down_proj.weight",
)

CONFIG_FILE = "config.json"
WEIGHT_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")

# Remote code: each layout has its own, neither is copied into the other.
REMOTE_CODE = ("configuration_minicpm4.py", "sparse_attention.py", "sparse_cache.py", "modeling_minicpm4.py")
OFFICIAL_REMOTE_CODE = ("configuration_minicpm.py", "modeling_minicpm.py")
AUTO_MAP = {
    "AutoConfig": "configuration_minicpm4.MiniCPM4Config",
    "AutoModel": "modeling_minicpm4.MiniCPM4Model",
    "AutoModelForCausalLM": "modeling_minicpm4.MiniCPM4ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minicpm4.MiniCPM4ForSequenceClassification",
}
