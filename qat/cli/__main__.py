"""`python -m qat.cli VERB`, the same as `bevqat VERB`."""

import sys

from qat.cli import main

sys.exit(main())
