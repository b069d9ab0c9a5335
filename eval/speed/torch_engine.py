"""A transformers model, ours included, as the worker runs it."""

import ctypes
import gc
import math
import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from minicpm4_hf import MiniCPM4Config
from minicpm4_hf.eval.ruler.record import find_commit
from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.cpu import load_library, why_missing

from .contestants import CONTESTANTS, build_model
from .weights import make_weight, random_buffer, random_ids


class TorchEngine:
    """One model on a CPU or GPU; nothing is kept from one measurement to the next."""

    def __init__(self, settings: dict):
        torch.set_num_threads(settings["threads"])
        contestant = CONTESTANTS[settings["contestant"]]
        self.dtype, self.seed = getattr(torch, settings["dtype"]), settings["seed"]
        self.device = settings["device"]
        self.warmed: set[int] = set()  # lengths of prompts whose kernels a GPU has compiled
        config = contestant.make_config(settings["preset"])
        self.buffer = random_buffer(self.seed)
        if contestant.packed:
            from .packed_files import ensure_folder  # needs gguf

            folder = ensure_folder(contestant.packed, config, self.seed)
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval().to(self.device)
        else:
            self.model = build_model(config, self.dtype, contestant.attention, self.device)
            fill_weights_(self.model, self.buffer)

    def describe(self) -> dict:
        """What a contestant's figures depend on beside its shape; of ours also the commit and the instruction set."""
        config = self.model.config
        facts = {"dtype": str(self.dtype).removeprefix("torch."), "attention": config._attn_implementation}
        if getattr(config, "sparse_config", None):
            facts["sparse_backend"] = resolve_backend(self.device)[0]
        if isinstance(config, MiniCPM4Config):
            facts["commit"] = find_commit()
            if self.device == "cpu" and why_missing() is None:
                facts["instruction_set"] = load_library().isa
        return facts

    def prompt(self, tokens: int, chunk: int) -> dict:
        """Seconds from a prompt's ids to the first token; a GPU's kernels are compiled for its length before."""
        if self.device == "cuda" and tokens not in self.warmed:
            self.warmed.add(tokens)
            self.prompt(tokens, chunk)
        ids = torch.tensor([random_ids(tokens, self.model.config.vocab_size, self.seed)], device=self.device)
        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        for part in ids.split(chunk, dim=1):
            token = self._step(part, cache)
        token.item()
        return {"seconds": [time.perf_counter() - start]}

    def decode(self, tokens: int, steps: int) -> dict:
        """Seconds of each of some steps with `tokens` random keys and values in the cache, and one step more."""
        cache = self._filled_cache(tokens)
        # Untimed: grows the buffers, pools the keys.
        token = self._step(torch.tensor([[1]], device=self.device), cache)
        seconds = []
        token.item()  # a GPU's queue is empty
        for _ in range(steps):
            start = time.perf_counter()
            token = self._step(token, cache)
            token.item()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def probe(self, tokens: int) -> dict:
        """Some logits after a prompt, and after one more token; sparse attention is on from the first token."""
        config = self.model.config
        before = getattr(config, "sparse_config", None)
        if before:
            config.sparse_config = {**before, "dense_len": -1}
        ids = torch.tensor([random_ids(tokens + 1, config.vocab_size, self.seed)], device=self.device)
        cache, values = DynamicCache(config=config), []
        for part in (ids[:, :-1], ids[:, -1:]):
            with torch.inference_mode():
                logits = self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            values += logits.float()[:: math.ceil(len(logits) / 256)].tolist()
        if before:
            config.sparse_config = before
        return {"logits": values}

    def release(self) -> None:
        """Give freed memory back to the system."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
            if trim is not None:
                trim(0)

    @torch.inference_mode()
    def _step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def _filled_cache(self, tokens: int) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        if not tokens:
            return cache
        sample = DynamicCache(config=self.model.config)
        self._step(torch.tensor([[1]], device=self.device), sample)  # shows what a layer caches
        for i, layer in enumerate(sample.layers):
            pair = [
                self._random_states(like, tokens, 2 * i + part) for part, like in enumerate((layer.keys, layer.values))
            ]
            cache.update(*pair, i)
        return cache

    def _random_states(self, like: torch.Tensor, tokens: int, offset: int) -> torch.Tensor:
        """`[B, H, tokens, D]` for a cache that holds `like [B, H, 1, D]`; made a piece at a time to save memory."""
        batch, heads, _, dim = like.shape
        out = torch.empty(batch, heads, tokens, dim, dtype=like.dtype, device=like.device)
        flat, piece = out.view(-1), torch.from_numpy(self.buffer).to(like)
        piece = piece.roll(offset * 7919)
        for start in range(0, len(flat), len(piece)):
            flat[start : start + len(piece)] = piece[: len(flat) - start]
        return out


@torch.no_grad()
def fill_weights_(model: torch.nn.Module, buffer: np.ndarray) -> None:
    """Give every parameter its random values; tied ones get them once."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(make_weight(buffer, name, tuple(parameter.shape))))
