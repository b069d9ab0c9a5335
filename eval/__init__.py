"""Evaluation of checkpoints: `python -m minicpm4_hf.eval --help`. Nothing else in the package imports this."""
