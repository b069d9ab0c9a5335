"""Fill the shipped checkpoints' model cards, and README's figures, from committed records."""
