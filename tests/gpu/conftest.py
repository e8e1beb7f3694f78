"""Tests that need an NVIDIA GPU, its driver, TensorRT and cuda-bindings; without one of them they skip and say which.

They need no torch, so that they run in the packed lab too (docs/tensorrt.md): `python -m pytest tests/gpu --noconftest` leaves
the rest of the suite's fixtures alone, hence everything is in test_tensorrt_gpu.py.
"""
