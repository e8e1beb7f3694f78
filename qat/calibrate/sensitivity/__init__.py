"""The accuracy loss of each quantized unit, one at a time.

`measure` runs the units, `histograms` counts the inputs of their quantizers, `reasons` says why layers stay float, `file`
writes and reads sensitivity.json, `show` prints and draws; `result` has the types that they share.
"""

from qat.calibrate.sensitivity.file import load_sensitivity, write_sensitivity
from qat.calibrate.sensitivity.measure import measure_sensitivity
from qat.calibrate.sensitivity.result import Metric, Sensitivity
from qat.calibrate.sensitivity.show import draw_sensitivity, print_sensitivity

__all__ = [
    "Metric",
    "Sensitivity",
    "draw_sensitivity",
    "load_sensitivity",
    "measure_sensitivity",
    "print_sensitivity",
    "write_sensitivity",
]
