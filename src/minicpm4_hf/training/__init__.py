"""Training, from raw text to a checkpoint. `import minicpm4_hf` does not load it; import its modules by name."""
