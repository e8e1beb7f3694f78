"""From a detector to ONNX parts with their manifest, each verified against PyTorch."""

from qat.export.module import export_module
from qat.export.parts import PRECISIONS, export_parts
from qat.export.torch_parts import TorchPart, torch_parts
from qat.families.bevfusion.settings import pipeline_settings

__all__ = ["PRECISIONS", "TorchPart", "export_module", "export_parts", "pipeline_settings", "torch_parts"]
