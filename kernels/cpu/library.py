"""Loads the native library: one shared object with a plain C interface, built by setup.py from `csrc/`.

The library is optional. Where it is missing or cannot run, `load_library` raises with the reason, `why_missing` gives
it in words, and the package runs on PyTorch.
"""

import ctypes
import functools
import os
import struct
import sysconfig
from pathlib import Path

import torch

# Forces an instruction set, one of `isa_names()`: for tests, and to compare.
ISA_VARIABLE = "MINICPM4_CPU_ISA"
# Loads another build of the library, such as one with a sanitizer.
LIBRARY_VARIABLE = "MINICPM4_CPU_LIBRARY"
_ABI_VERSION = 4

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Layouts of the structs in csrc/abi.h: all fields are 8 bytes wide.
ATTENTION_ARGS = struct.Struct("25qd32q")
POOL_ARGS = struct.Struct("17q")
LINEAR_CALL, LINEAR_LAYER = struct.Struct("10q"), struct.Struct("11q2d11q")  # the two halves of `mc_linear_args`
ROWWISE_ARGS = struct.Struct("10qd4q")
NO_TENSOR = (0, 0, 0, 0)


class LibraryUnavailable(RuntimeError):
    """The native library is not there or cannot run here; the message says why and what to do."""


def library_path() -> Path:
    """Where the build puts the library."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return Path(named) if named else Path(__file__).with_name(f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library with its instruction set chosen, which is its attribute `isa`.

    Raises:
        LibraryUnavailable: it was not built, does not load, or lacks the instruction set that was forced.
    """
    path = library_path()
    if not path.exists() and LIBRARY_VARIABLE in os.environ:
        raise LibraryUnavailable(f"{LIBRARY_VARIABLE} names a native library that does not exist, {path}")
    if not path.exists():
        raise LibraryUnavailable(
            "the native library was not built, as there was no C++ compiler at install; install g++ or clang and run "
            "`pip install --force-reinstall --no-deps minicpm4-hf`"
        )
    try:
        # OpenMP's functions are not linked in: they come from the library that torch has loaded, so that both share
        # one pool of threads.
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(f"the native library does not load ({str(error).splitlines()[0]})") from None
    library.mc_choose_isa.restype = library.mc_isa_name.restype = ctypes.c_char_p
    library.mc_choose_isa.argtypes, library.mc_isa_name.argtypes = [ctypes.c_char_p], [ctypes.c_int64]
    library.mc_abi_version.restype = ctypes.c_int64
    for function in (library.mc_attention, library.mc_pool, library.mc_linear, library.mc_layer, library.mc_rowwise):
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    library.mc_linear.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    if library.mc_abi_version() != _ABI_VERSION:
        raise LibraryUnavailable("the native library is of another version; run `pip install` again")
    forced = os.environ.get(ISA_VARIABLE)
    chosen = library.mc_choose_isa(forced.encode() if forced else None)
    if chosen is None:
        raise LibraryUnavailable(
            f"{ISA_VARIABLE} is {forced!r}, but this build and machine have {', '.join(isa_names(library))}"
        )
    library.isa = chosen.decode()
    return library


def isa_names(library: ctypes.CDLL | None = None) -> list[str]:
    """The instruction sets that the library has and this machine runs, fastest first."""
    library = library or load_library()
    names, i = [], 0
    while (name := library.mc_isa_name(i)) is not None:
        names.append(name.decode())
        i += 1
    return names


def why_missing() -> str | None:
    """None where the library runs, or the reason why it does not."""
    try:
        load_library()
    except LibraryUnavailable as error:
        return str(error)
    return None


def check_result(code: int) -> None:
    """Raise what a native function reported.

    Raises:
        MemoryError: there was no memory for its scratch.
        ValueError: it does not serve these tensors (the callers check before).
    """
    if code == 1:
        raise MemoryError("The native attention kernel found no memory for its scratch space.")
    if code:
        raise ValueError("The native kernel does not serve these tensors.")


def tensor_fields(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and the strides of batch, head and token of a `[B, H, T, D]` tensor."""
    batch, head, token, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, token
