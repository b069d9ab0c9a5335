"""The paper's tables and figures beside what was measured: `python -m minicpm4_hf.eval tables --help`.

`paper.py` reads `eval/paper_tables.json`, `measured.py` finds what records say about its cells, `render.py` puts the
two side by side; `estimates.py` says what reproducing them takes.
"""
