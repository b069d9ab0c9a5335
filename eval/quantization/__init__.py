"""What int4 quantisation costs, method by method: `python -m minicpm4_hf.eval.quantization --help`."""
