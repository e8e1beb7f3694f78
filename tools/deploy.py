"""`python tools/deploy.py`: the same as `bevqat deploy`, at the place where MMDeploy has it."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/

if __name__ == "__main__":
    from qat.cli import main

    sys.argv.insert(1, "deploy")
    sys.exit(main())
