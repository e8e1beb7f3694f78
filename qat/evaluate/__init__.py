"""Accuracy: nuScenes mAP and NDS by the official devkit, intervals of differences, and tensor against
tensor."""

from qat.core.tensors import compare_tensors
from qat.evaluate.bootstrap import Interval, difference, paired_bootstrap, resample
from qat.evaluate.detection import devkit_metric, evaluate_detections

__all__ = [
    "Interval",
    "compare_tensors",
    "devkit_metric",
    "difference",
    "evaluate_detections",
    "paired_bootstrap",
    "resample",
]
