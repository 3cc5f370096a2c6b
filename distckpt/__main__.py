"""``python -m distckpt``: the command ``distckpt``."""

import sys

from distckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
