"""Code that every stage shares: errors, files, geometry, preprocessing, ONNX files.

No file here imports torch, so that `qat.engine` and `qat.runtime` run without it.
"""
