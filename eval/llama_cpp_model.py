"""A GGUF file as llama.cpp runs it on the CPU: its tokenizer and its logits, through the Python binding's C interface.

Needs the package llama-cpp-python.
"""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

_LOG_LEVEL_ERROR = 4  # ggml.h; the binding does not name it


def system() -> str:
    """What llama.cpp says of the instructions that it uses here; its arithmetic depends on them."""
    return llama_cpp.llama_print_system_info().decode().strip()


class LlamaCppModel:
    """A loaded file with one context, whose keys and values are float32; use it in a `with` statement.

    Args:
        path: the file.
        context_tokens: room for so many tokens. Above the file's original context length llama.cpp takes the LongRoPE
            factors for long contexts.
        threads: for both prompts and single tokens.
        vocabulary_only: load the tokenizer alone.

    Raises:
        ValueError: llama.cpp does not load the file; its own words are in the sentence.
    """

    def __init__(
        self, path: str | Path, *, context_tokens: int = 512, threads: int = 1, vocabulary_only: bool = False
    ):
        self.said: list[str] = []
        self._log = llama_cpp.llama_log_callback(self._listen)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.context = None
        settings = llama_cpp.llama_model_default_params()
        settings.vocab_only = vocabulary_only
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}: {' '.join(''.join(self.said).split())}")
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.num_tokens = llama_cpp.llama_vocab_n_tokens(self.vocabulary)
        if vocabulary_only:
            return
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context_tokens
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp cannot make a context of {context_tokens} tokens for {path}.")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(context_tokens, 0, 1)

    def _listen(self, level: int, text: bytes, data) -> None:
        if level >= _LOG_LEVEL_ERROR:
            self.said.append(text.decode(errors="replace"))

    def __enter__(self) -> "LlamaCppModel":
        return self

    def __exit__(self, *rest) -> None:
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the file says belong around a text; special tokens in it count."""
        octets = text.encode()
        room = len(octets) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocabulary, octets, len(octets), ids, room, True, True)
        return list(ids[:count])

    def is_end(self, token: int) -> bool:
        """Whether generation stops at a token."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocabulary, token))

    def chat_template(self) -> str | None:
        """The Jinja template in the file."""
        template = llama_cpp.llama_model_chat_template(self.model, None)
        return None if template is None else template.decode()

    def logits(self, ids: list[int], past: int = 0) -> np.ndarray:
        """Logits float32 `[len(ids), vocab]` after each of some tokens, the first of them at position `past`.

        Raises:
            RuntimeError: llama.cpp gave up.
        """
        llama_cpp.llama_memory_seq_rm(self.memory, 0, past, -1)
        self.batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            self.batch.token[i] = token
            self.batch.pos[i] = past + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = True
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}.")
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, shape=(self.num_tokens,)).copy() for row in rows])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most likely tokens after some, one by one; an end of text does not stop it."""
        past, new = 0, []
        for _ in range(count):
            token = int(self.logits(ids, past)[-1].argmax())
            past, ids = past + len(ids), [token]
            new.append(token)
        return new
