"""`python -m raysweep`: the command line."""

import sys

from raysweep.cli import main

if __name__ == "__main__":
    sys.exit(main())
