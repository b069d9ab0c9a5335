"""The tasks, one a file: its header says what is measured, its `evaluate_*` function gives the record."""
