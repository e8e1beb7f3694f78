"""From a detector to ONNX parts with their manifest, each verified against PyTorch."""

from qat.export.parts import CPU_FLAVOURS, PRECISIONS, export_parts
from qat.export.settings import pipeline_settings
from qat.export.torch_parts import TorchPart, torch_parts

__all__ = ["CPU_FLAVOURS", "PRECISIONS", "TorchPart", "export_parts", "pipeline_settings", "torch_parts"]
