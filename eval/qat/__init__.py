"""What quantisation-aware training of ternary weights costs in loss: by its share of the tokens, and by group size.

`python -m minicpm4_hf.eval.qat --help`. `experiment.py` has the runs, `runs.py` trains and evaluates them,
`summary.py` compares and `figures.py` draws. It is an ablation as `minicpm4_hf.eval.ablation` is, on the same books,
and uses its parts. The committed record and its figure are `eval/results/qat.*`.
"""
