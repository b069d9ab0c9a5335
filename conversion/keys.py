"""What the files of a checkpoint are called in the two layouts; tables only.

The weights have the same names in both, so the shards are copied as they are.
Source: the file lists of the openbmb repositories and the `auto_map` of their config.json.
"""

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
WEIGHT_SUFFIX = ".safetensors"
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
