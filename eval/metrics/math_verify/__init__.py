"""The `evaluate` module `math_verify`, for `evaluate.load` of this folder."""
