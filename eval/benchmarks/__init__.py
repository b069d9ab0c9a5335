"""The paper's benchmarks on lm-eval's engine: `python -m minicpm4_hf.eval benchmarks --help`.

`tasks/` has one benchmark a file: what it asks, how an answer is scored, and a header that says where all of it comes
from. `data.py` reads the sets, `prompts.py` and `extract.py` make prompts and read answers, `engine.py` is the side
that lm-eval sees, `run.py` the whole run and `__main__.py` its command line.
"""
