"""Timing of the kernels against PyTorch: `python -m minicpm4_hf.kernels.bench --help`."""
