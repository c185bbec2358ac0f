"""``python -m smoothdiag`` is the command ``smoothdiag``."""

import sys

from smoothdiag.cli import main

if __name__ == "__main__":
    sys.exit(main())
