"""`python tools/test.py`, as MMDeploy's: the same as `bevqat test`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/

if __name__ == "__main__":
    from qat.cli import main

    sys.argv.insert(1, "test")
    sys.exit(main())
