"""``python -m baft_intervention.cli``: the command ``baft`` where no script is installed, e.g. under ``torchrun``."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
