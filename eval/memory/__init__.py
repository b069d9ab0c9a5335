"""What a checkpoint can do with a long text, measured on a CPU: `python -m minicpm4_hf.eval.memory --help`.

`subject.py` has the model that is measured and the texts, `cases.py` the file that a run goes on from, `record.py`
what is written in the end. `prediction.py`, `needle.py` and `answers.py` are the measurements, `heatmap.py` is the
figure.
"""
