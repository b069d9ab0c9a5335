"""Checkpoint tools: `python -m minicpm4_hf.conversion --help`."""

from .hf import convert_to_hf, convert_to_official

__all__ = ["convert_to_hf", "convert_to_official"]
