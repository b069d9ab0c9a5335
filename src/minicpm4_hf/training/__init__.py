"""Training of the small reference checkpoint. `import minicpm4_hf` does not load it; import its modules by name."""
