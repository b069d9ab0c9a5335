"""RULER (arXiv:2404.06654), generated here at any length for any tokenizer: `python -m minicpm4_hf.eval ruler --help`.

`tasks.py` is the table of the thirteen tasks; `needles.py`, `tracing.py`, `aggregation.py` and `answering.py` make
their samples of `source.py`'s words and `questions.py`'s documents, `fitting.py` finds the size that fills a length,
`scoring.py` scores, `plan.py` runs and `record.py` says what is written.
"""
