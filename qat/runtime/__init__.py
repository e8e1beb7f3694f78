"""From images to boxes on a robot, with a folder of engines or exported parts: numpy, a JIT and one backend, no torch.

pipeline = Pipeline.load("engines_int8_openvino")       # or of ONNX parts: Pipeline.load("onnx_int8", "openvino")
detections = pipeline(images, points, Calibration(camera_intrinsics, camera2lidar))
print(pipeline.timing_ms)
"""

from qat.runtime.engines import build_engines, load_engines
from qat.runtime.pipeline import Calibration, PartRunner, Pipeline, SampleTensors

__all__ = [
    "Calibration",
    "PartRunner",
    "Pipeline",
    "SampleTensors",
    "build_engines",
    "load_engines",
]
