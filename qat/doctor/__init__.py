"""`bevqat doctor`: reports what this machine can run, and what to install for the rest.

This package needs only Python's standard library, because it must report missing or broken packages. Anything that could
crash or hang (a package's native libraries, a driver) runs in a separate process.

finding   one line of the answer
system    Python, processor, memory, disk
packages  installed versions and setup.py's requirements
probes    imports, backends and the GPU, each in its own process
examine   all checks
"""

from qat.doctor.examine import Report, examine
from qat.doctor.finding import MISSING, OK, PROBLEM, Finding, describe

__all__ = ["MISSING", "OK", "PROBLEM", "Finding", "Report", "describe", "examine"]
