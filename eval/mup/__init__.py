"""Proofs of muP, on a CPU in minutes: `python -m minicpm4_hf.eval.mup --help`.

`experiment.py` has the models and their training, `coordinates.py` and `learning_rates.py` what is measured on them,
`records.py` the file that a sweep resumes from, `figures.py` the plots. The committed records and their figures are
`eval/results/mup-*`.
"""
