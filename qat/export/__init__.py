"""From a detector to ONNX parts with their manifest, each verified against PyTorch."""

from qat.export.module import export_module
from qat.export.parts import PRECISIONS, export_parts
from qat.model.runners import TorchPart, torch_parts

__all__ = ["PRECISIONS", "TorchPart", "export_module", "export_parts", "torch_parts"]
