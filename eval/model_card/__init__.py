"""Fill the shipped checkpoint's model card, and README's figures, from committed records."""
