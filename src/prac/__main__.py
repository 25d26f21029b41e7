"""``python -m prac`` is ``prac``."""

import sys

from prac.cli import main

if __name__ == "__main__":
    sys.exit(main())
