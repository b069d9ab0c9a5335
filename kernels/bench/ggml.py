"""llama.cpp's matrix product on its own: its libraries, as the Python binding installs them, called through ctypes.

One graph holds a product for each weight, computed in one call as llama.cpp computes its layers: what a call itself
costs is shared by all of them. Weights lie in the buffer that llama.cpp would choose, which may rearrange them.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

F32, Q4_0, TQ2_0 = 0, 2, 35  # enum ggml_type
TYPES = {"Q4_0": Q4_0, "TQ2_0": TQ2_0}
_CPU_DEVICE = 0
_POINTER, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
# Function -> result and arguments; source: ggml.h, ggml-alloc.h, ggml-backend.h and ggml-cpu.h of llama.cpp.
_FUNCTIONS = {
    "ggml_tensor_overhead": (_SIZE,),
    "ggml_graph_overhead_custom": (_SIZE, _SIZE, ctypes.c_bool),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, ctypes.c_int, _INT64, _INT64),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph_custom": (_POINTER, _POINTER, _SIZE, ctypes.c_bool),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, ctypes.c_int),
    "ggml_backend_cpu_buffer_type": (_POINTER,),
    "ggml_backend_free": (None, _POINTER),
    "ggml_backend_dev_by_type": (_POINTER, ctypes.c_int),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_tensor_get": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (ctypes.c_int, _POINTER, _POINTER),
}


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


def missing_reason() -> str | None:
    """Why llama.cpp cannot take part; None if it can."""
    found = all(find_spec(name) for name in ("llama_cpp", "gguf"))
    return None if found else "llama.cpp needs the packages llama-cpp-python and gguf"


def _load():
    """llama.cpp's functions by name; torch is loaded already, whose OpenMP pool they then share."""
    folder = Path(find_spec("llama_cpp").origin).parent / "lib"
    libraries = [ctypes.CDLL(str(path)) for name in ("base", "cpu") for path in folder.glob(f"libggml-{name}.so")]
    libraries += [ctypes.CDLL(str(folder / "libggml.so"))]
    functions = {}
    for name, (result, *arguments) in _FUNCTIONS.items():
        functions[name] = next(getattr(library, name) for library in libraries if hasattr(library, name))
        functions[name].restype, functions[name].argtypes = result, arguments
    init = next(library.ggml_init for library in libraries if hasattr(library, "ggml_init"))
    init.restype, init.argtypes = _POINTER, [_InitParams]
    return {**functions, "ggml_init": init}


class GgmlLayers:
    """`copies` equal weights `[N, K]` in a type of llama.cpp, and their products with one `x [M, K]`."""

    def __init__(self, weight: torch.Tensor, type_name: str, rows: int, copies: int, threads: int):
        """Quantises `weight` with the gguf package; `weight` becomes what the type then stands for, float32 `[N, K]`.

        Raises:
            RuntimeError: llama.cpp has no memory for it.
        """
        import gguf

        kind = gguf.GGMLQuantizationType[type_name]
        blob = gguf.quants.quantize(weight.float().numpy(), kind)
        self.weight = torch.from_numpy(gguf.quants.dequantize(blob, kind))
        self.c, self.shape = _load(), (rows, len(weight))
        outputs, columns = weight.shape
        self.backend = self.c["ggml_backend_cpu_init"]()
        self.c["ggml_backend_cpu_set_n_threads"](self.backend, threads)
        plain = self.c["ggml_backend_cpu_buffer_type"]()
        for kind in (*self._extra_buffer_types(), plain):
            held = self._context(copies)
            weights = [self.c["ggml_new_tensor_2d"](held, TYPES[type_name], columns, outputs) for _ in range(copies)]
            memory = self._allocate(held, kind)
            context = self._context(copies + 1, graph=True)
            self.x = self.c["ggml_new_tensor_2d"](context, F32, columns, rows)
            self.products = [self.c["ggml_mul_mat"](context, w, self.x) for w in weights]
            device = self.c["ggml_backend_dev_by_type"](_CPU_DEVICE)
            if kind == plain or self.c["ggml_backend_dev_supports_op"](device, self.products[0]):
                break
            self.c["ggml_backend_buffer_free"](memory)
            self.c["ggml_free"](held)
            self.c["ggml_free"](context)
        self.held = [(memory, held), (self._allocate(context, plain), context)]
        for w in weights:
            self.c["ggml_backend_tensor_set"](w, blob.ctypes.data, 0, blob.nbytes)
        self.graph = self.c["ggml_new_graph_custom"](context, copies + 8, False)
        for product in self.products:
            self.c["ggml_build_forward_expand"](self.graph, product)

    def _context(self, tensors: int, graph: bool = False):
        size = (tensors + 1) * self.c["ggml_tensor_overhead"]()
        if graph:
            size += self.c["ggml_graph_overhead_custom"](tensors + 8, False)
        return self.c["ggml_init"](_InitParams(size, None, True))

    def _allocate(self, context, buffer_type):
        memory = self.c["ggml_backend_alloc_ctx_tensors_from_buft"](context, buffer_type)
        if not memory:
            raise RuntimeError("llama.cpp found no memory for the weights.")
        return memory

    def _extra_buffer_types(self) -> list[int]:
        """Buffers that rearrange weights for this processor, in llama.cpp's order."""
        device = self.c["ggml_backend_dev_by_type"](_CPU_DEVICE)
        registry = self.c["ggml_backend_dev_backend_reg"](device)
        address = self.c["ggml_backend_reg_get_proc_address"](registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return []
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(device)
        found = []
        while kinds and kinds[len(found)]:
            found.append(kinds[len(found)])
        return found

    def set_input(self, x: torch.Tensor) -> None:
        """`x [M, K]`, kept as float32."""
        values = np.ascontiguousarray(x.float().numpy())
        self.c["ggml_backend_tensor_set"](self.x, values.ctypes.data, 0, values.nbytes)

    def compute(self) -> None:
        """All products."""
        status = self.c["ggml_backend_graph_compute"](self.backend, self.graph)
        if status:
            raise RuntimeError(f"llama.cpp's product ended with status {status}.")

    def output(self) -> torch.Tensor:
        """The last product, float32 `[M, N]`."""
        out = np.empty(self.shape, dtype=np.float32)
        self.c["ggml_backend_tensor_get"](self.products[-1], out.ctypes.data, 0, out.nbytes)
        return torch.from_numpy(out)

    def close(self) -> None:
        """Give the memory back."""
        for memory, context in self.held:
            self.c["ggml_backend_buffer_free"](memory)
            self.c["ggml_free"](context)
        self.c["ggml_backend_free"](self.backend)
