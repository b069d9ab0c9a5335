"""The `evaluate` module `answer_exact_match`, for `evaluate.load` of this folder."""
