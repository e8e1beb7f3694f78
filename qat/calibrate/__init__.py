"""The calibration stage: ranges for every quantizer from frames of data, and the PTQ checkpoint.

(`python qat/calibrate.py` is the command; Python imports this package and not that file.)
"""

from qat.calibrate.checkpoint import load_ptq, save_ptq
from qat.calibrate.ptq import CalibrationReport, calibrate

__all__ = ["CalibrationReport", "calibrate", "load_ptq", "save_ptq"]
