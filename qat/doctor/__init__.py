"""What this machine can run, and what to install for the rest: `bevqat doctor`.

Nothing here needs any package but Python's own: a missing or broken one is what is to be told. What could crash or hang (a
package's native libraries, a driver) is asked in a process of its own.

finding   one line of the answer
system    Python, processor, memory, disk
packages  installed versions beside those that setup.py wants
probes    imports, backends and the GPU, asked in processes of their own
examine   all of it
"""

from qat.doctor.examine import Report, examine
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding, describe

__all__ = ["MISSING", "OK", "PROBLEM", "Finding", "Report", "describe", "examine"]
