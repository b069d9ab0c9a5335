"""The `evaluate` module `longppl`, for `evaluate.load` of this folder."""
