"""What each choice of MiniCPM4's training changes in the loss, on two CPU cores in minutes.

`python -m minicpm4_hf.eval.ablation --help`. `experiment.py` has the five runs, `held_out.py` the loss on books that
none of them saw, `runs.py` what is trained and kept, `summary.py` the differences and `figures.py` the plot. The
committed record and its figure are `eval/results/ablation.*`.
"""
