"""LongPPL (arXiv:2410.23771): the perplexity of the tokens that need the long context.

`metric.py` is the metric on tensors, `contexts.py` what an evaluator model finds in a text, `plan.py` runs both
models; `python -m minicpm4_hf.eval longppl --help` is the command.
"""

from .metric import ALPHA, BETA, find_key_tokens, longppl

__all__ = ["ALPHA", "BETA", "find_key_tokens", "longppl"]
