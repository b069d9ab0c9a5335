"""`python -m minicpm4_hf`: the `minicpm4` command."""

import sys

from minicpm4_cli import main

if __name__ == "__main__":
    sys.exit(main())
