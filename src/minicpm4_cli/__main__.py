"""`python -m minicpm4_cli`: the `minicpm4` command."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
