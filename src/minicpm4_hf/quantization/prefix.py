"""Keys and values of a few tokens before every text, computed once in full precision and stored beside the weights.

    prefix = Prefix.load(folder)
    ids = prefix.prepend(tokenizer("It was", return_tensors="pt").input_ids)
    model.generate(ids, past_key_values=prefix.build_cache(model))

The first token of a text, and the first delimiters, draw the attention of every head and carry activations that are
many times larger than all others. Stored, they never pass through quantised layers, and no later token takes their
part.

Sources: PrefixQuant (arXiv:2410.05265); Sun et al. (arXiv:2402.17762) for which tokens these are.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel

PREFIX_FILE = "prefix.safetensors"


@dataclass(frozen=True)
class Prefix:
    """The stored tokens.

    Attributes:
        token_ids: `[P]` int64.
        keys, values: `[L, H, P, D]`, keys as they are cached, rotated for positions 0 to P - 1.
    """

    token_ids: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def load(cls, folder: str | Path) -> "Prefix":
        """Read `prefix.safetensors` of a model's folder.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = Path(folder) / PREFIX_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {PREFIX_FILE}: this model was quantised without `--prefix`.")
        try:
            with safe_open(path, framework="pt") as file:
                token_ids, keys, values = (file.get_tensor(name) for name in ("token_ids", "keys", "values"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); get the file again.") from error
        if keys.ndim != 4 or keys.shape != values.shape or token_ids.shape != keys.shape[2:3]:
            raise ValueError(
                f"{path} does not fit together: {list(token_ids.shape)} tokens, keys {list(keys.shape)}, values "
                f"{list(values.shape)}; get the file again."
            )
        return cls(token_ids, keys, values)

    def save(self, folder: str | Path) -> None:
        """Write `prefix.safetensors` into a folder."""
        tensors = {"token_ids": self.token_ids, "keys": self.keys, "values": self.values}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / PREFIX_FILE)

    def prepend(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The prefix's tokens and then `input_ids [B, T]`, whose own first token is left out where both begin alike.

        Rows must be of one length without padding: a prefix and left padding cannot both come first.
        """
        ids = self.token_ids.to(input_ids.device)
        if input_ids.shape[1] and (input_ids[:, 0] == ids[0]).all():
            input_ids = input_ids[:, 1:]
        return torch.cat((ids.expand(input_ids.shape[0], -1), input_ids), dim=1)

    def build_cache(self, model: PreTrainedModel, batch_size: int = 1) -> DynamicCache:
        """A cache that holds the prefix, in the model's dtype and on its device, for `past_key_values`.

        Raises:
            ValueError: a model that this prefix was not made with, or one that selects blocks by unrotated keys.
        """
        config = model.config
        expected = [config.num_hidden_layers, config.num_key_value_heads, config.head_dim]
        if [*self.keys.shape[:2], self.keys.shape[3]] != expected:
            raise ValueError(
                f"This prefix is of a model with {self.keys.shape[0]} layers, {self.keys.shape[1]} key heads of size "
                f"{self.keys.shape[3]}; the model given has {expected[0]}, {expected[1]} and {expected[2]}."
            )
        if (getattr(config, "sparse_config", None) or {}).get("use_nope"):
            raise ValueError("A stored prefix holds rotated keys only; `sparse_config['use_nope']` must be false.")
        cache = DynamicCache(config=config)
        for index, (keys, values) in enumerate(zip(self.keys, self.values)):
            pair = (
                tensor.to(model.device, model.dtype).expand(batch_size, *tensor.shape) for tensor in (keys, values)
            )
            cache.update(*pair, index)
        return cache


__all__ = ["PREFIX_FILE", "Prefix"]
