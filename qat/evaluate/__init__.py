"""What a result is worth: nuScenes mAP and NDS through the official devkit, and tensor against tensor."""

from qat.core.tensors import compare_tensors
from qat.evaluate.detection import evaluate_detections

__all__ = ["compare_tensors", "evaluate_detections"]
