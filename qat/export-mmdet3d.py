"""`python qat/export-mmdet3d.py`: the same as `bevqat export-mmdet3d`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not qat/, whose names would hide other modules

if __name__ == "__main__":
    from qat.cli import main

    sys.argv.insert(1, "export-mmdet3d")
    sys.exit(main())
