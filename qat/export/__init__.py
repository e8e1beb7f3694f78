"""Exports a detector as ONNX parts with a manifest, each verified against PyTorch."""

from qat.export.module import export_module
from qat.export.options import ExportOptions, Origin
from qat.export.parts import export_parts
from qat.model.runners import TorchPart, torch_parts

__all__ = ["ExportOptions", "Origin", "TorchPart", "export_module", "export_parts", "torch_parts"]
