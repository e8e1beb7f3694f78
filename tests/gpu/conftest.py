"""Tests that need an NVIDIA GPU and its driver; a file whose package or GPU is not there skips itself and says which.

test_tensorrt_gpu.py (TensorRT and cuda-bindings) needs no torch and nothing of the rest of the suite's fixtures, so that it runs in
the packed lab too (docs/tensorrt.md): `python -m pytest tests/gpu/test_tensorrt_gpu.py --noconftest`. test_onnxruntime_cuda.py
is for onnxruntime-gpu, test_pooling_cuda.py for the pooling kernel.
"""
