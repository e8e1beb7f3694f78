"""What this machine can run, and what to install for the rest: `bevqat doctor`.

Nothing here needs any package but Python's own: it must report missing or broken ones. Anything that could crash or hang (a
package's native libraries, a driver) runs in its own process.

finding   one line of the answer
system    Python, processor, memory, disk
packages  installed versions and setup.py's requirements
probes    imports, backends and the GPU, each in its own process
examine   all of it
"""

from qat.doctor.examine import Report, examine
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding, describe

__all__ = ["MISSING", "OK", "PROBLEM", "Finding", "Report", "describe", "examine"]
