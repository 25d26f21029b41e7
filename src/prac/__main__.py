"""``python -m prac`` is ``prac``."""

import sys

from prac.lab.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
