"""llama.cpp as the worker runs it, through the C interface of the Python binding."""

import ctypes
import math
import time

import llama_cpp
import numpy as np

from . import packed_files
from .contestants import CONTESTANTS
from .gguf_file import ensure_gguf
from .weights import random_ids

BATCH_TOKENS = 512


class LlamaCppEngine:
    """One context. It keeps the longest prompt's keys, so that a depth below it costs no evaluation."""

    def __init__(self, settings: dict):
        self.seed = settings["seed"]
        contestant = CONTESTANTS[settings["contestant"]]
        config = contestant.make_config(settings["preset"])
        if contestant.packed:
            # The file is that of the twin's folder.
            twin = CONTESTANTS[contestant.twin].make_config(settings["preset"])
            path = packed_files.ensure_gguf(contestant.packed, twin, self.seed)
        else:
            path = ensure_gguf(config, self.seed)
        self.file_type = "F16" if contestant.packed is None else settings["contestant"].rpartition("-")[2].upper()
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {str(path)!r}; delete the file to have it written again.")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-settings["context_tokens"] // 256) * 256
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F16
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {params.n_ctx} tokens.")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.length = 0

    def describe(self) -> dict:
        return {
            "dtype": self.file_type,
            "attention": "flash attention, F16 keys and values",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def prompt(self, tokens: int, chunk: int) -> dict:
        """Seconds from a prompt's ids to the first token; `chunk` is llama.cpp's own affair."""
        self._crop(0)
        ids = random_ids(tokens, self.vocab_size, self.seed)
        start = time.perf_counter()
        self._evaluate(ids).argmax()
        return {"seconds": [time.perf_counter() - start]}

    def decode(self, tokens: int, steps: int) -> dict:
        """Seconds of each of some steps behind `tokens` evaluated ones, and one step more."""
        self._crop(tokens)
        if self.length < tokens:
            self._evaluate(random_ids(tokens, self.vocab_size, self.seed)[self.length :])
        token, seconds = int(self._evaluate([1]).argmax()), []
        for _ in range(steps):
            start = time.perf_counter()
            token = int(self._evaluate([token]).argmax())
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds}

    def probe(self, tokens: int) -> dict:
        """Some logits after a prompt, and after one more token."""
        self._crop(0)
        ids, values = random_ids(tokens + 1, self.vocab_size, self.seed), []
        for part in (ids[:-1], ids[-1:]):
            logits = self._evaluate(part)
            values += logits[:: math.ceil(len(logits) / 256)].tolist()
        return {"logits": values}

    def release(self) -> None:
        """The context's memory is of one size."""

    def _crop(self, tokens: int) -> None:
        if self.length > tokens:
            llama_cpp.llama_memory_seq_rm(self.memory, 0, tokens, -1)
            self.length = tokens

    def _evaluate(self, ids: list[int]) -> np.ndarray:
        """Append tokens; logits `[vocab]` of the last one, valid until the next call."""
        for begin in range(0, len(ids), BATCH_TOKENS):
            part = ids[begin : begin + BATCH_TOKENS]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i] = token
                self.batch.pos[i] = self.length + i
                self.batch.n_seq_id[i] = 1
                self.batch.seq_id[i][0] = 0
                self.batch.logits[i] = begin + i == len(ids) - 1
            status = llama_cpp.llama_decode(self.context, self.batch)
            if status:
                raise RuntimeError(f"llama_decode failed with status {status} at {self.length} tokens.")
            self.length += len(part)
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,))
