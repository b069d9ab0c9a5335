"""Speed of whole models: prompt and decode rates, time to first token and peak memory, side by side.

`command.py` has the flags, `contestants.py` the models, `schedule.py` what is measured in which order, `pool.py` the
worker processes (`worker.py`: one model each, `torch_engine.py` or `llama_cpp_engine.py`), `records.py` the file that
a run resumes from, `report.py` medians, ratios and the table.
"""
