"""The `evaluate` module `needle_accuracy`, for `evaluate.load` of this folder."""
