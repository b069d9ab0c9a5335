"""Native CPU kernels; see README.md in this folder. The library is loaded at the first call that needs it."""

from minicpm4_hf.kernels.cpu.library import LibraryUnavailable, isa_names, load_library, why_missing

__all__ = ["LibraryUnavailable", "isa_names", "load_library", "why_missing"]
