"""`python -m mtx` is `mtx`."""

import sys

from mtx.cli import main

if __name__ == "__main__":
    sys.exit(main())
