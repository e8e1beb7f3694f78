"""`python qat/train.py`: the same as `bevqat train`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide other modules

if __name__ == "__main__":
    from qat.cli import main

    sys.argv.insert(1, "train")
    sys.exit(main())
