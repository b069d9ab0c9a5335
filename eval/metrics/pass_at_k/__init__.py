"""The `evaluate` module `pass_at_k`, for `evaluate.load` of this folder."""
