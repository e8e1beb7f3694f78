_base_ = ["./voxel-detection_dynamic.py", "../../_base_/backends/onnxruntime.py"]
