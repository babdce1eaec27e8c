"""``python -m rakd`` is the command ``rakd``."""

import sys

from rakd.cli import main

if __name__ == "__main__":
    sys.exit(main())
