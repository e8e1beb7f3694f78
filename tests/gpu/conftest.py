"""Tests that need an NVIDIA GPU, its driver and what each file runs there; without one of them they skip and say which.

None needs torch or a fixture of the suite, so that TensorRT's run in the packed lab too (docs/tensorrt.md):
`python -m pytest tests/gpu/test_tensorrt_gpu.py --noconftest`. In a lab without onnxruntime or Pillow the other files skip.
"""
